"""How much memory does fine-tuning take, and how many bytes does a device need?

Peak memory is the largest resident one of the whole process, as the kernel counts it (VmHWM): a fresh process loads the
artifact and steps a few times; nothing is subtracted. Memory after import is the same right after the imports. Saved
activations are what a forward pass keeps for the backward pass: ours by the step graph, PyTorch's by its own hooks.
Two processes run at a time, for nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import step_competitors as sc
from benchmarks.command import Say, common_options, finish
from benchmarks.finetune_cases import Cases, compared, noted, shortened
from benchmarks.memory_sizes import size_rows
from benchmarks.rows import Row
from benchmarks.step_cases import Case
from benchmarks.step_competitors import RUNTIME_WORKER, TORCH_WORKER, Competitor
from benchmarks.step_process import WorkerError, fresh
from lorac_exporters.costs import artifact_costs
from lorac_runtime.errors import LoracDeployError

BENCHMARK = "memory"
SIZE, THREADS, STEPS = 32, 2, 3
AT_A_TIME = 2  # processes
_making = threading.Lock()  # a case makes files when they are first asked for
COMPILED_MODELS, COMPILED_BATCH = ("resnet20", "resnet18"), 8  # compiling takes long; much of that peak is its own
COMPILED = sc.chosen("PyTorch compiled, lora-c")
UNCACHED = ("ours, block", "ours, skip")  # a device trains these with a cache
EVERY = (
    *(c for c in sc.of("ours,", "onnxruntime-training,", "PyTorch,") if c.label not in UNCACHED),
    *sc.chosen("ours, lora-c, micro-batches of 8"),
)
FEWER = tuple(c for c in EVERY if c.variant not in ("head", "skip"))
FULL_BATCHES = (8, 32)  # where every method is measured; elsewhere the larger ones


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure; ``python`` holds other interpreters of environments, by name."""

    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: one small network."""
        return cls(quick=True, python=python)

    @property
    def models(self) -> tuple[str, ...]:
        """Networks."""
        return ("resnet20",) if self.quick else ("resnet18", "mobilenet_v2")

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        return (1, 8) if self.quick else (1, 8, 32, 64)

    def competitors(self, model: str, batch: int) -> tuple[Competitor, ...]:
        """Who trains a network with batches of this size."""
        if self.quick:
            return tuple(c for c in sc.QUICK if c.label != sc.FLOOR)
        every = EVERY if batch in FULL_BATCHES else FEWER
        return (*every, *(COMPILED if model in COMPILED_MODELS and batch == COMPILED_BATCH else ()))


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure every network, batch and competitor, each in a process of its own."""
    found: list[Row] = []
    imported: dict[tuple[str, str], Row] = {}
    with Cases() as cases, ThreadPoolExecutor(AT_A_TIME) as pool:
        for model in settings.models:
            case = cases.of(model, SIZE)
            for batch in settings.batches:
                say(f"memory: {model}, batch {batch}")
                one = functools.partial(measured, settings, case, batch, imported)
                found += [row for its in pool.map(one, settings.competitors(model, batch)) for row in its]
            found += size_rows(case, settings.competitors(model, COMPILED_BATCH))
    return compared([*imported.values(), *found])


def measured(
    settings: Settings, case: Case, batch: int, imported: dict[tuple[str, str], Row], competitor: Competitor
) -> list[Row]:
    """Peak and saved activations of one competitor; its memory after import goes into ``imported``, once."""
    made = _row(case, competitor, "peak memory", batch)
    try:
        told, note = _asked(settings, case, competitor, batch)
    except (WorkerError, FileNotFoundError, RuntimeError, LoracDeployError) as err:
        return [dataclasses.replace(made, note=shortened(str(err)))]
    key = (competitor.environment, competitor.worker)
    imported.setdefault(key, _imported(competitor, told["imported_bytes"], note))
    details = {"imported": told["imported_bytes"], "steps": STEPS}
    found = [dataclasses.replace(made, figure=told["peak_bytes"], details=details, note=noted(competitor.note, note))]
    if (saved := told.get("saved_bytes")) is not None:
        made = _row(case, competitor, "saved activations", batch)
        found.append(dataclasses.replace(made, figure=saved, note=noted(competitor.note, _counted(competitor))))
    return found


def _asked(settings: Settings, case: Case, competitor: Competitor, batch: int) -> tuple[dict[str, Any], str]:
    """(bytes by kind, where it ran if that is not its own environment), from a fresh process."""
    with _making:
        job = case.job(competitor, batch=batch, threads=THREADS, onnxsim=Path)
    worker, where = fresh(competitor, settings.python, quick=settings.quick)
    with worker:
        imported = worker.ask("hello")["imported_bytes"]
        worker.ask("open", name="it", job=dataclasses.asdict(job))
        peak = worker.ask("step", name="it", count=STEPS)["peak_bytes"]
        saved = worker.ask("saved", name="it")["bytes"] if _tells(competitor) else _by_graph(case, competitor, batch)
    return {"imported_bytes": imported, "peak_bytes": peak, "saved_bytes": saved}, where.note


def _tells(competitor: Competitor) -> bool:
    return competitor.worker == TORCH_WORKER and not competitor.options["compile"]


def _by_graph(case: Case, competitor: Competitor, batch: int) -> int | None:
    """What the step graph keeps; None where the graph is not ours, or a step is made in parts."""
    options = competitor.options
    if competitor.worker != RUNTIME_WORKER or options["engine"] != "onnxruntime" or "micro_batch" in options:
        return None
    return artifact_costs(case.artifact(competitor.variant), batch).saved_bytes


def _counted(competitor: Competitor) -> str:
    return "with the updated weights of adapters" if competitor.variant == "lora-c" and _tells(competitor) else ""


def _row(case: Case, competitor: Competitor, quantity: str, batch: int) -> Row:
    return Row(
        benchmark=BENCHMARK,
        model=case.model,
        format=competitor.format,
        runtime=competitor.environment,
        variant=competitor.label,
        quantity=quantity,
        figure=None,
        unit="bytes",
        settings={"batch": batch, "threads": THREADS, "size": SIZE},
        note="not measured",
    )


def _imported(competitor: Competitor, size: int, note: str) -> Row:
    variant = competitor.label.partition(",")[0]
    return Row(
        BENCHMARK,
        "",
        competitor.format,
        competitor.environment,
        variant,
        "memory after import",
        size,
        "bytes",
        note=note,
    )


def main(argv: Sequence[str]) -> int:
    """Measure, print, write the results file."""
    p = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    common_options(p, BENCHMARK)
    args = p.parse_args(argv)
    settings = Settings(args.quick, args.python)
    return finish(BENCHMARK, argv, args, functools.partial(rows, settings))
