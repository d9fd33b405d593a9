"""PyTorch networks as files that need PyTorch alone: adapters, skip branches and all written out as plain operators.

So the worker that steps them imports what a PyTorch user would, and its memory is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.nn import functional

from lorac_deploy.lora import LoraConfig, LoraConv2d, load_adapter_tensors, select_trainable
from lorac_deploy.lora_layers import LoraLayer, recast
from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER, load


class ThinConv2d(LoraConv2d):
    """The spatial layout as conv(x, W) + conv(conv(x, A), B): a 1 x k_w convolution, then a k_h x 1 one."""

    def forward(self, input: Tensor) -> Tensor:
        """The same output as `LoraConv2d`'s, without ever forming the weight's update."""
        (s_h, s_w), (d_h, d_w) = self.stride, self.dilation
        p_h, p_w = (int(p) for p in self.padding)
        high, wide = self.kernel_size
        rank = self.lora_a.shape[0]
        down = self.lora_a.reshape(rank, -1, 1, wide).repeat(self.groups, 1, 1, 1)
        up = (self.scale * self.lora_b).reshape(self.out_channels, high, rank).transpose(1, 2).unsqueeze(3)
        if high == 1:  # all of the geometry belongs to the first one
            hidden = functional.conv2d(input, down, None, (s_h, s_w), (p_h, p_w), (d_h, d_w), self.groups)
            change = functional.conv2d(hidden, up, groups=self.groups)
        else:
            hidden = functional.conv2d(input, down, None, (1, s_w), (0, p_w), (1, d_w), self.groups)
            change = functional.conv2d(hidden, up, None, (s_h, 1), (p_h, 0), (d_h, 1), self.groups)
        whole: Tensor = self._conv_forward(input, self.weight, self.bias)
        return whole + change


def use_branches(network: nn.Module) -> None:
    """Turn every weight-space adapter into thin branches, in place.

    Raises ValueError for another layout than the spatial one, or padding that is not zeros given as numbers.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, LoraConv2d):
            if layer.adapter.layout != "spatial" or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise ValueError(f"{name} has no thin form here: {layer}")
            recast(layer, ThinConv2d)


def prepare_like(network: nn.Module, artifact: Path) -> None:
    """Prepare a folded network, in place, by the method of an artifact and with the numbers that it starts from."""
    said, shape = load_adapter(artifact / ADAPTER).metadata, load(artifact).input.shape
    settings: dict[str, Any] = {"freeze_a": said["freeze_a"] == "true"}
    settings["blocks"] = tuple(name for name in said["blocks"].split(",") if name)
    settings |= {"rank": int(said["r"]), "alpha": float(said["alpha"])} if said["r"] else {}
    settings |= {name: said[name] for name in ("rank_mode", "layout") if said[name]}
    lora = LoraConfig(**settings)
    select_trainable(network.eval(), said["method"], lora, bn_policy="frozen", input_shape=shape)
    load_adapter_tensors(network, load_file(artifact / ADAPTER))


class _Proxy(fx.Proxy):
    """A value in a trace that knows how many axes it has where a hook asks: that of a layer's input."""

    @property
    def ndim(self) -> int:
        """4 before a convolution, 2 before a fully connected layer."""
        return int(self.tracer.axes)  # type: ignore[attr-defined]


class _Tracer(fx.Tracer):
    """Follows adapters and hooks into plain operators; everything else of torch.nn stays a layer."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.axes = 4

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LoraLayer) or m._forward_hooks or m._forward_pre_hooks:
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.axes = 2 if isinstance(m, nn.Linear) else 4
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def standalone(network: nn.Module) -> fx.GraphModule:
    """The same network with the same parameters, of torch's own classes only."""
    graph = _Tracer().trace(network)
    for node in graph.nodes:
        node.type = None  # annotations in quotes cannot be pickled
    graph._tracer_cls = None
    return fx.GraphModule(network, graph)


def save_network(network: nn.Module, path: Path) -> None:
    """Write it where `torch.load` finds it, with nothing but torch installed."""
    torch.save(standalone(network), path)
