"""Opening step graphs: from the path, since their frozen weights lie in base.onnx beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines.native import PROVIDERS, frugal, session_options, translated
from lorac_runtime.engines.step_graph import OPTIMIZER
from lorac_runtime.errors import EngineError

Floats = npt.NDArray[np.float32]

WEIGHTS = "lorac.weights"  # metadata: JSON object, graph -> the frozen tensors that it reads from another file


class GraphFiles:
    """The graphs in ``folder``; ``replaced`` are frozen tensors with other values than in its files."""

    def __init__(self, engine: str, ort: Any, folder: Path, threads: int | None) -> None:
        self._engine, self.ort, self._threads = engine, ort, threads
        self.folder = folder
        self.replaced: dict[str, Floats] = {}
        self._weights: dict[str, list[str]] | None = None

    def read_weights(self, session: Any) -> None:
        """Learn from the metadata of a graph's session which frozen tensors each graph reads; without any: all do.

        Raises EngineError if they say something else.
        """
        text = session.get_modelmeta().custom_metadata_map.get(WEIGHTS, "null")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = text
        if found is not None and not (isinstance(found, dict) and all(isinstance(v, list) for v in found.values())):
            raise EngineError(f"{WEIGHTS} of {self.folder} should name tensors by graph, got {text[:60]!r}")
        self._weights = found

    def open(self, name: str, *, optimized: bool = True, threads: int | None = None) -> Any:
        """A session of the graph; ``threads`` None is what `options` has. Raises EngineError."""
        options, path = self.options(threads), self.folder / name
        if not optimized:
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with translated(self._engine, f"open {path}"):
            if optimized and (values := self._replacements(path)):
                wrapped = [self.ort.OrtValue.ortvalue_from_numpy(v) for v in values.values()]
                options.add_external_initializers(list(values), wrapped)
            return self.ort.InferenceSession(str(path), options, providers=list(PROVIDERS))

    def options(self, threads: int | None = None) -> Any:
        """Options of sessions that train, with the engine's number of threads unless another is given."""
        return frugal(session_options(self.ort, threads or self._threads))

    def _replacements(self, path: Path) -> dict[str, Floats]:
        """Those of the replaced tensors that a graph reads: onnxruntime refuses any other."""
        if not self.replaced or path.name == OPTIMIZER:  # which reads none
            return {}
        names = self.replaced if self._weights is None else self._weights.get(path.name, ())
        return {name: self.replaced[name] for name in names if name in self.replaced}
