// What the user is told. Any other error is a bug of the page, and is shown as one.

/** The page's own errors: the text says what happened and what to do. */
export class PageError extends Error {}
/** Images or labels that cannot be trained on. */
export class DataError extends PageError {}
/** A file of the site that is missing, altered or not what it should be. */
export class SiteError extends PageError {}
/** Training whose loss or weights are not finite any more, or exploded. */
export class DivergenceError extends PageError {}
/** The engine refuses, or memory does not suffice. */
export class EngineError extends PageError {}

const NO_MEMORY = /out of memory|bad_alloc|Array buffer allocation|allocation failed|memory access out of bounds|grow|OOM/i;

/** Whether an error says that memory ran out. */
export function isOutOfMemory(error) {
  const text = String(error?.message ?? error);
  return error instanceof RangeError || typeof error === "number" || NO_MEMORY.test(text);
}

/** The text for an error of the engine while it did `what` with `images` images at once. */
export function translated(error, what, images) {
  if (error instanceof PageError) return error;
  if (!isOutOfMemory(error)) return new EngineError(`The engine could not ${what}: ${error?.message ?? error}`);
  const fewer = Math.max(1, images >> 2);
  const advice =
    images > 1
      ? `Close other tabs, or set “Images at once” to ${fewer} and train again: the result is the same.`
      : "Close other tabs, or use a device with more memory.";
  return new EngineError(
    `This browser has too little memory to ${what} with ${images} image${images === 1 ? "" : "s"} at once. ` +
      `Your images are still here. ${advice}`,
  );
}
