"""report.json: what a fine-tuning run did, in figures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np

from lorac_runtime.config import Settings
from lorac_runtime.errors import OutputError, listed
from lorac_runtime.files import atomic_write, size_of
from lorac_runtime.schema import decode
from lorac_runtime.version import __version__

FILE_NAME = "report.json"
MAX_BYTES = 256 << 20  # a value for each step; no run comes near, and a larger file is not read


@dataclasses.dataclass(frozen=True)
class FusedFile:
    """A fused file in the output folder. ``seconds`` is all that making it took, ``compute_seconds`` what it took
    beside reading and writing.

    ``overflowed`` counts numbers too large for float16, stored as the largest one; ``saturated`` names biases that do
    not fit into int32.
    """

    name: str
    nbytes: int
    seconds: float
    compute_seconds: float
    overflowed: int = 0
    saturated: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """How a cache served a run (since it was resumed): look-ups that ``hits`` answered and ``misses`` did not, how many
    of ``samples`` are ``stored`` in the end, in ``nbytes`` of at most ``budget`` bytes."""

    hits: int
    misses: int
    stored: int
    samples: int
    nbytes: int
    budget: int
    fp16: bool

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that were answered.

        >>> CacheReport(hits=3, misses=1, stored=1, samples=1, nbytes=9, budget=9, fp16=False).hit_rate
        0.75
        """
        return self.hits / max(1, self.hits + self.misses)


@dataclasses.dataclass(frozen=True)
class FinetuneReport:
    """A finished run. ``losses`` has a value per step.

    ``accuracy_before`` and ``_after`` are shares of the held-out images, ``loss_before`` and ``_after`` the mean loss
    there; None where none were held out, the accuracies also where the data have no labels. Where nothing trained
    there are no losses, and ``step_seconds`` is 0.

    ``step_seconds`` is the median of the steps, from the images to the new weights. ``seconds`` is the whole run's
    time, resumed parts included; ``fuse_seconds`` is what fusing took beside reading and writing the ``fused`` files.
    ``peak_memory_bytes`` is the process's peak resident memory, None where the system does not tell. ``run`` identifies
    artifact, data and settings by hash and value: a run with an equal one would give the same result. ``cache`` is
    None where there was none. ``task`` is one of `lorac_runtime.tasks.TASKS`. Of segmentation accuracies are shares of
    pixels, and ``mean_iou_before`` and ``_after`` the mean overlap of classes; ``error_before`` and ``_after`` are mean
    absolute errors of regression; else None.
    """

    engine: str
    method: str
    model: str
    bn_policy: str
    accuracy_before: float | None
    accuracy_after: float | None
    loss_before: float | None
    loss_after: float | None
    losses: tuple[float, ...]
    epoch_losses: tuple[float, ...]
    train_images: int
    val_images: int
    step_seconds: float
    seconds: float
    fuse_seconds: float
    peak_memory_bytes: int | None
    trained_parameters: int
    model_parameters: int
    seed: int
    settings: Settings
    versions: dict[str, str]
    run: dict[str, str]
    fused: tuple[FusedFile, ...] = ()
    cache: CacheReport | None = None
    mean_iou_before: float | None = None
    mean_iou_after: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    task: str = "classification"

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


def write_report(folder: Path, report: FinetuneReport) -> None:
    """Write ``folder/report.json`` atomically. Raises OutputError."""
    atomic_write(folder / FILE_NAME, report.to_json().encode())


def read_report(folder: Path) -> FinetuneReport | None:
    """The report in ``folder``, None if there is none.

    Raises OutputError if report.json is not one of this program's.
    """
    path = folder / FILE_NAME
    problems: list[str] = []
    try:
        size_of(path, MAX_BYTES)
        report = decode(FinetuneReport, json.loads(path.read_text(encoding="utf-8")), "", problems)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as err:
        problems.append(f"it cannot be read: {err}")
    if problems:
        headline = f"{path} is not the report of a run; choose another output folder, or restart (--restart):"
        raise OutputError(listed(headline, problems))
    return cast(FinetuneReport, report)


def versions(engine: str, engine_version: str) -> dict[str, str]:
    """Versions of everything that took part."""
    return {
        "python": platform.python_version(),
        "lorac-runtime": __version__,
        "numpy": np.__version__,
        "safetensors": package_version("safetensors"),
        engine: engine_version,
    }


def package_version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process, None where the system does not tell.

    >>> (peak_memory_bytes() or 1 << 30) > 1 << 20
    True
    """
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the size of the process that launched this one
        return _high_water_mark(status.read_text(encoding="utf-8").splitlines())
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _high_water_mark(lines: Iterable[str]) -> int | None:
    """Bytes of the VmHWM line.

    >>> _high_water_mark(["Name: python", "VmHWM:      2 kB"])
    2048
    """
    values = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(values[0]) * 1024 if values else None
