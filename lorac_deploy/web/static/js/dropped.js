// Files that were dropped or picked, folders walked, each with the name of the folder that it lies in.

/** [{ file, folder }] of a drop; `folder` is null for files that were dropped themselves. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const found = [];
  for (const entry of entries) await walk(entry, null, found);
  return found;
}

async function walk(entry, folder, found) {
  if (entry.name.startsWith(".")) return;
  if (entry.isFile) {
    found.push({ file: await new Promise((ok, no) => entry.file(ok, no)), folder });
    return;
  }
  const reader = entry.createReader();
  for (let part = await next(reader); part.length; part = await next(reader)) {
    for (const inner of part) await walk(inner, entry.name, found);
  }
}

function next(reader) {
  return new Promise((ok, no) => reader.readEntries(ok, no));
}

/** The same of a picked folder: its files know their paths. */
export function pickedFiles(files) {
  const all = [...files].filter((file) => !file.webkitRelativePath.split("/").some((part) => part.startsWith(".")));
  return all.map((file) => ({ file, folder: file.webkitRelativePath.split("/").at(-2) ?? null }));
}
