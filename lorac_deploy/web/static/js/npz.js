// .npz files (zip archives of numpy arrays) in and out: `images` uint8 and `labels`, as `lorac-finetune` takes them.

import { DataError } from "./errors.js";

const [LOCAL, CENTRAL, END] = [0x04034b50, 0x02014b50, 0x06054b50];
const INTEGERS = {
  u1: Uint8Array, i1: Int8Array, u2: Uint16Array, i2: Int16Array, u4: Uint32Array, i4: Int32Array, u8: BigUint64Array, i8: BigInt64Array,
};

/** { pixels, labels }: uint8 (N, H, W, C) and class numbers. Throws DataError saying what was expected. */
export async function readNpz(file, input, classes) {
  const refuse = (why) => new DataError(`${file.name}: ${why}`);
  const entries = await unzipped(new Uint8Array(await file.arrayBuffer()), refuse);
  for (const key of ["images", "labels"]) {
    if (!entries.has(`${key}.npy`)) throw refuse(`it holds no array ${key}; expected images (uint8) and labels`);
  }
  const images = array(await entries.get("images.npy")(), refuse);
  const labels = array(await entries.get("labels.npy")(), refuse);
  if (images.kind !== "u1") throw refuse(`images are ${images.kind}, expected uint8, 0 to 255, not normalised`);
  if (labels.shape.length !== 1 || labels.shape[0] !== images.shape[0]) {
    throw refuse(`there are ${images.shape[0]} images but labels of shape (${labels.shape}); there must be one label each`);
  }
  const numbers = Array.from(labels.data, Number);
  const wrong = numbers.find((label) => !(label >= 0 && label < classes));
  if (wrong !== undefined) throw refuse(`labels must be 0 to ${classes - 1}, there is ${wrong}`);
  return { pixels: channelsLast(images, input, refuse), labels: numbers };
}

function channelsLast({ data, shape }, input, refuse) {
  const [channels, height, width] = input.shape;
  const is = (...expected) => shape.length === expected.length + 1 && expected.every((size, k) => shape[k + 1] === size);
  if (is(height, width, channels) || (channels === 1 && is(height, width))) return data;
  if (!is(channels, height, width)) {
    throw refuse(`images have shape (${shape.join(", ")}), expected (N, ${height}, ${width}, ${channels})`);
  }
  const [area, result] = [height * width, new Uint8Array(data.length)];
  for (let at = 0; at < data.length; at++) {
    const [rest, p] = [Math.floor(at / area), at % area];
    result[(Math.floor(rest / channels) * area + p) * channels + (rest % channels)] = data[at];
  }
  return result;
}

/** An .npy array: { kind, shape, data }. */
function array(bytes, refuse) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1;
  const start = (wide ? 12 : 10) + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder("latin1").decode(bytes.subarray(wide ? 12 : 10, start));
  const [, order, kind] = header.match(/'descr':\s*'([<>|=])(\w+)'/) ?? [];
  const shape = (header.match(/'shape':\s*\(([^)]*)\)/)?.[1] ?? "").split(",").filter((s) => s.trim()).map(Number);
  const Kind = INTEGERS[kind];
  if (!Kind || (order === ">" && kind[1] !== "1") || /'fortran_order':\s*True/.test(header)) {
    throw refuse("an array in it is not of whole numbers in C order; expected uint8 images and integer labels");
  }
  const count = shape.reduce((a, b) => a * b, 1);
  const content = bytes.slice(start, start + count * Kind.BYTES_PER_ELEMENT);
  if (content.length !== count * Kind.BYTES_PER_ELEMENT) throw refuse("it is cut off; copy it again");
  return { kind, shape, data: new Kind(content.buffer) };
}

/** Map name -> function that gives its bytes. */
async function unzipped(bytes, refuse) {
  const view = new DataView(bytes.buffer);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== END) end--;
  if (end < 0) throw refuse("it is no .npz file, or is cut off");
  const entries = new Map();
  let at = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count--) {
    if (at + 46 > bytes.length || view.getUint32(at, true) !== CENTRAL) throw refuse("its list of contents is damaged");
    const [nameLength, extra, comment] = [28, 30, 32].map((k) => view.getUint16(at + k, true));
    const [packed, place, method] = [view.getUint32(at + 20, true), view.getUint32(at + 42, true), view.getUint16(at + 10, true)];
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    entries.set(name, () => content(bytes, view, place, packed, method, refuse));
    at += 46 + nameLength + extra + comment;
  }
  return entries;
}

async function content(bytes, view, place, packed, method, refuse) {
  if (place + 30 > bytes.length || view.getUint32(place, true) !== LOCAL) throw refuse("it is damaged");
  const start = place + 30 + view.getUint16(place + 26, true) + view.getUint16(place + 28, true);
  const raw = bytes.subarray(start, start + packed);
  if (method === 0) return raw;
  if (method !== 8) throw refuse(`it is compressed by a method (${method}) that numpy does not write`);
  try {
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw refuse("it is damaged");
  }
}

/** The bytes of an .npz file of images (N, H, W, C) and labels, not compressed. */
export function writeNpz(pixels, labels, input) {
  const [channels, height, width] = input.shape;
  const files = [
    ["images.npy", npy("|u1", `(${labels.length}, ${height}, ${width}, ${channels})`, pixels)],
    ["labels.npy", npy("<i8", `(${labels.length},)`, new Uint8Array(BigInt64Array.from(labels, BigInt).buffer))],
  ];
  return zipped(files);
}

function npy(kind, shape, content) {
  const text = `{'descr': '${kind}', 'fortran_order': False, 'shape': ${shape}, }`;
  const length = Math.ceil((text.length + 11) / 64) * 64 - 10;
  const head = new TextEncoder().encode(text.padEnd(length - 1) + "\n");
  const bytes = new Uint8Array(10 + head.length + content.length);
  bytes.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, length & 255, length >> 8]);
  bytes.set(head, 10);
  bytes.set(content, 10 + head.length);
  return bytes;
}

function zipped(files) {
  const [parts, central] = [[], []];
  let at = 0;
  for (const [name, bytes] of files) {
    const label = new TextEncoder().encode(name);
    const fields = [20, 0, 0, 0, 0x21]; // version, flags, method (stored), time, date (1980-01-01)
    const sizes = [crc32(bytes), bytes.length, bytes.length];
    parts.push(record(LOCAL, [...fields], sizes, [label.length, 0]), label, bytes);
    central.push(record(CENTRAL, [20, ...fields], sizes, [label.length, 0, 0, 0, 0, 0, 0], at), label);
    at += 30 + label.length + bytes.length;
  }
  const length = central.reduce((all, part) => all + part.length, 0);
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, END, true);
  [8, 10].forEach((k) => end.setUint16(k, files.length, true));
  end.setUint32(12, length, true);
  end.setUint32(16, at, true);
  return new Blob([...parts, ...central, end.buffer]);
}

/** A header of a zip archive: a signature, 16-bit fields, 32-bit sizes, 16-bit fields, and the offset of an entry. */
function record(signature, fields, sizes, lengths, offset) {
  const size = 4 + 2 * fields.length + 12 + 2 * lengths.length + (offset === undefined ? 0 : 4);
  const view = new DataView(new ArrayBuffer(size));
  view.setUint32(0, signature, true);
  fields.forEach((v, k) => view.setUint16(4 + 2 * k, v, true));
  const middle = 4 + 2 * fields.length;
  sizes.forEach((v, k) => view.setUint32(middle + 4 * k, v, true));
  lengths.forEach((v, k) => view.setUint16(middle + 12 + 2 * k, v, true));
  if (offset !== undefined) view.setUint32(size - 4, offset, true);
  return new Uint8Array(view.buffer);
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
