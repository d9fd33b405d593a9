"""Which of the answers of a round count: broken, foreign and huge ones are rejected, each by name and reason."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from lorac_deploy.fleet.averaging import State, change_norm
from lorac_runtime.fleet.payload import Payload, Tensors, from_wire, wire_problems
from lorac_runtime.manifest import Manifest

MOST_SHARE = 10  # a client counts at most as so many times the median number of samples: it says that number itself


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client sent: ``tensors`` as they came, ``nbytes`` of them, and what it says of them."""

    client: str
    tensors: State
    artifact: str
    samples: float
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """An answer that counts: float32 ``tensors``, its ``weight`` in the mean, how far it moved (``norm``)."""

    client: str
    tensors: Tensors
    weight: float
    norm: float
    figures: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An answer that does not count, and why."""

    client: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.client}: {'; '.join(self.reasons)}"


@dataclasses.dataclass(frozen=True)
class Judge:
    """What answers are held against: ``artifact`` is the sha256 of the manifest, ``before`` the state that the clients
    started from (frozen tensors included). A change above ``most_norm`` times the median one is huge; with two clients
    or one there is nothing to compare with.
    """

    manifest: Manifest
    artifact: str
    payload: Payload
    before: Tensors
    most_norm: float = 5.0

    def judged(self, answers: Sequence[Answer]) -> tuple[list[Update], list[Rejected]]:
        """The updates that count, and the others."""
        rejected, sound = [], []
        for answer in answers:
            problems = self._problems(answer)
            if problems:
                rejected.append(Rejected(answer.client, tuple(problems)))
            else:
                tensors = from_wire(self.payload, answer.tensors)
                sound.append((answer, tensors, self._norm(tensors)))
        huge = self._huge([norm for _, _, norm in sound])
        most = MOST_SHARE * statistics.median_low([a.samples for a, _, _ in sound]) if sound else 0
        updates = []
        for (answer, tensors, norm), why in zip(sound, huge, strict=True):
            if why:
                rejected.append(Rejected(answer.client, (why,)))
            else:
                updates.append(Update(answer.client, tensors, min(answer.samples, most), norm, answer.figures))
        return updates, rejected

    def _problems(self, answer: Answer) -> list[str]:
        if answer.artifact != self.artifact:
            return [
                f"it has another artifact (manifest {answer.artifact[:12] or 'not named'}, here {self.artifact[:12]})"
            ]
        problems = wire_problems(self.payload, answer.tensors)
        if not (np.isfinite(answer.samples) and answer.samples >= 1):
            problems.append(f"it says that it has {answer.samples} samples, expected 1 or more")
        return problems

    def _norm(self, tensors: Tensors) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return change_norm(self.manifest, {**self.before, **tensors}, self.before)

    def _huge(self, norms: Sequence[float]) -> list[str]:
        """A reason for each norm that is too large, "" for the others."""
        if len(norms) < 3:
            return ["" if np.isfinite(norm) else f"its change has the norm {norm}" for norm in norms]
        middle = statistics.median_low(norms)
        limit = self.most_norm * middle if middle > 0 else np.inf
        text = f"times the median of this round's clients ({middle:.3g}); at most {self.most_norm:g} times is accepted"
        return [
            f"its change is huge: its norm {norm:.3g} is {norm / middle if middle else np.inf:.3g} {text}"
            if not norm <= limit
            else ""
            for norm in norms
        ]
