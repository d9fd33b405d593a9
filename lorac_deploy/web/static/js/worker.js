// Everything heavy, beside the page so that it stays responsive: loading, training, fusing.
// Messages in: open, train, pause, resume, stop, file. Messages out: loading, opened, before, step, done, file, note, failed.

import { split } from "./data.js";
import { Engine, graphs } from "./engine.js";
import { EngineError, PageError, SiteError } from "./errors.js";
import { fused } from "./fuse.js";
import { engineFor, loadEngine } from "./ort.js";
import { read, write } from "./safetensors.js";
import { checked, jsonOf } from "./site.js";
import { evaluate, train } from "./training.js";
import { agreement, requireGpu } from "./webgpu.js";

const FILES = new Map();
let site, manifest, start, engine, result;
let paused = null; // the promise that a paused training waits for, and what ends it
let stopped = false;

const say = (kind, fields = {}, transfer = []) => postMessage({ kind, ...fields }, transfer);

async function open() {
  site = await jsonOf("site.json");
  manifest = JSON.parse(new TextDecoder().decode(await checked("manifest.json", site.files)));
  start = read(await checked("adapter.safetensors", site.files), "adapter.safetensors");
  const lost = manifest.trainables.filter(({ name }) => !start.tensors.has(name)).map(({ name }) => name);
  if (lost.length) throw new SiteError(`adapter.safetensors lacks ${lost.join(", ")}: write the site anew.`);
  say("opened", { site, manifest, threads: globalThis.crossOriginIsolated });
}

/** The bytes of graphs, fetched when they are first needed. */
async function load(names) {
  const missing = names.filter((name) => !FILES.has(name));
  const total = missing.reduce((all, name) => all + (site.files[name]?.nbytes ?? 0), 0);
  let done = 0;
  for (const name of missing) {
    const onPart = (n) => say("loading", { done: (done += n), total });
    FILES.set(name, await checked(name, site.files, onPart));
  }
}

async function begin({ pixels, labels, settings }) {
  [stopped, paused] = [false, null];
  await engine?.close();
  const data = { pixels, labels };
  const parts = split([...labels], settings.val_fraction, settings.seed);
  const device = await chosenDevice(settings, data, parts.train);
  engine = await opened(device, settings);
  const probe = parts.held.length ? parts.held : parts.train.slice(0, settings.batch_size);
  const before = await evaluate(engine, data, probe, settings.batch_size);
  if (!Number.isFinite(before.loss)) throw new SiteError(`The loss is ${before.loss} before any training: the artifact is not sound.`);
  say("before", { train: parts.train.length, held: parts.held.length, device, ...before });
  const times = [];
  const losses = await trained(data, parts.train, settings, times);
  if (losses === null) return;
  const after = await evaluate(engine, data, probe, settings.batch_size);
  await engine.close();
  result = { state: engine.state(), losses };
  say("done", { before, after, held: parts.held.length, losses, milliseconds: median(times), device });
}

/** All losses, or null if training was stopped for good. */
async function trained(data, index, settings, times) {
  const onStep = async (progress) => {
    times.push(progress.milliseconds);
    say("step", progress);
    await turn(); // let messages in
    if (paused) {
      say("paused", { step: progress.step });
      await paused.promise;
    }
    if (stopped) throw new Stop();
  };
  try {
    return await train(engine, data, index, settings, manifest.output.classes, onStep);
  } catch (error) {
    if (!(error instanceof Stop)) throw error;
    await engine.close();
    say("stopped");
    return null;
  }
}

class Stop extends Error {}

async function opened(device, settings) {
  const atOnce = settings.at_once < settings.batch_size ? settings.at_once : null;
  await load(graphs(manifest, { device, pieces: atOnce !== null }));
  say("note", { text: "" });
  await loadEngine("wasm", site);
  if (device === "webgpu") await loadEngine("webgpu", site);
  return new Engine(manifest, FILES, start.tensors, { ort: engineFor, device, atOnce });
}

/** "webgpu" only where it was asked for, is there, and computes what the processor computes; else said in words. */
async function chosenDevice(settings, data, index) {
  if (settings.device !== "webgpu") return "wasm";
  try {
    await requireGpu();
    say("note", { text: "Comparing the graphics processor with the processor on one batch …" });
    await agreement(data, index, settings, opened);
    return "webgpu";
  } catch (error) {
    if (!(error instanceof PageError)) throw error;
    say("note", { text: `${error.message} Training goes on with the processor (WebAssembly).`, keep: true });
    return "wasm";
  }
}

async function file({ what }) {
  if (!result) throw new SiteError("There is no trained model yet.");
  if (what === "adapter.safetensors") {
    const metadata = { ...start.metadata, producer: site.producer };
    return send(what, write(result.state, metadata), {});
  }
  const base = `base.${what.split(".").at(-1)}`;
  await load(["base.onnx", base]);
  const made = fused(manifest, FILES.get("base.onnx"), FILES.get(base), base, result.state);
  return send(what, made.bytes, { overflowed: made.overflowed, saturated: made.saturated });
}

function send(name, bytes, fields) {
  say("file", { name, bytes, ...fields }, [bytes.buffer]);
}

function pause() {
  let end;
  const promise = new Promise((ok) => (end = ok));
  paused ??= { promise, end };
}

function resume() {
  paused?.end();
  paused = null;
}

function stop() {
  stopped = true;
  resume();
}

/** Lets messages that have come be taken before what follows. */
function turn() {
  return new Promise((ok) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      ok();
    };
    port2.postMessage(null);
  });
}

function median(values) {
  const ordered = [...values].sort((a, b) => a - b);
  const middle = ordered.length >> 1;
  return ordered.length % 2 ? ordered[middle] : (ordered[middle - 1] + ordered[middle]) / 2;
}

const VERBS = { open, train: begin, file, pause, resume, stop };

addEventListener("message", async ({ data }) => {
  try {
    await VERBS[data.kind](data);
  } catch (error) {
    const expected = error instanceof PageError;
    const fatal = !expected || error instanceof EngineError;
    say("failed", { during: data.kind, expected, fatal, text: error?.message ?? String(error) });
  }
});
say("ready");
