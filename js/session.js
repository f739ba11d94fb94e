/** One model and many resident adapters: each run names its own. */

import { readAdapterFile } from "./adapter_file.js";
import { UserError, quoted, some, words } from "./errors.js";
import { beside, bytesOf, located, nameOf, withFile } from "./files.js";
import { fromHalf, toHalf } from "./half.js";
import { MANIFEST, checkFile, checkFits, checkGraph, largestFile, readManifest } from "./manifest.js";

/** @typedef {import("./index.js").Ort} Ort */
/** @typedef {import("./index.js").Source} Source */
/** @typedef {import("./index.js").CreateOptions} CreateOptions */
/** @typedef {import("./index.js").RunOptions} RunOptions */
/** @typedef {import("./index.js").AdapterFile} AdapterFile */
/** @typedef {import("./manifest.js").Manifest} Manifest */
/** @typedef {import("onnxruntime-common").Tensor} Tensor */
/** @typedef {import("onnxruntime-common").InferenceSession} InferenceSession */
/** @typedef {import("onnxruntime-common").InferenceSession.SessionOptions} SessionOptions */
/** @typedef {{file: AdapterFile, tensors: Record<string, Tensor>}} Loaded */

const TOGETHER = "Keep an export's files together.";

export class AdapterSession {
  /** @type {Ort} */ #ort;
  /** @type {InferenceSession} */ #session;
  /** @type {Manifest} */ #manifest;
  /** @type {string} */ #model;
  /** @type {string[]} */ #inputs;
  /** @type {Map<string, Loaded>} */ #loaded = new Map();
  /** Ends with the runs that have begun. @type {Promise<unknown>} */
  #busy = Promise.resolve();

  /**
   * For `create`.
   * @param {Ort} ort
   * @param {InferenceSession} session
   * @param {Manifest} manifest
   * @param {string} model
   */
  constructor(ort, session, manifest, model) {
    this.#ort = ort;
    this.#session = session;
    this.#manifest = manifest;
    this.#model = model;
    const own = new Set(manifest.weights.map((weight) => weight.name));
    const taken = new Set(session.inputNames);
    const wrong = [...own].filter((name) => !taken.has(name));
    if (wrong.length) {
      throw new UserError(
        `${model} doesn't take what the ${MANIFEST} beside it says: ${some(wrong)} is no input of it. They are not of one ` +
          "export: export the model again.",
      );
    }
    this.#inputs = session.inputNames.filter((name) => !own.has(name));
  }

  /**
   * @param {Ort} ort
   * @param {Source} model
   * @param {CreateOptions} [options]
   * @returns {Promise<import("./index.js").AdapterSession>} so that tsc holds this class against index.d.ts
   */
  static async create(ort, model, options = {}) {
    if (typeof ort?.InferenceSession?.create !== "function") {
      throw new UserError(
        `${quoted(ort)} was given for ONNX Runtime. Pass the module: import * as ort from "onnxruntime-node" (or ` +
          '"onnxruntime-web"), then AdapterSession.create(ort, model).',
      );
    }
    const { manifest: given, externalData, ...sessionOptions } = options;
    const name = nameOf(model, "the model");
    const bytes = await bytesOf(model, "Expected a model.onnx of loratrf-export --swappable required.");
    const manifest = await manifestOf(model, given);
    await checkGraph(manifest, bytes, name);
    const opened = await weightsOf(ort, manifest, model, externalData);
    /** @type {InferenceSession} */
    let session;
    try {
      session =
        "path" in opened
          ? await ort.InferenceSession.create(opened.path, sessionOptions)
          : await ort.InferenceSession.create(bytes, { ...sessionOptions, externalData: opened.data });
    } catch (error) {
      throw refused(name, error);
    }
    return new AdapterSession(ort, session, manifest, name);
  }

  get inputs() {
    return [...this.#inputs];
  }

  get outputs() {
    return [...this.#session.outputNames];
  }

  get adapters() {
    return new Map([...this.#loaded].map(([name, { file }]) => [name, { ...file.origin.adapter, bytes: file.bytes }]));
  }

  /**
   * @param {string} name
   * @param {Source} source
   * @param {{replace?: boolean}} [options]
   */
  async load(name, source, { replace = false } = {}) {
    if (typeof name !== "string" || !name) {
      throw new UserError(`The adapter's name is ${quoted(name)}, expected a text that isn't empty.`);
    }
    const file = nameOf(source, `The adapter ${quoted(name)}`);
    const bytes = await bytesOf(source, "Expected a file of loratrf-export --onto model.onnx --out NAME.onnx_adapter.");
    const largest = largestFile(this.#manifest);
    if (bytes.length > largest) {
      throw new UserError(
        `${file} has ${bytes.length} bytes, and an adapter of ${this.#model} at most ${largest}. Is it another model's, or ` +
          "damaged? Convert the adapter again.",
      );
    }
    // A copy: what the caller does with the bytes later changes no weights.
    const read = readAdapterFile(bytes.slice(), file);
    checkFits(this.#manifest, read, file, this.#model);
    if (this.#loaded.has(name) && !replace) {
      throw new UserError(
        `An adapter ${quoted(name)} is loaded already. Choose another name, unload it first, or pass {replace: true}.`,
      );
    }
    const tensors = Object.fromEntries(
      [...read.values].map(([key, { type, data, dims }]) => [key, new this.#ort.Tensor(type, data, dims)]),
    );
    this.#loaded.set(name, { file: read, tensors });
  }

  /** @param {string} name */
  unload(name) {
    if (!this.#loaded.delete(name)) throw this.#unknown(name);
  }

  /**
   * @param {Record<string, Tensor>} inputs
   * @param {RunOptions} options
   * @returns {Promise<Record<string, Tensor>>}
   */
  async run(inputs, options) {
    const { adapter, scale = 1, outputs, ...runOptions } = options ?? /** @type {Partial<RunOptions>} */ ({});
    this.#check(inputs, outputs);
    const weights = this.#weights(adapter, scale);
    const feeds = { ...inputs, ...weights };
    const go = () => (outputs ? this.#session.run(feeds, outputs, runOptions) : this.#session.run(feeds, runOptions));
    // onnxruntime-web takes one run at a time.
    const done = isNative(this.#ort) ? go() : this.#busy.then(go);
    this.#busy = Promise.allSettled([this.#busy, done]).then(() => {});
    try {
      return /** @type {Record<string, Tensor>} */ (await done);
    } catch (error) {
      const given = Object.entries(inputs).map(([name, value]) => `${name} (${value.dims.join(", ")}) ${value.type}`);
      throw new UserError(`ONNX Runtime can't run the model on ${some(given)}: ${words(error)}`, { cause: error });
    }
  }

  async release() {
    this.#loaded.clear();
    await this.#busy;
    await this.#session.release();
  }

  /**
   * @param {Record<string, Tensor>} inputs
   * @param {readonly string[] | undefined} outputs
   */
  #check(inputs, outputs) {
    const given = Object.keys(inputs ?? {});
    const wanted = new Set(this.#inputs);
    if (given.length !== wanted.size || given.some((name) => !wanted.has(name))) {
      const found = given.length ? some(given) : "none";
      throw new UserError(`The inputs are ${found}, the model takes ${some(this.#inputs)}.`);
    }
    for (const name of given) {
      const value = inputs[name];
      if (!(typeof value?.type === "string" && Array.isArray(value?.dims))) {
        throw new UserError(
          `${name} is ${quoted(value)}, expected a tensor, such as new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), ` +
            "[rows, tokens]).",
        );
      }
    }
    const foreign = (outputs ?? []).filter((name) => !this.#session.outputNames.includes(name));
    if (foreign.length) {
      throw new UserError(`The model has no output ${some(foreign)}. It gives ${some([...this.#session.outputNames])}.`);
    }
  }

  /**
   * The weights of `adapter` as inputs, B and D times `scale`.
   * @param {unknown} adapter
   * @param {number} scale
   */
  #weights(adapter, scale) {
    if (adapter === undefined || adapter === null) {
      throw new UserError(
        `This model needs an adapter in every run, and this one names none. Loaded: ${this.#names()}. Name one: ` +
          'run(inputs, {adapter: "NAME"}).',
      );
    }
    const loaded = this.#loaded.get(/** @type {string} */ (adapter));
    if (!loaded) throw this.#unknown(adapter);
    if (typeof scale !== "number" || !Number.isFinite(Math.fround(scale))) {
      throw new UserError(`scale is ${quoted(scale)}, expected a finite number that float32 holds, such as 1 or 0.5.`);
    }
    return scale === 1 ? loaded.tensors : { ...loaded.tensors, ...this.#scaled(loaded, scale) };
  }

  /**
   * @param {Loaded} loaded
   * @param {number} scale
   */
  #scaled({ file }, scale) {
    /** @type {Record<string, Tensor>} */
    const scaled = {};
    const factor = Math.fround(scale);
    for (const { name, part } of this.#manifest.weights) {
      const value = file.values.get(name);
      if ((part !== "B" && part !== "D") || !value) continue;
      const { type, dims } = value;
      const half = value.data instanceof Uint16Array;
      const data = half
        ? value.data.map((bits) => toHalf(Math.fround(fromHalf(bits) * factor)))
        : value.data.map((number) => number * factor);
      if (half ? data.some((bits) => (bits & 0x7fff) >= 0x7c00) : data.some((number) => !Number.isFinite(number))) {
        throw new UserError(
          `scale is ${scale}, with which ${name} exceeds ${type}, which the model computes in. Take a smaller one.`,
        );
      }
      scaled[name] = new this.#ort.Tensor(type, data, dims);
    }
    return scaled;
  }

  #names() {
    return some([...this.#loaded.keys()].map(quoted), ", ", 20) || "none";
  }

  /** @param {unknown} name */
  #unknown(name) {
    if (typeof name !== "string") {
      return new UserError(`The adapter is ${quoted(name)}, expected the name of a loaded one: ${this.#names()}.`);
    }
    return new UserError(
      `No adapter ${quoted(name)} is loaded. Loaded: ${this.#names()}. Load it first: await session.load(${quoted(name)}, ` +
        "FILE).",
    );
  }
}

/**
 * Whether `ort` is onnxruntime-node, which reads files itself and runs several at once.
 * @param {Ort} ort
 */
function isNative(ort) {
  return ort.env?.versions?.node !== undefined;
}

/**
 * @param {Source} model
 * @param {unknown} given
 */
async function manifestOf(model, given) {
  if (given !== undefined) {
    const content = given instanceof URL || given instanceof ArrayBuffer ? await bytesOf(given, TOGETHER) : given;
    return readManifest(content, MANIFEST);
  }
  if (typeof model !== "string" && !(model instanceof URL)) {
    throw new UserError(
      `The model was given as bytes, without the ${MANIFEST} that says what adapters it takes. Pass {manifest: its content, ` +
        "as text or parsed}.",
    );
  }
  const place = beside(model, MANIFEST);
  return readManifest(await bytesOf(place, `It says what adapters the model takes. ${TOGETHER}`), String(place));
}

/**
 * How the model is opened: by its `path`, or with the `data` of its files of weights. Each is held against the manifest.
 * @param {Ort} ort
 * @param {Manifest} manifest
 * @param {Source} model
 * @param {CreateOptions["externalData"]} given
 * @returns {Promise<{path: string} | {data: {path: string, data: Uint8Array}[]}>}
 */
async function weightsOf(ort, manifest, model, given) {
  const isPlace = typeof model === "string" || model instanceof URL;
  const place = isPlace ? located(model) : null;
  const byPath = place && "path" in place && isNative(ort) && given === undefined;
  const data = [];
  for (const name of manifest.files.keys()) {
    const own = given?.find((entry) => entry.path === name);
    if (given ? !own : !isPlace) {
      const others = given?.length ? `, which holds ${some(given.map((entry) => entry.path))}` : "";
      throw new UserError(
        `The model's weights are in ${name}, and it isn't in externalData${others}. Pass {externalData: [{path: ` +
          `${quoted(name)}, data: the file's bytes}]}.`,
      );
    }
    const file = own ? own.data : beside(/** @type {string | URL} */ (model), name);
    if (byPath) {
      try {
        await withFile(String(file), (size, piece) => checkFile(manifest, name, size, piece));
      } catch (error) {
        if (error instanceof UserError) throw error;
        throw new UserError(`${file} can't be read, and the model's weights are in it: ${words(error)}. ${TOGETHER}`);
      }
      continue;
    }
    const bytes = await bytesOf(file, `The model's weights are in it. ${TOGETHER}`);
    await checkFile(manifest, name, bytes.length, (start, length) => bytes.subarray(start, start + length));
    data.push({ path: name, data: bytes });
  }
  return byPath ? place : { data };
}

/**
 * @param {string} model
 * @param {unknown} error
 */
function refused(model, error) {
  if (/SIMD is not supported/i.test(words(error))) {
    return new UserError(
      "This engine's WebAssembly has no SIMD, which onnxruntime-web needs. Browsers have it since Chrome and Edge 91, " +
        "Firefox 89 and Safari 16.4: update it, or run the model on a server with onnxruntime-node.",
      { cause: error },
    );
  }
  return new UserError(`ONNX Runtime refuses ${model}: ${words(error)}`, { cause: error });
}
