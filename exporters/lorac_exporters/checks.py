"""What every drop-in check is made of: verdicts with their evidence, and the comparisons that all formats share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Verdict = Literal["pass", "fail", "not checked"]
MAX_LISTED = 5
ROUNDINGS = 8.0  # inner roundings add to what a last bit of the inputs does: of 1 to 1.5 times as much on ResNets
BYTES_CHECK = "bytes outside the patch table"
NO_TABLE = "no manifest.json beside the base; name its folder with --artifact"


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise: its verdict and the evidence (what was compared, or what differs)."""

    name: str
    verdict: Verdict
    detail: str


@dataclasses.dataclass(frozen=True)
class DropinReport:
    """All checks of one pair of files. ``ok`` needs at least one passed check and none failed."""

    base: str
    fused: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether FUSED may replace BASE."""
        verdicts = [check.verdict for check in self.checks]
        return "fail" not in verdicts and "pass" in verdicts

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def same(name: str, old: object, new: object, unit: str = "") -> Check:
    """Whether two facts are equal."""
    if old == new:
        return Check(name, "pass", f"{old} {unit}".strip())
    return Check(name, "fail", f"base has {old}, fused has {new} {unit}".strip())


def same_list(name: str, old: Sequence[str], new: Sequence[str], unit: str) -> Check:
    """Whether two lists of descriptions are equal, item by item.

    >>> same_list("operators", ["CONV_2D", "ADD"], ["CONV_2D", "MUL"], "operators").detail
    'ADD -> MUL'
    """
    if old == new:
        return Check(name, "pass", f"{len(old)} {unit} equal")
    if len(old) != len(new):
        return Check(name, "fail", f"base has {len(old)} {unit}, fused has {len(new)}")
    different = [f"{a} -> {b}" for a, b in zip(old, new, strict=True) if a != b]
    return Check(name, "fail", shortened(different))


def shortened(found: Sequence[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return "; ".join(found[:MAX_LISTED]) + more


def bytes_check(base: Path, fused: Path, ranges: Iterable[tuple[int, int]] | None) -> Check:
    """Whether all bytes are equal but those of the patch table's ``ranges``: (offset, nbytes) each."""
    name = BYTES_CHECK
    if ranges is None:
        return Check(name, "not checked", NO_TABLE)
    old, new = np.fromfile(base, np.uint8), np.fromfile(fused, np.uint8)
    if old.size != new.size:
        return Check(name, "fail", "the files differ in size")
    different, total = old != new, 0
    changed = int(different.sum())
    for offset, nbytes in ranges:
        different[offset : offset + nbytes] = False
        total += nbytes
    outside = np.flatnonzero(different)
    if outside.size:
        return Check(name, "fail", f"{outside.size} bytes differ outside it, the first at offset {outside[0]}")
    return Check(name, "pass", f"equal; {changed} of its {total} bytes changed")


def numeric_check(
    name: str, expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any], tolerance: float, *, noise: float = 0.0
) -> Check:
    """Agreement of two sets of logits: max abs difference <= tolerance * max(1, largest logit).

    Where ``noise``, the distance by which a last bit of the inputs moves the logits, is large, `ROUNDINGS` times as
    much is allowed: a deep network with weights that are not trained multiplies every rounding on its way.
    """
    if expected.shape != got.shape or expected.size == 0:
        return Check(name, "fail", f"logits of shape {got.shape}, expected {expected.shape}")
    difference = float(np.max(np.abs(expected.astype(np.float64) - got)))
    bound = max(
        tolerance * max(1.0, float(np.max(np.abs(expected)))), ROUNDINGS * noise if math.isfinite(noise) else 0.0
    )
    verdict: Verdict = "pass" if difference <= bound else "fail"
    return Check(name, verdict, f"max abs difference {difference:.2e}, allowed {bound:.2e} on {len(expected)} inputs")
