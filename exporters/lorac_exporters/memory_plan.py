"""What fits into a device's memory: ways of training an artifact's network, each with its computed peak.

Graphs are rebuilt from base.onnx and the manifest alone, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file

from lorac_exporters import training_step as steps
from lorac_exporters.branches import form_of
from lorac_exporters.canonical import Canonical
from lorac_exporters.graph_tools import float_array, to_bytes
from lorac_exporters.graphs import Graphs
from lorac_exporters.inject import describe, starting_values
from lorac_exporters.loss_graph import read_loss_graph
from lorac_exporters.memory import Peak, peak
from lorac_exporters.methods import METHODS
from lorac_exporters.modules.removal import without_modules
from lorac_exporters.plan import LoraConfig, Network, Plan
from lorac_exporters.prefix import PREFIX
from lorac_exporters.stages import blocks_of
from lorac_exporters.task_graph import Purpose
from lorac_exporters.training_step import StepConfig
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, ConversionError

RANKS = (8, 4, 2, 1)
PIECES = (64, 32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to train: the method and its settings, in words and as export-training-artifact's options."""

    label: str
    method: str
    lora: LoraConfig

    @property
    def rank(self) -> int | None:
        """The nominal rank of adapters."""
        return self.lora.rank if self.method == "lora-c" else None

    @property
    def options(self) -> tuple[str, ...]:
        """What to give export-training-artifact."""
        found = ["--method", self.method]
        found += [] if self.rank is None else ["--rank", str(self.rank)]
        found += ["--freeze-a"] if self.lora.freeze_a else []
        return (*found, *(("--blocks", ",".join(self.lora.blocks)) if self.lora.blocks else ()))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A choice within a budget: ``at_once`` images of a batch are computed together, 0 where not even one fits.

    ``peak`` is that of ``at_once``, or else the least that was found. ``storage``: bytes of the files that train.
    ``choice`` None is the artifact as it is.
    """

    choice: Choice | None
    trained: int
    at_once: int
    peak: Peak
    storage: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """All choices for batches of ``batch`` images in ``budget`` bytes; ``refused`` says what cannot train, and why."""

    budget: int
    batch: int
    fits: tuple[Fit, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def best(self) -> Fit | None:
        """The one that trains most among those that compute most images together; None if nothing fits."""
        fitting = [fit for fit in self.fits if fit.at_once]
        return max(fitting, key=lambda fit: (fit.at_once, fit.trained), default=None)

    @property
    def smallest(self) -> Fit:
        """The one that needs least."""
        return min(self.fits, key=lambda fit: fit.peak.total)


def plan_memory(folder: Path, budget: int, *, batch: int | None = None) -> MemoryPlan:
    """Compare ways to train the artifact in ``folder`` within ``budget`` bytes; ``batch`` None is the artifact's own.

    Raises ArtifactError if the folder is no artifact, or not whole.
    """
    manifest = mf.load(folder)
    mf.verify_files(folder, manifest)
    size = batch or manifest.training.batch_size
    graphs = read_graphs(folder, manifest)
    fits, refused = [], []
    if steps.TRAIN in manifest.files:
        fits.append(_as_it_is(folder, manifest, budget, size))
    for choice in choices(graphs.network):
        try:
            fits.append(_fitted(graphs, manifest, choice, budget, size))
        except ConversionError as err:
            refused.append((choice.label, str(err).splitlines()[0]))
    if not fits:
        raise ArtifactError(f"{folder}: the engine onnxruntime can train nothing of this network: {refused[0][1]}")
    return MemoryPlan(budget, size, tuple(fits), tuple(refused))


def read_graphs(folder: Path, manifest: mf.Manifest) -> Graphs:
    """The folded network of an artifact without modules, its batch normalisations frozen; no plan yet."""
    model = ir.load(folder / mf.BASE)
    if manifest.additions is not None:
        without_modules(model, manifest.additions.sites)
    values = {n: float_array(v) for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    for name, numbers in values.items():  # read from the file once, not for every graph that is made
        model.graph.initializers[name].const_value = ir.tensor(numbers, name=name)
    base = Canonical(model, (), manifest.batchnorms, values, frozenset())
    network = describe(base, classifier=manifest.task is None)
    heads = [*network.head_weights, *(network.head_bias or ())[:1], *(h.bias for h in network.more_heads if h.bias)]
    head = sum(values[name].size for name in heads)
    network = dataclasses.replace(network, backbone_parameters=manifest.model_parameters - head)
    norms = load_file(folder / mf.BATCHNORM) if manifest.batchnorms else None
    return Graphs(
        base,
        base,
        Plan("head", (), (), ()),
        "frozen",
        manifest.input,
        network,
        norms=norms,
        purpose=_purpose(folder, manifest),
    )


def _purpose(folder: Path, manifest: mf.Manifest) -> Purpose | None:
    if manifest.task is None:
        return None
    own = read_loss_graph(folder / mf.LOSS, manifest.task.outputs) if mf.LOSS in manifest.files else None
    return Purpose(manifest.task, own)


def choices(network: Network) -> list[Choice]:
    """Everything, adapters everywhere, with a frozen half, in the last stages and the head, and the head alone."""
    found = [Choice("everything", "full", LoraConfig())]
    found += [Choice("adapters", "lora-c", LoraConfig(rank=r)) for r in RANKS]
    found += [Choice("adapters, A frozen", "lora-c", LoraConfig(rank=r, freeze_a=True)) for r in RANKS]
    for label, blocks in late_blocks(network):
        for r in RANKS:
            lora = LoraConfig(rank=r, freeze_a=True, blocks=blocks)
            found.append(Choice(f"{label}, A frozen", "lora-c", lora))
    return [*found, Choice("the head alone", "head", LoraConfig())]


def late_blocks(network: Network) -> list[tuple[str, tuple[str, ...]]]:
    """Late parts of a network with its head, in words and as blocks: stages where they can be told, else names."""
    try:
        told = blocks_of(network)
    except ValueError:
        layers = [conv.name for conv in network.hidden_convs]
        return [(_range(blocks), (*blocks, "head")) for blocks in last_stages(layers)]
    found: list[tuple[str, tuple[str, ...]]] = [("middle and rear", ("middle", "rear"))] if "middle" in told else []
    return [*found, ("rear", ("rear",))]


def _range(blocks: tuple[str, ...]) -> str:
    return ",".join(blocks) if len(blocks) < 3 else f"{blocks[0]} to {blocks[-1]}"


def last_stages(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """The last half and the last quarter of a network's blocks, by the names of its layers.

    >>> last_stages(["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"])
    [('layer3', 'layer4'), ('layer4',)]
    """
    blocks = _blocks(layers)
    counts = {len(blocks) // 2, len(blocks) // 4} - {0}
    return [tuple(blocks[-count:]) for count in sorted(counts, reverse=True)]


def _blocks(layers: Sequence[str]) -> list[str]:
    """Names cut at the first dot where there are more than two of them.

    >>> _blocks(["features.0.0", "features.1.conv.0", "features.2.conv.0", "features.2.conv.1"])
    ['features.0', 'features.1', 'features.2']
    """
    deepest = max((name.count(".") for name in layers), default=0)
    cuts = [list(dict.fromkeys(".".join(n.split(".")[: d + 1]) for n in layers)) for d in range(deepest + 1)]
    return next((cut for cut in cuts if len(cut) > 2), cuts[-1])


def _fitted(graphs: Graphs, manifest: mf.Manifest, choice: Choice, budget: int, batch: int) -> Fit:
    """Raises ConversionError if the network cannot be trained so."""
    try:
        planned = METHODS[choice.method](graphs.network, choice.lora)
    except ValueError as err:
        raise ConversionError(str(err)) from err
    graphs = dataclasses.replace(graphs, plan=planned)
    start = starting_values(planned, graphs.trained.values, seed=0)
    config = StepConfig(manifest.training, form_of("auto", batch))
    whole, front = steps.train_step(graphs, start, config), steps.prefix_step(graphs, start, config)
    first = peak(whole, batch, front=front)
    size = _file_bytes(whole, graphs, manifest)
    if first.total <= budget:
        return Fit(choice, planned.trained_parameters, batch, first, size)
    parts = (steps.gradient_step(graphs, start, config), steps.optimizer_step(graphs, config))
    at_once, needed = _in_parts(parts, front, first, budget, batch)
    return Fit(choice, planned.trained_parameters, at_once, needed, size)


def _in_parts(
    parts: tuple[ir.Model, ir.Model], front: ir.Model | None, whole: Peak, budget: int, batch: int
) -> tuple[int, Peak]:
    """(images together, their peak): the most that fit; if none do, 0 and the least, ``whole`` batches included."""

    def in_pieces(piece: int) -> Peak:
        return peak(parts[0], piece, optimizer=parts[1], front=front, whole=batch)

    one = in_pieces(1)
    if batch == 1 or one.total > budget:
        return 0, min(whole, one, key=lambda found: found.total)
    tried = ((piece, in_pieces(piece)) for piece in PIECES if 1 < piece < batch)
    return next(((piece, found) for piece, found in tried if found.total <= budget), (1, one))


def _as_it_is(folder: Path, manifest: mf.Manifest, budget: int, batch: int) -> Fit:
    files = {*manifest.engines[steps.ENGINE].files, mf.BASE}
    storage = sum(manifest.files[name].nbytes for name in files)
    front = ir.load(folder / PREFIX) if PREFIX in files else None
    needed, at_once = peak(ir.load(folder / steps.TRAIN), batch, front=front), batch
    if needed.total > budget:
        at_once = 0
        if steps.GRADIENT in files:
            gradient, optimizer = (ir.load(folder / name) for name in (steps.GRADIENT, steps.OPTIMIZER))
            at_once, needed = _in_parts((gradient, optimizer), front, needed, budget, batch)
    return Fit(None, manifest.trained_parameters, at_once, needed, storage)


def _file_bytes(whole: ir.Model, graphs: Graphs, manifest: mf.Manifest) -> int:
    """About what the files take: base.onnx, and train_step.onnx twice, for all graphs. ``whole`` loses its weights."""
    for name, value in whole.graph.initializers.items():
        if name in graphs.trained.values:
            value.const_value = ir.tensor(np.zeros(0, np.float32), name=name)
    return manifest.files[mf.BASE].nbytes + 2 * len(to_bytes(whole))
