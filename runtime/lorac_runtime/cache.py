"""Skip-Cache: what the frozen front of a network computes for a sample is kept, and later epochs start from it.

Matsutani et al., arXiv 2410.21073. Features of a sample never depend on its batch (`engines.prefix`), so a run with a
cache, whole, partial or reused, gives the same bytes as one without. In half precision they are rounded whether they
were kept or not, so that the result, then another one, does not depend on the cache's size either.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.cache_file import CacheFile, Sample, capacity, space
from lorac_runtime.data import LocalData
from lorac_runtime.engines import Engine
from lorac_runtime.engines.prefix import Prefix
from lorac_runtime.errors import CacheError
from lorac_runtime.manifest import Feature, Manifest
from lorac_runtime.report import CacheReport
from lorac_runtime.training import Indices, Samples

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FOLDER = "cache"
ENGINE = "onnxruntime"
PIECE = 16  # samples whose features are read or computed at once, beside those of the batch
LARGEST = np.float32(np.finfo(np.float16).max)

log = logging.getLogger(__name__)


def row_bytes(features: tuple[Feature, ...], *, fp16: bool) -> int:
    """Bytes of one sample's features.

    >>> row_bytes((Feature("a", (16, 4, 4)), Feature("b", (10,))), fp16=False)
    1064
    """
    return sum(math.prod(f.shape) for f in features) * (2 if fp16 else 4)


def check_cache(manifest: Manifest, engine: str, samples: int, *, budget: int, fp16: bool) -> None:
    """Raise CacheError, saying what to do, where a cache would be of no use: before any work.

    That is where nothing frozen lies in front of what trains, with another engine than onnxruntime, and where
    ``budget`` bytes do not even hold one of ``samples`` samples.
    """
    if manifest.moving_statistics:
        raise CacheError(
            "a cache does not go with BN policy 'batch': statistics are those of each batch, so nothing in front stays "
            "the same. Leave --cache out, or export with --bn frozen or recalibrate"
        )
    if engine not in (ENGINE, "auto"):
        raise CacheError(f"the engine {engine} has no cache: leave --cache out, or use --engine {ENGINE}")
    if not manifest.features:
        raise CacheError(_nothing_frozen(manifest))
    row = row_bytes(manifest.features, fp16=fp16)
    if capacity(budget, row) < 1:
        half = "" if fp16 else ", and --cache-fp16 halves that"
        raise CacheError(
            f"a cache of {budget:,} bytes holds nothing: the features of a sample take {row:,} bytes. "
            f"--cache {size_for(samples, row)} holds all {samples} samples{half}"
        )


def _nothing_frozen(manifest: Manifest) -> str:
    lowest = f"{manifest.trainables[0].name} trains" if manifest.trainables else "nothing trains"
    return (
        f"this artifact has no frozen front whose results could be kept ({lowest}, among others). Leave --cache out, "
        "or export it again so that only later layers train: --blocks rear, --method head or --method skip"
    )


def size_for(samples: int, row: int) -> str:
    """The size that holds so many samples of ``row`` bytes, as --cache takes it, rounded up.

    >>> size_for(1000, 2048), size_for(3, 40)
    ('3MB', '1KB')
    """
    needed = space(samples, row)
    unit, name = (10**6, "MB") if needed > 10**6 else (10**3, "KB")
    return f"{-(-needed // unit)}{name}"


def open_cache(
    out: Path, engine: Engine, manifest: Manifest, samples: Samples, *, budget: int | None, fp16: bool
) -> contextlib.AbstractContextManager[FeatureCache | None]:
    """The cache of a run into ``out``; None without a budget. What it keeps stays there, for a later run."""
    if budget is None:
        return contextlib.nullcontext()
    return contextlib.closing(FeatureCache(out / FOLDER, engine, manifest, samples, budget=budget, fp16=fp16))


class FeatureCache:
    """Features of the samples of ``data`` in ``folder``, at most ``budget`` bytes; the first that come stay.

    ``samples`` tells how images are prepared. Raises CacheError where another run uses the folder, OutputError where it
    cannot be written, EngineError.
    """

    def __init__(self, folder: Path, engine: Engine, manifest: Manifest, samples: Samples, *, budget: int, fp16: bool):
        if engine.prefix is None:
            raise CacheError(f"the engine {engine.name} has no cache: use --engine {ENGINE}")
        self._prefix, self._features, self._samples = engine.prefix, manifest.features, samples
        self._budget, self._fp16 = budget, fp16
        self._dtype = np.dtype("<f2" if fp16 else "<f4")
        self._names = _digests(samples.data)
        self._hits = self._misses = 0
        row = row_bytes(manifest.features, fp16=fp16)
        key = _key(self._prefix, manifest, self._dtype)
        self._file = CacheFile(folder, key=key, row=row, budget=budget, wanted=self._names)
        try:
            self._compare()
        except BaseException:
            self.close()
            raise
        self._tell(folder, row)

    def _compare(self) -> None:
        """Compute one kept row again: a cache filled on another processor, say, may hold other roundings."""
        first = next((i for i, name in enumerate(self._names) if name in self._file), None)
        if first is None:
            return
        _, found = self._file.read([self._names[first]])
        expected = self._rows(self._prefix.features(self._samples.images(np.array([first]))))
        if len(found) and not np.array_equal(found, expected):
            log.info("this machine computes other features than those in the cache: it starts empty")
            self._file.empty()
        self._rest()

    def _tell(self, folder: Path, row: int) -> None:
        count = len(self._names)
        log.info("cache %s: %d of %d samples, %d bytes each", folder, len(self._file), count, row)
        if (room := capacity(self._budget, row)) < count:
            log.info("the cache has room for %d of %d samples; --cache %s holds all", room, count, size_for(count, row))

    def inputs(self, samples: Samples, batch: Indices) -> dict[str, Floats]:
        """What a step takes for the samples ``batch`` of the data: kept features, and computed ones, kept from now on.

        Raises EngineError.
        """
        names = [self._names[index] for index in batch]
        made = {f.name: np.empty((len(batch), *f.shape), np.float32) for f in self._features}
        missing = [place for part in _pieces(list(range(len(batch)))) for place in self._read(names, part, made)]
        self._hits += len(batch) - len(missing)
        self._misses += len(missing)
        for part in _pieces(missing):
            rows = self._rows(self._prefix.features(samples.images(batch[part])))
            self._put(made, part, rows)
            for place, row in zip(part, rows, strict=True):
                self._file.write(names[place], row.tobytes())
        if missing:
            self._rest()
        return made

    def _read(self, names: list[Sample], part: list[int], made: dict[str, Floats]) -> list[int]:
        """Put what is kept of ``part`` of a batch in its place; returns what is not."""
        found, rows = self._file.read([names[place] for place in part])
        kept = [part[i] for i in found]
        self._put(made, kept, rows)
        return sorted(set(part) - set(kept))

    def _rest(self) -> None:
        """Without a sample to compute, the session of the front only takes memory."""
        if len(self._file) == len(self._names):
            self._prefix.close()

    def _rows(self, features: Mapping[str, Floats]) -> npt.NDArray[np.uint8]:
        """The bytes of each sample's features, one row below the other."""
        flat = np.concatenate([value.reshape(len(value), -1) for value in features.values()], axis=1)
        if self._fp16:
            flat = np.clip(flat, -LARGEST, LARGEST)
        return flat.astype(self._dtype).view(np.uint8)

    def _put(self, made: dict[str, Floats], places: list[int], rows: npt.NDArray[np.uint8]) -> None:
        """Write rows into the features of a batch, each to its place."""
        flat, start = rows.view(self._dtype), 0
        for value in made.values():
            end = start + value[0].size
            value[places] = flat[:, start:end].reshape(len(places), *value.shape[1:])
            start = end

    def report(self) -> CacheReport:
        """What it did so far."""
        return CacheReport(
            hits=self._hits,
            misses=self._misses,
            stored=len(self._file),
            samples=len(self._names),
            nbytes=self._file.nbytes,
            budget=self._budget,
            fp16=self._fp16,
        )

    def close(self) -> None:
        """Let another run use the folder; what is kept stays."""
        self._file.close()


def _pieces(items: list[int]) -> Iterator[list[int]]:
    return (items[start : start + PIECE] for start in range(0, len(items), PIECE))


def _digests(data: LocalData) -> list[Sample]:
    """(digest of the id, digest of the content) of every sample."""
    ids = range(len(data)) if data.ids is None else data.ids
    return [
        (_digest(str(name).encode()), _digest(f"{image.dtype} {image.shape} ".encode() + image.tobytes()))
        for name, image in zip(ids, data.images, strict=True)
    ]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _key(prefix: Prefix, manifest: Manifest, dtype: np.dtype[Any]) -> bytes:
    """What rows are valid for: the frozen part, how images are prepared for it, and how rows are stored."""
    return hashlib.sha256(f"{prefix.key()} {manifest.input} {manifest.features} {dtype.str}".encode()).digest()
