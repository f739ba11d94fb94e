/** Bytes of models, manifests and adapters: from a file in Node, from a URL in browsers, or as they are given. */

import { UserError, quoted, words } from "./errors.js";

/** @typedef {import("./index.js").Source} Source */

/** Node's own modules, without an import: bundlers for browsers stumble over "node:". Absent in browsers. */
const get = globalThis.process?.getBuiltinModule;
const node = get && { fs: get("node:fs/promises"), path: get("node:path"), url: get("node:url") };

/**
 * What `source` names: a file's path, or a URL.
 * @param {string | URL} source
 * @returns {{path: string} | {url: URL}}
 */
export function located(source) {
  const text = String(source);
  if (node && !/^(https?|data|blob):/i.test(text)) {
    return { path: text.startsWith("file:") ? node.url.fileURLToPath(text) : text };
  }
  try {
    return { url: new URL(text, globalThis.location?.href) };
  } catch (error) {
    throw new UserError(`${quoted(text)} is no URL. Pass one, absolute or relative to the page, or the file's bytes.`, {
      cause: error,
    });
  }
}

/**
 * The file `name` that lies beside `source`.
 * @param {string | URL} source
 * @param {string} name
 * @returns {string | URL}
 */
export function beside(source, name) {
  const place = located(source);
  if ("url" in place) return new URL(encodeURIComponent(name), place.url);
  return node.path.join(node.path.dirname(place.path), name);
}

/**
 * What a message calls `source`.
 * @param {Source} source
 * @param {string} otherwise
 */
export function nameOf(source, otherwise) {
  return typeof source === "string" || source instanceof URL ? String(source) : otherwise;
}

/**
 * The bytes of `source`, in memory that nobody else writes to where they are read here. UserError, ending in `advice`,
 * where there are none.
 * @param {Source} source
 * @param {string} advice
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function bytesOf(source, advice) {
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  if (ArrayBuffer.isView(source)) {
    return new Uint8Array(/** @type {ArrayBuffer} */ (source.buffer), source.byteOffset, source.byteLength);
  }
  if (typeof source !== "string" && !(source instanceof URL)) {
    throw new UserError(`${quoted(source)} was given for a file, expected a path, a URL, or its bytes as a Uint8Array.`);
  }
  const place = located(source);
  try {
    if ("path" in place) return new Uint8Array(await node.fs.readFile(place.path));
    const response = await fetch(place.url);
    if (!response.ok) throw new Error(`the server answers ${response.status} ${response.statusText}`.trim());
    return new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    throw new UserError(`${source} can't be read: ${words(error)}. ${advice}`, { cause: error });
  }
}

/**
 * The size of the file `path`, and a function that reads a piece of it; it is closed by `use`'s end.
 * @template T
 * @param {string} path
 * @param {(size: number, piece: (start: number, length: number) => Promise<Uint8Array>) => Promise<T>} use
 * @returns {Promise<T>}
 */
export async function withFile(path, use) {
  const file = await node.fs.open(path);
  try {
    const { size } = await file.stat();
    return await use(size, async (start, length) => {
      const { buffer, bytesRead } = await file.read(new Uint8Array(length), 0, length, start);
      return buffer.subarray(0, bytesRead);
    });
  } finally {
    await file.close();
  }
}

/**
 * The sha256 of `bytes`, in hexadecimal. UserError where the engine has none.
 * @param {Uint8Array} bytes
 */
export async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) {
    throw new UserError(
      "This page isn't a secure context, and browsers give crypto.subtle, by which a model's files are checked, to " +
        "those alone. Serve it over https, or from localhost.",
    );
  }
  const digest = new Uint8Array(await subtle.digest("SHA-256", /** @type {Uint8Array<ArrayBuffer>} */ (bytes)));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
