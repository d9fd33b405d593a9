"""All fused files together: each row is one observation, so that noise which no single row overcomes averages out."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rows import Row
from lorac_deploy.bench.equivalence import equivalence
from lorac_deploy.bench.pairs import BASE, FUSED

POOLED = "latency of all rows"
FEWEST = 4  # rows that make a mean


def pooled(rows: Sequence[Row]) -> list[Row]:
    """The mean ratio of fused files to their bases over rows of each format, and over all; none for few rows."""
    own = [row for row in rows if row.variant == FUSED and row.quantity == "latency" and row.ratio is not None]
    groups = {kind: [row for row in own if row.format == kind] for kind in dict.fromkeys(row.format for row in own)}
    groups |= {"onnx and tflite": own} if len(groups) > 1 else {}
    return [_mean(kind, found) for kind, found in groups.items() if len(found) >= FEWEST]


def _mean(kind: str, rows: Sequence[Row]) -> Row:
    test = equivalence([row.ratio for row in rows if row.ratio is not None])
    wrong = [row.model for row in rows if not str(row.details.get("structure", "")).startswith("drop-in")]
    details = {
        "low": test.low,
        "high": test.high,
        "bootstrap": list(test.bootstrap),
        "rows": len(rows),
        "must": "same",
        "structure": f"not a drop-in: {', '.join(wrong)}" if wrong else f"drop-in: all {len(rows)}",
    }
    place = ("latency", "", kind, "", FUSED, POOLED, test.ratio, "times the base's")
    return Row(*place, ratio=test.ratio, reference=BASE, verdict=test.verdict, details=details)
