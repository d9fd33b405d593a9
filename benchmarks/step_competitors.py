"""What is measured beside what: variants of the artifact, and competitors that train one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks.interpreters import ONNXSIM, PYTORCH, RUNTIME, TRAINING
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig

RANK = 4
RANKS = (1, 4, 16, 64)  # of the sweep
RUNTIME_WORKER = "benchmarks.step_worker_runtime"
FORWARD_WORKER = "benchmarks.step_worker_forward"
TORCH_WORKER = "benchmarks.step_worker_torch"
ONNXSIM_WORKER = "benchmarks.step_worker_onnxsim"
SIMPLIFIED = "simplified"  # the variant `lora-c` as onnxsim.simplify gives it back

REFERENCE = "ours, lora-c"
FLOOR = "two forward passes"
TRAINED = ("lora-c", "full", "head", "block", "skip")  # variants that every engine and library is asked for
FROZEN_FRONT = ("block", "skip")  # those of them that ours can cache
NO_CACHE = "no cache: the frozen part runs in every step"


def _variants() -> dict[str, ArtifactConfig]:
    lora = LoraConfig(rank=RANK, rank_mode="r")
    both = {
        "lora-c": ("lora-c", lora),
        "rk": ("lora-c", dataclasses.replace(lora, rank_mode="rk")),
        "freeze-a": ("lora-c", dataclasses.replace(lora, freeze_a=True)),
        "full": ("full", LoraConfig()),
        "head": ("head", LoraConfig()),
        "block": ("blocks", LoraConfig(blocks=("rear",))),
    }
    made = {name: _config(*what, engine="both") for name, what in both.items()}
    made["skip"] = _config("skip", LoraConfig(rank=RANK))
    made |= {form: dataclasses.replace(_config("lora-c", lora), form=form) for form in ("weight", "branch")}
    every = dataclasses.replace(lora, small_layers="adapter")  # or high ranks would leave small layers frozen
    return made | {rank_variant(r): _config("lora-c", dataclasses.replace(every, rank=r)) for r in RANKS}


def _config(method: str, lora: LoraConfig, engine: Any = "onnxruntime") -> ArtifactConfig:
    training = METHODS[method].training()
    return ArtifactConfig(lora=lora, method=method, bn_policy="frozen", engine=engine, tflite="none", training=training)


def rank_variant(rank: int) -> str:
    """The variant of the sweep over ranks.

    >>> rank_variant(16)
    'rank 16'
    """
    return f"rank {rank}"


VARIANTS = _variants()


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A worker module, the environment it runs in, the variant that it trains, its options, and what to know of it."""

    label: str
    variant: str
    environment: str
    worker: str
    options: dict[str, Any]
    note: str = ""

    @property
    def format(self) -> str:
        """Of the files that it works on."""
        return "torch" if self.worker == TORCH_WORKER else "onnx"


def ours(label: str, variant: str, environment: str = RUNTIME, *, note: str = "", **options: Any) -> Competitor:
    """This project's runtime with its engine ``onnxruntime``."""
    return Competitor(label, variant, environment, RUNTIME_WORKER, {"engine": "onnxruntime", **options}, note)


def _native(variant: str) -> Competitor:
    note = NO_CACHE if variant in FROZEN_FRONT else ""
    options = {"engine": "onnxruntime-training"}
    return Competitor(f"onnxruntime-training, {variant}", variant, TRAINING, RUNTIME_WORKER, options, note)


def _torch(variant: str, *, form: str = "weight", compiled: bool = False) -> Competitor:
    note = NO_CACHE if variant in FROZEN_FRONT else ""
    label = f"PyTorch{' compiled' if compiled else ''}, {variant}{' as branches' if form == 'branch' else ''}"
    return Competitor(label, variant, PYTORCH, TORCH_WORKER, {"form": form, "compile": compiled}, note)


def _onnxsim(label: str, session: str) -> Competitor:
    return Competitor(
        label, "branch", ONNXSIM, ONNXSIM_WORKER, {"session": session}, "its Adam neither clips nor decays"
    )


def forward(label: str, variant: str, passes: int = 2) -> Competitor:
    """Forward passes of base.onnx in this project's session settings."""
    return Competitor(label, variant, RUNTIME, FORWARD_WORKER, {"passes": passes})


def _all() -> Iterable[Competitor]:
    yield forward(FLOOR, "lora-c")
    for variant in TRAINED:
        yield ours(f"ours, {variant}", variant, note=NO_CACHE if variant in FROZEN_FRONT else "")
        if variant in FROZEN_FRONT:
            yield ours(f"ours, {variant} + cache", variant, cache=True)
        yield _native(variant)
        yield _torch(variant)
        yield _torch(variant, compiled=True)
    yield ours("ours, lora-c, inner rank r*k", "rk")
    yield ours("ours, lora-c, lora_a frozen", "freeze-a")
    yield ours("ours, lora-c, in weight space", "weight")
    yield ours("ours, lora-c, as branches", "branch")
    yield ours("ours, lora-c, micro-batches of 8", "lora-c", micro_batch=8)
    yield ours("ours, lora-c, on onnxruntime 1.19.2", "lora-c", TRAINING)
    yield ours("ours, lora-c, simplified by onnxsim", SIMPLIFIED)
    yield _torch("lora-c", form="branch")
    yield _onnxsim("onnxsim, lora-c", "own")
    yield _onnxsim("onnxsim, lora-c, optimized session", "optimized")


COMPETITORS: dict[str, Competitor] = {c.label: c for c in _all()}


def chosen(*labels: str) -> tuple[Competitor, ...]:
    """Competitors by their labels. Raises KeyError for one that does not exist."""
    return tuple(COMPETITORS[label] for label in labels)


def of(*starts: str) -> tuple[Competitor, ...]:
    """All competitors that train one of `TRAINED` and whose label begins so.

    >>> [c.label for c in of("PyTorch,")][:2]
    ['PyTorch, lora-c', 'PyTorch, full']
    """
    plain = {f"{start} {variant}{more}" for start in starts for variant in TRAINED for more in ("", " + cache")}
    return tuple(c for c in COMPETITORS.values() if c.label in plain)


MAIN = chosen(
    FLOOR,
    REFERENCE,
    "ours, full",
    "onnxruntime-training, lora-c",
    "onnxruntime-training, full",
    "PyTorch, lora-c",
    "PyTorch, full",
    "PyTorch compiled, lora-c",
)
FORMS = chosen(
    "ours, lora-c, inner rank r*k",
    "ours, lora-c, lora_a frozen",
    "ours, lora-c, in weight space",
    "ours, lora-c, as branches",
    "ours, lora-c, on onnxruntime 1.19.2",
    "ours, lora-c, simplified by onnxsim",
    "PyTorch, lora-c as branches",
    "onnxsim, lora-c",
    "onnxsim, lora-c, optimized session",
)
EVERY = (*chosen(FLOOR), *of("ours,", "onnxruntime-training,", "PyTorch,", "PyTorch compiled,"))
EAGER = (*chosen(FLOOR), *of("ours,", "onnxruntime-training,", "PyTorch,"))
FEWER_COMPILED = (*EAGER, *chosen("PyTorch compiled, lora-c", "PyTorch compiled, full"))  # seconds to compile each
QUICK = chosen(FLOOR, REFERENCE, "ours, block + cache", "onnxruntime-training, lora-c", "PyTorch, lora-c")
PROJECT_STANDS_IN = (TRAINING, PYTORCH)  # for these: it has the same packages, if more of them
