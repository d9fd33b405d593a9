"""Folders of images: a sub-folder per class, or files without classes. Needs Pillow, the extra ``images``."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.errors import DataError, listed
from lorac_runtime.manifest import InputSpec

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# What Pillow's many decoders raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_SHOWN = 20  # problems listed in one message
_NUMBERS = ("1", "L", "P")  # modes whose pixels are numbers of 8 bits
IMAGES, MASKS = "images", "masks"

Decode = Callable[[Path], npt.NDArray[np.uint8]]

_log = logging.getLogger(__name__)


def read_folder(
    folder: Path, spec: InputSpec, class_names: Sequence[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
    """`read_class_folders`, or where there are no sub-folders all images of ``folder``, sorted by name, and no labels.

    Raises what `read_class_folders` raises.
    """
    if not spec.is_image or any(entry.is_dir() for entry in _visible(folder)):
        return read_class_folders(folder, spec, class_names)
    return _stacked(folder, _visible(folder), spec), None


def read_all(folder: Path, spec: InputSpec) -> npt.NDArray[np.uint8]:
    """All images of a folder, or of its sub-folders, (N, H, W, C); masks beside images are none.

    Raises DataError listing the files that cannot be used, and for a model that takes no images.
    """
    if not spec.is_image:
        raise DataError(f"{folder} is a folder, and the model takes signals: give an .npz file with {spec.key}")
    folders = [entry for entry in _visible(folder) if entry.is_dir()]
    if {IMAGES, MASKS} == {entry.name for entry in folders}:
        folders = [folder / IMAGES]
    files = [path for part in folders for path in _visible(part)] if folders else _visible(folder)
    if not files:
        raise DataError(f"{folder} holds no {spec.key}")
    return _stacked(folder, files, spec)


def read_class_folders(
    folder: Path, spec: InputSpec, class_names: Sequence[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 (N, H, W, C) and labels int64 (N,), in the order of class numbers, then of file names.

    Names of sub-folders are class names; classes without a folder are allowed, hidden files are ignored.

    Raises DataError listing the files that cannot be used, or the folders that name no class; and for a model that
    takes no images.
    """
    if not spec.is_image:
        raise DataError(
            f"{folder} is a folder, and class folders hold images: the model takes signals of shape {spec.shape}; "
            "give an .npz file with samples and labels"
        )
    files = _files_by_class(folder, class_names)
    stacked = _stacked(folder, [path for path, _ in files], spec)
    return stacked, np.array([label for _, label in files], np.int64)


def read_masks(
    folder: Path, spec: InputSpec, shape: tuple[int, ...], *, need_masks: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
    """Images uint8 (N, H, W, C) of ``folder``/images and masks (N, *shape) of ``folder``/masks, sorted by name.

    A mask is an image of one channel, or with a palette, whose pixels are numbers of classes; it has the name of its
    image but for the ending. Without a folder of masks they are None, unless they are needed.

    Raises DataError listing the files that cannot be used, and those without a partner.
    """
    images, masks = (_by_stem(folder / name) for name in (IMAGES, MASKS))
    if not images:
        raise DataError(
            f"{folder} has no folder {IMAGES} with image files: put masks of equal names into {MASKS} beside it"
        )
    pixels = _stacked(folder, list(images.values()), spec)
    if not masks and not need_masks:
        return pixels, None
    alone = [f"{IMAGES}/{images[stem].name} has no mask" for stem in images if stem not in masks]
    alone += [f"{MASKS}/{masks[stem].name} has no image" for stem in masks if stem not in images]
    _refuse(alone, f"images and masks of {folder} do not go together:")
    problems: list[str] = []
    found = [_opened(masks[stem], folder, lambda path: _mask(path, shape), problems) for stem in images]
    _refuse(problems, f"masks of {folder} cannot be used:")
    return pixels, np.stack([mask for mask in found if mask is not None])


def _by_stem(folder: Path) -> dict[str, Path]:
    """Files by their names without the ending. Raises DataError where two have the same."""
    files = _visible(folder) if folder.is_dir() else []
    found = {path.stem: path for path in files}
    if len(found) < len(files):
        raise DataError(f"{folder} has files that differ by their ending only: {_twins(files)}")
    return found


def _twins(files: Sequence[Path]) -> str:
    stems = [path.stem for path in files]
    return ", ".join(path.name for path in files if stems.count(path.stem) > 1)


def _mask(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Numbers of classes (height, width); a palette's colours are not looked at."""
    with _image(path) as image:
        if image.mode not in _NUMBERS:
            raise DataError(
                f"has mode {image.mode}, expected a grey image or one with a palette: class numbers 0 to 255"
            )
        numbers = np.asarray(image, np.uint8)
    if numbers.shape != shape:
        size, wanted = " x ".join(map(str, numbers.shape[::-1])), " x ".join(map(str, shape[::-1]))
        raise DataError(f"is {size} pixels, expected {wanted} (width x height); resize it without interpolation")
    return numbers


def _stacked(folder: Path, paths: Sequence[Path], spec: InputSpec) -> npt.NDArray[np.uint8]:
    """The images, (N, H, W, C), each read or named in one DataError for all."""
    problems: list[str] = []
    images = [_opened(path, folder, lambda path: _decode(path, spec), problems) for path in paths]
    _refuse(problems, f"images of {folder} cannot be used:")
    return np.concatenate([np.empty((0, *spec.raw_shape), np.uint8), *(i[np.newaxis] for i in images if i is not None)])


def _refuse(problems: list[str], headline: str) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(listed(headline, problems[:_SHOWN] + more))


def _files_by_class(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    numbers = {name: number for number, name in enumerate(class_names)}
    entries = _visible(folder)
    unknown = [entry.name for entry in entries if entry.is_dir() and entry.name not in numbers]
    if unknown:
        known = ", ".join(class_names)
        raise DataError(listed(f"{folder}: these folders are not classes of the model ({known}):", unknown))
    loose = [entry.name for entry in entries if not entry.is_dir()]
    if loose:
        _log.warning("%s: %d files beside the class folders are ignored (%s, ...)", folder, len(loose), loose[0])
    chosen = sorted((numbers[entry.name], entry) for entry in entries if entry.is_dir())
    return [(path, number) for number, entry in chosen for path in _visible(entry)]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as err:
        raise DataError(f"{folder} cannot be read: {err}") from err


def _opened(path: Path, root: Path, decode: Decode, problems: list[str]) -> npt.NDArray[np.uint8] | None:
    """One image, as ``decode`` gives it; what is wrong with it goes to ``problems``."""
    name = path.relative_to(root)
    # realpath, because Path.resolve raises on a loop of links
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        problems.append(f"{name} is a link that leads out of the folder; copy the file itself")
    elif path.is_dir():
        problems.append(f"{name} is a folder; image files must lie directly in their class's folder")
    elif path.exists() and not path.is_file():
        problems.append(f"{name} is a device, a pipe or a socket, expected an image file")
    else:
        try:
            return decode(path)
        except DataError as err:
            problems.append(f"{name} {err}")
    return None


def _decode(path: Path, spec: InputSpec) -> npt.NDArray[np.uint8]:
    channels, height, width = spec.shape
    if channels not in _MODES:
        raise DataError(f"cannot be turned into {channels} channels; give the data as an .npz file")
    with _image(path) as image:
        if image.size != (width, height):
            raise DataError(
                f"is {image.width} x {image.height} pixels, expected {width} x {height} (width x height); "
                f"resize it, for example with Pillow's image.resize(({width}, {height}))"
            )
        if image.mode not in _EIGHT_BIT:
            raise DataError(f"has mode {image.mode}, not 8 bits per channel; convert it")
        pixels = np.asarray(image.convert(_MODES[channels]), np.uint8)
    return pixels.reshape(height, width, channels)


@contextlib.contextmanager
def _image(path: Path) -> Iterator[Any]:
    """An open image file. Raises DataError if it, or what is read of it, is damaged."""
    try:
        from PIL import Image
    except ImportError as err:
        raise DataError("cannot be read without Pillow: pip install pillow, or give the data as an .npz file") from err
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except (*_DAMAGED, Image.DecompressionBombError) as err:
        raise DataError(f"is not a readable image: {err or type(err).__name__}") from err
