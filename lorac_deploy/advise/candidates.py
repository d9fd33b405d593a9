"""What could be trained: methods and blocks of one artifact's network, with what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorac_exporters.artifact import ArtifactConfig, Naming, write_graphs
from lorac_exporters.base_tflite import TfliteChoice
from lorac_exporters.costs import artifact_costs
from lorac_exporters.graphs import Graphs, planned
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method, and the block that it trains (None: wherever it trains by itself)."""

    method: str
    block: str | None
    lora: LoraConfig

    @property
    def label(self) -> str:
        """How tables call it.

        >>> Candidate("lora-c", "rear", LoraConfig()).label
        'lora-c rear'
        """
        return self.method if self.block is None else f"{self.method} {self.block}"

    @property
    def options(self) -> tuple[str, ...]:
        """What to give export-training-artifact."""
        blocks = () if self.block is None else ("--blocks", self.block)
        rank = ("--rank", str(self.lora.rank)) if "rank" in METHODS[self.method].options else ()
        return ("--method", self.method, *rank, *blocks)


def candidates(methods: tuple[str, ...], scores: Mapping[str, float], lora: LoraConfig) -> list[Candidate]:
    """What to try. ``scores`` are those of the blocks; empty where the network has none.

    Full training is tried on every block but the head, which is the method of that name; adapters on all of the
    network and on the block that scores highest.

    >>> found = candidates(("head", "blocks", "lora-c"), {"front": 1.0, "rear": 0.5, "head": 0.1}, LoraConfig())
    >>> [c.label for c in found]
    ['head', 'blocks front', 'blocks rear', 'lora-c', 'lora-c front']
    """
    words = [word for word in scores if word != "head"]
    top = max(words, key=lambda word: scores[word], default=None)
    places: dict[str, list[str | None]] = {"blocks": list(words), "lora-c": [None, *([top] if top else [])]}
    return [
        Candidate(method, block, lora if block is None else dataclasses.replace(lora, blocks=(block,)))
        for method in methods
        for block in places.get(method, [None])
    ]


def export_candidate(
    graphs: Graphs, manifest: Manifest, candidate: Candidate, out: Path, *, tflite: TfliteChoice = "none"
) -> None:
    """Write the candidate's artifact into ``out``.

    Training settings are the candidate's own; those that the artifact was given, it gets too.

    Raises ConversionError where the method does not fit the network.
    """
    config = ArtifactConfig(
        lora=candidate.lora,
        method=candidate.method,
        engine="onnxruntime",
        tflite=tflite,
        training=METHODS[candidate.method].training(**chosen_settings(manifest)),
    )
    naming = Naming(manifest.model, manifest.class_names, manifest.model_parameters)
    write_graphs(
        planned(graphs, candidate.method, candidate.lora), out, naming=naming, config=config, on_progress=lambda _: None
    )


def chosen_settings(manifest: Manifest) -> dict[str, Any]:
    """The training settings of an artifact that are not its method's own: somebody chose them."""
    own = dataclasses.asdict(METHODS[manifest.method].training())
    return {n: value for n, value in dataclasses.asdict(manifest.training).items() if value != own[n]}


def work(artifact: Path, samples: int, epochs: int) -> int:
    """Multiply-adds of a whole run on ``samples``, the frozen front part run once for each (with a cache)."""
    costs = artifact_costs(artifact, 1)
    return samples * (costs.prefix_multiply_adds + epochs * costs.multiply_adds)
