"""A results file as the suite would write it, made of fixed random numbers: rows for every section of the report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.rows import Results, Row, Verdict

FULL = {"resnet18": 0.021, "mobilenet_v2": 0.009}
SMALL = {"resnet34": 0.04, "resnet50": 0.06, "resnet101": 0.11, "mobilenet_v3": 0.006, "mlperf_resnet8": 0.0003}
PLACES = (("onnx", "onnxruntime"), ("tflite", "ai-edge-litert"), ("tflite", "tflite-runtime"))
MUST = {"fused": "same", "unmerged": "same", "adapters as inputs": "different", "adapter branch": "different"}
SLOWER = {"adapters as inputs": 1.51, "adapter branch": 1.36, "fault: extra node": 1.04, "fault: unfolded branch": 1.2}
METHODS = {"full": (40.0, 91.2), "head": (6.0, 84.0), "lora-c": (22.0, 90.9), "block + cache": (9.0, 89.4)}
ENGINES = {"onnxruntime": 1.0, "onnxruntime-training": 2.1, "pytorch": 1.6}
HOSTILE = '<script>document.title = "taken"</script> & "quoted" \'single\' $math$ <b>'


def row(**changes: Any) -> Row:
    """One row of a fused file's latency, with some fields changed."""
    fields: dict[str, Any] = {
        "benchmark": "latency",
        "model": "resnet18",
        "format": "onnx",
        "runtime": "onnxruntime",
        "variant": "fused",
        "quantity": "latency",
        "figure": 0.0213,
        "unit": "s",
        "ratio": 1.001,
        "reference": "base",
        "verdict": "same",
        "settings": {"batch": 1, "precision": "float32"},
        "details": {"minimum": 0.0209, "ninetieth": 0.022, "low": 0.998, "high": 1.004, "must": "same"},
    }
    return Row(**{**fields, **changes})


def control(**changes: Any) -> Row:
    """A negative control that came out slower, with some fields changed."""
    own = {"variant": "adapter branch", "ratio": 1.36, "verdict": "different", "details": {"must": "different"}}
    return row(**{**own, **changes})


def fault(**changes: Any) -> Row:
    """A planted fault that was caught, with some fields changed."""
    details = {"must": "different", "structure": "not a drop-in: 1 node more"}
    own = {"variant": "fault: extra node", "ratio": 1.04, "verdict": "different", "details": details}
    return row(**{**own, **changes})


def html(made: Results, folder: Path, previous: Results | None = None) -> str:
    """The page of a results file."""
    return report.write(made, folder, previous).read_text(encoding="utf-8")


def results(rows: list[Row] | None = None, **changes: Any) -> Results:
    """A results file of these rows, or of rows for every section."""
    made = Results(
        command="python -m benchmarks all --report report/",
        started="2026-11-22T10:00:00+00:00",
        seconds=2520.0,
        quick=False,
        environment={
            "processor": "AMD EPYC",
            "cores": 2,
            "usable cores": [0, 1],
            "governor": "not readable",
            "load": [0.41, 0.3, 0.2],
            "memory": 25_276_502_016,
            "system": "Linux",
            "kernel": "6.18.44",
            "machine": "x86_64",
            "python": "3.11.7",
            "packages": {"numpy": "2.4.6", "torch": "2.13.0+cpu"},
        },
        environments={
            "onnxruntime": {"runtimes": {"onnxruntime": "1.31.1"}, "numpy": "2.4.6", "cores": [1]},
            "ai-edge-litert": {"runtimes": {"ai-edge-litert": "2.3.0"}, "numpy": "2.4.6", "cores": [1]},
            "tflite-runtime": {"runtimes": {"tflite-runtime": "2.14.0"}, "numpy": "1.26.4", "cores": [1]},
            "executorch": {"error": "cannot be installed: no build for this Python"},
        },
        rows=every_row() if rows is None else rows,
    )
    return dataclasses.replace(made, **changes)


def every_row() -> list[Row]:
    """Rows for every section, the same each time."""
    rng = np.random.default_rng(0)
    makers = (_latency, _small_latency, _faults, _loading, _finetune, _sweeps, _memory, _export, _footprint, _other)
    return [made for maker in makers for made in maker(rng)]


def _timed(rng: np.random.Generator, place: tuple[str, str], variant: str, typical: float, **changes: Any) -> Row:
    """A row of latency whose figures agree with its samples."""
    factor = SLOWER.get(variant, 1.0)
    samples = typical * factor * (1 + 0.03 * rng.gamma(1.2, 1.0, 120))
    ratio = factor * (1 + 0.002 * rng.standard_normal())
    wide = rng.random() < 0.08
    reach = 0.02 if wide else 0.004
    verdict: Verdict = "too noisy" if wide and factor == 1 else "same" if factor == 1 else "different"
    compared = variant != "base"
    details: dict[str, Any] = {
        "minimum": float(samples.min()),
        "ninetieth": float(np.percentile(samples, 90)),
        "rounds": 12,
        "structure": _structure(variant),
        "must": MUST.get(variant, ""),
        "samples": samples.tolist(),
        **({"low": ratio - reach, "high": ratio + reach} if compared else {}),
    }
    fields = {"figure": float(np.median(samples)), "details": details, "ratio": ratio if compared else None}
    fields |= {"reference": "base" if compared else "", "verdict": verdict if compared else ""}
    return row(format=place[0], runtime=place[1], variant=variant, **(fields | changes))


def _structure(variant: str) -> str:
    if variant in ("base", "fused"):
        return "drop-in: 12 checks"
    return "not a drop-in: 2 nodes more than the base (Mul, Add)"


def _latency(rng: np.random.Generator) -> Iterator[Row]:
    kinds = itertools.product(FULL, PLACES, ("float32", "int8"), (1, 8), ("base", *MUST))
    for model, place, precision, batch, variant in kinds:
        settings = {"batch": batch, "precision": precision, "threads": 1, "size": 224}
        if place[0] == "tflite" and variant == "adapters as inputs":
            note = "a TFLite file of this network takes no adapters as inputs: its kernels want constant weights"
            yield row(
                model=model,
                format=place[0],
                runtime=place[1],
                variant=variant,
                figure=None,
                ratio=None,
                verdict="",
                settings=settings,
                details={"must": "different"},
                note=note,
            )
            continue
        yield _timed(rng, place, variant, FULL[model] * batch**0.9, model=model, settings=settings)


def _small_latency(rng: np.random.Generator) -> Iterator[Row]:
    for model, place, variant in itertools.product(SMALL, PLACES[:2], ("base", "fused")):
        settings = {"batch": 1, "precision": "float32", "threads": 1, "size": 32 if "8" in model else 224}
        yield _timed(rng, place, variant, SMALL[model], model=model, settings=settings)


def _faults(rng: np.random.Generator) -> Iterator[Row]:
    settings = {"batch": 1, "precision": "float32", "threads": 1, "size": 224}
    for variant in ("fault: extra node", "fault: unfolded branch"):
        made = _timed(rng, PLACES[0], variant, FULL["resnet18"], settings=settings)
        yield dataclasses.replace(made, details={**made.details, "must": "different"})


def _loading(rng: np.random.Generator) -> Iterator[Row]:
    for model, place, variant in itertools.product(FULL, PLACES, ("base", "fused")):
        for quantity, typical in (("load", 0.03), ("first run", 0.05)):
            settings = {"batch": 1, "precision": "float32", "threads": 1, "size": 224}
            fields: dict[str, Any] = {"quantity": quantity, "figure": typical * float(rng.uniform(0.9, 1.1))}
            fields |= {"ratio": None, "verdict": "", "reference": "", "details": {}}
            yield row(
                model=model,
                format=place[0],
                runtime=place[1],
                variant=variant,
                settings=settings,
                **fields,
            )


def plain(
    benchmark: str, variant: str, runtime: str, quantity: str, figure: float | None, unit: str, **more: Any
) -> Row:
    """A row that is compared with nothing."""
    fields: dict[str, Any] = {"model": "resnet18", "format": "", "ratio": None, "reference": "", "verdict": ""}
    fields |= {"settings": {}, "details": {}, **more}
    return row(
        benchmark=benchmark, variant=variant, runtime=runtime, quantity=quantity, figure=figure, unit=unit, **fields
    )


def _finetune(rng: np.random.Generator) -> Iterator[Row]:
    for (method, (seconds, accuracy)), (engine, factor) in itertools.product(METHODS.items(), ENGINES.items()):
        settings = {"batch": 32, "threads": 2}
        cost = seconds * factor * float(rng.uniform(0.95, 1.05))
        for quantity, share in (("step", 1 / 60), ("epoch", 1 / 4), ("time to target", 1.0)):
            reached = method != "head" or quantity != "time to target"
            note = "" if reached else "the target of 88 % was not reached within 20 epochs"
            figure, details = (cost * share, {"minimum": 0.95 * cost * share}) if reached else (None, {})
            yield plain(
                "finetune", method, engine, quantity, figure, "s", settings=settings, details=details, note=note
            )
        yield plain("finetune", method, engine, "accuracy", accuracy, "%", settings=settings)


def _sweeps(rng: np.random.Generator) -> Iterator[Row]:
    swept = {"rank": (1, 2, 4, 8, 16), "batch": (1, 8, 32), "depth": (18, 34, 50), "size": (32, 64, 128)}
    for sweep, variant in itertools.product(swept, ("lora-c", "full")):
        for value in swept[sweep]:
            settings = {"batch": 8, "rank": 4, "size": 32, "threads": 1, "sweep": sweep, sweep: value}
            figure = 0.05 + 0.002 * value * float(rng.uniform(0.9, 1.1)) * (1.3 if variant == "full" else 1)
            model = f"resnet{value}" if sweep == "depth" else "resnet18"
            yield plain("finetune", variant, "onnxruntime", "step", figure, "s", settings=settings, model=model)


def _memory(rng: np.random.Generator) -> Iterator[Row]:
    for model, (engine, factor), batch in itertools.product(FULL, ENGINES.items(), (1, 8, 32)):
        figure = int(1e8 * factor + 9e6 * batch * float(rng.uniform(0.95, 1.05)))
        yield plain("memory", "lora-c", engine, "peak memory", figure, "bytes", model=model, settings={"batch": batch})


def _export(rng: np.random.Generator) -> Iterator[Row]:
    for model in FULL:
        seconds = float(rng.uniform(4, 9))
        yield plain("export", "training artifact", "", "export", seconds, "s", model=model)
        yield plain("export", "adapter", "", "file size", int(rng.integers(200_000, 900_000)), "bytes", model=model)


def _footprint(rng: np.random.Generator) -> Iterator[Row]:
    sizes = {
        "onnxruntime": (9.1e7, 6.4e7, 0.12),
        "onnxruntime-training": (7.7e7, 7e7, 0.2),
        "pytorch": (7.1e8, 2.3e8, 1.9),
    }
    for engine, (installed, resident, seconds) in sizes.items():
        for quantity, figure in (("installed", int(installed)), ("resident after import", int(resident))):
            yield plain("footprint", engine, engine, quantity, figure, "bytes", model="")
        yield plain("footprint", engine, engine, "import", seconds * float(rng.uniform(0.9, 1.1)), "s", model="")
    note = "no build for this Python"
    yield plain("footprint", "executorch", "executorch", "installed", None, "bytes", model="", note=note)


def _other(rng: np.random.Generator) -> Iterator[Row]:
    yield plain("domain < shift", HOSTILE, "", "accuracy", 81.0 + float(rng.random()), "%", model=HOSTILE, note=HOSTILE)
