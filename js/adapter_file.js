/**
 * Files of run-time adapters, .onnx_adapter: ONNX Runtime's own format, and behind it a block that says what it fits.
 *
 *     flatbuffer of onnxruntime/lora/adapter_format   names, shapes, values
 *     JSON                                            the adapter, hashes of base and graph
 *     uint64 length of the JSON | uint32 crc32 of all before this line | "LORATRF1", little-endian
 *
 * Nothing of a file is taken on trust.
 */

import { UserError, quoted, some } from "./errors.js";

/** @typedef {import("./index.js").AdapterFile} AdapterFile */
/** @typedef {import("./index.js").Origin} Origin */
/** @typedef {import("./index.js").AdapterValue} AdapterValue */

const END = 20;
const LONGEST_DESCRIPTION = 1 << 20;
const FORMAT = 1;
/** ONNX's numbers of the types that weights have. @type {Record<number, "float32" | "float16">} */
const DTYPES = { 1: "float32", 10: "float16" };
const SIZES = { float32: 4, float16: 2 };

/** What is wrong inside of a file that ends as ours do. */
class Damage extends Error {}

/**
 * The adapter in `bytes`: every offset and size, the checksum and every value checked. Its values are views of `bytes`
 * where these are aligned. Throws a UserError, in which the file is called `name`.
 * @param {Uint8Array | ArrayBuffer} bytes
 * @param {string} [name]
 * @returns {AdapterFile}
 */
export function readAdapterFile(bytes, name = "The file") {
  if (!(bytes instanceof ArrayBuffer || bytes instanceof Uint8Array)) {
    throw new UserError(`${name} is ${quoted(bytes)}, expected its bytes: a Uint8Array or an ArrayBuffer.`);
  }
  const raw = bytes instanceof ArrayBuffer ? new Uint8Array(bytes) : /** @type {Uint8Array<ArrayBuffer>} */ (bytes);
  const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  const { length, checksum } = readEnd(raw, view, name);
  const end = raw.length - END - length;
  try {
    if (crc32(raw.subarray(0, raw.length - END)) !== checksum) throw new Damage("its checksum is wrong");
    const origin = readOrigin(raw.subarray(end, raw.length - END));
    const values = new Reader(raw.subarray(0, end)).parameters();
    const broken = [...values].filter(([, value]) => !isWhole(value)).map(([key]) => key);
    if (broken.length) throw new Damage(`it holds NaN or infinite values in ${some(broken)}`);
    return { values, origin, bytes: raw.length };
  } catch (error) {
    // A RangeError is DataView's: an offset that leaves the file. TypeErrors and SyntaxErrors are of texts in it.
    if (!(error instanceof Damage || error instanceof RangeError || error instanceof TypeError)) throw error;
    const what = error instanceof Damage ? error.message : "an offset leaves the file, or a text isn't UTF-8";
    throw new UserError(`${name} is damaged (${what}). Convert or copy the adapter again.`, { cause: error });
  }
}

/**
 * @param {Uint8Array} raw
 * @param {DataView} view
 * @param {string} name
 */
function readEnd(raw, view, name) {
  const size = raw.length;
  if (size >= END && text(raw.subarray(size - 8)) === "LORATRF1") {
    const length = Number(view.getBigUint64(size - END, true));
    if (length <= Math.min(size - END, LONGEST_DESCRIPTION)) {
      return { length, checksum: view.getUint32(size - 12, true) };
    }
  }
  const start = text(raw.subarray(0, 64)).trimStart();
  const what =
    text(raw.subarray(4, 8)) === "TORT"
      ? "has no block at its end that says which model it fits: it was truncated, or loratrf-export didn't write it"
      : start.startsWith("<")
        ? "is not an adapter file but a page: the server has no such file and answers with another"
        : "is not an adapter file: it was truncated, or loratrf-export didn't write it";
  throw new UserError(
    `${name} ${what}. Expected a file of loratrf-export --adapter PATH --onto model.onnx --out NAME.onnx_adapter.`,
  );
}

/**
 * @param {Uint8Array} raw
 * @returns {Origin}
 */
function readOrigin(raw) {
  /** @type {any} */
  let origin;
  try {
    origin = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(raw));
  } catch {
    throw new Damage("its description is no JSON");
  }
  if (origin === null || typeof origin !== "object") throw new Damage("its description is no object");
  const { format = FORMAT } = origin;
  if (format !== FORMAT) {
    throw new Damage(`its format is ${format}, this version of loratrf-deploy reads ${FORMAT}`);
  }
  const { adapter, base_sha256, model_sha256 } = origin;
  const isText = (/** @type {unknown} */ value) => typeof value === "string";
  if (!isText(adapter?.name) || !isText(adapter?.sha256) || !isText(adapter?.peft_type)) {
    throw new Damage("its description names no adapter");
  }
  if (!isText(model_sha256) || !(base_sha256 === null || isText(base_sha256))) {
    throw new Damage("its description lacks the hashes of base and graph");
  }
  return origin;
}

/** @param {AdapterValue} value */
function isWhole({ data }) {
  // Of float16 by the bits but the sign: Inf and NaN come last.
  return data instanceof Uint16Array
    ? data.every((bits) => (bits & 0x7fff) < 0x7c00)
    : data.every((number) => Number.isFinite(number));
}

/** @param {Uint8Array} raw */
function text(raw) {
  return String.fromCharCode(...raw);
}

/** Reads the flatbuffer. DataView throws where an offset leaves the block. */
class Reader {
  /** @param {Uint8Array<ArrayBuffer>} block */
  constructor(block) {
    this._block = block;
    this._view = new DataView(block.buffer, block.byteOffset, block.byteLength);
  }

  /** Table Adapter {format_version, adapter_version, model_version: int32; parameters: [Parameter]}. */
  parameters() {
    if (text(this._block.subarray(4, 8)) !== "TORT") throw new Damage("it is not in ONNX Runtime's adapter format");
    const root = this._unsigned(0);
    const version = this._field(root, 0);
    if (version === null || this._view.getInt32(version, true) !== 1) {
      throw new Damage("its format of ONNX Runtime's is not version 1");
    }
    /** @type {Map<string, AdapterValue>} */
    const values = new Map();
    const [start, count] = this._vector(this._field(root, 3), 4);
    for (let position = start; position < start + 4 * count; position += 4) {
      const [name, value] = this._parameter(position + this._unsigned(position));
      if (values.has(name)) throw new Damage(`it holds ${name} twice`);
      values.set(name, value);
    }
    return values;
  }

  /**
   * Table Parameter {name: string; dims: [int64]; data_type: int32; raw_data: [uint8]}.
   * @param {number} table
   * @returns {[string, AdapterValue]}
   */
  _parameter(table) {
    let [start, count] = this._vector(this._field(table, 0), 1);
    const name = new TextDecoder("utf-8", { fatal: true }).decode(this._block.subarray(start, start + count));
    [start, count] = this._vector(this._field(table, 1), 8);
    if (count > 8) throw new Damage(`${name} has ${count} dimensions`);
    const dims = Array.from({ length: count }, (_, i) => Number(this._view.getBigInt64(start + 8 * i, true)));
    const kind = this._field(table, 2);
    const type = DTYPES[kind === null ? 0 : this._view.getInt32(kind, true)];
    if (!type) throw new Damage(`${name} is neither float32 nor float16`);
    [start, count] = this._vector(this._field(table, 3), 1);
    if (dims.some((size) => size < 1)) throw new Damage(`${name} has the shape (${dims.join(", ")})`);
    if (dims.reduce((product, size) => product * size, SIZES[type]) !== count) {
      throw new Damage(`${name} has the shape (${dims.join(", ")}) but ${count} bytes`);
    }
    let data = this._block.subarray(start, start + count);
    if (data.byteOffset % SIZES[type]) data = data.slice();
    const { buffer, byteOffset } = data;
    return type === "float32"
      ? [name, { type, dims, data: new Float32Array(buffer, byteOffset, count / 4) }]
      : [name, { type, dims, data: new Uint16Array(buffer, byteOffset, count / 2) }];
  }

  /**
   * Where a table's field lies, null where it is absent.
   * @param {number} table
   * @param {number} number
   */
  _field(table, number) {
    const vtable = table - this._view.getInt32(table, true);
    if (4 + 2 * number >= this._view.getUint16(vtable, true)) return null;
    const offset = this._view.getUint16(vtable + 4 + 2 * number, true);
    return offset ? table + offset : null;
  }

  /**
   * [start, count] of a vector of elements of `size` bytes, held against the block; [0, 0] where it is absent.
   * @param {number | null} field
   * @param {number} size
   * @returns {[number, number]}
   */
  _vector(field, size) {
    if (field === null) return [0, 0];
    const begin = field + this._unsigned(field);
    const count = this._unsigned(begin);
    if (begin + 4 + count * size > this._block.length) throw new Damage("an offset leaves the file");
    return [begin + 4, count];
  }

  /** @param {number} position */
  _unsigned(position) {
    return this._view.getUint32(position, true);
  }
}

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let value = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) value = CRC[(value ^ bytes[i]) & 0xff] ^ (value >>> 8);
  return ~value >>> 0;
}
