"""Bytes of files: of an adapter, and of everything that a device needs to train one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.step_cases import Case
from benchmarks.step_competitors import RUNTIME_WORKER, Competitor
from lorac_runtime.manifest import ADAPTER, BASE, BATCHNORM, FILE_NAME, load


def size_rows(case: Case, competitors: Sequence[Competitor]) -> Iterator[Row]:
    """Both sizes of every variant and engine among the competitors that are ours."""
    done: set[tuple[str, str]] = set()
    for competitor in competitors:
        engine = str(competitor.options.get("engine"))
        folder = case.artifact(competitor.variant) if competitor.worker == RUNTIME_WORKER else None
        if folder is None or (competitor.variant, engine) in done or engine not in load(folder).engines:
            continue
        done.add((competitor.variant, engine))
        for quantity, names in (("adapter", [ADAPTER]), ("artifact", needed(folder, engine))):
            yield Row(
                benchmark="memory",
                model=case.model,
                format="onnx",
                runtime=competitor.environment,
                variant=competitor.label.removesuffix(" + cache"),
                quantity=quantity,
                figure=sum((folder / name).stat().st_size for name in names),
                unit="bytes",
                details={"files": names},
            )


def needed(folder: Path, engine: str) -> list[str]:
    """The files of an artifact that a device with this engine needs; base.tflite is left out."""
    manifest = load(folder)
    names = {FILE_NAME, BASE, ADAPTER, *manifest.engines[engine].files}
    return sorted(names | ({BATCHNORM} & manifest.files.keys()))
