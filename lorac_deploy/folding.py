"""Batch normalisation folded into the convolutions of a PyTorch network, as it is in a device's base.onnx.

An adapter that a device trained adds to folded weights. A network folded here can hold it as it is, for ever.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lorac_deploy.lora_layers import LoraLayer
from lorac_deploy.partial_layers import PartialLayer
from lorac_deploy.structure import shared_weights, tensor_name
from lorac_deploy.timm_layers import behind_norm, is_traceable
from lorac_exporters.plan import Norm
from lorac_runtime.errors import ConversionError
from lorac_runtime.folding import fold_conv
from lorac_runtime.manifest import Trainable

# What tracing raises for code whose path depends on values: torch.fx's own error is a ValueError.
_TRACING_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, NotImplementedError)
_FOLDED = "_lorac_folded"  # attribute of the root module; a plain object, so state_dict() does not see it
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # nothing to do in evaluation mode


def conv_bn_pairs(module: nn.Module) -> dict[str, str]:
    """BN layer -> the convolution whose only reader it is; these are the ones that folding removes.

    >>> conv_bn_pairs(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)))
    {'1': '0'}

    Raises ConversionError if the forward pass cannot be traced.
    """
    try:
        graph = _Tracer().trace(module)
    except _TRACING_ERRORS as err:
        raise ConversionError(
            f"the forward pass of {type(module).__name__} cannot be followed ({err}), so it is not known which "
            "convolution each batch normalisation belongs to: name them with pairs={bn: conv, ...}"
        ) from err
    layers, shared = dict(module.named_modules()), shared_weights(module)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs = {}
    for node in graph.nodes:
        if _called(node, layers, _BatchNorm):
            conv = _only_source(node, layers)
            single = conv and calls[str(conv.target)] == 1 and calls[str(node.target)] == 1
            if conv and single and not shared.get(str(conv.target)):
                pairs[str(node.target)] = str(conv.target)
    return pairs


def norm_layers(module: nn.Module) -> tuple[Norm, ...]:
    """Every BN layer with a scale and a shift, and the convolution that a device's export folds it into.

    >>> norm_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[0].conv
    '0'

    Raises ConversionError if the forward pass cannot be traced.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    pairs = conv_bn_pairs(module) if layers else {}
    shapes = {name: (layer.num_features,) for name, layer in layers.items()}
    return tuple(
        Norm(
            name,
            Trainable(tensor_name(name, "weight"), shape, "bn_weight"),
            Trainable(tensor_name(name, "bias"), shape, "bn_bias"),
            pairs.get(name),
        )
        for name, shape in shapes.items()
    )


def fold_batchnorm(module: nn.Module, *, pairs: Mapping[str, str] | None = None) -> nn.Module:
    """A new network in evaluation mode, every BN that follows a convolution folded into it; same outputs.

    The convolutions get a bias; the BN layers become nn.Identity, or what those of timm do after that. ``pairs``
    (BN layer -> convolution) is needed only where `conv_bn_pairs` cannot find them. There is no way back.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    >>> sorted(fold_batchnorm(net).state_dict())
    ['0.bias', '0.weight']

    Raises ValueError if the network holds adapters or ``pairs`` names other layers; ConversionError as above.
    """
    if any(isinstance(part, LoraLayer | PartialLayer) for part in module.modules()):
        raise ValueError("fold first, then attach: this network already holds adapters; detach(module) takes them off")
    folded = copy.deepcopy(module).eval()
    for bn_name, conv_name in (conv_bn_pairs(module) if pairs is None else pairs).items():
        bn, conv = folded.get_submodule(bn_name), folded.get_submodule(conv_name)
        if not isinstance(bn, _BatchNorm) or not isinstance(conv, _ConvNd) or isinstance(conv, _ConvTransposeNd):
            raise ValueError(
                f"pairs maps BN layers to convolutions, but {bn_name} is a {type(bn).__name__} and {conv_name} a "
                f"{type(conv).__name__}"
            )
        _fold(conv, bn)
        folded.set_submodule(bn_name, behind_norm(bn))
    vars(folded)[_FOLDED] = True
    return folded


def is_folded(module: nn.Module) -> bool:
    """Whether `fold_batchnorm` made this network.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> is_folded(net), is_folded(fold_batchnorm(net))
    (False, True)
    """
    return _FOLDED in vars(module)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, _ConvNd | nn.Linear | _BatchNorm) or not is_traceable(type(m))
        return whole or super().is_leaf_module(m, module_qualified_name)


def _called(node: fx.Node, layers: dict[str, nn.Module], kind: type[Any] | tuple[type[Any], ...]) -> bool:
    return node.op == "call_module" and isinstance(layers[str(node.target)], kind)


def _only_source(node: fx.Node, layers: dict[str, nn.Module]) -> fx.Node | None:
    """The convolution that nothing but ``node`` reads."""
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and len(source.users) == 1 and _called(source, layers, _PASSING):
        source = source.args[0] if source.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1 or not _called(source, layers, _ConvNd):
        return None
    return None if _called(source, layers, _ConvTransposeNd) else source


def _fold(conv: _ConvNd, bn: _BatchNorm) -> None:
    zeros, ones = np.zeros(bn.num_features, np.float32), np.ones(bn.num_features, np.float32)
    weight, bias = fold_conv(
        array(conv.weight),
        None if conv.bias is None else array(conv.bias),
        array(bn.weight) if bn.affine else ones,
        array(bn.bias) if bn.affine else zeros,
        array(cast(torch.Tensor, bn.running_mean)),
        array(cast(torch.Tensor, bn.running_var)),
        bn.eps,
    )
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(weight))
    conv.bias = nn.Parameter(torch.from_numpy(bias).to(conv.weight))


def array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """A tensor's values in numpy, wherever it lies."""
    return tensor.detach().cpu().numpy()
