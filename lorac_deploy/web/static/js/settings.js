// The settings of a training: the same names, defaults and limits as `lorac-finetune`.

import { made } from "./dom.js";

const FIELDS = [
  { name: "epochs", label: "Epochs", hint: "passes over the images", type: "number", min: 1, step: 1 },
  { name: "lr", label: "Learning rate", hint: "the highest", type: "number", min: 0, step: "any" },
  { name: "batch_size", label: "Batch size", hint: "images per step", type: "number", min: 1, step: 1 },
  { name: "val_fraction", label: "Held-out share", hint: "measures, never trains", type: "number", min: 0, max: 0.9, step: "any" },
  { name: "seed", label: "Seed", hint: "same seed, same order", type: "number", min: 0, max: 2 ** 53 - 1, step: 1 },
  { name: "at_once", label: "Images at once", hint: "fewer take less memory", type: "number", min: 1, step: 1 },
];

/** Show the fields with the artifact's defaults; `engines` are the builds that the site has. */
export function showSettings(root, training, engines) {
  const defaults = { ...training, val_fraction: 0.2, seed: 0, at_once: training.batch_size };
  root.append(...FIELDS.map((field) => shownField(field, defaults[field.name])));
  if (engines.includes("webgpu")) root.append(shownDevices());
  const [batch, pieces] = ["batch_size", "at_once"].map((name) => root.querySelector(`[name=${name}]`));
  batch.addEventListener("input", () => (pieces.value = batch.value));
}

function shownField({ name, label, hint, ...attributes }, value) {
  const own = { id: `set-${name}`, name, value, required: "", inputmode: "decimal", "aria-describedby": `hint-${name}`, ...attributes };
  return made("div", { class: "field" }, made("label", { for: own.id }, label), made("input", own), made("p", { class: "hint", id: `hint-${name}` }, hint));
}

function shownDevices() {
  const select = made("select", { id: "set-device", name: "device", "aria-describedby": "hint-device" });
  select.append(made("option", { value: "wasm" }, "Processor"), made("option", { value: "webgpu" }, "WebGPU"));
  const hint = "WebGPU: the graphics processor, checked first";
  return made("div", { class: "field" }, made("label", { for: "set-device" }, "Compute with"), select, made("p", { class: "hint", id: "hint-device" }, hint));
}

/** The settings as they stand, or null with the first wrong field shown to the user. */
export function readSettings(form, training) {
  form.elements.lr.setCustomValidity("");
  if (!form.reportValidity()) return null;
  const given = Object.fromEntries(new FormData(form));
  const found = { warmup: training.warmup, device: given.device ?? "wasm" };
  for (const { name } of FIELDS) found[name] = Number(given[name]);
  form.elements.lr.setCustomValidity(found.lr > 0 ? "" : "The learning rate must be above 0.");
  return form.reportValidity() ? found : null;
}
