// Small helpers for elements. All text goes in as text, never as markup.

/** An element with attributes and children. */
export function made(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A boxed message: "problem", "warning" or "good". */
export function notice(kind, text) {
  return made("div", { class: `notice ${kind}`, role: kind === "problem" ? "alert" : "note" }, text);
}

/** A size in bytes for people. */
export function size(nbytes) {
  return nbytes < 1e5 ? `${(nbytes / 1e3).toFixed(1)} kB` : `${(nbytes / 1e6).toFixed(1)} MB`;
}

/** Offer bytes as a file to save. */
export function download(name, content) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content]));
  const link = made("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
