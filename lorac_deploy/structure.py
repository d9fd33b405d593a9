"""What a PyTorch network consists of, as the plan sees it: stem, convolutions, head, the rest."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lorac_deploy.forward_order import with_sizes
from lorac_deploy.lora_layers import adapted_class
from lorac_exporters.plan import Layer, Network
from lorac_runtime.manifest import BnPolicy, Trainable


def tensor_name(layer: str, tensor: str) -> str:
    """State-dict key of a layer's tensor; the root module's name is empty.

    >>> tensor_name("layer1.0.conv1", "weight"), tensor_name("", "weight")
    ('layer1.0.conv1.weight', 'weight')
    """
    return f"{layer}.{tensor}" if layer else tensor


def describe(
    module: nn.Module,
    *,
    bn_policy: BnPolicy = "frozen",
    stem: str | None = None,
    head: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Network:
    """The facts about ``module`` that `lorac_exporters.plan` needs; ``stem`` and ``head`` name layers.

    Convolutions come in the order of definition, which is the forward order in the networks of
    `lorac_deploy.models`. The first is the stem: a network that defines its layers in another order names it.
    A module may name its own heads, several too, with an attribute ``heads``; see `Network.more_heads`.
    BN scale and shift count as parameters of their own only under the policy ``batch``. With ``input_shape``, that of
    one sample, a forward pass tells the order of calls and the sizes of feature maps too.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    >>> found = describe(net)
    >>> [c.name for c in found.convs], found.head_weight
    (['0', '1'], ('3.weight', (10, 8)))

    Raises ValueError if there is no head, a given name is not that of a fitting layer, or the network cannot process
    such a sample.
    """
    heads = heads_of(module) if head is None else (find_head(module, head),)
    head = heads[0]
    convs = _layers(module, _ConvNd, heads, stem)
    linears = _layers(module, nn.Linear, heads, None if convs else stem)
    if stem is not None and stem not in [layer.name for layer in (convs or linears)[:1]]:
        kind = "convolution" if convs else "linear layer before the head"
        raise ValueError(f"stem {stem!r} is not a {kind} of this network: {_some([c.name for c in convs or linears])}")
    tensors = {t.name: t for t in _tensors(module)}
    leaves = [tensor_name(name, leaf) for name in heads for leaf in ("weight", "bias")]
    in_head = {name: tensors[name] for name in leaves if name in tensors}
    sharers = shared_weights(module)
    free = [layer for layer in (*convs, *linears) if layer.obstacle is None]
    planned = {layer.weight for layer in free} | {layer.bias for layer in free}
    if tensor_name(head, "weight") not in in_head:
        raise ValueError(f"the weight of head {head!r} is shared with another layer: name another one with head=...")
    others = [t for name, t in tensors.items() if name not in planned | in_head.keys()]
    weight, bias = in_head[tensor_name(head, "weight")], in_head.get(tensor_name(head, "bias"))
    network = Network(
        convs=convs,
        head_weight=(weight.name, weight.shape),
        head_bias=(bias.name, bias.shape) if bias else None,
        backbone_parameters=sum(math.prod(t.shape) for n, t in tensors.items() if n not in in_head),
        batchnorms=_affine(module) if bn_policy == "batch" else (),
        others=tuple(t for t in others if not t.role.startswith("bn_")),
        linears=linears,
        head_obstacle=_unadaptable(module.get_submodule(head)),
        more_heads=tuple(_layer(module, name, sharers, in_full=True) for name in heads[1:]),
    )
    return network if input_shape is None else with_sizes(network, module, input_shape)


def heads_of(module: nn.Module) -> tuple[str, ...]:
    """The layers that a module names in its attribute ``heads``, or the one that `find_head` finds.

    Raises ValueError if there is none.
    """
    named: tuple[str, ...] = getattr(module, "heads", ())
    return tuple(find_head(module, name) for name in named) or (find_head(module),)


def find_head(module: nn.Module, name: str | None = None) -> str:
    """Name of the classifying layer: the last nn.Linear, else a last convolution with a 1x1 kernel.

    >>> find_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1)))
    '1'

    Raises ValueError if there is none, or ``name`` is not a linear layer or a 1x1 convolution.
    """
    layers = dict(module.named_modules())
    candidates = [n for n, m in layers.items() if _can_be_head(m)]
    if name is not None:
        if name not in candidates:
            raise ValueError(f"head {name!r} is not a linear layer or 1x1 convolution: {_some(candidates)}")
        return name
    linear = [n for n in candidates if isinstance(layers[n], nn.Linear)]
    last_conv = [n for n, m in layers.items() if isinstance(m, _ConvNd)][-1:]
    found = linear[-1:] or [n for n in last_conv if n in candidates]
    if not found:
        raise ValueError(
            "this network ends neither in a linear layer nor in a 1x1 convolution, so its head cannot be found: "
            f"name the classifying layer with head=...; {_some(candidates)}"
        )
    head: str = found[0]
    return head


def _layers(
    module: nn.Module, kind: type[_ConvNd] | type[nn.Linear], heads: tuple[str, ...], stem: str | None
) -> tuple[Layer, ...]:
    """The layers of a kind, the heads not among them, in the order of definition; ``stem`` comes first."""
    found = [n for n, m in module.named_modules() if isinstance(m, kind) and n not in heads]
    names = sorted(found, key=lambda name: name != stem)
    shared = shared_weights(module)
    return tuple(_layer(module, name, shared, in_full=not index) for index, name in enumerate(names))


def _layer(module: nn.Module, name: str, shared: dict[str, list[str]], *, in_full: bool) -> Layer:
    """A layer of its name; ``in_full``: that it may take no adapter does not keep it from training in full."""
    part: Any = module.get_submodule(name)
    unfit = _unadaptable(part)
    return Layer(
        name=name,
        weight=tensor_name(name, "weight"),
        bias=None if part.bias is None else tensor_name(name, "bias"),
        shape=tuple(part.weight.shape),
        groups=getattr(part, "groups", 1),
        obstacle=_untrainable(part, shared.get(name, [])) or (None if in_full else unfit),
        no_adapter=unfit,
    )


def _untrainable(layer: nn.Module, sharers: list[str]) -> str | None:
    if "weight" not in layer._parameters:
        return "its weight is computed by a parametrization or hook"
    return f"its weight is shared with {', '.join(sharers)}" if sharers else None


def _unadaptable(layer: nn.Module) -> str | None:
    if isinstance(layer, _ConvTransposeNd):
        return "transposed convolutions take no adapter"
    if adapted_class(type(layer)) is None:
        fitting = "nn.Conv1d and nn.Conv2d do" if isinstance(layer, _ConvNd) else "nn.Linear does"
        return f"{type(layer).__name__} takes no adapter, only plain {fitting}"
    return None


def shared_weights(module: nn.Module) -> dict[str, list[str]]:
    """Layer -> other layers that use its weight.

    >>> net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    >>> net[1].weight = net[0].weight
    >>> shared_weights(net)
    {'0': ['1'], '1': ['0']}
    """
    users: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        if part._parameters.get("weight") is not None:
            users.setdefault(id(part.weight), []).append(name)
    return {name: [n for n in group if n != name] for group in users.values() for name in group}


def _tensors(module: nn.Module) -> list[Trainable]:
    """All parameters, each under its first name."""
    return [
        Trainable(name, tuple(parameter.shape), _role(module.get_submodule(name.rpartition(".")[0]), name))
        for name, parameter in module.named_parameters()
    ]


def _role(owner: nn.Module, name: str) -> str:
    role = "bias" if name.endswith("bias") else "weight"
    return f"bn_{role}" if isinstance(owner, _BatchNorm) else role


def _affine(module: nn.Module) -> tuple[tuple[str, str, int], ...]:
    layers = ((n, m) for n, m in module.named_modules() if isinstance(m, _BatchNorm) and m.affine)
    return tuple((tensor_name(n, "weight"), tensor_name(n, "bias"), m.num_features) for n, m in layers)


def _can_be_head(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1
    return (isinstance(module, nn.Linear) or pointwise) and "weight" in module._parameters


def _some(names: list[str]) -> str:
    text = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"candidates are {text}" if names else "it has no candidate"
