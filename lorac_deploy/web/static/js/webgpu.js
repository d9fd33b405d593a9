// WebGPU: gradient_step.onnx runs there, optimizer_step.onnx (which counts in double precision) on the processor.
// It is used only where the first batch gives the loss that the processor gives.

import { EngineError } from "./errors.js";
import { batches } from "./data.js";

const LOSS_TOLERANCE = 1e-3; // relative: graphics processors round and sum differently

/** Throws EngineError where the browser has no graphics processor for us. */
export async function requireGpu() {
  if (!navigator.gpu) throw new EngineError("This browser has no WebGPU.");
  if (!(await navigator.gpu.requestAdapter())) throw new EngineError("This browser has WebGPU, but no graphics processor for it.");
}

/** Takes two steps of the same batch with both; throws EngineError where their losses differ. */
export async function agreement(data, index, settings, opened) {
  const [batch] = batches(index, settings.batch_size, settings.seed, 0);
  const losses = {};
  for (const device of ["wasm", "webgpu"]) {
    const engine = await opened(device, settings);
    const own = [];
    for (let step = 0; step < 2; step++) own.push(await engine.trainStep(data.pixels, data.labels, batch, settings.lr / 10));
    losses[device] = own;
    await engine.close();
  }
  losses.wasm.forEach((expected, step) => {
    const given = losses.webgpu[step];
    if (!(Math.abs(given - expected) <= LOSS_TOLERANCE * Math.max(1e-3, Math.abs(expected)))) {
      throw new EngineError(`WebGPU gives a loss of ${given} where the processor gives ${expected}, so it is not used.`);
    }
  });
}
