// The labelled images: how they come in, and what is shown of them.

import { decoded, shown } from "./images.js";
import { DataError } from "./errors.js";
import { droppedFiles } from "./dropped.js";
import { readNpz } from "./npz.js";
import { made, notice } from "./dom.js";

const MOST_THUMBS = 12;
const MOST_CARDS = 24; // with more classes, only those with images are shown, and a search
const MOST_NAMED = 8; // problems named in one message
const byId = (id) => document.getElementById(id);

/** All images of the page. `onChange` is called whenever they change. */
export class Gallery {
  #manifest;
  #onChange;
  #items = [];
  #cards = [];
  #onDraw;

  constructor(manifest, { onChange, onDraw }) {
    [this.#manifest, this.#onChange, this.#onDraw] = [manifest, onChange, onDraw];
    this.#cards = manifest.class_names.map((name, label) => this.#card(name, label));
    byId("classes").append(...this.#cards.map((card) => card.root));
    byId("find-box").hidden = manifest.class_names.length <= MOST_CARDS;
    byId("find").addEventListener("input", () => this.#show());
    this.#show();
  }

  get labels() {
    return this.#items.map((item) => item.label);
  }

  /** All pixels, uint8 (N, H, W, C), in the order of labels. */
  pixels() {
    const size = this.#size;
    const all = new Uint8Array(this.#items.length * size);
    this.#items.forEach((item, n) => all.set(item.pixels, n * size));
    return all;
  }

  get #size() {
    return this.#manifest.input.shape.reduce((a, b) => a * b, 1);
  }

  /** Add an image; returns how many its class has then. */
  add(label, pixels, name) {
    this.#items.push({ label, pixels, name });
    this.#changed();
    return this.#items.filter((item) => item.label === label).length;
  }

  clear() {
    this.#items = [];
    this.#changed();
  }

  /** Add image files to a class; what is not an image is named, the rest is taken. */
  async addFiles(files, label) {
    await this.#take([...files].map((file) => ({ file, label })), []);
  }

  /** Add files of folders that are named like classes. */
  async addFolders(found) {
    const numbers = new Map(this.#manifest.class_names.map((name, label) => [name, label]));
    const unknown = [...new Set(found.filter((f) => !numbers.has(f.folder)).map((f) => f.folder ?? f.file.name))];
    const problems = unknown.map((name) => `${name}: no class of the model has this name, so it was left out`);
    await this.#take(found.filter((f) => numbers.has(f.folder)).map((f) => ({ file: f.file, label: numbers.get(f.folder) })), problems);
  }

  /** Add the images of an .npz file. */
  async addNpz(file) {
    try {
      const { pixels, labels } = await readNpz(file, this.#manifest.input, this.#manifest.output.classes);
      labels.forEach((label, n) => {
        this.#items.push({ label, pixels: pixels.subarray(n * this.#size, (n + 1) * this.#size), name: `${file.name} ${n}` });
      });
      this.#tell([], labels.length, 0);
    } catch (error) {
      if (!(error instanceof DataError)) throw error;
      this.#tell([error.message], 0, 0);
    }
    this.#changed();
  }

  async #take(files, problems) {
    let [added, resized] = [0, 0];
    for (const { file, label } of files) {
      try {
        const image = await decoded(file, this.#manifest.input);
        this.#items.push({ label, pixels: image.pixels, name: file.name });
        added += 1;
        resized += image.resized;
      } catch (error) {
        if (!(error instanceof DataError)) throw error;
        problems.push(error.message);
      }
    }
    this.#tell(problems, added, resized);
    this.#changed();
  }

  #tell(problems, added, resized) {
    const notes = [];
    if (problems.length) {
      const more = problems.length > MOST_NAMED ? [`and ${problems.length - MOST_NAMED} more`] : [];
      notes.push(notice("problem", [`Not added:`, ...problems.slice(0, MOST_NAMED), ...more].join("\n")));
    }
    const [, height, width] = this.#manifest.input.shape;
    const cut = resized ? ` ${resized} of them had another size: scaled, and the middle ${width} × ${height} pixels cut out.` : "";
    if (added) notes.push(notice("good", `${added} image${added === 1 ? "" : "s"} added.${cut}`));
    byId("image-notes").replaceChildren(...notes);
  }

  #changed() {
    this.#show();
    this.#onChange();
  }

  #show() {
    const wanted = byId("find").value.trim().toLowerCase();
    const many = this.#cards.length > MOST_CARDS;
    this.#cards.forEach((card, label) => {
      const own = this.#items.filter((item) => item.label === label);
      const found = wanted && card.name.toLowerCase().includes(wanted);
      card.root.hidden = many && !own.length && !found;
      card.count.textContent = `${own.length} image${own.length === 1 ? "" : "s"}`;
      card.thumbs.replaceChildren(...own.slice(-MOST_THUMBS).map((item) => this.#thumb(item, card)));
      if (own.length > MOST_THUMBS) card.thumbs.append(made("span", { class: "hint" }, `and ${own.length - MOST_THUMBS} more`));
    });
  }

  #thumb(item, card) {
    if (!item.canvas) {
      item.canvas = document.createElement("canvas");
      shown(item.canvas, item.pixels, this.#manifest.input);
    }
    const button = made("button", { type: "button", "aria-label": `Remove ${item.name}`, title: `Remove ${item.name}` }, item.canvas);
    button.addEventListener("click", () => {
      this.#items = this.#items.filter((other) => other !== item);
      this.#changed();
      (card.thumbs.querySelector("button") ?? card.input).focus();
    });
    return button;
  }

  #card(name, label) {
    const input = made("input", { type: "file", class: "hidden-input", multiple: "", accept: "image/*", id: `add-${label}` });
    const count = made("span", { class: "count" });
    const thumbs = made("div", { class: "thumbs" });
    const draw = made("button", { type: "button", "aria-label": `Draw ${name}` }, "Draw …");
    const pick = made("label", { class: "button", for: input.id }, "Add …", made("span", { class: "sr" }, ` images of ${name}`));
    const root = made("li", { class: "class" }, made("header", {}, made("h3", {}, name), count), thumbs, made("div", { class: "bar" }, pick, input, draw));
    input.addEventListener("change", async () => {
      await this.addFiles(input.files, label);
      input.value = "";
    });
    draw.addEventListener("click", () => this.#onDraw(label));
    takeDrops(root, async (found) => this.#dropped(found, label));
    return { name, root, count, thumbs, input };
  }

  /** Files that were dropped on a class, or beside all of them (`label` null). */
  async #dropped(found, label) {
    for (const { file } of found.filter((f) => isNpz(f.file))) await this.addNpz(file);
    const rest = found.filter((f) => !isNpz(f.file));
    if (rest.some((f) => f.folder !== null)) await this.addFolders(rest);
    else if (rest.length && label !== null) await this.addFiles(rest.map((f) => f.file), label);
    else if (rest.length) this.#tell([`${rest[0].file.name}: drop images on the class that they belong to, or a folder with a sub-folder for each class`], 0, 0);
  }

  /** Take what is dropped anywhere on the page. */
  listen(root) {
    takeDrops(root, async (found) => this.#dropped(found, null));
  }
}

function isNpz(file) {
  return file.name.toLowerCase().endsWith(".npz");
}

function takeDrops(root, onFiles) {
  const mark = (on) => root.classList?.toggle("over", on);
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    mark(true);
  });
  root.addEventListener("dragleave", () => mark(false));
  root.addEventListener("drop", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    mark(false);
    await onFiles(await droppedFiles(event.dataTransfer));
  });
}
