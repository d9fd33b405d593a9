"""A network before and after its adaptation, as tensors by name: what files for other libraries are made from."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.checkpoint import CONFIG, load_checkpoint
from lorac_deploy.interchange.change import Doubles, Tensors
from lorac_deploy.interchange.factorise import tensors_of
from lorac_deploy.lora import adapter_tensors, fuse, report_of
from lorac_exporters.graph_tools import array, convolutions, name_of
from lorac_exporters.plan import layer_of
from lorac_exporters.references import adapted_state
from lorac_runtime import manifest as mf
from lorac_runtime import patch
from lorac_runtime.delta import delta
from lorac_runtime.manifest import Adapter


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Tensors before (``base``) and after (``fused``), and the exact low-rank ``deltas`` of weights, all by name.

    ``grouped`` are layers that work in groups, ``layers`` the names of all. ``folded``: the weights are those of
    base.onnx, whose batch normalisations are folded into them. ``additions``: the artifact's method added layers.
    """

    model: str
    base: Tensors
    fused: Tensors
    deltas: dict[str, Doubles]
    grouped: frozenset[str]
    layers: tuple[str, ...]
    folded: bool
    additions: bool = False

    def changed(self) -> list[str]:
        """Names of the tensors that an adaptation changed, or that its factors may."""
        differ = (name for name, value in self.fused.items() if not np.array_equal(value, self.base[name]))
        return list(dict.fromkeys([*self.deltas, *differ]))

    def change_of(self, weight: str) -> Doubles:
        """What is added to a weight, float64: from the factors where there are some, so that nothing is rounded."""
        if weight in self.deltas:
            return self.deltas[weight]
        return np.asarray(self.fused[weight], np.float64) - np.asarray(self.base[weight], np.float64)


def read_adapted(source: Path, adapter: Path) -> Adapted:
    """The network of ``source``, a checkpoint folder or a training artifact, with an adapter file for it.

    Raises CheckpointError, ArtifactError or AdapterError.
    """
    is_checkpoint = (source / CONFIG).exists() and not (source / mf.FILE_NAME).exists()
    return of_checkpoint(source, adapter) if is_checkpoint else of_artifact(source, adapter)


def of_checkpoint(folder: Path, adapter: Path) -> Adapted:
    """As PyTorch knows the network."""
    checkpoint = load_checkpoint(folder)
    module = checkpoint.module
    prepared = copy.deepcopy(module)
    attach_adapter(adapter, prepared)
    values = {name: value.detach().double().numpy() for name, value in adapter_tensors(prepared).items()}
    layers = tuple(name for name, _ in module.named_modules() if name)
    return Adapted(
        model=checkpoint.spec.name,
        base=tensors_of(module),
        fused=tensors_of(fuse(prepared)),
        deltas=deltas_of(report_of(prepared).adapters, values),
        grouped=frozenset(name for name in layers if _groups(module, name) > 1),
        layers=layers,
        folded=False,
    )


def of_artifact(folder: Path, adapter: Path) -> Adapted:
    """As base.onnx knows it. Adapters of the policies ``batch`` and ``recalibrate`` have no deltas there."""
    manifest = mf.load(folder)
    mf.verify_files(folder, manifest, (mf.BASE,))
    state = adapted_state(folder, manifest, adapter)
    model = ir.load(folder / mf.BASE)
    with tempfile.TemporaryDirectory(prefix="lorac-deploy.") as scratch:
        patch.fuse(folder, Path(scratch) / "fused.onnx", state)
        fused = graph_tensors(ir.load(Path(scratch) / "fused.onnx"))
    values = {name: np.asarray(value, np.float64) for name, value in state.items()}
    groups = {layer_of(name_of(n.inputs[1])): n.attributes.get_int("group", 1) for n in convolutions(model.graph)}
    base = graph_tensors(model)
    return Adapted(
        model=manifest.model,
        base=base,
        fused=fused,
        deltas={} if manifest.live_batchnorm else deltas_of(manifest.adapters, values),
        grouped=frozenset(name for name, count in groups.items() if count > 1),
        layers=tuple(dict.fromkeys(map(layer_of, base))),
        folded=bool(manifest.batchnorms),
        additions=manifest.additions is not None,
    )


def graph_tensors(model: ir.Model) -> dict[str, np.ndarray]:
    """The parameters of a graph: copies of its initializers of numbers with a fraction that are no scalars."""
    found = {str(name): array(value) for name, value in model.graph.initializers.items()}
    return {n: v.copy() for n, v in found.items() if v is not None and v.ndim and np.issubdtype(v.dtype, np.floating)}


def deltas_of(adapters: tuple[Adapter, ...], values: Mapping[str, Doubles]) -> dict[str, Doubles]:
    """What the factors of each adapter add to its weight, by the weight's name."""
    found = {}
    for adapter in adapters:
        alpha = adapter.alpha if adapter.lora_alpha is None else float(values[adapter.lora_alpha].item())
        a, b, scale = values[adapter.lora_a], values[adapter.lora_b], alpha / adapter.r
        found[adapter.weight] = np.asarray(
            delta(a, b, adapter.weight_shape, scale, adapter.arrangement, pairs=adapter.pairs), np.float64
        )
    return found


def _groups(module: nn.Module, layer: str) -> int:
    return int(getattr(module.get_submodule(layer), "groups", 1))
