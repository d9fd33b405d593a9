"""Networks stepped on both sides: PyTorch's own optimizers, and the step graph in plain onnxruntime."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorac_deploy.batchnorm import bn_tensors
from lorac_deploy.lora import adapter_tensors
from lorac_exporters.branches import FormChoice, form_of
from lorac_exporters.graph_tools import to_bytes
from lorac_exporters.graphs import Graphs
from lorac_exporters.plan import LoraConfig
from lorac_exporters.training_step import StepConfig, prefix_step
from lorac_runtime.manifest import BnPolicy, TrainingDefaults

Arrays = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray, float]  # images, labels, learning rate


RANK_2 = LoraConfig(rank=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is stepped, and how."""

    training: TrainingDefaults
    policy: BnPolicy = "frozen"
    lora: LoraConfig = RANK_2
    method: str = "lora-c"
    form: FormChoice = "auto"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Losses and gradient norms step by step, and every tensor that changes, after the last one."""

    losses: list[float]
    norms: list[float]
    tensors: Arrays


def starting(net: nn.Module, case: Case) -> Arrays:
    """What the step graph starts from: the tensors of adapters, and running statistics where they move."""
    return {name: value.numpy() for name, value in (adapter_tensors(net) | _statistics(net, case)).items()}


def _statistics(net: nn.Module, case: Case) -> dict[str, Tensor]:
    if case.policy != "batch":
        return {}
    return {name: value for name, value in bn_tensors(net).items() if "running" in name}


def in_pytorch(net: nn.Module, case: Case, given: Iterable[Batch], dtype: torch.dtype) -> Outcome:
    """Steps of torch.optim in ``dtype``."""
    net = copy.deepcopy(net).to(dtype)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer, losses, norms = _optimizer(list(parameters.values()), case.training), [], []
    for images, labels, lr in given:
        optimizer.param_groups[0]["lr"] = lr
        loss = _loss(net(torch.from_numpy(images).to(dtype)), torch.from_numpy(labels), case.training)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), case.training.clip_norm or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    kept = {f"{kind} of {n}": v for n, p in parameters.items() for kind, v in optimizer.state[p].items()}
    state = {name.replace("momentum_buffer", "momentum"): value for name, value in kept.items() if value.ndim}
    after = {**parameters, **_statistics(net, case), **state}
    return Outcome(losses, norms, {name: value.detach().double().numpy() for name, value in after.items()})


def in_pytorch_kernels(net: nn.Module, case: Case, given: Sequence[Batch]) -> list[Outcome]:
    """Float32 PyTorch with each of its kinds of convolution: all equally right, each rounding in its own order."""
    found = [in_pytorch(net, case, given, torch.float32)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)  # of Intel's GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            found.append(in_pytorch(net, case, given, torch.float32))
    transposed = copy.deepcopy(net).to(memory_format=torch.channels_last)
    return [*found, in_pytorch(transposed, case, given, torch.float32)]


def _optimizer(parameters: Sequence[nn.Parameter], s: TrainingDefaults) -> torch.optim.Optimizer:
    if s.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, amsgrad=s.amsgrad)
    return torch.optim.SGD(
        parameters, momentum=s.momentum, dampening=s.dampening, weight_decay=s.weight_decay, nesterov=s.nesterov
    )


def _loss(logits: Tensor, labels: Tensor, settings: TrainingDefaults) -> Tensor:
    if settings.loss == "entropy":
        logs = logits.log_softmax(1)
        return -(logs.exp() * logs).sum(1).mean()
    return functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)


def session(model: ir.Model | Path) -> onnxruntime.InferenceSession:
    """A graph or a file in plain onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    content = to_bytes(model) if isinstance(model, ir.Model) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, feed: Mapping[str, npt.ArrayLike]) -> Arrays:
    """Outputs by name; entries of ``feed`` that the graph does not take are left out."""
    names = [value.name for value in graph.get_outputs()]
    wanted = {value.name: np.asarray(feed[value.name]) for value in graph.get_inputs()}
    return dict(zip(names, graph.run(None, wanted), strict=True))


def first_state(graph: onnxruntime.InferenceSession, start: Arrays) -> Arrays:
    """What carries over, before the first step: ``start``, zeros for the optimizer's state and the step."""
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    carried = {value.name.removesuffix(".next") for value in graph.get_outputs() if value.name.endswith(".next")}
    inputs = {value.name: value for value in graph.get_inputs() if value.name in carried}
    assert inputs.keys() == carried
    return {n: start[n] if n in start else np.zeros(v.shape, kinds[v.type]) for n, v in inputs.items()}


def carried_over(found: Arrays) -> Arrays:
    """Outputs that the next step takes, by the names of its inputs."""
    return {name.removesuffix(".next"): value for name, value in found.items() if name.endswith(".next")}


def in_graph(graph: onnxruntime.InferenceSession, start: Arrays, given: Iterable[Batch]) -> Outcome:
    """The same steps of a train_step.onnx: feed every ``X.next`` back as ``X``."""
    state, losses, norms = first_state(graph, start), [], []
    for images, labels, lr in given:
        found = run(graph, {"input": images, "labels": labels, "lr": np.float32(lr), **state})
        losses.append(float(found["loss"]))
        norms.append(float(found["gradient_norm"]))
        state = carried_over(found)
    assert state.pop("step") == len(losses)
    return Outcome(losses, norms, {name: value.astype(np.float64) for name, value in unpacked(graph, state).items()})


def unpacked(graph: onnxruntime.InferenceSession, state: Arrays) -> Arrays:
    """Packed vectors ("momentum.0") as a tensor for each parameter ("momentum of fc.weight"), by the metadata."""
    groups = json.loads(graph.get_modelmeta().custom_metadata_map["lorac.groups"])
    members = {name for group in groups for name in group}
    found = {name: value for name, value in state.items() if name in members or "running_" in name}
    for name in state.keys() - found.keys():
        kind, _, number = name.rpartition(".")
        shapes = {member: found[member].shape for member in groups[int(number)]}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        assert state[name].shape == (ends[-1],)
        parts = np.split(state[name], ends[:-1])
        found |= {f"{kind} of {m}": part.reshape(shapes[m]) for m, part in zip(shapes, parts, strict=True)}
    return found


def step_config(case: Case) -> StepConfig:
    return StepConfig(case.training, form_of(case.form))


class Chained:
    """The graph of a frozen front and one that takes its features, as if they were one session."""

    def __init__(self, front: onnxruntime.InferenceSession, rest: onnxruntime.InferenceSession) -> None:
        self._front, self._rest = front, rest

    def get_inputs(self) -> list[onnxruntime.NodeArg]:
        inner = {value.name for value in self._front.get_outputs()}
        return [*self._front.get_inputs(), *(v for v in self._rest.get_inputs() if v.name not in inner)]

    def __getattr__(self, name: str) -> object:
        return getattr(self._rest, name)

    def run(self, names: list[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        feed = dict(feed)
        images = {value.name: feed.pop(value.name) for value in self._front.get_inputs()}
        features = self._front.run(None, images)
        return self._rest.run(
            names, feed | dict(zip([v.name for v in self._front.get_outputs()], features, strict=True))
        )


def whole_session(
    model: ir.Model, graphs: Graphs, start: Arrays, config: StepConfig
) -> onnxruntime.InferenceSession | Chained:
    """A session of a step graph that takes images, its frozen front in front where there is one."""
    front = prefix_step(graphs, start, config)
    return session(model) if front is None else Chained(session(front), session(model))


def distances(found: Outcome, exact: Outcome) -> dict[str, float]:
    """For every tensor, the optimizer's among them: how far it is from ``exact``, relative in norm.

    What is zero but for rounding (the gradient of a bias before a BN of policy batch) must be so in both.
    """
    assert found.tensors.keys() == exact.tensors.keys()
    zero = {name for name, value in exact.tensors.items() if np.linalg.norm(value) < 1e-12}
    assert all(np.linalg.norm(found.tensors[name]) < 1e-6 for name in zero)
    return {n: relative(found.tensors[n], value) for n, value in exact.tensors.items() if n not in zero}


def changes(found: Outcome, exact: Outcome, start: Arrays) -> dict[str, float]:
    """For every tensor of ``start``: how far it is from ``exact``, relative in norm to how far that one moved.

    What float32 cannot hold is forgiven: a distance of 1e-4 includes 4e-7 of the tensor itself.
    """
    errors = {
        n: np.linalg.norm(v - exact.tensors[n]) for n, v in found.tensors.items() if n in start and n in exact.tensors
    }
    moved = {n: np.linalg.norm(exact.tensors[n] - start[n]) for n in errors}
    return {n: float(e / (moved[n] + 4e-3 * np.linalg.norm(exact.tensors[n]))) for n, e in errors.items()}


def trained_only(found: dict[str, float]) -> dict[str, float]:
    """Without the optimizer's state."""
    return {name: value for name, value in found.items() if " of " not in name}


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    assert found.shape == exact.shape
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
