"""Do the patched bytes of a fused .tflite hold the base plus the adapter, as nearly as their type can?

Stricter than comparing answers where numbers are rounded: a weight that lies one channel off changes the answers of an
int8 file hardly more than rounding does. Decoding is written here a second time on purpose, to check the writer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_exporters.checks import Check, shortened
from lorac_exporters.references import patches_of
from lorac_runtime import manifest as mf
from lorac_runtime.patch import base_weights, batchnorm_tensors, fused_weights

Array = npt.NDArray[Any]
NAME = "patched numbers"
# Half a step of rounding, and what other additions on another processor may add to it.
ROUNDING, SPARE = 0.5, 0.01
FLOAT_SPARE = 1e-5  # of the tensor's largest number
HALF_MAX = 65504.0


def stored_check(fused: Path, folder: Path, manifest: mf.Manifest, state: Mapping[str, Array]) -> Check:
    """Whether every tensor of the patch table of base.tflite holds its new value in the file ``fused``.

    ``state`` is the adapter in the artifact's coordinates (`references.adapted_state`).
    """
    base = base_weights(folder, manifest)
    values = {**base, **fused_weights(manifest, base, state, batchnorm_tensors(folder, manifest))}
    content, patches = fused.read_bytes(), patches_of(manifest, mf.BASE_TFLITE)
    wrong = list(_wrong(content, patches, values))
    if wrong:
        return Check(NAME, "fail", shortened(wrong))
    return Check(NAME, "pass", f"{len(patches)} tensors hold the base plus the adapter, rounded to their type")


def _wrong(content: bytes, patches: Iterable[mf.Patch], values: Mapping[str, Array]) -> Iterable[str]:
    for patch in patches:
        if len(content) < patch.offset + patch.nbytes:
            yield f"{patch.tensor} lies beyond the end of the file"
            continue
        off = steps_off(content, patch, values[patch.tensor])
        if not off <= 1:
            yield f"{patch.tensor} ({patch.dtype}) is off by {off:.1f} times what rounding explains"


def steps_off(content: bytes, patch: mf.Patch, value: Array) -> float:
    """The largest difference between a stored tensor and its ``value``, in units of what rounding explains."""
    stored = stored_numbers(content, patch)
    with np.errstate(invalid="ignore", over="ignore"):
        if patch.quantization is not None:
            scale = _scales(content, patch)
            allowed = scale * (ROUNDING + SPARE) + 1e-7 * np.abs(value)
            stored = stored * scale
        elif patch.dtype == "float16":
            value = np.clip(value, -HALF_MAX, HALF_MAX)
            allowed = np.abs(value) * 2.0**-11 * (1 + SPARE) + 2.0**-25 + FLOAT_SPARE * 1e-2 * np.max(np.abs(value))
        else:
            allowed = np.asarray(FLOAT_SPARE * np.max(np.abs(value), initial=0.0) + np.finfo(np.float32).tiny)
        return float(np.max(np.abs(stored - value) / allowed, initial=0.0))


def stored_numbers(content: bytes, patch: mf.Patch) -> npt.NDArray[np.float64]:
    """A patched tensor's stored numbers in its own shape, not yet times their scale."""
    axes = patch.view or patch.shape
    order = patch.permute or tuple(range(len(axes)))
    dtype = np.dtype(patch.dtype).newbyteorder("<")
    numbers = np.frombuffer(content, dtype, patch.nbytes // dtype.itemsize, patch.offset)
    turned = numbers.reshape([axes[axis] for axis in order]).transpose(np.argsort(order))
    return turned.reshape(patch.shape).astype(np.float64)


def _scales(content: bytes, patch: mf.Patch) -> npt.NDArray[np.float64]:
    """The scales of a quantized tensor, so shaped that they spread along its output channels."""
    how = patch.quantization
    if how is None:
        return np.ones(())
    found = np.frombuffer(content, "<f4", how.scales.nbytes // 4, how.scales.offset).astype(np.float64)
    return found if found.size == 1 else found.reshape([-1 if a == how.axis else 1 for a in range(len(patch.shape))])
