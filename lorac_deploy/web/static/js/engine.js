// The artifact's step graphs under onnxruntime-web: the protocol of docs/artifact.md, "Step graphs".
// Sessions hold the weights, so few are open at a time; what carries over is fed back after each step.

import { preprocess } from "./data.js";
import { EngineError, translated } from "./errors.js";

const BASE = "base.onnx";
const [TRAIN, GRADIENT, OPTIMIZER, EVAL] = ["train_step.onnx", "gradient_step.onnx", "optimizer_step.onnx", "eval_step.onnx"];
const PREFIX = "prefix_step.onnx";
const NEXT = ".next";
const MOST_FEATURES = 256 << 20; // bytes of a frozen front's results that are kept in memory

/** The graphs that an engine opens; `device` is "wasm" or "webgpu", `pieces` whether a batch is computed in parts. */
export function graphs(manifest, { device, pieces }) {
  const step = device === "webgpu" || pieces ? [GRADIENT, OPTIMIZER] : [TRAIN];
  return [BASE, ...step, EVAL, ...(manifest.features.length ? [PREFIX] : [])];
}

/**
 * A model that trains. `files` holds the bytes of `graphs` by name, `start` the adapter's tensors by name,
 * `ort` a function name -> onnxruntime-web for "wasm" and "webgpu".
 */
export class Engine {
  #ort;
  #files;
  #manifest;
  #start;
  #device;
  #atOnce;
  #sessions = new Map();
  #carried = new Map(); // name -> { type, data, shape }: tensors, the optimizer's memory, the count of steps
  #features = new Map();

  constructor(manifest, files, start, { ort, device, atOnce }) {
    [this.#manifest, this.#files, this.#start] = [manifest, files, start];
    [this.#ort, this.#device, this.#atOnce] = [ort, device, atOnce];
    this.begin();
  }

  /** Carry the start, and an optimizer that has not made a step. */
  begin() {
    this.#carried.clear();
    for (const { name } of this.#manifest.trainables) {
      const { shape, data } = this.#start.get(name);
      this.#carried.set(name, { type: "float32", data: data.slice(), shape });
    }
    this.#carried.set("step", { type: "int64", data: new BigInt64Array(1), shape: [] });
  }

  /** Every trained tensor, and what is fixed in adapters, by name. */
  state() {
    const found = new Map();
    for (const [name, { shape, data }] of this.#start) found.set(name, { shape, data: this.#carried.get(name)?.data ?? data });
    return found;
  }

  /** Whether all that trains is finite. */
  isSound() {
    return this.#manifest.trainables.every(({ name }) => this.#carried.get(name).data.every(Number.isFinite));
  }

  /** One optimizer step; the loss before it, or NaN where its gradient is not finite (then nothing changes). */
  async trainStep(pixels, labels, batch, lr) {
    const rate = { lr: scalar(lr) };
    if (this.#inPieces) return this.#trainInParts(pixels, labels, batch, rate);
    const session = await this.#opened(TRAIN);
    const found = await this.#run(session, { ...(await this.#feeds(pixels, labels, batch)), ...rate }, "train", batch.length);
    return this.#taken(found, found.loss.data[0], found.gradient_norm.data[0]);
  }

  async #trainInParts(pixels, labels, batch, rate) {
    const [gradient, optimizer] = await this.#openedBoth();
    const sums = new Map();
    for (const { name, shape } of gradient.inputMetadata) if (name.startsWith("gradient.")) sums.set(name, zeros(shape));
    let loss = 0;
    for (const part of this.#parts(batch)) {
      const share = part.length / batch.length;
      const feeds = { ...(await this.#feeds(pixels, labels, part)), ...Object.fromEntries(sums), weight: scalar(share) };
      const found = await this.#run(gradient, feeds, "train", part.length);
      loss += share * found.loss.data[0];
      for (const name of sums.keys()) sums.set(name, taken(found[name + NEXT]));
    }
    if (!Number.isFinite(loss)) return loss;
    const found = await this.#run(optimizer, { ...Object.fromEntries(sums), ...rate }, "update the weights", batch.length);
    return this.#taken(found, loss, found.gradient_norm.data[0]);
  }

  /** Keep what a step computed, if it is sound. */
  #taken(found, loss, norm) {
    if (!Number.isFinite(loss)) return loss;
    if (!Number.isFinite(norm)) return NaN;
    for (const name of this.#carried.keys()) if (found[name + NEXT]) this.#carried.set(name, taken(found[name + NEXT]));
    return loss;
  }

  /** { loss, logits } of a batch, in evaluation mode; changes nothing. */
  async evalStep(pixels, labels, batch) {
    const session = await this.#opened(EVAL);
    const classes = this.#manifest.output.classes;
    const logits = new Float32Array(batch.length * classes);
    let [loss, at] = [0, 0];
    for (const part of this.#parts(batch)) {
      const found = await this.#run(session, await this.#feeds(pixels, labels, part), "evaluate", part.length);
      loss += (found.loss.data[0] * part.length) / batch.length;
      logits.set(found[this.#manifest.output.name].data, at);
      at += part.length * classes;
    }
    return { loss, logits };
  }

  get #inPieces() {
    return this.#device === "webgpu" || this.#atOnce !== null;
  }

  #parts(batch) {
    if (this.#atOnce === null) return [batch];
    const found = [];
    for (let at = 0; at < batch.length; at += this.#atOnce) found.push(batch.slice(at, at + this.#atOnce));
    return found;
  }

  async #feeds(pixels, labels, part) {
    const feeds = this.#manifest.features.length
      ? await this.#featuresOf(pixels, part)
      : { [this.#manifest.input.name]: preprocess(pixels, part, this.#manifest.input) };
    feeds.labels = { type: "int64", data: BigInt64Array.from(part, (i) => BigInt(labels[i])), shape: [part.length] };
    return feeds;
  }

  /** What the frozen front gives, image by image, so that it does not depend on the batch. */
  async #featuresOf(pixels, part) {
    const rows = [];
    for (const index of part) rows.push(await this.#rowOf(pixels, index));
    const feeds = {};
    for (const { name, shape } of this.#manifest.features) {
      const size = volume(shape);
      const data = new Float32Array(part.length * size);
      rows.forEach((row, n) => data.set(row[name], n * size));
      feeds[name] = { type: "float32", data, shape: [part.length, ...shape] };
    }
    return feeds;
  }

  async #rowOf(pixels, index) {
    if (this.#features.has(index)) return this.#features.get(index);
    const input = { [this.#manifest.input.name]: preprocess(pixels, [index], this.#manifest.input) };
    const found = await this.#run(await this.#opened(PREFIX, true), input, "compute features", 1);
    const row = Object.fromEntries(this.#manifest.features.map(({ name }) => [name, found[name].data]));
    const nbytes = this.#manifest.features.reduce((all, { shape }) => all + 4 * volume(shape), 0);
    if ((this.#features.size + 1) * nbytes <= MOST_FEATURES) this.#features.set(index, row);
    return row;
  }

  /** Run a session on `feeds` and whatever it takes of what is carried. */
  async #run(session, feeds, what, images) {
    const { Tensor } = this.#ort(session.device);
    const inputs = {};
    for (const { name, shape } of session.inputMetadata) {
      if (!(name in feeds) && !this.#carried.has(name)) this.#carried.set(name, zeros(shape)); // the optimizer's memory
      const { type, data, shape: given } = feeds[name] ?? this.#carried.get(name);
      inputs[name] = new Tensor(type, data, given);
    }
    try {
      return await session.run(inputs);
    } catch (error) {
      throw translated(error, what, images);
    }
  }

  /** A session of a graph; others are closed, but the frozen front, and what stands beside. */
  async #opened(name, beside = false, device = "wasm") {
    if (!beside) await this.#closeAllBut([name, PREFIX]);
    if (!this.#sessions.has(name)) this.#sessions.set(name, await this.#open(name, device));
    return this.#sessions.get(name);
  }

  async #openedBoth() {
    await this.#closeAllBut([GRADIENT, OPTIMIZER, PREFIX]);
    return [await this.#opened(GRADIENT, true, this.#device), await this.#opened(OPTIMIZER, true)];
  }

  async #open(name, device) {
    const options = {
      executionProviders: [device],
      externalData: [{ path: BASE, data: this.#files.get(BASE) }],
      graphOptimizationLevel: "all",
      logSeverityLevel: 3,
    };
    try {
      const session = await this.#ort(device).InferenceSession.create(this.#files.get(name), options);
      session.device = device;
      return session;
    } catch (error) {
      throw translated(error, `open ${name}`, this.#atOnce ?? 1);
    }
  }

  async #closeAllBut(names) {
    for (const [name, session] of this.#sessions) {
      if (names.includes(name)) continue;
      this.#sessions.delete(name);
      await session.release();
    }
  }

  /** Give all memory of sessions back. */
  async close() {
    await this.#closeAllBut([]);
    this.#features.clear();
  }
}

function scalar(value) {
  return { type: "float32", data: new Float32Array([value]), shape: [] };
}

function zeros(shape) {
  if (!shape.every(Number.isInteger)) throw new EngineError(`a graph of this site has an input of unknown shape (${shape})`);
  return { type: "float32", data: new Float32Array(volume(shape)), shape };
}

function volume(shape) {
  return shape.reduce((a, b) => a * b, 1);
}

/** A result as it is kept: `data` belongs to us, not to the engine. */
function taken(tensor) {
  return { type: tensor.type, data: tensor.data, shape: [...tensor.dims] };
}
