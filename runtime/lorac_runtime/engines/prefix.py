"""The frozen front of a network, images -> features, where the artifact has it as a graph of its own.

Features of an image are the same to the last bit whatever batch it comes in and however many threads there are: every
image runs by itself, in a session of one thread, and several images run side by side (docs/decisions/0017).
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines import step_graph as sg
from lorac_runtime.engines.graph_files import GraphFiles
from lorac_runtime.engines.native import translated
from lorac_runtime.manifest import BASE, Manifest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Prefix:
    """What computes the features of ``manifest``. Its session, which holds the frozen weights, opens when needed."""

    def __init__(self, engine: str, files: GraphFiles, manifest: Manifest, threads: int | None) -> None:
        self._engine, self._files, self._manifest = engine, files, manifest
        self._threads = threads or _processors()
        self._session: Any = None

    def features(self, images: Array) -> dict[str, Floats]:
        """Every feature by name, (n, *shape), of ``images`` as the artifact's input spec says.

        Raises EngineError if the graph is not as the manifest says or refuses the images, MemoryError.
        """
        session = self._opened()
        rows, source = np.ascontiguousarray(images), self._manifest.input.name
        found = {f.name: np.empty((len(rows), *f.shape), np.float32) for f in self._manifest.features}

        def compute(i: int) -> None:
            for value, row in zip(found.values(), session.run(list(found), {source: rows[i : i + 1]}), strict=True):
                value[i] = row[0]

        with translated(self._engine, "compute features"):
            self._each(compute, len(rows))
        return found

    def _each(self, compute: Any, count: int) -> None:
        if min(self._threads, count) < 2:
            for i in range(count):
                compute(i)
            return
        with ThreadPoolExecutor(min(self._threads, count)) as pool:
            list(pool.map(compute, range(count)))

    def key(self) -> str:
        """Hex digest of all that features depend on beside the image: graph, frozen weights, version of the engine."""
        files, digest = self._manifest.files, hashlib.sha256()
        weights = [files[name].sha256 for name in (sg.PREFIX, BASE, sg.WEIGHTS_FILE) if name in files]
        digest.update("\n".join([*weights, self._engine, str(self._files.ort.__version__)]).encode())
        for name, value in sorted(self._files.replaced.items()):
            digest.update(f"\n{name} {value.shape}\n".encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Give the session's memory back; the next use opens it again."""
        self._session = None

    def _opened(self) -> Any:
        if self._session is None:
            session = self._files.open(sg.PREFIX, threads=1)
            sg.check_prefix(session, self._manifest, where=str(self._files.folder / sg.PREFIX))
            self._session = session
        return self._session


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
