"""Networks stepped on both sides: PyTorch's own optimizers, and the step graph in plain onnxruntime."""

from __future__ import annotations

import copy
import dataclasses
import functools
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
from exporter_graphs import randomize
from networks import touch_adapters, trained
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import DenseNet

from lorac_deploy.batchnorm import bn_tensors, recalibrate, restore_policy
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import adapter_tensors, select_trainable
from lorac_exporters.branches import FormChoice, form_of
from lorac_exporters.graph_tools import need, producer, remove_unused, to_bytes
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.training_step import StepConfig, prefix_step, train_step
from lorac_runtime.manifest import BnPolicy, InputSpec, TrainingDefaults

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


class Small(nn.Module):
    """Smooth; stride, groups, a 1x1 convolution, a skip, and a BN behind each kind of convolution and one alone."""

    shape = (3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, (5, 3), stride=2, padding=(2, 0))
        self.conv4 = nn.Conv2d(12, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 12, 12) -> (N, 4)."""
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x))) + x
        x = functional.silu(self.conv3(torch.tanh(self.bn3(x))))
        result: Tensor = self.fc(torch.sigmoid(self.conv4(x)).mean((2, 3)))
        return result


class UNet(nn.Module):
    """Two levels down and up, each skip joined by Concat; ``up`` is "transposed" or "bilinear"."""

    shape = (3, 16, 16)

    def __init__(self, up: str, activation: type[nn.Module], pool: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.pooled = pool(2), False
        self.down1, self.down2 = _block(3, 8, activation), _block(8, 12, activation)
        self.bottom = _block(12, 16, activation)
        self.wider2 = _upwards(up, 16, 12)
        self.up2 = _block(24, 12, activation)
        self.wider1 = _upwards(up, 12, 8)
        self.up1 = _block(16, 8, activation)
        self.classify = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 16, 16) -> (N, 5, 16, 16), a class for each pixel; their mean (N, 5) with ``pooled``."""
        high = self.down1(x)
        middle = self.down2(self.pool(high))
        low = self.bottom(self.pool(middle))
        middle = self.up2(torch.cat([middle, self.wider2(low)], 1))
        high = self.up1(torch.cat([high, self.wider1(middle)], 1))
        result: Tensor = self.classify(high)
        return result.mean((2, 3)) if self.pooled else result


def _block(c_in: int, c_out: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), activation())


def _upwards(kind: str, c_in: int, c_out: int) -> nn.Module:
    """Twice the resolution."""
    if kind == "transposed":
        return nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
    larger = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    return nn.Sequential(larger, nn.Conv2d(c_in, c_out, 3, padding=1))


class _SmoothDenseNet(DenseNet):
    """Without the Relu that torchvision's calls as a function."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        features = torch.tanh(self.features(x)).mean((2, 3))
        result: Tensor = self.classifier(features)
        return result


@functools.lru_cache(maxsize=6)
def network(name: str, *, smooth: bool) -> nn.Module:
    """In evaluation mode, all four tensors of each BN away from their start; not to be changed."""
    torch.manual_seed(0)
    if name == "small":
        return randomize(Small())
    if name.startswith("unet"):
        kinds = (nn.Tanh, nn.AvgPool2d) if smooth else (nn.ReLU, nn.MaxPool2d)
        return randomize(UNet(name.removeprefix("unet_"), *kinds))
    net = trained(name)
    return settled(smoothed(net) if smooth else net, shape_of(name))


def settled(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With BN statistics of images of ``shape``, in place."""
    recalibrate(net, [torch.randn(16, *shape, generator=torch.Generator().manual_seed(4))])
    restore_policy(net)
    return net.eval()


def smoothed(net: nn.Module) -> nn.Module:
    """The same layers with every kink replaced, in place.

    BN scales are halved: gradients that grew from layer to layer would let rounding errors grow as well.
    """
    for name, module in list(net.named_modules()):
        if type(module) in _SMOOTH:
            net.set_submodule(name, _SMOOTH[type(module)]())
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data /= 2
        elif isinstance(module, nn.MaxPool2d):
            net.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    if type(net) is DenseNet:
        net.__class__ = _SmoothDenseNet
    return net


_SMOOTH: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: nn.Tanh,
    nn.ReLU6: nn.Softplus,
    nn.Hardswish: nn.SiLU,
    nn.Hardsigmoid: nn.Sigmoid,
}
_SHAPES = {"small": Small.shape, "unet_transposed": UNet.shape, "unet_bilinear": UNet.shape, "densenet121": (3, 64, 64)}
_CLASSES = {"small": 4, "unet_transposed": 5, "unet_bilinear": 5}


def shape_of(name: str) -> tuple[int, ...]:
    """Channels, height and width of an image; 48 pixels are the least that leave BN 2 x 2 positions everywhere."""
    return _SHAPES.get(name, (3, 48, 48))


def class_count(name: str) -> int:
    return _CLASSES.get(name, 10)


def graphs_of(name: str, case: Case, *, smooth: bool) -> Graphs:
    """The exporter's side."""
    graphs = _graphs(name, case.policy, smooth)
    return dataclasses.replace(graphs, plan=METHODS[case.method](graphs.network, case.lora))


@functools.lru_cache(maxsize=6)
def _graphs(name: str, policy: BnPolicy, smooth: bool) -> Graphs:
    graphs = build_graphs(
        exported(name, smooth=smooth),
        spec=InputSpec("input", shape_of(name), 1 / 255, (0.5,) * 3, (0.25,) * 3),
        classes=class_count(name),
        new_head=False,
        method="head",
        lora=LoraConfig(),
        policy=policy,
    )
    if name.startswith("unet"):
        _end_before_pooling(graphs.trained.model)
    return graphs


@functools.lru_cache(maxsize=6)
def exported(name: str, *, smooth: bool) -> ir.Model:
    """The plain network as an ONNX graph; not to be changed."""
    net = copy.deepcopy(network(name, smooth=smooth))
    if isinstance(net, UNet):
        net.pooled = True
    return export_graph(net, shape_of(name))


def _end_before_pooling(model: ir.Model) -> None:
    """Make the logits of the pixels the graph's output; the exporter takes classifiers, which pool them."""
    pooling = producer(model.graph.outputs[0])
    assert pooling.op_type == "ReduceMean"
    model.graph.outputs[0] = need(pooling.inputs[0])
    remove_unused(model)


def prepared(name: str, case: Case, *, smooth: bool) -> nn.Module:
    """The PyTorch side: adapters attached, every trainable tensor away from its start, dropout off."""
    net = network(name, smooth=smooth)
    net = fold_batchnorm(net) if case.policy == "frozen" else copy.deepcopy(net)
    select_trainable(net, case.method, case.lora, bn_policy=case.policy)
    touch_adapters(net)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.train()


def starting(net: nn.Module, case: Case) -> Arrays:
    """What the step graph starts from: the tensors of adapters, and running statistics where they move."""
    return {name: value.numpy() for name, value in (adapter_tensors(net) | _statistics(net, case)).items()}


def _statistics(net: nn.Module, case: Case) -> dict[str, Tensor]:
    if case.policy != "batch":
        return {}
    return {name: value for name, value in bn_tensors(net).items() if "running" in name}


def batches(name: str, *, size: int = 6, steps: int = 10, lr: float = 0.1, seed: int = 0) -> list[Batch]:
    """The last one is smaller; the learning rate falls."""
    rng = np.random.default_rng(seed)
    shape, found = shape_of(name), []
    for step in range(steps):
        count = size if step < steps - 1 else size - 2
        pixels = shape[1:] if name.startswith("unet") else ()
        images = rng.standard_normal((count, *shape)).astype(np.float32)
        labels = rng.integers(0, class_count(name), (count, *pixels))
        found.append((images, labels, lr * (1 - 0.5 * step / steps)))
    return found


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


def step_graph(name: str, case: Case, start: Arrays, *, smooth: bool) -> onnxruntime.InferenceSession | Chained:
    """train_step.onnx of a network, ready to run."""
    graphs, config = graphs_of(name, case, smooth=smooth), step_config(case)
    return whole_session(train_step(graphs, start, config), graphs, start, config)


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
