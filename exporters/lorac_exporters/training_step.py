"""The artifact of the engine ``onnxruntime``: training, evaluation and optimizer steps as plain ONNX graphs.

A step graph takes images (or the features of a frozen front: `prefix`), labels, the learning rate and every tensor that
changes under its own name, and gives the loss and, for each input ``X`` that carries over, ``X.next``. Weights that do
not change stay in base.onnx; the graphs name their place in that file. Any onnxruntime from 1.17 on runs them; nothing
of a training build is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.branches import Factors, FormOf, add_adapters
from lorac_exporters.external import external_names, externalize
from lorac_exporters.gradients.normalization import Statistics, write_out_batchnorm
from lorac_exporters.gradients.optimizers import append_updates, groups, pack, state_names
from lorac_exporters.gradients.reverse import differentiate
from lorac_exporters.gradients.rules import RULES
from lorac_exporters.gradients.tape import Dim, Tape, dims
from lorac_exporters.graph_tools import name_of, remove_unused, save
from lorac_exporters.graphs import Graphs
from lorac_exporters.partials import Chosen, add_partials, read_again
from lorac_exporters.prefix import PREFIX, Features, find_features, keep_rest
from lorac_exporters.rewrites import rewrite_for_training
from lorac_exporters.step_losses import append_loss
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import BASE, Adapter, TrainingDefaults

Floats = npt.NDArray[np.float32]

ENGINE = "onnxruntime"
TRAIN, EVAL, GRADIENT, OPTIMIZER = (f"{kind}_step.onnx" for kind in ("train", "eval", "gradient", "optimizer"))
PRODUCER = "lorac-deploy"


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What step graphs do: loss and optimizer as in the manifest, and the form of each adapter."""

    training: TrainingDefaults
    form: FormOf


@dataclasses.dataclass
class Forward:
    """A forward graph under construction: every tensor that changes is an input, ``loss`` a value."""

    model: ir.Model
    tape: Tape
    tensors: dict[str, ir.Value]
    loss: ir.Value
    statistics: dict[str, Statistics]
    chosen: list[Chosen] = dataclasses.field(default_factory=list)


def write(graphs: Graphs, folder: Path, *, start: Mapping[str, Floats], config: StepConfig) -> tuple[str, ...]:
    """Write the step graphs into ``folder``, which holds base.onnx; returns the names of the files.

    Where nothing trains (method ``recalibrate``) there is only the one that evaluates.

    Raises ConversionError naming every node that has no gradient rule, or tensors that no gradient reaches.
    """
    built = {EVAL: eval_step(graphs, start, config)}
    if graphs.plan.trainables:
        built |= {TRAIN: train_step(graphs, start, config), OPTIMIZER: optimizer_step(graphs, config)}
    if graphs.plan.trainables and divisible(graphs):
        built[GRADIENT] = gradient_step(graphs, start, config)
    if (front := prefix_step(graphs, start, config)) is not None:
        built[PREFIX] = front
    extra = externalize(built, folder / BASE, graphs.trained.values)
    weights = json.dumps({name: external_names(model) for name, model in built.items()})
    for name, model in built.items():
        if graphs.policy == "recalibrate":  # an engine replaces those that change
            model.metadata_props["lorac.weights"] = weights
        save(model, folder / name)
    return (*built, *extra)


def divisible(graphs: Graphs) -> bool:
    """Whether a batch may be computed in pieces: not where its statistics count, or a loss that may do anything."""
    return not graphs.moving and (graphs.purpose is None or graphs.purpose.loss is None)


def prefix_step(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig) -> ir.Model | None:
    """The frozen front alone, images -> features; None where there is none (see `lorac_exporters.prefix`)."""
    forward = _forward(graphs, start, config, training=False)
    features = _features(graphs, forward)
    if not features:
        return None
    del forward.model.graph.inputs[1:]
    return _finished(forward, features, {})


def train_step(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig) -> ir.Model:
    """Forward, backward and update in one graph; it takes features where there is a frozen front, else images."""
    forward = _behind_the_front(graphs, start, config, training=True)
    gradients = _packed_gradients(graphs, forward)
    outputs = {"loss": forward.loss, **_updated(graphs, forward, gradients, config.training)}
    return _finished(forward, outputs | _moved_statistics(graphs, forward), _metadata(graphs, config))


def gradient_step(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig) -> ir.Model:
    """Forward and backward of a micro-batch; its gradients are added to those of the ones before it."""
    forward = _behind_the_front(graphs, start, config, training=True)
    tape = forward.tape
    gradients = _packed_gradients(graphs, forward)
    weight = _own_input(tape, "weight", ())
    outputs = {"loss": forward.loss}
    for index, gradient in enumerate(gradients):
        before = _own_input(tape, f"gradient.{index}", dims(gradient))
        weighted = tape.op("Mul", gradient, weight, like=gradient)
        outputs[f"gradient.{index}.next"] = tape.op("Add", before, weighted, like=gradient)
    return _finished(forward, outputs, _metadata(graphs, config))


def optimizer_step(graphs: Graphs, config: StepConfig) -> ir.Model:
    """The update alone, from gradients that are inputs."""
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="optimizer_step"), ir_version=9)
    tape = Tape(model.graph)
    tensors = {t.name: tape.input(t.name, t.shape) for t in graphs.plan.trainables}
    shapes = {t.name: t.shape for t in graphs.plan.trainables}
    lengths = [sum(math.prod(shapes[name]) for name in group) for group in _groups(graphs)]
    gradients = [tape.input(f"gradient.{k}", (length,)) for k, length in enumerate(lengths)]
    forward = Forward(model, tape, tensors, tape.constant(np.float32(0)), {})
    return _finished(forward, _updated(graphs, forward, gradients, config.training), _metadata(graphs, config))


def eval_step(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig) -> ir.Model:
    """Loss and outputs in evaluation mode."""
    forward = _behind_the_front(graphs, start, config, training=False)
    outputs = {name_of(value): value for value in forward.model.graph.outputs}
    return _finished(forward, {"loss": forward.loss, **outputs}, {})


def _behind_the_front(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig, *, training: bool) -> Forward:
    """`_forward` without the frozen front: features are inputs in place of the images."""
    forward = _forward(graphs, start, config, training=training)
    keep_rest(forward.tape, _features(graphs, forward))
    return forward


def _features(graphs: Graphs, forward: Forward) -> Features:
    """What the frozen front gives; nothing under the policy ``batch``, whose statistics are those of each batch, and
    where nothing trains.
    """
    if graphs.moving or not graphs.plan.trainables:
        return {}
    return find_features(forward.model.graph, [*forward.tensors.values(), *(c.picks for c in forward.chosen)])


def _forward(graphs: Graphs, start: Mapping[str, Floats], config: StepConfig, *, training: bool) -> Forward:
    """The graph to differentiate: adapters added, changing tensors as inputs, the loss appended."""
    model = graphs.trained.model.clone()
    rewrite_for_training(model, keep=RULES)
    plain = model.clone() if config.training.loss == "distillation" else None
    statistics = write_out_batchnorm(model) if training and graphs.moving else {}
    tape = Tape(model.graph)
    tensors = {t.name: tape.input(t.name, t.shape) for t in graphs.plan.trainables}
    running = {n: tape.input(n, start[n].shape) for n in graphs.statistics()} if graphs.moving else {}
    factors = {a.weight: _factors(tape, a, tensors, start) for a in graphs.plan.adapters}
    add_adapters(tape, {a.weight: a for a in graphs.plan.adapters}, factors, config.form)
    chosen = add_partials(tape, graphs.plan.partials, tensors)
    loss = append_loss(
        tape, graphs.purpose, config.training, make_input=functools.partial(_own_input, tape), base=plain
    )
    return Forward(model, tape, tensors | running, loss, statistics, chosen)


def _factors(tape: Tape, adapter: Adapter, tensors: Mapping[str, ir.Value], start: Mapping[str, Floats]) -> Factors:
    """An adapter's tensors: inputs if they train, else constants."""

    def tensor(name: str) -> ir.Value:
        return tensors[name] if name in tensors else tape.constant(start[name], name)

    scale: ir.Value | float = adapter.alpha / adapter.r
    if adapter.lora_alpha is not None:
        scale = tape.op("Mul", tensor(adapter.lora_alpha), 1.0 / adapter.r, shape=(1,))
    return Factors(tensor(adapter.lora_a), tensor(adapter.lora_b), scale)


def _groups(graphs: Graphs) -> list[list[str]]:
    return groups({t.name: t.shape for t in graphs.plan.trainables})


def _packed_gradients(graphs: Graphs, forward: Forward) -> list[ir.Value]:
    """The gradients of all trainable tensors, a vector for each group."""
    names = [t.name for t in graphs.plan.trainables]
    found = differentiate(forward.tape, forward.loss, [forward.tensors[n] for n in names])
    read_again(forward.tape, forward.chosen, forward.loss)
    gradients = dict(zip(names, found, strict=True))
    return [pack(forward.tape, [gradients[n] for n in group]) for group in _groups(graphs)]


def _updated(
    graphs: Graphs, forward: Forward, gradients: list[ir.Value], settings: TrainingDefaults
) -> dict[str, ir.Value]:
    """Outputs of the update, by name."""
    tape = forward.tape
    lr, step = _own_input(tape, "lr", ()), _own_input(tape, "step", (), ir.DataType.INT64)
    state = {
        f"{name}.{k}": _own_input(tape, f"{name}.{k}", dims(gradient))
        for name in state_names(settings)
        for k, gradient in enumerate(gradients)
    }
    done = append_updates(tape, _groups(graphs), forward.tensors, gradients, state, lr=lr, step=step, settings=settings)
    carried = {**done.parameters, **done.state, "step": done.step}
    return {"gradient_norm": done.gradient_norm, **{f"{name}.next": value for name, value in carried.items()}}


def _moved_statistics(graphs: Graphs, forward: Forward) -> dict[str, ir.Value]:
    """Running statistics after the step, as PyTorch moves them."""
    outputs = {}
    for bn in graphs.base.batchnorms if forward.statistics else ():
        found = forward.statistics[bn.weight]
        for name, seen in ((bn.running_mean, found.mean), (bn.running_var, found.unbiased_var)):
            outputs[f"{name}.next"] = _moved(forward.tape, forward.tensors[name], seen, bn.momentum)
    return outputs


def _moved(tape: Tape, old: ir.Value, seen: ir.Value, momentum: float) -> ir.Value:
    kept = tape.op("Mul", old, 1.0 - momentum, like=old)
    return tape.op("Add", kept, tape.op("Mul", seen, momentum, like=old), like=old)


def _metadata(graphs: Graphs, config: StepConfig) -> dict[str, str]:
    return {"lorac.groups": json.dumps(_groups(graphs)), "lorac.optimizer": config.training.optimizer}


def _finished(forward: Forward, outputs: Mapping[str, ir.Value], metadata: Mapping[str, str]) -> ir.Model:
    """The whole graph with its outputs under their names, and nothing in it that no output needs."""
    graph = forward.model.graph
    _make_way(forward.tape, outputs)
    graph.outputs[:] = [_named(forward.tape, name, value) for name, value in outputs.items()]
    remove_unused(forward.model)
    forward.model.metadata_props.update(metadata)
    forward.model.producer_name = PRODUCER
    return forward.model


def _named(tape: Tape, name: str, value: ir.Value) -> ir.Value:
    """``value`` under an output's name; an input or a second output of it is copied."""
    if value.name == name:
        return value
    if value.producer() is None or value.is_graph_output():
        value = tape.op("Identity", value, like=value)
    value.name = name
    return value


def _own_input(tape: Tape, name: str, shape: Sequence[Dim], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A new input that is no tensor of the model."""
    _make_way(tape, {name: None})
    return tape.input(name, shape, dtype)


def _make_way(tape: Tape, owners: Mapping[str, ir.Value | None]) -> None:
    """Let nothing but its owner have a name: other computed values get another one.

    Raises ConversionError if it is the name of the model's own input, output or parameter.
    """
    graph = tape.graph
    kept = [v for v in (*graph.inputs, *graph.initializers.values(), *graph.outputs) if v.name in owners]
    names = [name_of(v) for v in kept if v is not owners[name_of(v)]]
    if names:
        raise ConversionError(listed("these names of the model belong to inputs and outputs of a step; rename:", names))
    for value in (output for node in graph for output in node.outputs):
        name = name_of(value)
        if name in owners and value is not owners[name]:
            value.name = tape.fresh(name)
