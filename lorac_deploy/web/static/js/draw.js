// Drawing an image for a class, with a pointer or with the keyboard.

import { fitted } from "./images.js";

const SIDE = 288;
const STEP = 6;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const byId = (id) => document.getElementById(id);

/** The dialog; `onAdd(label, pixels)` gets each drawing and returns how many images the class has. */
export class Drawing {
  #input;
  #onAdd;
  #label = 0;
  #context;
  #at = [SIDE / 2, SIDE / 2];
  #empty = true;

  constructor(input, onAdd) {
    [this.#input, this.#onAdd] = [input, onAdd];
    const canvas = byId("canvas");
    [canvas.width, canvas.height] = [SIDE, Math.round((SIDE * input.shape[1]) / input.shape[2])];
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    canvas.addEventListener("pointerdown", (event) => this.#pointed(event, false));
    canvas.addEventListener("pointermove", (event) => event.buttons && this.#pointed(event, true));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    byId("draw-add").addEventListener("click", () => this.#add());
    byId("draw-clear").addEventListener("click", () => this.#clear());
    byId("draw-close").addEventListener("click", () => byId("draw").close());
    byId("paper").addEventListener("input", () => this.#clear());
  }

  /** Show the dialog for a class. */
  open(label, name) {
    this.#label = label;
    byId("draw-title").textContent = `Draw: ${name}`;
    byId("draw-add").textContent = `Add to ${name}`;
    byId("draw-count").textContent = "";
    this.#clear();
    byId("draw").showModal();
    byId("canvas").focus();
  }

  #clear() {
    const { canvas } = this.#context;
    this.#context.fillStyle = byId("paper").value;
    this.#context.fillRect(0, 0, canvas.width, canvas.height);
    this.#empty = true;
    this.#moved([canvas.width / 2, canvas.height / 2]);
  }

  #add() {
    if (this.#empty) {
      byId("draw-count").textContent = "There is nothing on the paper yet.";
      return;
    }
    const count = this.#onAdd(this.#label, fitted(this.#context.canvas, this.#input));
    this.#clear();
    byId("draw-count").textContent = `Added. The class has ${count} image${count === 1 ? "" : "s"}.`;
  }

  #pointed(event, line) {
    const box = event.target.getBoundingClientRect();
    const { canvas } = this.#context;
    const place = [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
    if (event.type === "pointerdown") event.target.setPointerCapture(event.pointerId);
    this.#stroke(line ? this.#at : place, place);
    this.#moved(place);
  }

  #key(event) {
    const way = ARROWS[event.key];
    if (!way) return;
    event.preventDefault();
    const { canvas } = this.#context;
    const limit = [canvas.width, canvas.height];
    const place = this.#at.map((v, k) => Math.min(limit[k], Math.max(0, v + STEP * way[k])));
    if (event.shiftKey) this.#stroke(this.#at, place);
    this.#moved(place);
  }

  #stroke(from, to) {
    const context = this.#context;
    context.strokeStyle = byId("ink").value;
    context.lineWidth = (Number(byId("width").value) * context.canvas.width) / 50;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    this.#empty = false;
  }

  #moved(place) {
    const { canvas } = this.#context;
    this.#at = place;
    byId("pen").style.left = `${(100 * place[0]) / canvas.width}%`;
    byId("pen").style.top = `${(100 * place[1]) / canvas.height}%`;
  }
}
