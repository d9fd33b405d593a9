"""Names of samples that stay the same while a data set grows or is sorted anew: ``ids`` of an ``.npz`` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import DataError

Array = npt.NDArray[Any]
_SHOWN = 5


def checked_ids(path: Path, ids: Array, count: int) -> Array:
    """``ids`` of the file ``path``: integers or strings (N,), one for each of ``count`` samples, each once.

    >>> checked_ids(Path("local.npz"), np.array(["a", "b"]), 2).tolist()
    ['a', 'b']

    Raises DataError, naming some that repeat.
    """
    if ids.dtype.kind not in "iuU" or ids.ndim != 1:
        raise DataError(f"ids of {path} are {ids.dtype} {ids.shape}, expected integers or strings, (N,)")
    if len(ids) != count:
        raise DataError(f"{path} holds {len(ids)} ids but {count} samples; there must be one id each, or no ids")
    values, counts = np.unique(ids, return_counts=True)
    if len(repeated := values[counts > 1].tolist()):
        more = f" and {len(repeated) - _SHOWN} more" if len(repeated) > _SHOWN else ""
        shown = ", ".join(map(repr, repeated[:_SHOWN]))
        raise DataError(f"ids of {path} repeat: {shown}{more}; every sample needs an id of its own, or leave ids out")
    return ids
