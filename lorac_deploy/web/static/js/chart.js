// The curve of the loss: each step, and the mean of each epoch.

const NAMESPACE = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, RIGHT, BOTTOM, TOP] = [220, 52, 10, 30, 12];
const NARROWEST = 260;

/** Draw `losses`, with `perEpoch` steps in each epoch and `steps` in all, into a figure. */
export function drawLosses(figure, losses, perEpoch, steps) {
  figure.hidden = false;
  const width = Math.max(NARROWEST, figure.clientWidth); // drawn as wide as it is shown, so that its text keeps its size
  const top = losses.reduce((most, loss) => Math.max(most, loss), 1e-9);
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / Math.max(1, steps);
  const y = (loss) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - loss / top);
  const svg = element("svg", { class: "plot", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": summary(losses) });
  for (const share of [0, 0.5, 1]) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(share * top), y2: y(share * top) }));
    svg.append(text((share * top).toPrecision(2), { x: LEFT - 8, y: y(share * top) + 4, "text-anchor": "end" }));
  }
  svg.append(text("step", { x: LEFT, y: HEIGHT - 8 }), text(String(steps), { x: width - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }));
  svg.append(element("polyline", { class: "each", points: losses.map((loss, k) => `${x(k + 1)},${y(loss)}`).join(" ") }));
  const means = epochs(losses, perEpoch);
  if (means.length > 1) svg.append(element("polyline", { class: "mean", points: means.map(([k, m]) => `${x(k)},${y(m)}`).join(" ") }));
  const caption = document.createElement("figcaption");
  caption.textContent = "Loss: each step (thin) and the mean of each epoch (bold)";
  figure.replaceChildren(svg, caption);
}

function epochs(losses, size) {
  const found = [];
  for (let at = 0; at + size <= losses.length; at += size) {
    const part = losses.slice(at, at + size);
    found.push([at + size / 2, part.reduce((a, b) => a + b, 0) / size]);
  }
  return found;
}

function summary(losses) {
  return `Loss over ${losses.length} steps, from ${losses[0].toPrecision(3)} to ${losses.at(-1).toPrecision(3)}`;
}

function element(name, attributes) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(content, attributes) {
  const made = element("text", attributes);
  made.textContent = content;
  return made;
}
