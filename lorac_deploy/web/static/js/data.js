// Local images: what is held out, in which order they are trained on, and the numbers that a model takes.
// Everything here gives what lorac_runtime/data.py and lorac_runtime/training.py give for the same seed.

import { Generator } from "./random.js";
import { DataError } from "./errors.js";

/** { train, held }: indices, each sorted, with `fraction` of every class held out as nearly as it goes. */
export function split(labels, fraction, seed) {
  const generator = new Generator(seed);
  const shuffled = generator.permutation(labels.length);
  const classes = [...new Set(labels)].sort((a, b) => a - b);
  const groups = classes.map((label) => shuffled.filter((i) => labels[i] === label));
  const counts = heldOutCounts(groups.map((group) => group.length), fraction, generator);
  if (fraction > 0 && sum(counts) === 0) throw new DataError(tooFew(labels.length, groups.length, fraction));
  const ascending = (parts) => parts.flat().sort((a, b) => a - b);
  return {
    train: ascending(groups.map((group, k) => group.slice(counts[k]))),
    held: ascending(groups.map((group, k) => group.slice(0, counts[k]))),
  };
}

function tooFew(samples, classes, fraction) {
  const needed = Math.max(2, Math.ceil(0.5 / fraction));
  return (
    `${samples} images in ${classes} classes are too few to hold out ${Math.round(100 * fraction)} % of them: it takes ` +
    `at least ${needed} images, two of them of the same class. Add images, or set the held-out share to 0`
  );
}

/** Shares rounded so that their sum is right: the largest remainders are rounded up, ties by lot. */
function heldOutCounts(sizes, fraction, generator) {
  const shares = sizes.map((size) => size * fraction);
  const counts = sizes.map((size, i) => Math.min(Math.trunc(shares[i]), size - 1));
  const lots = generator.permutation(sizes.length);
  const order = sizes.map((_, i) => i);
  order.sort((a, b) => counts[a] - shares[a] - (counts[b] - shares[b]) || lots[a] - lots[b]);
  for (const i of order) {
    if (sum(counts) < Math.trunc(sum(shares) + 0.5) && counts[i] < Math.min(shares[i], sizes[i] - 1)) counts[i] += 1;
  }
  return counts;
}

/** Indices of each batch of an epoch; without an epoch in the given order. The last one may be smaller. */
export function batches(index, size, seed = null, epoch = null) {
  const order = epoch === null ? index : new Generator([seed, epoch]).permutation(index.length).map((i) => index[i]);
  const found = [];
  for (let start = 0; start < order.length; start += size) found.push(order.slice(start, start + size));
  return found;
}

/**
 * Images of a batch as the model takes them: (pixel * scale - mean) / std, float32 (N, C, H, W), in float32 at each
 * step as numpy does; or uint8 (N, H, W, C) for a model that does this itself.
 * `pixels` holds all images, uint8 (samples, H, W, C).
 */
export function preprocess(pixels, batch, input) {
  const [channels, height, width] = input.shape;
  const area = height * width;
  const size = area * channels;
  if (input.in_graph) {
    const raw = new Uint8Array(batch.length * size);
    batch.forEach((index, n) => raw.set(pixels.subarray(index * size, (index + 1) * size), n * size));
    return { type: "uint8", data: raw, shape: [batch.length, height, width, channels] };
  }
  const data = new Float32Array(batch.length * size);
  const tables = Array.from({ length: channels }, (_, c) => levels(input, c));
  batch.forEach((index, n) => {
    for (let c = 0; c < channels; c++) {
      const target = n * size + c * area;
      const source = index * size + c;
      for (let p = 0; p < area; p++) data[target + p] = tables[c][pixels[source + p * channels]];
    }
  });
  return { type: "float32", data, shape: [batch.length, channels, height, width] };
}

/** What each of the 256 values of a pixel becomes in a channel. */
function levels(input, channel) {
  const [scale, mean, std] = [input.scale, input.mean[channel], input.std[channel]].map(Math.fround);
  return Float32Array.from({ length: 256 }, (_, v) => Math.fround(Math.fround(v * scale) - mean) / std);
}

/** What stops a training on these labels, as text; null where nothing does. */
export function refusal(labels, classNames) {
  const present = new Set(labels);
  if (labels.length === 0) return "There are no images yet. Add some of at least two classes.";
  if (present.size < 2) {
    const [only] = present;
    return (
      `All ${labels.length} images are of class “${classNames[only]}”: training on one class teaches a model to ` +
      "always answer it. Add images of at least one other class."
    );
  }
  return null;
}

/** A warning about classes without an image, as text; null where every class has one. */
export function absentClasses(labels, classNames) {
  const present = new Set(labels);
  const absent = classNames.filter((_, k) => !present.has(k));
  if (!absent.length || !labels.length) return null;
  const shown = absent.slice(0, 5).join(", ") + (absent.length > 5 ? ", …" : "");
  return (
    `No images of ${absent.length} of the ${classNames.length} classes (${shown}): training on the others makes a ` +
    "model forget these. Add some of each, or expect answers among the others."
  );
}

function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}
