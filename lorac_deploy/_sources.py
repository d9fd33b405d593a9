"""Where labelled data come from: scikit-learn's digits, torchvision's CIFAR, `.npz` files, class folders.

Each reader gives images (height, width, channels) uint8 as they are stored, labels, and class names;
`lorac_deploy.data` brings them to one size and number of channels. An `.npz` file may hold signals instead: float32
(n, features) or (n, channels, length).
"""

from __future__ import annotations

import pickle
import struct
import urllib.error
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from lorac_runtime.data import stratified_split
from lorac_runtime.errors import DataError, listed
from lorac_runtime.npz import read_npz
from lorac_runtime.signals import as_signals

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}
Pixels = npt.NDArray[np.uint8]  # one image (height, width, channels)
DIGITS_TEST_FRACTION, DIGITS_SPLIT_SEED = 0.3, 0
MAX_CLASSES = 100_000  # more than any classifier has: beyond it, labels are not class numbers
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SHOWN = 20  # problems listed in one message


@dataclass(frozen=True)
class Request:
    """What to read. ``size`` is (height, width), None where the stored size stays."""

    source: str
    split: Split
    size: tuple[int, int] | None
    channels: int
    root: Path | None
    download: bool


class Raw(NamedTuple):
    """Images as stored, a list or an array (n, height, width, channels), or an array of signals; labels; names."""

    images: Sequence[Pixels] | npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]


def read(request: Request) -> Raw:
    """Read what the request names: a data set, an ``.npz`` file or a folder. Raises DataError."""
    if request.source in NAMED:
        return NAMED[request.source](request)
    path = Path(request.source)
    if path.is_dir():
        return _folder(path, request)
    if path.exists():
        return _npz(path, request)
    raise DataError(
        f"no data {request.source!r}: give one of {', '.join(NAMED)}, an .npz file, or a folder with one sub-folder "
        "of images per class"
    )


def resized(picture: PIL.Image.Image, size: tuple[int, int] | None) -> PIL.Image.Image:
    """Bilinear to (height, width), smoothed where it shrinks; sides are stretched, nothing is cut off."""
    if size is None or (picture.height, picture.width) == size:
        return picture
    return picture.resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)


def _digits(request: Request) -> Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise DataError("`digits` come with scikit-learn: pip install 'lorac-deploy[demo]'") from err
    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    train, test = stratified_split(labels, DIGITS_TEST_FRACTION, DIGITS_SPLIT_SEED)
    chosen = train if request.split == "train" else test
    pixels = np.rint(bunch.images[chosen, :, :, None] * (255 / 16)).astype(np.uint8)
    return Raw(pixels, labels[chosen], tuple(str(digit) for digit in range(10)))


def _cifar(request: Request) -> Raw:
    from lorac_deploy._torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.source]
    if request.root is None:
        raise DataError(f"{request.source}: say which folder holds it, or is to hold it (root, --data-root)")
    try:
        found: Any = reader(str(request.root), train=request.split == "train", download=request.download)
    except urllib.error.URLError as err:
        raise DataError(
            f"{request.source} cannot be downloaded ({err.reason}): fetch {reader.url} where there is a network and "
            f"unpack it into {request.root}"
        ) from err
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as err:
        raise DataError(
            f"{request.source} cannot be read from {request.root} ({err}): unpack {reader.url} there, or ask for the "
            "download (download=True, --download)"
        ) from err
    return Raw(found.data, np.asarray(found.targets, np.int64), tuple(found.classes))


NAMED: dict[str, Callable[[Request], Raw]] = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar}


def _npz(path: Path, request: Request) -> Raw:
    _require_train(path, request.split)
    key = _key(path)
    images, labels = read_npz(path, key)
    if key == "images" and images.dtype != np.uint8:
        raise DataError(f"images of {path} are {images.dtype}, expected uint8, 0 to 255, not normalised")
    if labels.ndim != 1 or images.shape[:1] != labels.shape:
        count = len(np.atleast_1d(images))
        raise DataError(f"{path} holds {count} {key} and labels of shape {labels.shape}, expected one label each")
    images = as_signals(path, images) if key == "samples" else _as_nhwc(path, images)
    labels = _class_numbers(path, labels)
    return Raw(images, labels, tuple(str(number) for number in range(int(labels.max(initial=0)) + 1)))


def _key(path: Path) -> str:
    """``samples`` where an archive holds signals, else ``images``; what is wrong with a file, reading it tells."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return "images"
    if {"images.npy", "samples.npy"} <= names:
        raise DataError(f"{path} holds images and samples; give two files, a network takes one of them")
    return "samples" if "samples.npy" in names else "images"


def _as_nhwc(path: Path, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(N, H, W, C), (N, C, H, W) or (N, H, W); channels last is assumed where both are possible."""
    if images.ndim == 3:
        return images[..., np.newaxis]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise DataError(
        f"images of {path} have shape {images.shape}, expected (N, H, W, C), (N, C, H, W) or (N, H, W) with C = 1 or 3"
    )


def _class_numbers(path: Path, labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels of {path} are {labels.dtype}, expected integers from 0")
    if len(labels) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise DataError(f"labels of {path} run from {labels.min()} to {labels.max()}, expected class numbers from 0")
    return labels.astype(np.int64)


def _folder(path: Path, request: Request) -> Raw:
    """Class folders, perhaps below folders for each split."""
    splits = folder_splits(path)
    if request.split in splits:
        path = path / request.split
    else:
        _require_train(path, request.split)
    folders = _folders(path)
    files = [(file, number) for number, folder in enumerate(folders) for file in _visible(folder)]
    if not files:
        raise DataError(f"{path} holds no images: expected one sub-folder of images per class")
    problems: list[str] = []
    images = [image for file, _ in files if (image := _decoded(file, request, problems)) is not None]
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(listed(f"images of {path} cannot be used:", problems[:SHOWN] + more))
    return Raw(images, np.array([number for _, number in files]), tuple(folder.name for folder in folders))


def _decoded(file: Path, request: Request, problems: list[str]) -> Pixels | None:
    """One image file, upright, at the wanted size; what is wrong with it goes to ``problems``."""
    try:
        with PIL.Image.open(file) as picture:
            if picture.mode not in EIGHT_BIT:
                problems.append(f"{file}: mode {picture.mode}, expected 8 bits per channel")
                return None
            upright = PIL.ImageOps.exif_transpose(picture).convert("L" if request.channels == 1 else "RGB")
            pixels = np.asarray(resized(upright, request.size), np.uint8)
    # What Pillow's decoders raise on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.Image.DecompressionBombError) as err:
        problems.append(f"{file}: not a readable image ({err})")
        return None
    return pixels.reshape(*pixels.shape[:2], request.channels)


def folder_splits(path: Path) -> tuple[str, ...]:
    """Names of the split folders in ``path``; none where its folders are classes.

    A folder ``train`` beside other classes (``bus``, ``tram``) is a class.
    """
    names = {folder.name for folder in _folders(path)} if path.is_dir() else set()
    return tuple(sorted(names)) if "train" in names and names <= SPLIT_FOLDERS else ()


def _folders(path: Path) -> list[Path]:
    return [entry for entry in _visible(path) if entry.is_dir()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as err:
        raise DataError(f"{folder} cannot be read: {err}") from err


def _require_train(path: Path, split: Split) -> None:
    """Refuse to take another part for the test part."""
    if split != "train":
        raise DataError(f"{path} has no {split} part; give the file or folder that holds it by its own path")
