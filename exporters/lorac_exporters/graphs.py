"""The graphs of one artifact, from one source: base (folded), original (BN kept), and the one that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.batchnorm import as_arithmetic
from lorac_exporters.canonical import Canonical, canonicalize, with_new_head
from lorac_exporters.heads import find_head
from lorac_exporters.inject import describe, inject
from lorac_exporters.methods import METHODS
from lorac_exporters.modules.additions import additions
from lorac_exporters.modules.insertion import with_modules
from lorac_exporters.plan import LoraConfig, Network, Plan
from lorac_exporters.preprocessing import add_preprocessing
from lorac_exporters.rewrites import rewrite_for_training
from lorac_exporters.task_graph import Purpose, TaskConfig, purpose_of
from lorac_runtime.additions import Additions
from lorac_runtime.description import touched
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import BnPolicy, InputSpec
from lorac_runtime.tasks import CLASSIFICATION

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Graphs:
    """``base`` becomes base.onnx; ``original`` is the same network before folding, the one that trains if ``live``.

    Both hold the modules of the plan; ``additions`` counts what these add. ``norms`` is the content of
    batchnorm.safetensors where an artifact has told it already, and ``original`` knows nothing of BN. ``purpose`` is
    the task; None is classification.
    """

    base: Canonical
    original: Canonical
    plan: Plan
    policy: BnPolicy
    spec: InputSpec
    network: Network
    live: bool = False
    additions: Additions | None = None
    norms: Mapping[str, npt.NDArray[np.generic]] | None = None
    purpose: Purpose | None = None

    @property
    def trained(self) -> Canonical:
        """The graph that adapters are added to: folded, unless batch normalisations stay layers of their own."""
        return self.original if self.live else self.base

    @property
    def moving(self) -> bool:
        """Whether a training step uses the statistics of its batch and moves the running ones."""
        return self.policy == "batch"

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
        changing = {t.name for t in self.plan.trainables} | {*self.plan.updated}
        norms = self.base.batchnorms
        if self.policy == "frozen":
            norms = touched(norms, changing) if self.live else ()
        changing |= {name for bn in norms for name in bn.folded_into}
        return {k: v.shape for k, v in self.base.values.items() if k in changing}

    def training_model(self, start: dict[str, Floats]) -> ir.Model:
        """The graph to differentiate: branches added, parameters and BN statistics at ``start``."""
        model = self.trained.model.clone()
        if self.live and not self.moving:
            as_arithmetic(model)
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
            *(n for layer in self.network.more_heads for n in (layer.weight, layer.bias) if n is not None),
        ]
        names += [n for layer in self.network.linears for n in (layer.weight, layer.bias) if n is not None]
        names += [t.name for t in self.network.others]
        for bn in self.base.batchnorms:
            if self.live:
                names += [bn.weight, bn.bias, *((bn.running_mean, bn.running_var) if self.moving else ())]
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
    task: TaskConfig | None = None,
) -> Graphs:
    """Canonical graphs and the plan. Whether an engine can train them, `engine_files.chosen` tells.

    Raises ConversionError if the classifier has another width than ``classes`` and no new one is
    wanted, a new one would not train, ``lora.blocks`` are not in this network, or its outputs do not fit the ``task``.
    """
    task = task or TaskConfig()
    head = task.kind == CLASSIFICATION
    base, original = canonicalize(model, head=head), canonicalize(model, fold=False, head=head)
    if new_head:
        base, original = (with_new_head(form, classes, seed=lora.seed) for form in (base, original))
    _check_policy(policy, base)
    purpose = purpose_of(base.model, task)
    width = find_head(base.model).classes if purpose is None else purpose.task.classes
    _check_width(width, classes)
    if spec.in_graph:
        add_preprocessing(base.model, spec)
        add_preprocessing(original.model, spec)
    live = policy == "batch" or METHODS[method].batchnorm == "live"
    network = _network(base, original, live=live, classifier=head)
    plain = Graphs(base, original, Plan(method, (), (), ()), policy, spec, network, live, purpose=purpose)
    graphs = planned(plain, method, lora)
    if new_head:
        _require_head(graphs, lora)
    return graphs


def planned(graphs: Graphs, method: str, lora: LoraConfig) -> Graphs:
    """Graphs without modules, as a method trains them: with its plan and its modules.

    Raises ConversionError for settings that do not fit the network.
    """
    plan = _plan(method, graphs.network, lora)
    base, original = (with_modules(form, plan, seed=lora.seed) for form in (graphs.base, graphs.original))
    added = additions(plan, lora, before=graphs.base, after=base)
    return dataclasses.replace(graphs, base=base, original=original, plan=plan, additions=added)


def _require_head(graphs: Graphs, lora: LoraConfig) -> None:
    """A new classifier has random weights: it must train."""
    plan, head = graphs.plan, graphs.network.head
    changing = {t.name for t in plan.trainables} | {*plan.updated}
    if graphs.network.head_weight[0] not in changing:
        advice = "add head to the blocks" if lora.blocks else "train it first, with a method that does, such as head"
        where = f" in blocks {', '.join(lora.blocks)}" if lora.blocks else ""
        raise ConversionError(
            f"the new classifier {head} starts from random numbers, and method {plan.method}{where} would leave it at "
            f"them: {advice}, or keep the model's own classes"
        )


def _plan(method: str, network: Network, lora: LoraConfig) -> Plan:
    try:
        return METHODS[method](network, lora)
    except ValueError as err:  # settings that are sound in themselves, but not for this network or method
        raise ConversionError(str(err)) from err


def _check_width(width: int, classes: int) -> None:
    if width != classes:
        raise ConversionError(f"the classifier has {width} outputs, but {classes} class names were given")


def _network(base: Canonical, original: Canonical, *, live: bool, classifier: bool) -> Network:
    """The graph that trains; biases of zeros that only the canonical form has do not, unless BN is folded into them."""
    network = describe(original if live else base, original, classifier=classifier)
    filled = () if live else {bn.folded_into[1] for bn in base.batchnorms}
    idle = {name for name in original.added if name not in filled}
    convs, heads = (
        tuple(dataclasses.replace(layer, bias=None) if layer.bias in idle else layer for layer in layers)
        for layers in (network.convs, network.more_heads)
    )
    return dataclasses.replace(network, convs=convs, more_heads=heads)


def _check_policy(policy: BnPolicy, base: Canonical) -> None:
    if policy != "frozen" and not base.batchnorms:
        raise ConversionError(
            f"BN policy {policy!r} needs batch normalisations, and this model has none (already folded by whoever "
            "exported it?); use --bn frozen"
        )
