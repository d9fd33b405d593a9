"""Networks to be stepped: in PyTorch, and as the exporter's graphs."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from exporter_graphs import randomize
from networks import touch_adapters, trained
from step_runs import Arrays, Batch, Case, Chained, step_config, whole_session
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import DenseNet

from lorac_deploy.batchnorm import recalibrate, restore_policy
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import select_trainable
from lorac_exporters.graph_tools import need, producer, remove_unused
from lorac_exporters.graphs import Graphs, build_graphs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.torch_graph import export_graph
from lorac_exporters.training_step import train_step
from lorac_runtime.manifest import BnPolicy, InputSpec


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


def step_graph(name: str, case: Case, start: Arrays, *, smooth: bool) -> onnxruntime.InferenceSession | Chained:
    """train_step.onnx of a network, ready to run."""
    graphs, config = graphs_of(name, case, smooth=smooth), step_config(case)
    return whole_session(train_step(graphs, start, config), graphs, start, config)
