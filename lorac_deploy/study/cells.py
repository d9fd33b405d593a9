"""The cells of a study's grid, each under a key that its result is kept by."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from typing import Any

from lorac_deploy.study.config import StudyConfig, StudyDrift, StudyMethod


@dataclasses.dataclass(frozen=True)
class Cell:
    """One fine-tuning: a method on ``size`` samples of a drift, a share of their labels ``wrong``, with a seed."""

    method: StudyMethod
    drift: StudyDrift
    size: int
    wrong: float
    seed: int

    def key(self, sources: str) -> str:
        """What the cell's result is filed under. ``sources`` stands for the files that the study reads."""
        return digest({"cell": dataclasses.asdict(self), "sources": sources})


def grid(config: StudyConfig) -> list[Cell]:
    """All cells, those of one seed and drift together, so that whole comparisons are there early."""
    axes = (config.seeds, config.drifts, config.sizes, config.wrong_labels, config.methods)
    return [Cell(method, drift, size, wrong, seed) for seed, drift, size, wrong, method in itertools.product(*axes)]


def digest(value: Any) -> str:
    """A short name for a value made of plain data: equal values, equal names. Of a path the last part counts.

    >>> digest({"a": 1}) == digest({"a": 1}), digest([1]) == digest([2])
    (True, False)
    """
    text = json.dumps(value, sort_keys=True, default=lambda path: path.name)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
