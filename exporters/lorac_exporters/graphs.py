"""The graphs of one artifact, from one source: base (folded), original (BN kept), and the one that trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.canonical import Canonical, canonicalize, with_new_head
from lorac_exporters.heads import find_head
from lorac_exporters.inject import describe, inject
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig, Network, Plan
from lorac_exporters.preprocessing import add_preprocessing
from lorac_exporters.rewrites import rewrite_for_training
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import BnPolicy, InputSpec

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Graphs:
    """``base`` becomes base.onnx; ``original`` is the same network before folding; the policy picks which trains."""

    base: Canonical
    original: Canonical
    plan: Plan
    policy: BnPolicy
    spec: InputSpec
    network: Network

    @property
    def trained(self) -> Canonical:
        """The graph that adapters are added to: folded, unless batch statistics are used."""
        return self.original if self.policy == "batch" else self.base

    def statistics(self) -> dict[str, Floats]:
        """Running statistics, which adapters of the policies ``batch`` and ``recalibrate`` carry."""
        sites = () if self.policy == "frozen" else self.base.batchnorms
        return {n: self.original.values[n] for bn in sites for n in (bn.running_mean, bn.running_var)}

    def frozen_names(self) -> list[str]:
        """Parameters that do not train: those of `trained` in graph order, then those of adapters."""
        trainable = {t.name for t in self.plan.trainables}
        return [*(name for name in self._parameter_names() if name not in trainable), *self.plan.fixed]

    def patched_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of base.onnx that an adaptation may change, with their shapes, in graph order."""
        changing = {t.name for t in self.plan.trainables} | {a.weight for a in self.plan.adapters}
        if self.policy != "frozen":
            changing |= {name for bn in self.base.batchnorms for name in bn.folded_into}
        return {k: v.shape for k, v in self.base.values.items() if k in changing}

    def training_model(self, start: dict[str, Floats]) -> ir.Model:
        """The graph to differentiate: branches added, parameters and BN statistics at ``start``."""
        model = self.trained.model.clone()
        rewrite_for_training(model)
        inject(model, self.plan, start)
        fixed = start.keys() & model.graph.initializers.keys() - {t.name for t in self.plan.trainables}
        for name in sorted(fixed):
            model.graph.initializers[name].const_value = ir.tensor(start[name], name=name)
        return model

    def _parameter_names(self) -> list[str]:
        names = [n for conv in self.network.convs for n in (conv.weight, conv.bias) if n is not None]
        names += [
            self.network.head_weight[0],
            *([self.network.head_bias[0]] if self.network.head_bias else []),
        ]
        names += [t.name for t in self.network.others]
        for bn in self.base.batchnorms:
            if self.policy == "batch":
                names += [bn.weight, bn.bias, bn.running_mean, bn.running_var]
            elif bn.affine:
                names += bn.folded_into
        return [n for n in dict.fromkeys(names) if n in self.trained.values]


def build_graphs(
    model: ir.Model,
    *,
    spec: InputSpec,
    classes: int,
    new_head: bool,
    method: str,
    lora: LoraConfig,
    policy: BnPolicy,
) -> Graphs:
    """Canonical graphs and the plan. Whether an engine can train them, `engine_files.chosen` tells.

    Raises ConversionError if the classifier has another width than ``classes`` and no new one is
    wanted, or ``lora.blocks`` are not in this network.
    """
    base, original = canonicalize(model), canonicalize(model, fold=False)
    if new_head:
        base, original = (with_new_head(form, classes, seed=lora.seed) for form in (base, original))
    _check_policy(policy, base)
    _check_width(find_head(base.model).classes, classes)
    if spec.in_graph:
        add_preprocessing(base.model, spec)
        add_preprocessing(original.model, spec)
    network = _network(base, original, policy)
    return Graphs(base, original, _plan(method, network, lora), policy, spec, network)


def _plan(method: str, network: Network, lora: LoraConfig) -> Plan:
    try:
        return METHODS[method](network, lora)
    except ValueError as err:  # settings that are sound in themselves, but not for this network or method
        raise ConversionError(str(err)) from err


def _check_width(width: int, classes: int) -> None:
    if width != classes:
        raise ConversionError(f"the classifier has {width} outputs, but {classes} class names were given")


def _network(base: Canonical, original: Canonical, policy: BnPolicy) -> Network:
    if policy != "batch":
        return describe(base, original)
    network = describe(original, original)
    convs = tuple(dataclasses.replace(c, bias=None) if c.bias in original.added else c for c in network.convs)
    return dataclasses.replace(network, convs=convs)


def _check_policy(policy: BnPolicy, base: Canonical) -> None:
    if policy != "frozen" and not base.batchnorms:
        raise ConversionError(
            f"BN policy {policy!r} needs batch normalisations, and this model has none (already folded by whoever "
            "exported it?); use --bn frozen"
        )
