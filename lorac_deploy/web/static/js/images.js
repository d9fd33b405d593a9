// Image files to pixels of the model's size, uint8 (H, W, C), as Pillow reads them where the size is right already.

import { DataError } from "./errors.js";

/** { pixels, resized } of an image file. Throws DataError for a file that is no image. */
export async function decoded(file, input) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new DataError(`${file.name} is not an image that this browser can read`);
  }
  try {
    const [, height, width] = input.shape;
    return { pixels: fitted(bitmap, input), resized: bitmap.width !== width || bitmap.height !== height };
  } finally {
    bitmap.close();
  }
}

/** Pixels of anything that a canvas can draw: scaled until it covers the model's size, the middle cut out. */
export function fitted(source, input) {
  const [channels, height, width] = input.shape;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / source.width, height / source.height);
  const [w, h] = [width / scale, height / scale];
  context.drawImage(source, (source.width - w) / 2, (source.height - h) / 2, w, h, 0, 0, width, height);
  return channelsOf(context.getImageData(0, 0, width, height).data, channels);
}

/** 1 (grey, with Pillow's weights), 3 or 4 of the four values of each pixel. */
function channelsOf(rgba, channels) {
  const count = rgba.length / 4;
  const pixels = new Uint8Array(count * channels);
  for (let p = 0; p < count; p++) {
    const [r, g, b, a] = rgba.subarray(4 * p, 4 * p + 4);
    if (channels === 1) pixels[p] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else pixels.set(channels === 3 ? [r, g, b] : [r, g, b, a], p * channels);
  }
  return pixels;
}

/** Draw pixels on a canvas of the model's size. */
export function shown(canvas, pixels, input) {
  const [channels, height, width] = input.shape;
  [canvas.width, canvas.height] = [width, height];
  const image = new ImageData(width, height);
  for (let p = 0; p < width * height; p++) {
    const own = pixels.subarray(p * channels, (p + 1) * channels);
    image.data.set(channels === 1 ? [own[0], own[0], own[0], 255] : [own[0], own[1], own[2], own[3] ?? 255], 4 * p);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
