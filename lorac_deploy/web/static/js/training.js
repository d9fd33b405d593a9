// The training loop: batches in a seeded order, the learning rate of each step, and a watch on the loss.
// The same steps as lorac_runtime/training.py and lorac_runtime/schedule.py.

import { batches } from "./data.js";
import { DivergenceError } from "./errors.js";

const EXPLODED = 5; // a mean loss so many times that of the first step, and of random answers, is no training any more

/** Learning rate of `step` (from 0) out of `total`: a linear rise over `warmup` of them, then half a cosine. */
export function oneCycle(step, total, peak, warmup) {
  const rising = roundToEven(warmup * total);
  if (step < rising) return (peak * (step + 1)) / rising;
  const done = (step - rising + 1) / (total - rising + 1);
  return peak * 0.5 * (1 + Math.cos(Math.PI * done));
}

function roundToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

/** Mean loss and share of right answers on the images of `index`. */
export async function evaluate(engine, data, index, batchSize) {
  let [loss, right] = [0, 0];
  for (const batch of batches(index, batchSize)) {
    const found = await engine.evalStep(data.pixels, data.labels, batch);
    loss += found.loss * batch.length;
    const classes = found.logits.length / batch.length;
    batch.forEach((i, n) => (right += largest(found.logits, n * classes, classes) === data.labels[i]));
  }
  return { loss: loss / index.length, accuracy: right / index.length };
}

function largest(values, start, count) {
  let best = 0;
  for (let k = 1; k < count; k++) if (values[start + k] > values[start + best]) best = k;
  return best;
}

/**
 * Train on the images of `index`. `onStep` gets { epoch, step, steps, loss, lr, milliseconds } after each step, where
 * `loss` is that of the step, and is waited for: it may pause.
 * Throws DivergenceError as soon as the loss or the weights are not finite, or the loss explodes.
 */
export async function train(engine, data, index, settings, classes, onStep) {
  const losses = [];
  let steps = 0;
  for (let epoch = 0; epoch < settings.epochs; epoch++) {
    const parts = batches(index, settings.batch_size, settings.seed, epoch);
    steps = settings.epochs * parts.length;
    for (const batch of parts) {
      const lr = oneCycle(losses.length, steps, settings.lr, settings.warmup);
      const started = performance.now();
      const loss = await engine.trainStep(data.pixels, data.labels, batch, lr);
      const milliseconds = performance.now() - started;
      if (!Number.isFinite(loss)) throw diverged(`the loss became ${loss} in step ${losses.length + 1} of ${steps}`, settings);
      losses.push(loss);
      await onStep({ epoch: epoch + 1, step: losses.length, steps, loss, lr, milliseconds });
    }
    requireSound(engine, losses, parts.length, classes, settings);
  }
  return losses;
}

function requireSound(engine, losses, perEpoch, classes, settings) {
  if (!engine.isSound()) throw diverged(`weights are not finite after step ${losses.length}`, settings);
  const mean = losses.slice(-perEpoch).reduce((a, b) => a + b, 0) / perEpoch;
  if (mean > EXPLODED * Math.max(losses[0], Math.log(classes))) {
    throw diverged(`the mean loss rose to ${mean.toPrecision(3)}, from ${losses[0].toPrecision(3)} in the first step`, settings);
  }
}

function diverged(what, settings) {
  return new DivergenceError(
    `Training diverged at a peak learning rate of ${settings.lr}: ${what}. Nothing was kept of it; your images are ` +
      `still here. Train again with a lower rate, such as ${Number((settings.lr / 3).toPrecision(1))}.`,
  );
}
