"""Rows of the benchmark ``export``: seconds, peak memory and bytes of a conversion, and how its file answers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fusing
from benchmarks.export_compare import RUNNERS
from benchmarks.export_conversions import CANONICAL, OURS, TFLITE, Conversion, Made
from benchmarks.networks import Network
from benchmarks.rows import Row
from benchmarks.step_rounds import summary
from lorac_runtime.config import FORMATS

TIME, MEMORY, SIZE, ANSWERS = "time", "peak memory", "size", "difference of answers"
LOGIT = "of the largest logit"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


@dataclasses.dataclass(frozen=True)
class _Figure:
    figure: float | None
    unit: str
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def _figures(conversion: Conversion, folder: Path, said: Sequence[Mapping[str, Any]]) -> dict[str, _Figure]:
    seconds, peaks = [one["seconds"] for one in said], [one["peak_bytes"] for one in said]
    spread = summary([seconds])
    stages = {name: statistics.median(one["stages"][name] for one in said) for name in said[0]["stages"]}
    details = {"minimum": spread.minimum, "ninetieth": spread.ninetieth, "samples": seconds, "stages": stages}
    details |= {"from": conversion.source, "whole": statistics.median(one["whole_seconds"] for one in said)}
    imported = max(one["imported_bytes"] for one in said)
    note = "ran once" if conversion.once else ""
    return {
        TIME: _Figure(spread.median, "s", details, note),
        MEMORY: _Figure(float(max(peaks)), "bytes", {"after imports": imported, "samples": peaks}, note),
        SIZE: _Figure(float(size_of(conversion.target(folder))), "bytes"),
    }


def conversion_rows(
    conversion: Conversion, net: Network, folder: Path, made: Mapping[str, Made], answer: float | str
) -> Iterator[Row]:
    """The rows of a conversion; those of other .tflite files compare with ours in float32."""
    one, ours = made[conversion.name], made[TFLITE["float32"].name]
    if one.reason:
        yield _row(conversion, net, TIME, _Figure(None, "s", note=one.reason))
        return
    against = {}
    if conversion.format == "tflite" and conversion.variant != OURS and not ours.reason:
        against = _figures(TFLITE["float32"], folder, ours.said)
    for quantity, found in _figures(conversion, folder, one.said).items():
        yield _row(conversion, net, quantity, found, against.get(quantity))
    if conversion.format in RUNNERS:
        number, reason = (None, answer) if isinstance(answer, str) else (answer, "")
        other = "PyTorch's" if conversion == CANONICAL else "those of our ONNX file"
        yield _row(
            conversion,
            net,
            ANSWERS,
            _Figure(number, LOGIT, {"from": other, "run by": RUNNERS[conversion.format]}, reason),
        )


def _row(conversion: Conversion, net: Network, quantity: str, found: _Figure, against: _Figure | None = None) -> Row:
    ratio = found.figure / against.figure if found.figure is not None and against and against.figure else None
    return Row(
        *("export", net.name, conversion.format, conversion.environment, conversion.variant, quantity),
        *(found.figure, found.unit, ratio),
        reference=OURS if ratio is not None else "",
        settings={"precision": conversion.precision, "size": net.shape[1]},
        details=found.details,
        note=found.note,
    )


def fusing_rows(net: Network, artifact: Path, scratch: Path, rounds: int) -> list[Row]:
    """Fusing into the ONNX and the TFLite file: seconds, what that takes beyond copying, added memory, bytes."""
    fusing.write_state(artifact, scratch)
    found = []
    for kind, base in FORMATS.items():
        measured = fusing.measure(artifact, scratch, base, rounds)
        seconds = [one["fuse"] for one in measured]
        spread = summary([seconds])
        details: dict[str, Any] = {"minimum": spread.minimum, "ninetieth": spread.ninetieth, "samples": seconds}
        details |= {part: statistics.median(one[part] for one in measured) for part in ("compute", "copy", "beyond")}
        memory = fusing.extra_memory(artifact, scratch, base)
        conversion = dataclasses.replace(CANONICAL, variant=f"{OURS}, fusing", format=kind)
        figures = {
            TIME: _Figure(spread.median, "s", details),
            "added memory": _Figure(float(memory["anonymous"]), "bytes", {"resident": memory["resident"]}),
            SIZE: _Figure(float(size_of(scratch / "fused")), "bytes"),
        }
        found += [_row(conversion, net, quantity, figure) for quantity, figure in figures.items()]
    return found
