// Fusing: a base file with W + delta in the byte ranges of the manifest's patch table, and every other byte as it was.
// The formulas are those of lorac_runtime/delta.py and lorac_runtime/fused.py, for folded coordinates.

import { SiteError } from "./errors.js";
import { halves, layerPieces } from "./stored.js";
import { transposed } from "./arrays.js";

const BASE = "base.onnx";

/** A copy of `target`, the bytes of the file `name`, with the trained `state` in it. `base` is base.onnx. */
export function fused(manifest, base, target, name, state) {
  const values = finalValues(manifest, base, state);
  const patches = manifest.patches.filter((patch) => patch.file === name);
  const partners = patches.filter((p) => p.quantization && values.has(p.tensor)).map((p) => p.quantization.partner);
  for (const partner of partners) {
    if (partner !== null && !values.has(partner)) values.set(partner, stored(manifest, base, partner));
  }
  const missing = [...values.keys()].filter((tensor) => !patches.some((p) => p.tensor === tensor));
  if (missing.length) throw new SiteError(`The patch table has no entry for ${missing.join(", ")} in ${name}: export the artifact again.`);
  const result = target.slice();
  const losses = { overflowed: 0, saturated: [] };
  for (const patch of patches.filter((p) => values.has(p.tensor))) {
    for (const [offset, bytes] of pieces(patch, patches, values, losses)) result.set(bytes, offset);
  }
  return { bytes: result, ...losses };
}

/** [offset, bytes] of all that a patch entry writes; a quantized bias is written with its weight. */
function pieces(patch, patches, values, losses) {
  const value = values.get(patch.tensor);
  if (patch.quantization) {
    if (patch.dtype !== "int8") return [];
    const partner = patches.find((p) => p.tensor === patch.quantization.partner) ?? null;
    return layerPieces(patch, value, partner, partner && values.get(partner.tensor), losses);
  }
  const numbers = transposed(value, patch.view ?? patch.shape, patch.permute);
  const data = patch.dtype === "float16" ? halves(numbers, losses) : numbers;
  return [[patch.offset, new Uint8Array(data.buffer, data.byteOffset, data.byteLength)]];
}

/** Final value, float32, of every tensor of the patch table that training changed, by name. */
export function finalValues(manifest, base, state) {
  const entries = new Set(manifest.patches.filter((p) => p.file === BASE).map((p) => p.tensor));
  const values = new Map();
  for (const { name, role } of manifest.trainables) {
    if (entries.has(name)) values.set(name, state.get(name).data);
    else if (role === "weight" || role === "bias") {
      throw new SiteError(`The patch table has no entry for ${name}: export the artifact again.`);
    }
  }
  for (const adapter of manifest.adapters) {
    const start = values.get(adapter.weight) ?? stored(manifest, base, adapter.weight);
    values.set(adapter.weight, plusDelta(start, adapter, state));
  }
  for (const partial of manifest.partials) {
    const start = values.get(partial.weight) ?? stored(manifest, base, partial.weight);
    values.set(partial.weight, withColumns(start, partial, state.get(partial.tensor).data));
  }
  return values;
}

/** A tensor as base.onnx has it, in its own shape. */
function stored(manifest, base, tensor) {
  const patch = manifest.patches.find((p) => p.file === BASE && p.tensor === tensor);
  if (!patch) throw new SiteError(`The patch table has no entry for ${tensor}: export the artifact again.`);
  const numbers = new Float32Array(base.slice(patch.offset, patch.offset + patch.nbytes).buffer);
  if (!patch.permute) return numbers;
  const axes = patch.view ?? patch.shape;
  const inverse = patch.permute.map((_, axis) => patch.permute.indexOf(axis));
  return transposed(numbers, patch.permute.map((axis) => axes[axis]), inverse);
}

/** (c_out, c_in/groups, k_h, k_w) of a weight; 1-D kernels have k_h = 1, fully connected layers k_w = 1 too. */
function dimensions(shape) {
  if (shape.length === 2) return [...shape, 1, 1];
  return shape.length === 3 ? [shape[0], shape[1], 1, shape[2]] : shape;
}

/** weight + alpha / r * arrange(lora_b @ lora_a), rounded to float32 after each operation. */
function plusDelta(weight, adapter, state) {
  const [cOut, cIn, kH, kW] = dimensions(adapter.weight_shape);
  const [a, b] = [state.get(adapter.lora_a).data, state.get(adapter.lora_b).data];
  const alpha = adapter.lora_alpha === null ? adapter.alpha : state.get(adapter.lora_alpha).data[0];
  const scale = Math.fround(alpha / adapter.r);
  const columns = cIn * kW;
  const perPair = (cOut * kH) / adapter.pairs;
  const result = new Float32Array(weight.length);
  const product = new Float32Array(columns); // rounds each sum, as a fused multiply-add in float32 does
  for (let row = 0; row < cOut * kH; row++) {
    rowOfProduct(product, a, b, row, adapter.rank, Math.floor(row / perPair));
    for (let column = 0; column < columns; column++) {
      const at = adapter.layout === "paper" ? row * columns + column : spatialPlace(row, column, cIn, kH, kW);
      result[at] = weight[at] + Math.fround(Math.fround(product[column]) * scale);
    }
  }
  return result;
}

/** Element (o, i, u, v) of a weight for row o * k_h + u and column i * k_w + v of the product. */
function spatialPlace(row, column, cIn, kH, kW) {
  const [o, u] = [Math.floor(row / kH), row % kH];
  const [i, v] = [Math.floor(column / kW), column % kW];
  return ((o * cIn + i) * kH + u) * kW + v;
}

/** A row of B A; rows of a pair's B see rows of its A alone. */
function rowOfProduct(product, a, b, row, rank, pair) {
  product.fill(0);
  for (let k = 0; k < rank; k++) {
    const factor = b[row * rank + k];
    const start = (pair * rank + k) * product.length;
    for (let column = 0; column < product.length; column++) product[column] += factor * a[start + column];
  }
}

/** `weight` with the trained input channels in their places. */
function withColumns(weight, partial, trained) {
  const [cOut, cIn] = partial.weight_shape;
  const kernel = partial.weight_shape.slice(2).reduce((x, y) => x * y, 1);
  const result = weight.slice();
  const count = partial.channels.length;
  for (let o = 0; o < cOut; o++) {
    partial.channels.forEach((channel, n) => {
      const from = (o * count + n) * kernel;
      result.set(trained.subarray(from, from + kernel), (o * cIn + channel) * kernel);
    });
  }
  return result;
}
