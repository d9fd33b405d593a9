// What came out of a training, and the files to take home.

import { drawLosses } from "./chart.js";
import { made, notice, size } from "./dom.js";

const byId = (id) => document.getElementById(id);

/** Show accuracies and downloads of a finished run; `onFile(name)` is called for each file that is wanted. */
export function showResult(run, site, onFile) {
  const { before, after, held, losses, milliseconds } = run;
  drawLosses(byId("chart"), losses, losses.length / run.settings.epochs, losses.length);
  byId("figures").replaceChildren(
    made(
      "dl",
      { class: "figures" },
      ...(held ? [figure("Accuracy before → after", `${percent(before.accuracy)} → ${percent(after.accuracy)}`, among(run))] : []),
      figure("Loss before → after", `${before.loss.toPrecision(3)} → ${after.loss.toPrecision(3)}`, held ? "on the same images" : "on images that it trained on"),
      figure("Time", `${milliseconds < 10 ? milliseconds.toPrecision(2) : Math.round(milliseconds)} ms per step`, `${losses.length} steps, ${run.device === "webgpu" ? "WebGPU" : "WebAssembly"}`),
    ),
    ...(held ? [] : [notice("warning", "No images were held out, so there is no accuracy: nothing tells whether the model became better.")]),
    ...(held && after.accuracy < before.accuracy ? [notice("warning", "On the held-out images the model got worse. Keep the old file, or try more images or a lower learning rate.")] : []),
    ...(held && held < 20 ? [notice("warning", `${held} held-out images prove little: one of them is ${percent(1 / held)} of the accuracy.`)] : []),
  );
  const files = [...site.formats.map((format) => `fused.${format}`), "adapter.safetensors"];
  byId("downloads").replaceChildren(...files.map((name) => button(name, site, onFile)));
  byId("result-notes").replaceChildren();
  byId("result").hidden = false;
  byId("result-title").focus();
}

function figure(title, value, note) {
  return made("div", {}, made("dt", {}, title), made("dd", {}, value, made("small", {}, note)));
}

function among({ held, train, settings }) {
  return `on ${held} held-out images, by class (seed ${settings.seed}); ${train} trained`;
}

function button(name, site, onFile) {
  const nbytes = name === "adapter.safetensors" ? site.files[name].nbytes : site.files[name.replace("fused", "base")].nbytes;
  const element = made("button", { type: "button", ...(name === "fused.onnx" ? { class: "main" } : {}) }, `Download ${name} (${size(nbytes)})`);
  element.addEventListener("click", () => onFile(name));
  return element;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}
