// adapter.safetensors in and out: 8 bytes of length, a JSON header, the tensors' bytes (little-endian float32).

import { SiteError } from "./errors.js";

const ALIGNMENT = 8;

/** { tensors: Map name -> { shape, data }, metadata } of a file that holds float32 tensors. */
export function read(bytes, where) {
  const refuse = (why) => new SiteError(`${where} is not a whole safetensors file (${why}); copy the site again`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8) throw refuse(`${bytes.length} bytes`);
  const start = 8 + Number(view.getBigUint64(0, true));
  if (start > bytes.length) throw refuse("its header ends behind the file");
  const { __metadata__: metadata = {}, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(entries)) {
    if (dtype !== "F32") throw refuse(`${name} is ${dtype}, expected F32`);
    if (start + to > bytes.length || (to - from) % 4) throw refuse(`${name} lies outside of it`);
    tensors.set(name, { shape, data: new Float32Array(bytes.slice(start + from, start + to).buffer) });
  }
  return { tensors, metadata };
}

/** The bytes of a file; equal content gives equal bytes. Names are written in the order of their code points. */
export function write(tensors, metadata) {
  const names = [...tensors.keys()].sort(byCodePoint);
  const header = { __metadata__: sorted(metadata) };
  let at = 0;
  for (const name of names) {
    const { shape, data } = tensors.get(name);
    header[name] = { data_offsets: [at, at + data.byteLength], dtype: "F32", shape };
    at += data.byteLength;
  }
  const text = new TextEncoder().encode(ascii(JSON.stringify(sorted(header))));
  const length = Math.ceil(text.length / ALIGNMENT) * ALIGNMENT;
  const bytes = new Uint8Array(8 + length + at).fill(0x20, 8, 8 + length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(length), true);
  bytes.set(text, 8);
  let place = 8 + length;
  for (const name of names) {
    const { data } = tensors.get(name);
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), place);
    place += data.byteLength;
  }
  return bytes;
}

function sorted(object) {
  return Object.fromEntries(Object.entries(object).sort(([a], [b]) => byCodePoint(a, b)));
}

function byCodePoint(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** JSON text with everything beyond ASCII escaped, as the device's runtime writes it. */
function ascii(text) {
  return text.replace(/[^\x00-\x7f]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
