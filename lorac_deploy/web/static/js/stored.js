// From float32 numbers to what a TFLite file stores: half precision, or int8 with scales.
// The formulas of lorac_runtime/stored.py and lorac_runtime/quantization.py, to the bit.

import { along, transposed } from "./arrays.js";
import { DataError } from "./errors.js";

const WEIGHT_LIMIT = 127;
const BIAS_LIMIT = 2 ** 30;
const SMALLEST_STEP = 2 ** -28;
const INT32 = [-(2 ** 31), 2 ** 31 - 1];
const LARGEST_HALF = 0x7bff;
const FLOAT = new Float32Array(1);
const BITS = new Uint32Array(FLOAT.buffer);

/** The bits of the nearest float16 numbers, ties to even; what is too large becomes the largest one and is counted. */
export function halves(values, losses) {
  return Uint16Array.from(values, (value) => {
    const half = halfOf(value);
    if ((half & 0x7fff) < 0x7c00) return half;
    losses.overflowed += 1;
    return (half & 0x8000) | LARGEST_HALF;
  });
}

function halfOf(value) {
  FLOAT[0] = value;
  const sign = (BITS[0] >>> 16) & 0x8000;
  const exponent = ((BITS[0] >>> 23) & 0xff) - 112;
  const mantissa = BITS[0] & 0x7fffff;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent < -10) return sign;
  const whole = exponent > 0 ? (exponent << 23) | mantissa : mantissa | 0x800000;
  const shift = exponent > 0 ? 13 : 14 - exponent;
  return sign | roundedShift(whole, shift);
}

/** value / 2^shift to the nearest whole number, ties to even. A carry moves into the exponent, as it should. */
function roundedShift(value, shift) {
  const kept = Math.floor(value / 2 ** shift);
  const rest = value - kept * 2 ** shift;
  const half = 2 ** (shift - 1);
  return rest > half || (rest === half && kept % 2) ? kept + 1 : kept;
}

/** The nearest whole number, ties to even. */
export function rint(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return rest > 0.5 ? below + 1 : below;
  return below % 2 ? below + 1 : below;
}

/** [offset, bytes] of an int8 weight, of its scales, and of the int32 bias whose scales follow from them. */
export function layerPieces(weight, value, bias, offsets, losses) {
  const { axis, scales: place, input_scale: inputScale } = weight.quantization;
  const channels = place.nbytes === 4 * weight.shape[axis] ? weight.shape[axis] : 1;
  const channel = channels > 1 ? along(weight.shape, axis) : () => 0;
  const scales = scalesOf(peaks(value, channel, channels), offsets && peaks(offsets, (i) => i % channels, channels), inputScale, weight);
  const numbers = Int8Array.from(value, (w, at) => clipped(rint(Math.fround(w / scales[channel(at)])), -WEIGHT_LIMIT, WEIGHT_LIMIT));
  const found = [
    [weight.offset, bytesOf(transposed(numbers, weight.view ?? weight.shape, weight.permute))],
    [place.offset, bytesOf(scales)],
  ];
  return bias?.quantization ? [...found, ...biasPieces(bias, offsets, scales, inputScale, losses)] : found;
}

function biasPieces(bias, offsets, scales, inputScale, losses) {
  const steps = Float32Array.from(scales, (scale) => scale * inputScale);
  const exact = Array.from(offsets, (value, k) => rint(value / steps[k % steps.length]));
  if (exact.some((n) => n < INT32[0] || n > INT32[1])) losses.saturated.push(bias.tensor);
  const numbers = Int32Array.from(exact, (n) => clipped(n, ...INT32));
  return [
    [bias.quantization.scales.offset, bytesOf(steps)],
    [bias.offset, bytesOf(numbers)],
  ];
}

/** Largest magnitude for each channel. */
function peaks(values, channel, count) {
  const found = new Float32Array(count);
  values.forEach((value, at) => {
    const c = channel(at);
    found[c] = value !== value ? value : Math.max(found[c], Math.abs(value));
  });
  return found;
}

function scalesOf(weightPeaks, biasPeaks, inputScale, weight) {
  if (![...weightPeaks, ...(biasPeaks ?? [])].every(Number.isFinite)) {
    throw new DataError(`${weight.tensor} cannot be stored in ${weight.file}: it holds numbers that are not finite.`);
  }
  return Float32Array.from(weightPeaks, (peak, k) =>
    Math.max(peak / WEIGHT_LIMIT, SMALLEST_STEP / inputScale, biasPeaks ? biasPeaks[k] / (inputScale * BIAS_LIMIT) : 0),
  );
}

function clipped(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

function bytesOf(array) {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}
