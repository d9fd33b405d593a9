"""Settings of a fine-tuning run on the device."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from lorac_runtime.engines import AUTO, MODULES
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import BASE, BASE_TFLITE, Manifest, TrainingDefaults

ENGINES = (AUTO, *MODULES)
FORMATS = {"onnx": BASE, "tflite": BASE_TFLITE}  # what a fused file can be, and the base file that it is a copy of
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def size_in_bytes(text: str) -> int:
    """Bytes.

    >>> size_in_bytes("256MB"), size_in_bytes("1GiB"), size_in_bytes("1.5 G"), size_in_bytes("4096")
    (256000000, 1073741824, 1500000000, 4096)

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write it like 256MB, 512MiB or 1GiB")
    return int(float(found[1]) * UNITS[found[2]])


def seconds(text: str) -> float:
    """Seconds.

    >>> seconds("90"), seconds("10m"), seconds("1.5h")
    (90.0, 600.0, 5400.0)

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is not a time; write it like 90s, 10m or 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def option(default: Any, text: str, choices: tuple[str, ...] | None = None, parse: Any = None, unit: str = "") -> Any:
    """A field whose help text and choices the command line shows, and how it reads a value that is no plain number."""
    shown = {"help": text, "choices": choices, "parse": parse, "unit": unit or None}
    return dataclasses.field(default=default, metadata=shown)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune; None means what the artifact says. The command line's options are these fields.

    >>> FinetuneConfig(lr=3e-4).resolved(TrainingDefaults(epochs=5)).epochs
    5

    Raises ValueError for a value out of range.
    """

    epochs: int | None = option(None, "passes over the training images (default: the artifact's)")
    batch_size: int | None = option(None, "images per step (default: the artifact's)")
    lr: float | None = option(None, "peak learning rate (default: the artifact's)")
    warmup: float | None = option(
        None, "share of all steps in which the learning rate rises, 0 to 1 (default: the artifact's)"
    )
    val_fraction: float = option(
        0.2, "share of the samples held out, by class, for the accuracies before and after (default: %(default)s)"
    )
    seed: int = option(0, "seed of the split and of the order of images (default: %(default)s)")
    engine: str = option(
        AUTO,
        "what trains; auto takes onnxruntime where the artifact has its files and the package is installed, else "
        "onnxruntime-training (default: %(default)s)",
        ENGINES,
    )
    micro_batch: int | None = option(
        None,
        "compute a step in pieces of so many images, in less memory and with the same result; engine onnxruntime, not "
        "with BN policy batch (default: all images at once)",
    )
    cache: int | None = option(
        None,
        "keep what the frozen front of the network computes in OUT/cache, in at most this much space, such as 64MB or "
        "1GiB, so that it runs once for each image and not in every epoch; the result is the same to the last bit "
        "(default: no cache)",
        parse=size_in_bytes,
        unit="SIZE",
    )
    cache_fp16: bool = option(
        False, "keep it in half precision: twice as many images in the same space, but the result differs a little"
    )
    to: tuple[str, ...] = option(
        ("onnx",),
        "formats of the fused model, onnx, tflite or onnx,tflite: OUT gets a file fused.FORMAT for each, made from "
        "base.FORMAT of the artifact (default: onnx)",
    )
    threads: int | None = option(None, "threads of the engine (default: its own choice)")
    memory: int | None = option(
        None,
        "the most memory that the process may take, such as 256MB: chooses the largest --micro-batch that fits, and "
        "refuses to begin where none does (default: no limit)",
        parse=size_in_bytes,
        unit="SIZE",
    )
    time_budget: float | None = option(
        None,
        "stop at a checkpoint after so long, such as 90s, 10m or 1.5h, with exit status 75; the same command goes on "
        "(default: no limit)",
        parse=seconds,
        unit="TIME",
    )
    checkpoint_every: float = option(
        60.0,
        "write a checkpoint after so long, such as 30s or 5m, and after every epoch (default: 60s)",
        parse=seconds,
        unit="TIME",
    )
    trust: Path | None = option(  # noqa: RUF009 - it makes a field
        None, "refuse an artifact that was not signed with the private half of this public key, a PEM file", unit="KEY"
    )
    restart: bool = option(False, "begin anew, whatever a finished or unfinished run left in the output folder")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch", "cache", "threads", "memory"):
            _check(name, getattr(self, name), least=1)
        if self.cache_fp16 and self.cache is None:
            raise ValueError("cache_fp16 says how the cache stores numbers; give the cache a size too (--cache 64MB)")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if not self.to or not set(self.to) <= set(FORMATS) or len(set(self.to)) < len(self.to):
            raise ValueError(f"to must name some of {', '.join(FORMATS)}, each once, got {','.join(self.to)!r}")
        _check("seed", self.seed, least=0)
        for name in ("time_budget", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, got {value}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.warmup is not None and not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of all steps, 0 to 1, got {self.warmup}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")

    def resolved(self, defaults: TrainingDefaults) -> Settings:
        """The settings with the artifact's ``defaults`` where nothing was asked for."""
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}
        return Settings(**{n: getattr(defaults, n) if v is None else v for n, v in chosen.items()})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, all of it known. A run resumes only with the same settings."""

    epochs: int
    batch_size: int
    lr: float
    warmup: float
    val_fraction: float
    seed: int


def settings_for(manifest: Manifest, config: FinetuneConfig) -> Settings:
    """What is asked for, the artifact's defaults for the rest; where nothing trains there are no epochs.

    Raises ArtifactError for settings of a training that does not take place.
    """
    settings = config.resolved(manifest.training)
    if manifest.trainables:
        return settings
    idle = [f"--{name}" for name in ("epochs", "lr", "warmup") if getattr(config, name) is not None]
    if idle:
        raise ArtifactError(
            f"this artifact trains nothing (method {manifest.method}), so {' and '.join(idle)} would change nothing: "
            "leave that out, or export with a method that trains"
        )
    return dataclasses.replace(settings, epochs=0)


def _check(name: str, value: int | None, *, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
