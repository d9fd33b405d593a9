"""Images with masks, or with numbers, for training in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from lorac_runtime.errors import DataError
from lorac_runtime.image_folder import IMAGES, read_masks
from lorac_runtime.manifest import InputSpec
from lorac_runtime.npz import read_named
from lorac_runtime.signals import as_signals, described
from lorac_runtime.tasks import CLASSIFICATION, IGNORED, LABELS, REGRESSION, SEGMENTATION, VALUES

Array = npt.NDArray[Any]


def task_of_labels(labels: Array) -> str:
    """What labels are for: classes (n,), masks (n, height, width), or floats (n, numbers).

    >>> task_of_labels(np.zeros(3, np.int64)), task_of_labels(np.zeros((3, 8, 8), np.int64))
    ('classification', 'segmentation')
    """
    if labels.dtype.kind == "f":
        return REGRESSION
    return SEGMENTATION if labels.ndim == 3 else CLASSIFICATION


def require_labels(images: Array, labels: Array, task: str, classes: int) -> None:
    """Raise DataError where labels do not fit the images, or the number of classes."""
    found = f"{labels.dtype} {labels.shape}"
    if task == REGRESSION:
        if labels.dtype != np.float32 or labels.ndim != 2 or len(labels) != len(images) or not labels.shape[1]:
            raise DataError(f"{len(images)} samples need as many rows of float32 targets, got {found}")
        if not np.isfinite(labels).all():
            raise DataError("the targets have values that are not finite")
        return
    wanted = images.shape[:1] if task == CLASSIFICATION else images.shape[:3]
    if labels.dtype != np.int64 or labels.shape != wanted:
        what = "images" if images.dtype == np.uint8 else "samples"
        masks = "" if task == CLASSIFICATION else f" of shape {wanted}"
        raise DataError(f"{len(images)} {what} need as many int64 labels{masks}, got {found}")
    known = labels[labels != IGNORED] if task == SEGMENTATION else labels
    if labels.size and not known.size:
        raise DataError(f"no pixel has a label: all are {IGNORED}")
    if known.size and not 0 <= known.min() <= known.max() < classes:
        raise DataError(f"labels must be 0 to {classes - 1}, got {known.min()} to {known.max()}")


def read_task(
    path: Path, task: str, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> tuple[Array, Array, tuple[str, ...]]:
    """Images or signals, masks or numbers, and class names of a file or a folder.

    Raises DataError for what cannot be read, and for a ``size`` or ``channels`` other than those of the file.
    """
    if path.is_dir():
        if task != SEGMENTATION:
            raise DataError(f"{path} is a folder: for {task} give an .npz file with images and {VALUES}")
        images, labels = _folder(path, channels or 3)
    elif path.exists():
        images, labels = _file(path, task)
    else:
        raise DataError(f"no data {str(path)!r}: for {task} give an .npz file, or of segmentation a folder with masks")
    if not len(images):
        raise DataError(f"{path} holds no images")
    if size is not None and images.shape[1:3] != size:
        raise DataError(
            f"{path} holds images of {images.shape[1:3]}: for {task} they are taken as they are, not resized"
        )
    if channels is not None and images.shape[-1] != channels:
        raise DataError(f"{path} holds images of {images.shape[-1]} channels, asked for were {channels}")
    known = labels[labels != IGNORED] if task == SEGMENTATION else labels[:0]
    count = int(known.max(initial=0)) + 1 if task == SEGMENTATION else 0
    return images, labels, tuple(str(number) for number in range(count))


def _file(path: Path, task: str) -> tuple[Array, Array]:
    target = LABELS if task == SEGMENTATION else VALUES
    found = read_named(path, {"images": None, "samples": None, target: None}, needed=(target,))
    if ("images" in found) == ("samples" in found):
        raise DataError(
            f"{path} must hold images or samples, one of them, beside {target}; it holds {', '.join(found)}"
        )
    values = found[target]
    if task == SEGMENTATION and (values.dtype.kind not in "iu" or values.ndim != 3):
        raise DataError(
            f"{target} of {path} are {described(values)} of shape {values.shape}, expected integers (N, H, W)"
        )
    if task == REGRESSION and (values.dtype.kind != "f" or values.ndim not in (1, 2)):
        raise DataError(
            f"{target} of {path} are {described(values)} of shape {values.shape}, expected floats (N, numbers)"
        )
    values = values.astype(np.int64) if task == SEGMENTATION else values.reshape(len(values), -1).astype(np.float32)
    return _samples(path, found), values


def _samples(path: Path, found: dict[str, Array]) -> Array:
    if "samples" in found:
        return as_signals(path, found["samples"])
    images = found["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or not {images.shape[1], images.shape[3]} & {1, 3}:
        raise DataError(f"images of {path} are {described(images)} {images.shape}, expected uint8 (N, H, W, 1 or 3)")
    return np.ascontiguousarray(images if images.shape[3] in (1, 3) else images.transpose(0, 2, 3, 1))


def _folder(path: Path, channels: int) -> tuple[Array, Array]:
    """Images and masks of one size, that of the first image."""
    files = sorted(p for p in (path / IMAGES).glob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"{path} has no folder {IMAGES} with image files, and masks of equal names beside it")
    try:
        with PIL.Image.open(files[0]) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as err:
        raise DataError(f"{files[0]} is not a readable image ({err})") from err
    ones = (1.0,) * channels
    spec = InputSpec("input", (channels, height, width), 1.0, ones, ones)
    images, masks = read_masks(path, spec, (height, width), need_masks=True)
    assert masks is not None
    return images, masks.astype(np.int64)
