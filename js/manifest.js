/** loratrf.json, which says what a model takes at run time; and whether files and adapters are those that it describes. */

import { UserError, quoted, some, words } from "./errors.js";
import { sha256 } from "./files.js";

/** @typedef {import("./index.js").AdapterFile} AdapterFile */
/**
 * @typedef {object} Weight a graph input that takes a weight of the adapter
 * @property {string} name
 * @property {string} part
 * @property {(number | string)[]} shape a text stands for any size, the same wherever it occurs
 * @property {"float32" | "float16"} dtype
 */
/**
 * @typedef {object} Manifest
 * @property {string} model the graph's sha256
 * @property {string | null} base the base model's
 * @property {Map<string, {bytes: number, sampled: string}>} files of weights
 * @property {Weight[]} weights
 */

export const MANIFEST = "loratrf.json";
const FORMAT = 1;
const MAX_RANK = 1024;
const AGAIN = "Export the model again with loratrf-export.";

/**
 * What `content`, the bytes, text or object of a loratrf.json, says of a model with --swappable required. UserError where
 * it is damaged, or of a model that JavaScript can give no adapters.
 * @param {unknown} content
 * @param {string} name
 * @returns {Manifest}
 */
export function readManifest(content, name) {
  const read = parsed(content, name);
  if (!isObject(read) || read.format !== FORMAT) {
    const found = isObject(read) ? quoted(read.format) : quoted(read);
    throw new UserError(
      `${name} has the format ${found}, and this version of loratrf-deploy reads ${FORMAT}. Update loratrf-deploy, or ` +
        "export the model again.",
    );
  }
  const { model, base, swappable } = read;
  const advice = "Export it with --swappable required.";
  if (!isObject(swappable)) throw new UserError(`The model of ${name} takes no adapters at run time. ${advice}`);
  if (isObject(swappable.slots) && Object.keys(swappable.slots).length) {
    throw new UserError(
      `The model of ${name} was exported with --adapters: its slots are inputs with defaults, and ONNX Runtime can't feed ` +
        `these in JavaScript. Export the adapters one by one. ${advice}`,
    );
  }
  if (swappable.default !== "required") {
    throw new UserError(
      `The model of ${name} was exported with --swappable ${swappable.default}, whose inputs have defaults, and ONNX ` +
        "Runtime can't feed these in JavaScript: onnxruntime-node would answer as if no adapter were named. " +
        advice,
    );
  }
  const isText = (/** @type {unknown} */ value) => typeof value === "string";
  const files = Object.entries(isObject(model?.files) ? model.files : {});
  if (!isText(model?.sha256) || !(base?.sha256 === null || isText(base?.sha256)) || !Array.isArray(swappable.weights)) {
    throw damaged(name, "it lacks hashes or weights");
  }
  if (files.some(([, file]) => !Number.isSafeInteger(file?.bytes) || !isText(file?.sampled))) {
    throw damaged(name, "it lacks sizes of files");
  }
  const wrong = swappable.weights.filter((/** @type {any} */ weight) => !isWeight(weight));
  if (wrong.length) throw damaged(name, `weight ${quoted(wrong[0]?.name)} is none that an export writes`);
  return { model: model.sha256, base: base.sha256, files: new Map(files), weights: swappable.weights };
}

/**
 * @param {unknown} content
 * @param {string} name
 * @returns {any}
 */
function parsed(content, name) {
  if (!(content instanceof Uint8Array) && typeof content !== "string") return content;
  const text = typeof content === "string" ? content : new TextDecoder().decode(content);
  try {
    return JSON.parse(text);
  } catch (error) {
    const page = text.trimStart().startsWith("<");
    const why = page ? "it is a page: the server has no such file and answers with another" : words(error);
    throw new UserError(`${name} can't be read (${why}). Expected the one of the export, beside its model.onnx.`, {
      cause: error,
    });
  }
}

/** @param {any} weight */
function isWeight(weight) {
  return (
    isObject(weight) &&
    typeof weight.name === "string" &&
    typeof weight.part === "string" &&
    (weight.dtype === "float32" || weight.dtype === "float16") &&
    Array.isArray(weight.shape) &&
    weight.shape.every((/** @type {unknown} */ dim) =>
      typeof dim === "string" ? /.\.[RF]$/.test(dim) : Number.isSafeInteger(dim) && Number(dim) > 0,
    )
  );
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, any>}
 */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * @param {string} name
 * @param {string} why
 */
function damaged(name, why) {
  return new UserError(`${name} is damaged: ${why}. ${AGAIN}`);
}

/**
 * UserError where `bytes` are not the graph that the manifest describes.
 * @param {Manifest} manifest
 * @param {Uint8Array} bytes
 * @param {string} model
 */
export async function checkGraph(manifest, bytes, model) {
  if ((await sha256(bytes)) === manifest.model) return;
  const page = new TextDecoder().decode(bytes.subarray(0, 64)).trimStart().startsWith("<");
  const why = page
    ? "it is a page: the server has no such file and answers with another"
    : "it was changed or replaced after the export, or is another export's";
  throw new UserError(`${model} is not the file that ${MANIFEST} describes: ${why}. Keep an export's files together.`);
}

const SAMPLES = 1024;
const SAMPLE = 1024;

/**
 * UserError where the file of weights `name`, of so many bytes, isn't the one that the manifest describes: its size, and
 * 1024 pieces of 1024 bytes that `piece` reads.
 * @param {Manifest} manifest
 * @param {string} name
 * @param {number} size
 * @param {(start: number, length: number) => Uint8Array | Promise<Uint8Array>} piece
 */
export async function checkFile(manifest, name, size, piece) {
  const expected = /** @type {{bytes: number, sampled: string}} */ (manifest.files.get(name));
  let found = `it has ${size} bytes, expected ${expected.bytes}`;
  if (size === expected.bytes) {
    const last = Math.max(size - SAMPLE, 0);
    // A set: the pieces of a small file overlap, and are its whole content.
    const starts = new Set(Array.from({ length: SAMPLES }, (_, i) => Math.floor((last * i) / (SAMPLES - 1))));
    const sampled = new Uint8Array(8 + starts.size * Math.min(SAMPLE, size));
    new DataView(sampled.buffer).setBigUint64(0, BigInt(size), true);
    let at = 8;
    for (const start of starts) {
      const bytes = await piece(start, Math.min(SAMPLE, size));
      sampled.set(bytes, at);
      at += bytes.length;
    }
    if ((await sha256(sampled.subarray(0, at))) === expected.sampled) return;
    found = "its bytes are others";
  }
  throw new UserError(
    `${name} is not the file that ${MANIFEST} describes: ${found}. It was changed, cut off or replaced after the export, ` +
      "or the server answers with another. Copy the folder again, or export the model again.",
  );
}

/**
 * Whether `file`, called `name`, was made for the model of `manifest`: the hashes of base and graph, and the name, type and
 * size of every weight. UserError.
 * @param {Manifest} manifest
 * @param {AdapterFile} file
 * @param {string} name
 * @param {string} model
 */
export function checkFits(manifest, file, name, model) {
  const convert = "Convert the adapter for this model: loratrf-export --adapter PATH --onto model.onnx --out NAME.onnx_adapter.";
  const { origin } = file;
  const short = (/** @type {string | null} */ hash) => String(hash).slice(0, 12);
  if (origin.base_sha256 !== manifest.base) {
    throw new UserError(
      `${name} was made for another base model (sha256 ${short(origin.base_sha256)}) than that of ${model} ` +
        `(${short(manifest.base)}). ${convert}`,
    );
  }
  if (origin.model_sha256 !== manifest.model) {
    throw new UserError(
      `${name} was made for another export (graph sha256 ${short(origin.model_sha256)}) than ${model} ` +
        `(${short(manifest.model)}). ${convert}`,
    );
  }
  const problems = mismatches(manifest.weights, file.values);
  if (problems.length) throw new UserError(`${name} doesn't fit this model: ${some(problems, "; ")}. ${convert}`);
}

/**
 * @param {readonly Weight[]} weights
 * @param {AdapterFile["values"]} values
 */
function mismatches(weights, values) {
  const problems = [];
  const names = new Set(weights.map((weight) => weight.name));
  const missing = [...names].filter((name) => !values.has(name));
  if (missing.length) problems.push(`it lacks ${some(missing)}`);
  const foreign = [...values.keys()].filter((name) => !names.has(name));
  if (foreign.length) problems.push(`the model takes no ${some(foreign)}`);
  /** @type {Map<string, number>} */
  const sizes = new Map();
  for (const { name, shape, dtype } of weights) {
    const value = values.get(name);
    if (!value) continue;
    if (value.type !== dtype) problems.push(`${name} is ${value.type}, expected ${dtype}`);
    const expected = shape.map((dim, i) => {
      if (typeof dim === "number") return dim;
      if (!sizes.has(dim) && value.dims[i] > 0) sizes.set(dim, value.dims[i]);
      return sizes.get(dim) ?? dim;
    });
    if (value.dims.length !== shape.length || value.dims.some((got, i) => got !== expected[i])) {
      problems.push(`${name} is (${value.dims.join(", ")}), expected (${expected.join(", ")})`);
    }
  }
  return problems;
}

/**
 * Bytes that an adapter of the model has at most: at the highest rank, with room for names and tables.
 * @param {Manifest} manifest
 */
export function largestFile({ weights }) {
  const size = (/** @type {Weight} */ { shape }) =>
    shape.reduce((/** @type {number} */ product, dim) => product * (typeof dim === "number" ? dim : MAX_RANK), 4);
  return weights.reduce((sum, weight) => sum + size(weight) + 1000 + 4 * weight.name.length, 2 << 20);
}
