"""timm's networks by name: ``timm/resnet18``, or with the name of its weights ``timm/resnet18.a1_in1k``.

timm is imported where one of its networks is asked for, and no earlier. A network comes as timm makes it, but for one
thing: convolutions whose weight timm standardizes in each forward pass (NFNet, BiT) are made plain ones that hold
the standardized weight, for only a weight that is stored can be adapted and patched.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorac_deploy import _torchvision  # noqa: F401 - before timm, which imports torchvision
from lorac_deploy.lora_layers import recast
from lorac_runtime.errors import CheckpointError

PREFIX = "timm/"
EXTRA = "lorac-deploy[timm]"
CLOSE = 5  # names that are listed where one is unknown
_STANDARDIZED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def is_timm(name: str) -> bool:
    """Whether ``name`` is that of one of timm's networks, known or not.

    >>> is_timm("timm/resnet18"), is_timm("resnet18")
    (True, False)
    """
    return name.startswith(PREFIX)


def require_known(name: str) -> None:
    """Raise ValueError for a name that timm does not know (with close ones), or if timm is not installed.

    >>> require_known("timm/resnet19")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: timm has no network 'resnet19'; close to it are resnet18, ...
    """
    timm, (own, _, tag) = _timm(name), name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(own):
        close = difflib.get_close_matches(own, timm.list_models(), CLOSE, 0.5)
        known = f"close to it are {', '.join(close)}" if close else "timm.list_models() lists all"
        raise ValueError(f"timm has no network {own!r}; {known}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{own}.*")]
    if tag and tag not in tags:
        known = f"choose one of {', '.join(tags)}" if tags else "it has none"
        raise ValueError(f"timm has no weights {tag!r} of {own}; {known}")


def make(name: str, channels: int, classes: int) -> nn.Module:
    """A fresh network for (N, channels, H, W) images, with a head of ``classes`` outputs.

    Raises ValueError where timm cannot give it such a head or so many channels.
    """
    return stem_first(plain(_create(name, channels=channels, classes=classes)), (channels, *size(name)))


def plain(module: nn.Module) -> nn.Module:
    """``module`` itself, its weight-standardizing convolutions made plain ones: same outputs, ``weight`` standardized.

    There is no way back. Other networks stay as they are.
    """
    layers: Any = importlib.import_module("timm.layers")
    for part in list(module.modules()):
        if type(part).__name__ in _STANDARDIZED and type(part) is getattr(layers, type(part).__name__):
            _store_standardized(cast(nn.Conv2d, part), layers.Conv2dSame)
    return module


class _StemFoundError(Exception):
    """Ends a forward pass where its first convolution begins."""


def stem_first(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """``module`` itself; the convolution that it calls first is the first it defines, which is how a stem is known.

    Blocks of several branches (MobileOne) call them in another order than they define them. Names stay.
    """
    found: list[nn.Module] = []

    def begin(part: nn.Module, _: object) -> None:
        found.append(part)
        raise _StemFoundError

    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    handles = [part.register_forward_pre_hook(begin) for part in convs]
    try:
        with torch.no_grad(), contextlib.suppress(_StemFoundError):
            module(torch.zeros(1, *shape, device=next(module.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    for part in found:
        _move_to_front(module, part)
    return module


def _move_to_front(module: nn.Module, wanted: nn.Module) -> None:
    """Along the way to ``wanted``, but where the order of parts is the order of calls."""
    path = next(name for name, part in module.named_modules() if part is wanted).split(".")
    for depth, leaf in enumerate(path):
        parent = module.get_submodule(".".join(path[:depth]))
        if not isinstance(parent, nn.Sequential | nn.ModuleList):
            others = [name for name in parent._modules if name != leaf]
            for name in others:
                parent._modules[name] = parent._modules.pop(name)


def pretrained(name: str) -> dict[str, Tensor]:
    """The state dict of the weights that timm offers for ``name``, for all the classes they were trained for.

    They come from the cache of the Hugging Face hub, or from the network: those whose name stands in ``name`` behind
    a dot, else timm's default for the network.

    Raises ValueError if there are none; CheckpointError if they cannot be downloaded.
    """
    config = data_config(name)
    if not (config.hf_hub_id or config.url or config.file):
        raise ValueError(f"timm offers no weights for {name}: train it, or give a file of weights")
    try:
        return plain(_create(name, weights=True)).state_dict()
    except OSError as err:  # no network, no space
        raise CheckpointError(
            f"the weights of {name} are not on this machine and could not be downloaded. Download model.safetensors of "
            f"{config.hf_hub_id or config.url} elsewhere and give its path: --weights model.safetensors"
        ) from err


def fitted(name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as timm writes it, as one of the network that `make` gives: standardized weights are stored."""
    with torch.device("meta"):
        raw = _create(name)
    found = dict(given)
    for layer, part in raw.named_modules():
        weight, gain = f"{layer}.weight", f"{layer}.gain"
        if type(part).__name__ in _STANDARDIZED and weight in found and (gain in found or not hasattr(part, "gain")):
            found[weight] = _standardized(cast(Any, part), found[weight], found.pop(gain, None))
    return found


def statistics(name: str) -> Statistics:
    """Mean and standard deviation of each channel, of pixels / 255, that timm's weights of ``name`` were trained with.

    >>> statistics("timm/mobilenetv4_conv_small")
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    config = data_config(name)
    return tuple(config.mean), tuple(config.std)


def size(name: str) -> tuple[int, int]:
    """Height and width of the images that timm's weights of ``name`` were trained on.

    >>> size("timm/inception_v3")
    (299, 299)
    """
    height, width = data_config(name).input_size[1:]
    return int(height), int(width)


def data_config(name: str) -> Any:
    """timm's ``PretrainedCfg``: where the weights are, and the images that they were trained on."""
    require_known(name)
    found = _timm(name).get_pretrained_cfg(name.removeprefix(PREFIX), allow_unregistered=False)
    if found is None:
        raise ValueError(f"timm says nothing about weights of {name}: give --normalize data, and --size in pixels")
    return found


def _timm(name: str) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{name} is a network of timm, which is not installed here: pip install '{EXTRA}'")
    return importlib.import_module("timm")


def _create(name: str, *, channels: int = 3, classes: int | None = None, weights: bool = False) -> nn.Module:
    own = {} if classes is None else {"num_classes": classes}
    if channels != 3:
        own["in_chans"] = channels
    try:
        made: nn.Module = _timm(name).create_model(name.removeprefix(PREFIX), pretrained=weights, **own)
    except (TypeError, AssertionError, RuntimeError) as err:
        wanted = f"{classes} classes and {channels} channels" if classes else "its weights"
        raise ValueError(f"timm cannot make {name} with {wanted}: {err}") from err
    return made


def _store_standardized(conv: nn.Conv2d, same: type[nn.Conv2d]) -> None:
    own: Any = conv
    with torch.no_grad():
        conv.weight.copy_(_standardized(own, conv.weight, getattr(own, "gain", None)))
    if hasattr(own, "gain"):
        del own.gain
    recast(conv, same if getattr(own, "same_pad", False) else nn.Conv2d)


def _standardized(layer: Any, weight: Tensor, gain: Tensor | None) -> Tensor:
    """(weight - mean) / sqrt(var + eps) over the inputs of each output channel, times gain / sqrt(inputs) if any."""
    axes = tuple(range(1, weight.ndim))
    variance, mean = torch.var_mean(weight, axes, correction=0, keepdim=True)
    found = (weight - mean) * torch.rsqrt(variance + layer.eps)
    return found if gain is None else found * (gain * layer.scale)
