"""Labelled images and signals for training in PyTorch: data sets by name, `.npz` files, class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from lorac_deploy._sources import NAMED, SPLITS, Pixels, Request, Split, folder_splits, read, resized
from lorac_deploy.task_sources import read_task, require_labels, task_of_labels
from lorac_runtime.data import stratified_split
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.tasks import CLASSIFICATION, IGNORED, REGRESSION, SEGMENTATION

__all__ = [
    "NORMALIZATIONS",
    "Dataset",
    "Split",
    "has_test_split",
    "input_spec",
    "load_dataset",
    "named",
    "split_validation",
    "with_classes",
]

DIGITS_SIZE = (32, 32)  # stored at 8 x 8
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, in units of pixel / 255
NORMALIZATIONS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Dataset:
    """``images`` uint8 (n, height, width, 1 or 3); ``labels`` int64 (n,), numbers of ``class_names``.

    Signals stand in ``images`` too: float32 (n, features) or (n, channels, length). Of segmentation ``labels`` are
    masks, int64 (n, height, width), where 255 is no label; of regression they are float32 (n, numbers), and there are
    no ``class_names``.

    Raises DataError where these do not fit together.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        fits = self.images.ndim == 4 and self.images.shape[3] in (1, 3)
        if not (fits if self.is_image else self.images.dtype == np.float32 and self.images.ndim in (2, 3)):
            found = f"{self.images.dtype} {self.images.shape}"
            raise DataError(
                "images must be uint8 (n, height, width, 1 or 3), signals float32 (n, features) or (n, channels, "
                f"length), got {found}"
            )
        require_labels(self.images, self.labels, self.task, len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def task(self) -> str:
        """What the labels are for, one of `lorac_runtime.tasks.TASKS`."""
        return task_of_labels(self.labels)

    @property
    def is_image(self) -> bool:
        """Whether these are images; otherwise signals."""
        return self.images.dtype == np.uint8

    @property
    def key(self) -> str:
        """What they are called in messages."""
        return "images" if self.is_image else "samples"

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of images, (features,) or (channels, length) of signals, as `InputSpec` has it."""
        sizes = self.images.shape[1:]
        return (sizes[-1], *sizes[:-1]) if self.is_image else sizes

    def select(self, indices: npt.NDArray[Any]) -> Dataset:
        """The images at ``indices``, in that order.

        >>> both = Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ("a", "b"))
        >>> both.select(np.array([1])).labels.tolist()
        [1]
        """
        return Dataset(self.images[indices], self.labels[indices], self.class_names)


def load_dataset(
    name_or_path: str | Path,
    *,
    split: Split = "train",
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    root: Path | None = None,
    download: bool = False,
    task: str = CLASSIFICATION,
) -> Dataset:
    """Read labelled images.

    ``name_or_path`` is ``digits`` (scikit-learn's handwritten digits: 70 % of each class to train, 30 % to test,
    always the same ones), ``cifar10`` or ``cifar100`` (torchvision's files in the folder ``root``, fetched there
    with ``download``), an ``.npz`` file (``images`` uint8 NHWC, NCHW or NHW, ``labels`` integers), or a folder with
    one sub-folder of image files per class, perhaps below ``train/`` and ``test/``. ``size`` is (height, width):
    images are stretched to it (None: as stored; digits 32 x 32). ``channels`` is 1 or 3 (None: 3). An ``.npz`` file
    of signals holds ``samples`` instead of ``images``, finite floats (n, features) or (n, channels, length), which are
    taken as they are: without size and channels. For the ``task`` segmentation the labels of an ``.npz`` file are
    masks (n, height, width), and a folder has ``images`` and ``masks`` of equal names; for regression the file holds
    ``targets``, floats (n,) or (n, numbers). Both are taken at the size that they have.

    Raises DataError for what cannot be read, ValueError for arguments outside their range.

    >>> digits = load_dataset("digits")
    >>> digits.shape, len(digits), len(load_dataset("digits", split="test"))
    ((3, 32, 32), 1258, 539)
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be positive, got {size}")
    if task != CLASSIFICATION:
        return Dataset(*read_task(Path(name_or_path), task, size=size, channels=channels))
    if size is None and name_or_path == "digits":
        size = DIGITS_SIZE
    raw = read(Request(str(name_or_path), split, size, channels or 3, root, download))
    if not len(raw.images):
        raise DataError(f"{name_or_path} holds no images")
    if isinstance(raw.images, np.ndarray) and raw.images.dtype == np.float32:
        if size is not None or channels is not None:
            raise DataError(
                f"{name_or_path} holds signals, {raw.images.shape[1:]} each, which have neither the size nor the "
                "channels of an image"
            )
        return Dataset(raw.images, raw.labels, raw.class_names)
    return Dataset(_fit(raw.images, size, channels or 3), raw.labels, raw.class_names)


def has_test_split(name_or_path: str | Path) -> bool:
    """Whether ``load_dataset(..., split="test")`` has something to read: named data sets and ``test/`` folders.

    >>> has_test_split("digits"), has_test_split("local.npz")
    (True, False)
    """
    return str(name_or_path) in NAMED or "test" in folder_splits(Path(name_or_path))


def named(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The same images and labels under other class names, in label order.

    >>> data = Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ("0", "1"))
    >>> named(data, ("cat", "dog")).class_names
    ('cat', 'dog')

    Raises ValueError if there are too few names, or one is there twice.
    """
    found = len(dataset.class_names)
    if len(class_names) < found or len(set(class_names)) < len(class_names):
        raise ValueError(f"the data have {found} classes, which need as many different names, got {list(class_names)}")
    return Dataset(dataset.images, dataset.labels, tuple(class_names))


def with_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The same images with labels that are numbers of ``class_names``.

    Classes are found by name. Where the data have no names of their own but numbers from 0, as in an ``.npz`` file,
    these numbers are taken as they are.

    >>> data = Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ("cat", "dog"))
    >>> with_classes(data, ("bird", "dog", "cat")).labels.tolist()
    [2, 1]

    Raises DataError naming the classes that are not among ``class_names``.
    """
    if dataset.task == REGRESSION:
        return dataset
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in dataset.class_names if name not in numbers]
    if not unknown:
        order = np.full(256, IGNORED, np.int64) if dataset.task == SEGMENTATION else np.zeros(len(numbers), np.int64)
        order[: len(dataset.class_names)] = [numbers[name] for name in dataset.class_names]
        return Dataset(dataset.images, order[dataset.labels], tuple(class_names))
    unnamed = dataset.class_names == tuple(str(number) for number in range(len(dataset.class_names)))
    if unnamed and len(dataset.class_names) <= len(class_names):
        return Dataset(dataset.images, dataset.labels, tuple(class_names))
    raise DataError(
        f"the data's classes {', '.join(unknown)} are none of the network's: {', '.join(class_names)}. Give the data "
        "the network's class names, or the network a new head (--new-head)"
    )


def input_spec(images: npt.NDArray[Any], normalization: str | Statistics = "data") -> InputSpec:
    """How a network is to see images of this shape: pixels / 255, then a mean and a std per channel.

    ``normalization`` is one of `NORMALIZATIONS`, ``data`` for the statistics of ``images`` (n, h, w, c), or a mean and
    a std for each channel of their own. Signals,
    float32 (n, channels, length), get a mean and a std per channel, those of (n, features) one for all features.

    >>> input_spec(np.array([[[[0]]], [[[255]]]], np.uint8)).mean
    (0.5,)
    >>> input_spec(np.array([[[1, 3]], [[5, 7]]], np.float32)).mean
    (4.0,)

    Raises ValueError for another name, or known statistics with images of one channel or with signals.
    """
    if images.dtype != np.uint8:
        return _signal_spec(images, normalization)
    height, width, channels = images.shape[1:]
    if normalization == "data":
        mean, std = _statistics(images)
    elif isinstance(normalization, tuple) and channels == len(normalization[0]):
        mean, std = normalization
    elif isinstance(normalization, str) and normalization in NORMALIZATIONS and channels == 3:
        mean, std = NORMALIZATIONS[normalization]
    else:
        known = ", ".join(["data", *NORMALIZATIONS])
        raise ValueError(
            f"normalization {normalization!r} does not serve images of {channels} channels; there are {known}, "
            "and with one channel only data"
        )
    return InputSpec(name="input", shape=(channels, height, width), scale=1 / 255, mean=mean, std=std)


def _signal_spec(samples: npt.NDArray[np.float32], normalization: str | Statistics) -> InputSpec:
    if normalization != "data":
        raise ValueError(f"normalization {normalization!r} is one of images; signals have their own statistics: data")
    axes = None if samples.ndim == 2 else (0, 2)
    mean = np.atleast_1d(samples.mean(axes, np.float64))
    std = np.atleast_1d(samples.std(axes, np.float64))
    std[std == 0] = 1.0  # what never changes cannot be divided by its spread
    shape = tuple(int(size) for size in samples.shape[1:])
    return InputSpec("input", shape, 1.0, tuple(mean.tolist()), tuple(std.tolist()), dtype="float32")


def split_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training part, validation part): ``fraction`` of every class held out, always the same for a ``seed``.

    Raises ValueError for a fraction outside [0, 1), DataError where there are too few samples.
    """
    classes = dataset.labels if dataset.task == CLASSIFICATION else np.zeros(len(dataset), np.int64)
    train, held_out = stratified_split(classes, fraction, seed)
    return dataset.select(train), dataset.select(held_out)


def _statistics(images: npt.NDArray[np.uint8]) -> Statistics:
    """Mean and standard deviation of each channel, from its histogram: exact, and small in memory."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[3]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        variance = float(share @ (values - mean[-1]) ** 2)
        std.append(max(variance**0.5, 1 / 255))  # a channel that never changes cannot be divided by its spread
    return tuple(round(m, 6) for m in mean), tuple(round(s, 6) for s in std)


def _fit(
    images: Sequence[Pixels] | npt.NDArray[np.uint8], size: tuple[int, int] | None, channels: int
) -> npt.NDArray[np.uint8]:
    """Stack images at one size and number of channels."""
    found = sorted({image.shape[:2] for image in images})
    if size is None and len(found) > 1:
        shown = ", ".join(f"{height} x {width}" for height, width in found[:3])
        raise DataError(f"the images have different sizes ({shown}, ...): say to which they shall be resized (--size)")
    wanted = (*(size or found[0]), channels)
    if isinstance(images, np.ndarray) and images.shape[1:] == wanted:
        return np.ascontiguousarray(images)
    return np.stack([image if image.shape == wanted else _fit_one(image, wanted) for image in images])


def _fit_one(image: Pixels, wanted: tuple[int, ...]) -> Pixels:
    picture = PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture = resized(picture, (wanted[0], wanted[1])).convert("L" if wanted[2] == 1 else "RGB")
    return np.asarray(picture, np.uint8).reshape(wanted)
