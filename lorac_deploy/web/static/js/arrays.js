// Arrays of several axes, flat in C order.

/** `data` of `shape` with its axes in the order `axes`, flat again; null leaves it as it is. */
export function transposed(data, shape, axes) {
  if (axes === null || axes === undefined) return data;
  const strides = shape.map((_, k) => shape.slice(k + 1).reduce((x, y) => x * y, 1));
  const sizes = axes.map((axis) => shape[axis]);
  const steps = axes.map((axis) => strides[axis]);
  const result = new data.constructor(data.length);
  const index = sizes.map(() => 0);
  let from = 0;
  for (let at = 0; at < result.length; at++) {
    result[at] = data[from];
    for (let k = sizes.length - 1; k >= 0; k--) {
      from += steps[k];
      if (++index[k] < sizes[k]) break;
      from -= steps[k] * sizes[k];
      index[k] = 0;
    }
  }
  return result;
}

/** Which index along `axis` each element of an array of `shape` has, as (elements per index, indices). */
export function along(shape, axis) {
  const inner = shape.slice(axis + 1).reduce((x, y) => x * y, 1);
  return (at) => Math.floor(at / inner) % shape[axis];
}
