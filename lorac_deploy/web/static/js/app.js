// The page: it shows what there is, and leaves all heavy work to the worker.

import { absentClasses, refusal } from "./data.js";
import { drawLosses } from "./chart.js";
import { notice, size, download } from "./dom.js";
import { Drawing } from "./draw.js";
import { Gallery } from "./gallery.js";
import { pickedFiles } from "./dropped.js";
import { showResult } from "./result.js";
import { readSettings, showSettings } from "./settings.js";
import { writeNpz } from "./npz.js";

const byId = (id) => document.getElementById(id);
const SECOND = 1000;
const BETWEEN_DRAWINGS = 250; // milliseconds
let worker, site, manifest, gallery, drawing;
let run = null; // what is known of the training that runs, or ran last
let unsaved = false;

/** A worker that keeps to the page's own rule of what may be loaded: one from a blob inherits it. */
function startWorker() {
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  worker = new Worker(url, { type: "module" });
  worker.addEventListener("message", ({ data }) => HANDLERS[data.kind](data));
  worker.addEventListener("error", (event) => failed({ during: "open", text: `The page's worker failed: ${event.message || "it could not be loaded"}.` }));
}

const HANDLERS = {
  ready: () => worker.postMessage({ kind: "open" }),
  opened,
  loading: ({ done, total }) => progress(`Loading the model: ${size(done)} of ${size(total)}`, done / total),
  note: ({ text, keep }) => (keep ? byId("training-notes").append(notice("warning", text)) : progress(text || "Preparing", null)),
  before,
  step,
  paused: () => progressText("Paused. Nothing is lost: go on whenever you like."),
  stopped: () => ended(notice("warning", "Stopped. The images are still here.")),
  done,
  file: saved,
  failed,
};

function opened(message) {
  byId("not-started")?.remove();
  if (manifest) return; // a worker that was started anew
  ({ site, manifest } = message);
  const [channels, height, width] = manifest.input.shape;
  byId("title").textContent = `Adapt ${manifest.model} in this browser`;
  document.title = byId("title").textContent;
  byId("size-note").textContent = `The model takes ${width} × ${height} pixels${channels === 1 ? " of grey" : ""}; images of another size are scaled and cut.`;
  gallery = new Gallery(manifest, { onChange: imagesChanged, onDraw: (label) => drawing.open(label, manifest.class_names[label]) });
  drawing = new Drawing(manifest.input, (label, pixels) => gallery.add(label, pixels, "drawing"));
  gallery.listen(document);
  showSettings(byId("fields"), manifest.training, site.engines);
  byId("about").textContent = about(message.threads);
  for (const id of ["images", "training"]) byId(id).hidden = false;
  imagesChanged();
}

function about(threads) {
  const trained = manifest.trainables.reduce((all, { shape }) => all + shape.reduce((a, b) => a * b, 1), 0);
  const share = ((100 * trained) / manifest.model_parameters).toPrecision(2);
  const one = threads ? "several threads" : "one thread (see docs/browser.md for more)";
  return (
    `Method ${manifest.method}: ${trained.toLocaleString("en")} of ${manifest.model_parameters.toLocaleString("en")} parameters (${share} %) train. ` +
    `onnxruntime-web ${site.onnxruntime_web}, ${one}. ${site.producer}.`
  );
}

function imagesChanged() {
  const { labels } = gallery;
  const absent = absentClasses(labels, manifest.class_names);
  byId("counts").replaceChildren(labels.length ? `${labels.length} images of ${new Set(labels).size} classes.` : "No images yet.");
  if (absent) byId("counts").append(notice("warning", absent));
  for (const id of ["save-images", "remove-all"]) byId(id).disabled = !labels.length;
  unsaved = labels.length > 0 || Boolean(run?.after);
}

function begin() {
  const settings = readSettings(byId("settings"), manifest.training);
  if (!settings) return;
  const { labels } = gallery;
  const wrong = refusal(labels, manifest.class_names);
  byId("training-notes").replaceChildren(...(wrong ? [notice("problem", wrong)] : memoryWarning(settings)));
  if (wrong) return;
  run = { settings, losses: [], started: null, drawn: 0 };
  const pixels = gallery.pixels();
  worker.postMessage({ kind: "train", pixels, labels: Int32Array.from(labels), settings }, [pixels.buffer]);
  running(true);
  progress("Preparing", null);
}

/** A word before training where the artifact's computed need is near what the browser says that the device has. */
function memoryWarning(settings) {
  const known = manifest.memory.filter((need) => need.parts === settings.at_once < settings.batch_size && need.images <= settings.at_once);
  const need = known.at(-1)?.nbytes;
  const has = (navigator.deviceMemory ?? 0) * 2 ** 30;
  if (!need || !has || need < has / 2) return [];
  const text = `Training ${settings.at_once} images at once takes about ${size(need)}, and this device has ${size(has)}. If it fails, set “Images at once” to a smaller number.`;
  return [notice("warning", text)];
}

function running(on) {
  byId("train").disabled = on;
  byId("pause").hidden = byId("stop").hidden = !on;
  byId("pause").textContent = "Pause";
  byId("progress-box").hidden = !on;
  for (const field of byId("settings").elements) field.disabled = on;
}

function progress(text, share) {
  progressText(text);
  if (share === null) byId("progress").removeAttribute("value");
  else byId("progress").value = share;
}

function progressText(text) {
  byId("progress-text").textContent = text;
}

function before(message) {
  run = { ...run, ...message, started: performance.now() };
}

function step({ epoch, step, steps, loss, milliseconds }) {
  run.losses.push(loss);
  const perEpoch = steps / run.settings.epochs;
  const left = Math.round(((performance.now() - run.started) / step) * (steps - step) / SECOND);
  progress(`Epoch ${epoch} of ${run.settings.epochs}, step ${step} of ${steps}, loss ${loss.toPrecision(3)}, ${Math.round(milliseconds)} ms per step, about ${left} s left`, step / steps);
  if (step % perEpoch === 0) byId("progress-live").textContent = `Epoch ${epoch} of ${run.settings.epochs} is done.`;
  if (performance.now() - run.drawn < BETWEEN_DRAWINGS || step === 1) return;
  run.drawn = performance.now();
  drawLosses(byId("chart"), run.losses, perEpoch, steps);
}

function done(message) {
  run = { ...run, ...message };
  ended();
  showResult(run, site, (what) => worker.postMessage({ kind: "file", what }));
  unsaved = true;
}

function ended(...notes) {
  running(false);
  byId("training-notes").append(...notes);
}

function saved({ name, bytes, overflowed, saturated }) {
  download(name, bytes);
  const losses = [];
  if (overflowed) losses.push(`${overflowed} weights are too large for float16, the largest one is stored.`);
  if (saturated?.length) losses.push(`Biases that do not fit into 32 bits were cut off: ${saturated.join(", ")}.`);
  byId("result-notes").replaceChildren(notice("good", `${name}: ${size(bytes.length)}, saved where this browser keeps downloads.`), ...losses.map((text) => notice("warning", text)));
}

function failed({ during, text, expected, fatal }) {
  const said = expected === false ? `Something went wrong in this page: ${text}. Your images are still here.` : text;
  if (during === "open") {
    byId("not-started")?.remove();
    byId("problem").textContent = said;
    byId("problem").hidden = false;
  } else if (during === "file") {
    byId("result-notes").replaceChildren(notice("problem", said));
  } else {
    ended(notice("problem", said));
    if (fatal) anew();
  }
}

/** An engine that failed may have no memory left: another one begins from nothing. */
function anew() {
  worker.terminate();
  byId("result").hidden = true; // its files went with the worker
  startWorker();
}

function togglePause() {
  const pausing = byId("pause").textContent === "Pause";
  worker.postMessage({ kind: pausing ? "pause" : "resume" });
  byId("pause").textContent = pausing ? "Go on" : "Pause";
}

byId("train").addEventListener("click", begin);
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("pause").addEventListener("click", togglePause);
byId("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));
byId("remove-all").addEventListener("click", () => confirm(`Remove all ${gallery.labels.length} images?`) && gallery.clear());
byId("save-images").addEventListener("click", () => download("local.npz", writeNpz(gallery.pixels(), gallery.labels, manifest.input)));
byId("folder").addEventListener("change", async ({ target }) => {
  await gallery.addFolders(pickedFiles(target.files));
  target.value = "";
});
byId("npz").addEventListener("change", async ({ target }) => {
  await gallery.addNpz(target.files[0]);
  target.value = "";
});
addEventListener("beforeunload", (event) => unsaved && event.preventDefault());
startWorker();
