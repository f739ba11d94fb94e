import type { InferenceSession, Tensor, TensorConstructor } from "onnxruntime-common";

/** A file: its path (Node), its URL, or its bytes. */
export type Source = string | URL | Uint8Array | ArrayBuffer;

/** `import * as ort from "onnxruntime-node"`, or "onnxruntime-web", or one of its parts such as "onnxruntime-web/webgpu". */
export interface Ort {
  readonly InferenceSession: { create: (typeof InferenceSession)["create"] };
  readonly Tensor: TensorConstructor;
  readonly env?: { readonly versions?: { readonly node?: string; readonly web?: string } };
}

export interface CreateOptions extends Omit<InferenceSession.SessionOptions, "externalData"> {
  /** The loratrf.json beside the model: its text, what it parses to, or its URL. Needed where the model is bytes. */
  manifest?: string | URL | Uint8Array | ArrayBuffer | object;
  /** The files of weights beside the model, model.onnx.data. Needed where the model is bytes. */
  externalData?: readonly { path: string; data: Source }[];
}

export interface RunOptions extends InferenceSession.RunOptions {
  /** The name of a loaded adapter. */
  adapter: string;
  /** Multiplies alpha/R and gamma: y = h + scale·(alpha/R)·(x Aᵀ)Bᵀ, out = y + scale·gamma·((s·z) Cᵀ)Dᵀ. 1 if absent. */
  scale?: number;
  /** The outputs that are wanted; all if absent. */
  outputs?: readonly string[];
}

/** Which adapter a file holds. */
export interface AdapterId {
  readonly name: string;
  readonly sha256: string;
  readonly peft_type: string;
}

/** What an .onnx_adapter says of itself: which adapter it is, of which base, for which export (model.onnx). */
export interface Origin {
  readonly format: number;
  readonly adapter: AdapterId;
  readonly base_sha256: string | null;
  readonly model_sha256: string;
}

/** A weight; of float16 the bits. */
export type AdapterValue =
  | { readonly type: "float32"; readonly dims: readonly number[]; readonly data: Float32Array<ArrayBuffer> }
  | { readonly type: "float16"; readonly dims: readonly number[]; readonly data: Uint16Array<ArrayBuffer> };

/** What is in an .onnx_adapter: `values` by graph input, of a file of so many `bytes`. */
export interface AdapterFile {
  readonly values: Map<string, AdapterValue>;
  readonly origin: Origin;
  readonly bytes: number;
}

/**
 * What was wrong (with the values), what was expected, what to do: one paragraph.
 */
export class UserError extends Error {
  constructor(message: string, options?: { cause?: unknown });
}

/**
 * The adapter in the bytes of an .onnx_adapter: every offset and size, the checksum and every value checked. Throws a
 * UserError, in which the file is called `name`.
 */
export function readAdapterFile(bytes: Uint8Array | ArrayBuffer, name?: string): AdapterFile;

/**
 * outputs = model(inputs; weights of one adapter), the adapter named in each run.
 *
 * Every method that reads, and `run`, rejects with a UserError where the input is at fault. Runs may be started while
 * others are at work; a run that has begun keeps its adapter, whatever is unloaded or replaced meanwhile.
 */
export class AdapterSession {
  private constructor();

  /**
   * Opens a model of `loratrf-export --swappable required`; no adapter is loaded at first. loratrf.json and the weights
   * are read from beside a `model` that is a path or URL. All are held against the hashes in loratrf.json, weights by
   * samples of their bytes. Other options (executionProviders, ...) are ONNX Runtime's.
   */
  static create(ort: Ort, model: Source, options?: CreateOptions): Promise<AdapterSession>;

  /** What `run` takes, by name. */
  readonly inputs: string[];
  /** What `run` gives, by name. */
  readonly outputs: string[];
  /** The loaded adapters by name. */
  readonly adapters: Map<string, AdapterId & { readonly bytes: number }>;

  /**
   * Reads an .onnx_adapter and keeps it as `name`. It is held against the model before anything uses it: hashes of base
   * and graph, and the name, type and size of every weight. With `replace` runs that begin from now on use the new one.
   */
  load(name: string, source: Source, options?: { replace?: boolean }): Promise<void>;

  /** Forgets the adapter `name`. */
  unload(name: string): void;

  /** Output name -> tensor for `inputs` (name -> tensor as the model takes it) under the loaded `adapter`. */
  run(inputs: Record<string, Tensor>, options: RunOptions): Promise<Record<string, Tensor>>;

  /** Forgets all adapters and frees the model, after the runs that have begun. */
  release(): Promise<void>;
}
