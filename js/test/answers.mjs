/**
 * What tests/test_js.py asks for, in one process: node answers.mjs JOBS.json ANSWERS.json. Of every job the answer is what
 * it gives, or {error: its name, message}.
 */

import { readFile, writeFile } from "node:fs/promises";
import * as node from "onnxruntime-node";
import { AdapterSession, readAdapterFile } from "../index.js";
import { fromHalf, toHalf } from "../half.js";

const jobs = JSON.parse(await readFile(process.argv[2], "utf-8"));
if (jobs.noSimd) {
  const { validate } = WebAssembly;
  // As an old engine answers: a module with a SIMD instruction in it is none. 0xfd begins them.
  WebAssembly.validate = (bytes) => !new Uint8Array(bytes).includes(0xfd) && validate(bytes);
}
const web = await import("onnxruntime-web");
const engines = { node, web };
const answers = {};

async function answer(name, ask) {
  try {
    answers[name] = await ask();
  } catch (error) {
    answers[name] = { error: error.name, message: error.message };
  }
}

function feeds(ort, inputs) {
  const arrays = { int64: (values) => BigInt64Array.from(values, BigInt), float32: (values) => Float32Array.from(values) };
  return Object.fromEntries(
    Object.entries(inputs).map(([name, { type, dims, data }]) => [name, new ort.Tensor(type, arrays[type](data), dims)]),
  );
}

function plain(outputs) {
  return Object.fromEntries(
    Object.entries(outputs).map(([name, { type, dims, data }]) => {
      const numbers = type === "float16" && data instanceof Uint16Array ? Array.from(data, fromHalf) : Array.from(data);
      return [name, { type, dims, data: numbers }];
    }),
  );
}

/** A server of files at http://here/: what isn't there is 404, or with `page` the application's page. */
function serve(folder, page) {
  globalThis.fetch = async (url) => {
    try {
      return new Response(await readFile(folder + new URL(url).pathname));
    } catch {
      return page ? new Response("<!doctype html><title>App</title>") : new Response("", { status: 404, statusText: "Not Found" });
    }
  };
}

async function opened(ort, { model, how, without }) {
  if (how === "url" || how === "page") {
    serve(model.replace(/\/[^/]*$/, ""), how === "page");
    return AdapterSession.create(ort, new URL("http://here/model.onnx"));
  }
  if (how !== "bytes") return AdapterSession.create(ort, model);
  const bytes = await readFile(model);
  const options = {
    manifest: await readFile(model.replace("model.onnx", "loratrf.json"), "utf-8"),
    externalData: [{ path: "model.onnx.data", data: await readFile(`${model}.data`) }],
  };
  if (without) delete options[without];
  return AdapterSession.create(ort, bytes, options);
}

for (const job of jobs.sessions ?? []) {
  const ort = engines[job.engine];
  let session;
  await answer(job.name, async () => {
    session = await opened(ort, job);
    for (const [name, file] of Object.entries(job.adapters ?? {})) await session.load(name, file);
    return { inputs: session.inputs, outputs: session.outputs, adapters: [...session.adapters.keys()] };
  });
  if (!session) continue;
  for (const { name, file, replace } of job.loads ?? []) {
    await answer(name, async () => (await session.load("another", file, { replace: !!replace }), "loaded"));
  }
  for (const { name, file } of job.tries ?? []) {
    await answer(name, async () => (await session.load(name, file), session.unload(name), "loaded"));
  }
  // All at once: runs queue where the engine takes one at a time.
  await Promise.all(
    (job.runs ?? []).map(({ name, inputs, options }) =>
      answer(name, async () => plain(await session.run(inputs && feeds(ort, inputs), options))),
    ),
  );
  if (job.running) {
    await answer(job.running.name, async () => {
      const inputs = feeds(ort, job.running.inputs);
      const run = session.run(inputs, { adapter: "one" });
      session.unload("one");
      return plain(await run);
    });
    await answer(`${job.running.name}, after`, async () => session.run(feeds(ort, job.running.inputs), { adapter: "one" }));
    await answer(`${job.running.name}, twice`, async () => session.unload("one"));
  }
  if (job.odd) {
    await answer("no tensor", async () => session.run({ ...feeds(ort, job.odd), input_ids: [1, 2] }, { adapter: "two" }));
    await answer("no ort", async () => AdapterSession.create(undefined, job.model));
    await answer("no source", async () => session.load("x", 7));
    await answer("no name", async () => session.load("", "x"));
    const own = Object.getOwnPropertyDescriptor(globalThis, "crypto");
    Object.defineProperty(globalThis, "crypto", { value: {}, configurable: true });
    await answer("no secure context", async () => AdapterSession.create(ort, job.model));
    Object.defineProperty(globalThis, "crypto", own);
  }
  await answer(`${job.name}, released`, async () => {
    const ends = [];
    const last = job.last && session.run(feeds(ort, job.last), { adapter: "two" }).then(() => ends.push("run"));
    await Promise.all([last, session.release().then(() => ends.push("released"))]);
    return ends;
  });
}

if (jobs.mutants) {
  const { file, changes } = jobs.mutants;
  const raw = new Uint8Array(await readFile(file));
  answers.mutants = changes.map(({ at, value, crc }) => {
    const bytes = raw.slice();
    bytes[at] = value;
    new DataView(bytes.buffer).setUint32(bytes.length - 12, crc, true);
    try {
      readAdapterFile(bytes, "x");
      return "read";
    } catch (error) {
      return error.name === "UserError" ? "refused" : `${error.name}: ${error.message}`;
    }
  });
}
if (jobs.halves) {
  answers.toHalf = jobs.halves.map(toHalf);
  answers.fromHalf = Array.from({ length: 65536 }, (_, bits) => (Number.isFinite(fromHalf(bits)) ? fromHalf(bits) : null));
}
await writeFile(process.argv[3], JSON.stringify(answers));
