"""Data of studies: one vendor's icons held out, fans in quiet and noisy rooms, labels that turn or lie."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.data import Dataset
from lorac_runtime.errors import DataError
from lorac_runtime.signals import as_signals

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
CONDITIONS = ("normal", "damage1", "damage2")
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def vendor_split(path: Path, vendor: str) -> tuple[Dataset, Dataset]:
    """(images of all other vendors, images of ``vendor``) of an ``.npz`` file such as Icons-50 at 32 x 32.

    The file holds ``x`` uint8 (N, H, W, C), ``y`` class numbers (N,), and ``vendor`` (N,): names, or numbers of
    ``vendor_names``. With ``class_names`` the classes are called so.

    Raises DataError if it is another file, or listing the vendors if it has none of that name.
    """
    arrays = _arrays(path, ("x", "y", "vendor"))
    images, labels = arrays["x"], _class_numbers(path, arrays["y"])
    vendors = _named(path, arrays, "vendor")
    _require_equal_lengths(path, {"x": images, "y": labels, "vendor": vendors})
    names = arrays.get("class_names", np.arange(labels.max(initial=0) + 1))
    whole = Dataset(images, labels, tuple(str(name) for name in names))
    held_out = vendors == vendor
    if not held_out.any():
        raise DataError(f"{path} has no images of vendor {vendor!r}; there are {', '.join(np.unique(vendors))}")
    return whole.select(np.flatnonzero(~held_out)), whole.select(np.flatnonzero(held_out))


def fan_spectra(
    path: Path,
    environments: Sequence[str],
    *,
    fan: str = "12cm",
    speeds: Sequence[str] = ("hmlo",),
    recordings: Sequence[str] | None = None,
    bins: int = 512,
) -> Dataset:
    """Vibration spectra of cooling fans, float32 (n, bins), labelled by `CONDITIONS`.

    The ``.npz`` file holds ``x`` (n, 512) floats, ``sequence`` (n,), numbers of ``sequence_names``, which are
    ``<fan>_<speed>_<condition>_<environment>`` and perhaps ``_<recording>``. All sequences of these fans, speeds and
    environments ("silentA", "silentB", "noisy") are taken, in the order of the file; with ``recordings`` ("1", "2")
    only those. Fewer ``bins``, a divisor of the stored ones, are means of neighbours.

    Raises DataError if it is another file, or listing its sequences if none of them fits; ValueError for such bins.
    """
    arrays = _arrays(path, ("x", "sequence", "sequence_names"))
    samples, names = as_signals(path, arrays["x"]), _named(path, arrays, "sequence")
    _require_equal_lengths(path, {"x": samples, "sequence": names})
    if samples.ndim != 2 or bins < 1 or samples.shape[1] % bins:
        raise ValueError(f"bins must divide the {samples.shape[1:]} bins of {path}, got {bins}")
    wanted = {
        f"{fan}_{speed}_{condition}_{environment}{tail}": CONDITIONS.index(condition)
        for speed in speeds
        for condition in CONDITIONS
        for environment in environments
        for tail in (("", "_1", "_2") if recordings is None else [f"_{r}" for r in recordings])
    }
    chosen = np.flatnonzero(np.isin(names, list(wanted)))
    if not len(chosen):
        found = ", ".join(np.unique(names))
        raise DataError(f"{path} has no sequence of {fan}, {speeds}, {environments}, {recordings}; there are {found}")
    labels = np.array([wanted[name] for name in names[chosen]], np.int64)
    return Dataset(samples[chosen].reshape(len(chosen), bins, -1).mean(2), labels, CONDITIONS)


def flip(labels: Labels, classes: int) -> Labels:
    """The output-level drift of TBFT (arXiv 2403.15905): label y becomes classes - 1 - y. Twice is no change.

    >>> flip(np.array([0, 1, 9]), 10)
    array([9, 8, 0])

    Raises ValueError for labels that are not 0 to classes - 1.
    """
    _require_labels(labels, classes)
    return classes - 1 - labels


def with_wrong(labels: Labels, share: float, classes: int, seed: int) -> Labels:
    """A copy of ``labels`` in which exactly round(share * n) are wrong: each another class, by lot.

    >>> labels = np.zeros(10, np.int64)
    >>> int((with_wrong(labels, 0.4, 3, seed=0) != labels).sum())
    4

    Raises ValueError for a share outside of 0 to 1, labels that are not 0 to classes - 1, or fewer than two classes.
    """
    _require_labels(labels, classes)
    if not 0 <= share <= 1 or classes < 2:
        raise ValueError(f"wrong labels need a share from 0 to 1 and two classes, got {share} and {classes}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    wrong = labels.copy()
    wrong[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return wrong


def _require_labels(labels: Labels, classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {labels.min()} to {labels.max()}")


def _arrays(path: Path, required: tuple[str, ...]) -> dict[str, Array]:
    """All arrays of an ``.npz`` file; pickling off. Raises DataError."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive.files]
            if not missing:
                return {key: archive[key] for key in archive.files}
            found = archive.files
    except (*_DAMAGED, AttributeError, TypeError) as err:  # the last two: a single array, which is no archive
        raise DataError(f"{path} is not a readable .npz of plain arrays ({err})") from err
    raise DataError(f"{path} has no {', '.join(missing)}, expected {', '.join(required)}; it has {', '.join(found)}")


def _named(path: Path, arrays: dict[str, Array], key: str) -> Array:
    """Texts (n,): as they are, or looked up by number in ``<key>_names``."""
    values = arrays[key]
    if values.dtype.kind == "U":
        return values
    names = arrays.get(f"{key}_names", np.empty(0, str))
    if values.dtype.kind not in "iu" or (len(values) and not 0 <= values.min() <= values.max() < len(names)):
        raise DataError(f"{key} of {path} must be names, or numbers of the {len(names)} {key}_names")
    return names[values].astype(str) if len(values) else np.empty(0, str)


def _class_numbers(path: Path, labels: Array) -> Labels:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"y of {path} is {labels.dtype} {labels.shape}, expected class numbers (N,)")
    return labels.astype(np.int64)


def _require_equal_lengths(path: Path, arrays: dict[str, Array]) -> None:
    if len({array.shape[:1] for array in arrays.values()}) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{path} needs one entry of each for every sample, got {shapes}")
