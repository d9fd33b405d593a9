"""Folding a base's batch normalisation anew, with other statistics: the BN policy ``recalibrate`` in every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.engines import statistics
from lorac_runtime.engines.native import PROVIDERS, translated
from lorac_runtime.manifest import Manifest
from lorac_runtime.patch import base_weights, batchnorm_tensors, fused_weights

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

GRAPH = "stats_model.onnx"  # images -> statistics of the batch for every batch normalisation


def batchnorm_names(manifest: Manifest) -> list[str]:
    """Weight, bias and running statistics of every batch normalisation of the original network."""
    return [n for bn in manifest.batchnorms for n in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]


class FoldedBatchnorm:
    """The batch normalisation that is folded into the base. ``tensors`` is empty under the other BN policies."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._trained = {t.name for t in manifest.trainables}
        self.tensors: dict[str, Floats] = {}
        self._before: dict[str, Floats] = {}  # the original ones of those that train under their names
        if manifest.bn_policy == "recalibrate":
            whole = batchnorm_tensors(folder, manifest)
            self.tensors = {n: whole[n] for n in batchnorm_names(manifest) if n not in self._trained}
            self._before = {n: whole[n] for n in batchnorm_names(manifest) if n in self._trained}

    def estimated(self, ort: Any, options: Any, batches: Iterable[Array], *, engine: str) -> dict[str, Floats]:
        """All BN tensors with the statistics of image batches. Changes nothing.

        Raises ValueError unless the policy is ``recalibrate``, DataError for batches without variance.
        """
        if self._manifest.bn_policy != "recalibrate":
            raise ValueError(f"the artifact's BN policy is {self._manifest.bn_policy!r}, not 'recalibrate'")
        path = self._folder / GRAPH
        with translated(engine, f"open {path}"):
            session = ort.InferenceSession(str(path), options, providers=list(PROVIDERS))
        found = self._batch_statistics(session, batches, engine)
        return self.tensors | statistics.cumulative_average(self._manifest.batchnorms, found)

    def _batch_statistics(
        self, session: Any, batches: Iterable[Array], engine: str
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        names = [output.name for output in session.get_outputs()]
        for images in batches:
            with translated(engine, "estimate BN statistics"):
                values = session.run(None, {self._manifest.input.name: np.ascontiguousarray(images)})
            yield len(images), dict(zip(names, values, strict=True))

    def moved(self, new: Mapping[str, Floats], trained: Mapping[str, Floats]) -> dict[str, Floats]:
        """The ``trained`` tensors that ``new`` BN tensors change, so that the unfolded network keeps its training."""
        values: dict[str, Floats] = {}
        old, new = self._before | self.tensors, self._before | dict(new)
        for bn in self._manifest.batchnorms:
            values |= statistics.moved_trained(self._manifest, bn, trained, old=old, new=new)
        return values

    def change(self, new: Mapping[str, Floats]) -> dict[str, Floats]:
        """Take over ``new`` BN tensors; returns what changes of the base with them, trained tensors left out."""
        if all(np.array_equal(value, new[name]) for name, value in self.tensors.items()):
            return {}
        plain = dataclasses.replace(self._manifest, adapters=(), partials=(), trainables=())
        base, original = base_weights(self._folder, self._manifest), batchnorm_tensors(self._folder, self._manifest)
        folded = fused_weights(plain, base, new, original)
        self.tensors = {name: new[name].copy() for name in self.tensors}
        return {name: value for name, value in folded.items() if name not in self._trained}
