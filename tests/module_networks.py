"""Networks with modules at their sites (methods skip and attention), in PyTorch and as the exporter's graphs."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from exporter_graphs import randomize
from networks import touch_adapters
from shared_export import export_graph
from step_runs import (
    Arrays,
    Batch,
    Case,
    Outcome,
    carried_over,
    first_state,
    in_pytorch,
    run,
    session,
    starting,
    unpacked,
)
from torch import Tensor, nn

from lorac_deploy.lora import select_trainable
from lorac_exporters.branches import form_of
from lorac_exporters.graph_tools import set_array
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.training_step import StepConfig, eval_step, prefix_step, train_step
from lorac_runtime.manifest import InputSpec, TrainingDefaults

CLASSES = 4
HIGH = 2.0**12
PLAIN_SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0)


class Block(nn.Module):
    """Two convolutions with BN beside a shortcut, which reads the block's input too."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        return torch.tanh(inner + self.downsample(x))


class Residual(nn.Module):
    """A stem and three blocks; (N, 3, 12, 12) -> (N, 4)."""

    shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        blocks = ((6, 6, 1), (6, 8, 2), (8, 20, 2))
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(Block(*sizes)) for sizes in blocks)
        self.fc = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


def depthwise() -> nn.Module:
    """Inverted bottlenecks: wider, depthwise, narrower, each with BN."""

    def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
        wide = 2 * c_in
        inner = nn.Sequential(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide))
        last = [nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
        return nn.Sequential(nn.Conv2d(c_in, wide, 1), nn.SiLU(), inner, nn.SiLU(), *last)

    stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.SiLU())
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))
    return nn.Sequential(stem, block(6, 8, 1), block(8, 8, 2), block(8, 12, 1), *end)


def plain() -> nn.Module:
    """Bare names, biases, a convolution that pads by reflection, one with groups, and a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        nn.Tanh(),
        nn.Linear(10, CLASSES),
    )


def dense() -> nn.Module:
    """Fully connected, as Skip-LoRA's own networks."""
    return nn.Sequential(
        nn.Linear(20, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, CLASSES)
    )


def signals() -> nn.Module:
    """One-dimensional convolutions."""
    return nn.Sequential(
        nn.Conv1d(2, 6, 5), nn.Tanh(), nn.Conv1d(6, 8, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


IMAGE, VECTOR, SIGNAL = (3, 12, 12), (20,), (2, 24)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "plain": (plain, IMAGE),
    "dense": (dense, VECTOR),
    "signals": (signals, SIGNAL),
}


@functools.cache
def network(name: str) -> nn.Module:
    """In evaluation mode, its BN away from the start; not to be changed."""
    torch.manual_seed(0)
    net = randomize(NETWORKS[name][0]())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.abs_().clamp_(min=0.3)
    return net


@functools.cache
def exported(name: str) -> ir.Model:
    """The network's raw graph; the exporter works on copies of it."""
    return export_graph(network(name), NETWORKS[name][1])


def spec(name: str) -> InputSpec:
    shape = NETWORKS[name][1]
    if len(shape) == 3:
        return InputSpec("input", shape, 1 / 255, (0.5,) * 3, (0.25,) * 3)
    channels = shape[0] if len(shape) > 1 else 1
    return InputSpec("input", shape, 1.0, (0.0,) * channels, (1.0,) * channels, dtype="float32")


@functools.lru_cache(maxsize=8)
def graphs_of(name: str, case: Case) -> Graphs:
    return build_graphs(
        exported(name),
        spec=spec(name),
        classes=CLASSES,
        new_head=False,
        method=case.method,
        lora=case.lora,
        policy=case.policy,
    )


def prepared(name: str, case: Case, *, size: float = 0.2) -> nn.Module:
    """The PyTorch side, in training mode, every trained tensor moved by ``size``."""
    net = copy.deepcopy(network(name))
    select_trainable(net, case.method, case.lora, bn_policy=case.policy)
    touch_adapters(net, size=size)
    for key, value in net.named_parameters():
        if key.endswith("gate_down_bias"):
            value.data += 0.5  # a hidden unit that is never above zero would have no gradient
    return net.train()


def samples(name: str, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, *NETWORKS[name][1])).astype(np.float32)
    return inputs, rng.integers(0, CLASSES, count)


def batches(name: str, count: int, *, steps: int, lr: float) -> list[Batch]:
    return [(*samples(name, count, seed=step), lr) for step in range(steps)]


class Steps:
    """The step graphs of a network in plain onnxruntime, behind the graph of the frozen front where there is one."""

    def __init__(self, name: str, case: Case, start: Arrays) -> None:
        self.graphs, self.start, config = graphs_of(name, case), start, StepConfig(case.training, form_of("auto"))
        front = prefix_step(self.graphs, start, config)
        self.front = None if front is None else session(front)
        self.train = session(train_step(self.graphs, start, config))
        self.evaluate = session(eval_step(self.graphs, start, config))

    def inputs(self, values: np.ndarray) -> Arrays:
        return {"input": values} if self.front is None else run(self.front, {"input": values})

    def logits(self, values: np.ndarray, labels: np.ndarray) -> Arrays:
        """Loss and logits in evaluation mode, before any step."""
        return run(self.evaluate, {**self.inputs(values), "labels": labels, **self.start})

    def steps(self, given: list[Batch]) -> Outcome:
        state, losses, norms = first_state(self.train, self.start), [], []
        for values, labels, lr in given:
            found = run(self.train, {**self.inputs(values), "labels": labels, "lr": np.float32(lr), **state})
            losses.append(float(found["loss"]))
            norms.append(float(found["gradient_norm"]))
            state = carried_over(found)
        assert state.pop("step") == len(losses)
        tensors = {n: v.astype(np.float64) for n, v in unpacked(self.train, state).items()}
        return Outcome(losses, norms, tensors)


@dataclasses.dataclass(frozen=True)
class Sides:
    """The same numbers in both."""

    case: Case
    net: nn.Module
    graph: Steps
    start: Arrays


def sides(name: str, case: Case) -> Sides:
    net = prepared(name, case)
    start = starting(net, case)
    return Sides(case, net, Steps(name, case, start), start)


def gradients(name: str, case: Case, count: int) -> tuple[Arrays, Arrays]:
    """(the graph's, PyTorch's in float64) of every trained tensor: what one step of SGD takes off, at a rate so high
    that hardly a digit is lost to the tensor itself.
    """
    case = dataclasses.replace(case, training=PLAIN_SGD)
    both, given = sides(name, case), batches(name, count, steps=1, lr=HIGH)
    found, exact = both.graph.steps(given), in_pytorch(both.net, case, given, torch.float64)
    names = [t.name for t in both.graph.graphs.plan.trainables]
    assert sorted(names) == sorted(n for n, p in both.net.named_parameters() if p.requires_grad)
    return tuple({n: (both.start[n] - side.tensors[n]) / HIGH for n in names} for side in (found, exact))  # type: ignore[return-value]


def close(found: Arrays, exact: Arrays, tolerance: float = 2e-5) -> bool:
    """Every tensor within ``tolerance`` of its own norm; what is below 1e-3 need not be nearer than that allows."""
    bounds = {n: tolerance * max(float(np.linalg.norm(v)), 1e-3) for n, v in exact.items()}
    return found.keys() == exact.keys() and all(np.linalg.norm(found[n] - exact[n]) <= b for n, b in bounds.items())


def with_numbers(model: ir.Model, values: Arrays) -> ir.Model:
    """A copy whose initializers of these names hold these numbers, as fusing writes them."""
    twin = model.clone()
    for name, numbers in values.items():
        set_array(twin.graph.initializers[name], numbers)
    return twin
