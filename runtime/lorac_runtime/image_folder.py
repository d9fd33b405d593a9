"""Folders of images: a sub-folder per class, or files without classes. Needs Pillow, the extra ``images``."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

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


def _stacked(folder: Path, paths: Sequence[Path], spec: InputSpec) -> npt.NDArray[np.uint8]:
    """The images, (N, H, W, C), each read or named in one DataError for all."""
    problems: list[str] = []
    images = [_read(path, folder, spec, problems) for path in paths]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(listed(f"images of {folder} cannot be used:", problems[:_SHOWN] + more))
    return np.concatenate([np.empty((0, *spec.raw_shape), np.uint8), *(i[np.newaxis] for i in images)])


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


def _read(path: Path, root: Path, spec: InputSpec, problems: list[str]) -> npt.NDArray[np.uint8]:
    """One image (H, W, C); what is wrong with it goes to ``problems``."""
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
            return _decode(path, spec)
        except DataError as err:
            problems.append(f"{name} {err}")
    return np.zeros(spec.raw_shape, np.uint8)


def _decode(path: Path, spec: InputSpec) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as err:
        raise DataError("cannot be read without Pillow: pip install pillow, or give the data as an .npz file") from err
    channels, height, width = spec.shape
    if channels not in _MODES:
        raise DataError(f"cannot be turned into {channels} channels; give the data as an .npz file")
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                raise DataError(
                    f"is {image.width} x {image.height} pixels, expected {width} x {height} (width x height); "
                    f"resize it, for example with Pillow's image.resize(({width}, {height}))"
                )
            if image.mode not in _EIGHT_BIT:
                raise DataError(f"has mode {image.mode}, not 8 bits per channel; convert it")
            pixels = np.asarray(image.convert(_MODES[channels]), np.uint8)
    except (*_DAMAGED, Image.DecompressionBombError) as err:
        raise DataError(f"is not a readable image: {err or type(err).__name__}") from err
    return pixels.reshape(height, width, channels)
