// Tables sort by the buttons in their heads; a line's first cell shows and hides its details.
"use strict";

const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

function valueOf(line, column, numeric) {
  const cell = line.rows[0].cells[column];
  if (numeric) return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  return cell.textContent.trim() || null;
}

// Missing values come last in both directions.
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? a - b : words.compare(a, b));
}

function sort(head) {
  const table = head.closest("table");
  const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  const numeric = head.classList.contains("number");
  const lines = [...table.tBodies].map((line) => ({ line, value: valueOf(line, head.cellIndex, numeric) }));
  lines.sort((a, b) => compare(a.value, b.value, direction === "ascending" ? 1 : -1));
  table.append(...lines.map(({ line }) => line));
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", direction);
}

function toggle(button) {
  const details = document.getElementById(button.getAttribute("aria-controls"));
  details.hidden = !details.hidden;
  button.setAttribute("aria-expanded", String(!details.hidden));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button === null) return;
  if (button.classList.contains("sort")) sort(button.closest("th"));
  if (button.classList.contains("more")) toggle(button);
});
