"""Local data: images or signals from an ``.npz`` file, or images from folders, checked before any work.

Images are uint8 as a camera gives them, signals are floats; `preprocess` computes the numbers that a model wants.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import DataError
from lorac_runtime.image_folder import read_all, read_folder
from lorac_runtime.manifest import InputSpec
from lorac_runtime.npz import NEED_LABELS, read_arrays, read_named
from lorac_runtime.sample_ids import checked_ids
from lorac_runtime.signals import as_signals, described

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class LocalData:
    """``images`` uint8 (N, H, W, C), however they were stored, and ``labels`` int64 (N,), None where there are none.

    Signals stand in ``images`` too: float32 (N, features) or (N, channels, length). ``ids`` are integers or strings
    (N,), each once, by which a cache knows samples again; None: their positions. ``targets`` (N, ...) are what the loss
    of another task than classification compares answers with, by name (`lorac_runtime.task_data`).
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int64] | None
    ids: Array | None = None
    targets: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """What samples and targets take in memory."""
        return int(self.images.nbytes + sum(values.nbytes for values in self.targets.values()))

    def known_labels(self) -> npt.NDArray[np.int64]:
        """``labels``; raises DataError where there are none."""
        if self.labels is None:
            raise DataError(f"{len(self.images)} samples without labels, where labels are needed")
        return self.labels


def load_data(
    path: Path, spec: InputSpec, classes: int, class_names: Sequence[str], *, require_classes: int = 2
) -> LocalData:
    """Read and check local data: a ``.npz`` file, or a folder with one sub-folder of images per class.

    With ``require_classes=0`` labels may be missing, for what needs none: a ``.npz`` without ``labels``, or a folder
    of image files without sub-folders. Labels that are there are checked all the same.

    A ``.npz`` holds ``images``, uint8 (N, H, W, C) or (N, C, H, W), or (N, H, W) for one channel, and
    ``labels``, integers 0 to classes - 1, (N,). Where all sides are equal, (N, H, W, C) is assumed. For a model that
    takes signals it holds ``samples`` instead, finite floats (N, features) or (N, channels, length).
    ``ids``, unique integers or strings, (N,), may name the samples for a cache of features.
    Training needs two classes, and warns of those without a sample; for evaluation ``require_classes=1`` will do.

    Raises DataError saying what was found and what was expected.
    """
    images: Array
    if is_folder(path):
        (images, labels), ids = read_folder(path, spec, class_names), None
    else:
        needed = (spec.key, "labels")[: 2 if require_classes else 1]
        images, labels, ids = read_arrays(path, spec.key, needed=needed, shapes=sample_shapes(spec))
        images = raw_samples(path, images, spec)
        labels = None if labels is None else _as_labels(path, labels, classes)
    data = LocalData(np.ascontiguousarray(images), labels)
    _check_labels(path, data, spec, class_names, require_classes)
    return data if ids is None else dataclasses.replace(data, ids=checked_ids(path, ids, len(data)))


def load_samples(path: Path, spec: InputSpec) -> Array:
    """The images (or signals) of a file or a folder as `LocalData` has them, whatever labels there are.

    Of a folder those in it, in its sub-folders, or in its sub-folder ``images``. Raises DataError.
    """
    if is_folder(path):
        return read_all(path, spec)
    found = read_named(path, {spec.key: sample_shapes(spec)}, needed=(spec.key,))
    samples = np.ascontiguousarray(raw_samples(path, found[spec.key], spec))
    if not len(samples):
        raise DataError(f"{path} holds no {spec.key}")
    return samples


def _check_labels(path: Path, data: LocalData, spec: InputSpec, class_names: Sequence[str], required: int) -> None:
    labels = data.labels
    if labels is not None and len(data) != len(labels):
        raise DataError(f"{path} holds {len(data)} {spec.key} but {len(labels)} labels; there must be one label each")
    if len(data) == 0:
        raise DataError(f"{path} holds no {spec.key}")
    if labels is None and required:
        raise DataError(
            f"{path} holds {len(data)} {spec.key} without labels (no sub-folders): {NEED_LABELS} Put the files of each "
            "class into a sub-folder with the name of the class"
        )
    present = np.unique(np.empty(0, np.int64) if labels is None else labels)
    if len(present) < required:
        raise DataError(
            f"all {len(data)} {spec.key} of {path} are of class {class_names[present[0]]!r}: training on one class "
            f"teaches a model to always answer it. Add {spec.key} of other classes (at least {required})"
        )
    if required > 1 and len(present) < len(class_names):
        _warn_of_absent(path, present, spec, class_names)


def _warn_of_absent(path: Path, present: Array, spec: InputSpec, class_names: Sequence[str]) -> None:
    absent = [name for index, name in enumerate(class_names) if index not in present]
    log.warning(
        "%s has no %s of %d of the %d classes (%s): training on the others makes a model forget these; add some of "
        "each, or expect answers among the other %d",
        path,
        spec.key,
        len(absent),
        len(class_names),
        ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else ""),
        len(present),
    )


def preprocess(images: Array, spec: InputSpec) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
    """Images uint8 (N, H, W, C) as the model takes them: (pixel * scale - mean) / std, float32 (N, C, H, W).

    A model that does this itself (``spec.in_graph``) takes them untouched. Signals float32 (N, C, L) or (N, features)
    keep their order of axes.

    >>> spec = InputSpec("input", (1, 1, 2), scale=0.5, mean=(1.0,), std=(2.0,))
    >>> preprocess(np.array([[[[2], [10]]]], np.uint8), spec)
    array([[[[0., 2.]]]], dtype=float32)
    >>> spectra = InputSpec("input", (3,), scale=1.0, mean=(1.0,), std=(2.0,), dtype="float32")
    >>> preprocess(np.array([[1, 3, 5]], np.float32), spectra)
    array([[0., 1., 2.]], dtype=float32)
    """
    if spec.in_graph:
        return images
    column = (spec.channels, *[1] * (len(spec.shape) - 1))
    values = np.array(np.moveaxis(images, -1, 1) if spec.is_image else images, np.float32, order="C")  # always a copy
    values *= np.float32(spec.scale)
    values -= np.asarray(spec.mean, np.float32).reshape(column)
    values /= np.asarray(spec.std, np.float32).reshape(column)
    return values


def fingerprint(data: LocalData) -> str:
    """Hex sha256 of images (or signals), labels and targets, with their shapes: does a run resume on the same data?

    >>> one = LocalData(np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]))
    >>> fingerprint(one) == fingerprint(LocalData(one.images, one.labels[::-1]))
    False
    """
    digest = hashlib.sha256(repr(data.images.shape).encode())
    digest.update(np.ascontiguousarray(data.images).data)
    if data.labels is not None:
        digest.update(np.ascontiguousarray(data.labels, "<i8").data)
    for name, values in sorted(data.targets.items()):
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def split(data: LocalData, fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`stratified_split` of the labels; without labels at random.

    >>> train, held = split(LocalData(np.zeros((8, 1, 1, 1), np.uint8), None), 0.25, 0)
    >>> len(train), len(held)
    (6, 2)

    Raises what `stratified_split` raises.
    """
    classes = np.zeros(len(data), np.int64) if data.labels is None else data.labels
    return stratified_split(classes, fraction, seed)


def stratified_split(
    labels: npt.NDArray[np.int64], fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices (training, held out), each sorted, with ``fraction`` of every class held out as nearly as it goes.

    Every class keeps at least one training sample. The same labels, fraction and seed give the same split.

    >>> train, held = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, 0)
    >>> len(train), len(held)
    (6, 2)

    Raises ValueError for a fraction outside of [0, 1), DataError if nothing could be held out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    groups = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    counts = _held_out_counts([len(group) for group in groups], fraction, generator)
    if fraction > 0 and not sum(counts):
        needed = max(2.0, np.ceil(0.5 / fraction))
        raise DataError(
            f"{len(labels)} samples in {len(groups)} classes are too few to hold out {fraction:g} of them: it takes "
            f"at least {needed:.0f} samples, two of them of the same class, or a held-out fraction of 0"
        )
    held = [group[:count] for group, count in zip(groups, counts, strict=True)]
    kept = [group[count:] for group, count in zip(groups, counts, strict=True)]
    return _sorted(kept), _sorted(held)


def _held_out_counts(sizes: list[int], fraction: float, generator: np.random.Generator) -> list[int]:
    """Round the shares so that their sum is right: the largest remainders are rounded up, ties by lot."""
    shares = [size * fraction for size in sizes]
    counts = [min(int(share), size - 1) for share, size in zip(shares, sizes, strict=True)]
    lots = generator.permutation(len(sizes))
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], lots[i]))
    for i in order:
        if sum(counts) < _rounded(sum(shares)) and counts[i] < min(shares[i], sizes[i] - 1):
            counts[i] += 1
    return counts


def _rounded(share: float) -> int:
    return int(share + 0.5)


def _sorted(groups: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.sort(np.concatenate([np.empty(0, np.int64), *groups]))


def is_folder(path: Path) -> bool:
    """Whether it is one, and no file. Raises DataError if it cannot be read."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as err:
        raise DataError(
            f"{path} cannot be read ({err.strerror}): give an .npz file or a folder with one sub-folder per class"
        ) from err


def sample_shapes(spec: InputSpec) -> list[tuple[int, ...]]:
    """The shapes that a sample in a file may have."""
    one_channel = [spec.shape[1:]] if spec.is_image and spec.channels == 1 else []
    return [spec.raw_shape, spec.shape, *one_channel]


def raw_samples(path: Path, samples: Array, spec: InputSpec) -> Array:
    """Images uint8 (N, H, W, C), or signals float32, from what the file at ``path`` holds. Raises DataError."""
    return _as_nhwc(path, samples, spec) if spec.is_image else as_signals(path, samples, spec.shape)


def _as_nhwc(path: Path, images: Array, spec: InputSpec) -> npt.NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise DataError(f"images of {path} are {described(images)}, expected uint8, 0 to 255, not normalised")
    channels, height, width = spec.shape
    if images.shape[1:] == (height, width, channels):
        return images
    if images.shape[1:] == (channels, height, width):
        return images.transpose(0, 2, 3, 1)
    if channels == 1 and images.shape[1:] == (height, width):
        return images[..., np.newaxis]
    raise DataError(
        f"images of {path} have shape {images.shape}, expected (N, {height}, {width}, {channels}) or "
        f"(N, {channels}, {height}, {width}); resize or convert them to what the model was exported for"
    )


def _as_labels(path: Path, labels: Array, classes: int) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels of {path} are {described(labels)}, expected integers 0 to {classes - 1}")
    if labels.ndim != 1:
        raise DataError(f"labels of {path} have shape {labels.shape}, expected one class number each, (N,)")
    values, counts = np.unique(labels, return_counts=True)
    wrong = [f"{v} ({n} times)" for v, n in zip(values, counts, strict=True) if not 0 <= v < classes]
    if wrong:
        shown = ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise DataError(f"labels of {path} must be 0 to {classes - 1}, for {classes} classes, but there are {shown}")
    return labels.astype(np.int64)
