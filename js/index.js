export { readAdapterFile } from "./adapter_file.js";
export { UserError } from "./errors.js";
export { AdapterSession } from "./session.js";
