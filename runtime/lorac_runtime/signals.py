"""Signals: spectra, vibrations and other float data, as a ``.npz`` file holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import DataError

Array = npt.NDArray[Any]


def as_signals(path: Path, samples: Array, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
    """``samples`` of the file ``path`` as float32 (N, *shape); shape is (features,) or (channels, length), None: any.

    >>> as_signals(Path("fans.npz"), np.ones((2, 3)), (3,)).dtype
    dtype('float32')

    Raises DataError for other shapes, numbers that are no floats, and floats that are not finite (as float32).
    """
    if samples.dtype.kind != "f" or samples.dtype.itemsize > 8:
        raise DataError(f"samples of {path} are {described(samples)}, expected float16, float32 or float64")
    if shape is None and (samples.ndim not in (2, 3) or 0 in samples.shape[1:]):
        raise DataError(
            f"samples of {path} have shape {samples.shape}, expected (N, features) or (N, channels, length)"
        )
    if shape is not None and samples.shape[1:] != shape:
        expected = ", ".join(str(size) for size in shape)
        raise DataError(
            f"samples of {path} have shape {samples.shape}, expected (N, {expected}); cut or resample them to what the "
            "model was exported for"
        )
    return _finite_float32(path, samples)


def _finite_float32(path: Path, samples: Array) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(samples, np.float32)
    bad = {
        "NaN": int(np.isnan(samples).sum()),
        "infinite": int(np.isinf(samples).sum()),
        "beyond float32": int((np.isinf(numbers) & np.isfinite(samples)).sum()),
    }
    found = [f"{count} are {what}" for what, count in bad.items() if count]
    if found:
        raise DataError(
            f"of the {samples.size} values in samples of {path} {', '.join(found)}; expected finite numbers: leave "
            "such samples out, or repair them"
        )
    return numbers


def described(array: Array) -> str:
    """The type, and how many values are NaN if it can hold any.

    >>> described(np.array([1.0, np.nan]))
    'float64 and hold NaN (1 of 2 values)'
    """
    nans = int(np.isnan(array).sum()) if array.dtype.kind in "fc" else 0
    return f"{array.dtype}" + (f" and hold NaN ({nans} of {array.size} values)" if nans else "")
