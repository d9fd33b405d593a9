"""Arrays that go from step to step without being copied: a session reads one set and writes the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines.step_graph import NEXT

Array = npt.NDArray[Any]


class Carried:
    """Two sets of arrays of the same names. `swap` after a step makes what it wrote what the next one reads."""

    def __init__(self, ort: Any, start: Mapping[str, Array]) -> None:
        first = {name: np.array(value, order="C") for name, value in start.items()}
        second = {name: np.zeros_like(value) for name, value in first.items()}
        self._arrays = (first, second)
        self._wrapped = tuple(
            {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()} for values in self._arrays
        )
        self.side = 0

    @property
    def values(self) -> dict[str, Array]:
        """What the next step reads; changing an array in place changes that."""
        return self._arrays[self.side]

    def swap(self) -> None:
        """Read next what was written last."""
        self.side = 1 - self.side

    def bind(self, io: Any, inputs: set[str], outputs: set[str]) -> None:
        """Tie the inputs X and the outputs X.next that a session has to the two sets."""
        for name, value in self._wrapped[self.side].items():
            if name in inputs:
                io.bind_ortvalue_input(name, value)
        for name, value in self._wrapped[1 - self.side].items():
            if name + NEXT in outputs:
                io.bind_ortvalue_output(name + NEXT, value)


class StepSession:
    """A session that steps: its ``carried`` arrays are bound once for each side that they can have."""

    def __init__(self, ort: Any, session: Any, carried: Sequence[Carried], scalars: Sequence[str]) -> None:
        self._ort, self._session, self._carried = ort, session, carried
        self._inputs = {i.name for i in session.get_inputs()}
        self._outputs = {o.name for o in session.get_outputs()}
        self._scalars = {name: np.zeros((), np.float32) for name in scalars}
        self._bindings: dict[tuple[int, ...], Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, float]:
        """One step on ``feeds``, contiguous arrays; returns its scalars. The carried arrays are not swapped."""
        io = self._binding()
        for name, value in feeds.items():
            io.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(value))
        self._session.run_with_iobinding(io)
        return {name: float(value) for name, value in self._scalars.items()}

    def _binding(self) -> Any:
        sides = tuple(carried.side for carried in self._carried)
        if sides not in self._bindings:
            io = self._bindings[sides] = self._session.io_binding()
            for carried in self._carried:
                carried.bind(io, self._inputs, self._outputs)
            for name, value in self._scalars.items():
                io.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(value))
        return self._bindings[sides]
