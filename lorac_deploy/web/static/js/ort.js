// onnxruntime-web, from the site's own folder: "wasm" for the processor, "webgpu" for the graphics processor.

import { EngineError } from "./errors.js";
import { address } from "./site.js";

const MODULES = { wasm: "ort/ort.wasm.min.mjs", webgpu: "ort/ort.webgpu.min.mjs" };
const MOST_THREADS = 4;
const loaded = new Map();

/** Load a build of the engine once. Throws EngineError where it or the browser refuses. */
export async function loadEngine(device, site) {
  if (loaded.has(device)) return;
  if (typeof WebAssembly !== "object") throw new EngineError("This browser has no WebAssembly; use a newer one.");
  try {
    const ort = await import(address(MODULES[device]));
    ort.env.wasm.wasmPaths = address("ort/");
    ort.env.wasm.numThreads = threads();
    ort.env.logLevel = "error";
    loaded.set(device, ort);
  } catch (error) {
    throw new EngineError(`onnxruntime-web ${site.onnxruntime_web} could not be loaded (${error.message}): copy the site again.`);
  }
}

/** A build that was loaded. */
export function engineFor(device) {
  return loaded.get(device);
}

/** Threads share memory, which browsers allow only on pages with two headers that plain static servers do not send. */
export function threads() {
  return globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
}
