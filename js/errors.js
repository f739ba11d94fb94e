/** The one exception that means: the user's input is at fault, and the message says what to do. */

const MOST = 1000; // characters of a paragraph; what a stranger wrote can be of any length
const MOST_OF_AN_ITEM = 300;

/**
 * What was wrong (with the values), what was expected, what to do: one paragraph, shown as it is.
 *
 * The message quotes strangers' files and ONNX Runtime: whatever they say, it is one printable line of at most 1,000
 * characters, of which the middle is left out where it would be longer: what to do comes last.
 */
export class UserError extends Error {
  /**
   * @param {string} message
   * @param {{cause?: unknown}} [options]
   */
  constructor(message, options) {
    super(cut(oneLine(message)), options);
    this.name = "UserError";
  }
}

/**
 * The first few items, and how many more there are: lists run to hundreds of names, and a name to any length.
 * @param {readonly string[]} items
 */
export function some(items, separator = ", ", limit = 5) {
  const shown = items.slice(0, limit).map((item) => cut(item, MOST_OF_AN_ITEM));
  const rest = items.length - shown.length;
  return shown.join(separator) + (rest ? `${separator}and ${rest} more` : "");
}

/**
 * `value` in quotes where it is a text, otherwise what it is.
 * @param {unknown} value
 */
export function quoted(value) {
  if (typeof value === "string") return JSON.stringify(cut(value, MOST_OF_AN_ITEM));
  if (value === null || ["undefined", "number", "boolean", "bigint"].includes(typeof value)) return String(value);
  const kind = /** @type {object} */ (value).constructor?.name || typeof value;
  return `${/^[AEIOU]/i.test(kind) ? "an" : "a"} ${kind}`;
}

/**
 * What an exception says; anything may be thrown.
 * @param {unknown} error
 */
export function words(error) {
  return error instanceof Error ? error.message : String(error);
}

/** @param {string} text */
function oneLine(text) {
  return text
    .replace(/[\n\r\t\v\f\x85\u2028\u2029]\s*/g, " ")
    .replace(/[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]|\p{Surrogate}/gu, "?");
}

/** @param {string} text */
function cut(text, limit = MOST) {
  if (text.length <= limit) return text;
  const half = Math.floor((limit - 7) / 2);
  return `${text.slice(0, half)} [...] ${text.slice(-half)}`;
}
