"""Files of the engine `onnxruntime`, written for a small network, and what the contract says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from step_networks import graphs_of, prepared
from step_runs import Case, session, starting, step_config

from lorac_exporters.graphs import Graphs
from lorac_exporters.plan import LoraConfig
from lorac_exporters.training_step import write
from lorac_runtime.manifest import BASE, TrainingDefaults

SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, clip_norm=0.0)
PLAIN_SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.25)
ADAMW = TrainingDefaults(weight_decay=0.01, clip_norm=0.5)
AMSGRAD = TrainingDefaults(amsgrad=True)
FROZEN, BATCH = Case(SGD), Case(ADAMW, policy="batch")
CASES = {
    "sgd": FROZEN,
    "sgd without momentum": Case(PLAIN_SGD),
    "adamw, batch": BATCH,
    "amsgrad": Case(AMSGRAD),
    "full": Case(SGD, method="full"),
    "head": Case(SGD, method="head"),
    "frozen factors": Case(SGD, lora=LoraConfig(rank=2, freeze_a=True)),
    "learned alpha": Case(SGD, lora=LoraConfig(rank=2, learnable_alpha=True)),
    "entropy": Case(dataclasses.replace(SGD, loss="entropy")),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """An engine's files with the network that they were made from."""

    folder: Path
    names: tuple[str, ...]
    case: Case
    net: torch.nn.Module
    start: dict[str, np.ndarray]
    graphs: Graphs

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        return {t.name: t.shape for t in self.graphs.plan.trainables}

    def signature(self, file: str) -> tuple[dict[str, tuple[object, ...]], set[str]]:
        """Inputs with their shapes, names of outputs, as onnxruntime tells them."""
        graph = session(self.folder / file)
        return {i.name: tuple(i.shape) for i in graph.get_inputs()}, {o.name for o in graph.get_outputs()}


Make = Callable[[str], Written]


def write_small(case: Case, folder: Path) -> Written:
    net = prepared("small", case, smooth=True)
    graphs, start = graphs_of("small", case, smooth=True), starting(net, case)
    ir.save(graphs.base.model, folder / BASE)
    return Written(folder, write(graphs, folder, start=start, config=step_config(case)), case, net, start, graphs)


def images_or_features(written: Written) -> dict[str, tuple[object, ...]]:
    """What a step takes first: in a network of which only the head trains, what its pooling gives."""
    if written.case.method == "head":
        return {"features.mean": ("batch", 16)}
    return {"input": ("batch", 3, 12, 12)}


def one_group(written: Written, prefix: str) -> dict[str, tuple[int, ...]]:
    """The small network has a single packed vector."""
    return {f"{prefix}.0": (sum(int(np.prod(shape)) for shape in written.trained.values()),)}


def statistics(written: Written) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in written.start.items() if "running_" in name}


def stored(path: Path) -> tuple[dict[str, tuple[str, bytes]], dict[str, int]]:
    """Initializers in other files, as (file, bytes), and sizes of the float vectors, matrices, ... inside."""
    outside, inside = {}, {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(place["offset"]), int(place["length"])
            content = (path.parent / place["location"]).read_bytes()[start : start + length]
            outside[tensor.name] = (place["location"], content)
        elif tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims:
            inside[tensor.name] = int(np.prod(tensor.dims))
    return outside, inside
