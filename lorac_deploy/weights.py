"""Pretrained weights into a network: from a file, or torchvision's and timm's own by name."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorac_deploy import _torchvision, timm_nets
from lorac_deploy.structure import describe
from lorac_runtime.errors import CheckpointError, listed

_NESTS = ("state_dict", "model_state_dict", "model", "net", "weights")
# torchvision's DenseNet files of 2017 say norm.1 where the module says norm1
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. ``fresh``: head or stem tensors of another shape in the file, left as they were."""

    path: Path
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]


def load_weights(module: nn.Module, path: Path, *, name: str = "") -> LoadReport:
    """Copy the tensors of a ``.safetensors`` or PyTorch file (read without unpickling code) into ``module``.

    ``name`` of one of timm's networks says what the file is of: see `lorac_deploy.timm_nets.fitted`.

    Prefixes ``module.`` and a nesting such as ``state_dict`` are taken off. A head with another number of classes,
    and a stem of another kernel size or number of input channels, keep their present values: see the report.

    Raises CheckpointError if the file cannot be read, or listing every tensor that is missing, unexpected or of
    another shape; then nothing was changed.
    """
    given = read_weights(path)
    return _load(module, timm_nets.fitted(name, given) if timm_nets.is_timm(name) else given, path)


def _load(module: nn.Module, given: Mapping[str, Tensor], path: Path) -> LoadReport:
    """Copy all tensors, or none; ``path`` is where they are from."""
    state = module.state_dict()
    differing = [name for name in state if name in given and given[name].shape != state[name].shape]
    fresh = [n for n in differing if _may_differ(module, n, given[n])]
    problems = [f"{n} is missing" for n in state if n not in given and not n.endswith("num_batches_tracked")]
    problems += [f"{n} is unexpected" for n in given if n not in state]
    problems += [
        f"{n} has shape {tuple(given[n].shape)}, expected {tuple(state[n].shape)}" for n in differing if n not in fresh
    ]
    if problems:
        raise CheckpointError(listed(f"{path} does not hold the weights of this {type(module).__name__}:", problems))
    loaded = tuple(n for n in state if n in given and n not in fresh)
    with torch.no_grad():
        for name in loaded:
            state[name].copy_(given[name])
    return LoadReport(path, loaded, tuple(fresh))


def load_imagenet(module: nn.Module, name: str) -> LoadReport:
    """Load torchvision's best ImageNet weights of the model ``name``; see `load_weights` about head and stem.

    They come from PyTorch's download cache, or from the network. Of one of timm's networks see
    `lorac_deploy.timm_nets.pretrained`.

    Raises ValueError if there are none for ``name``; CheckpointError, with what to download and where to put it, if
    they cannot be downloaded.
    """
    if timm_nets.is_timm(name):
        return _load(module, timm_nets.pretrained(name), Path(name))
    if name not in _torchvision.models.list_models():
        raise ValueError(f"there are no ImageNet weights for {name}: train it, or give a file of weights")
    url = _torchvision.models.get_model_weights(name).DEFAULT.url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlparse(url).path).name
    if not path.exists():
        _download(url, path)
    return load_weights(module, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, nesting and ``module.`` prefixes taken off.

    Raises CheckpointError if it cannot be read, or holds no tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} not found: give the path of a .safetensors or .pth file of weights")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    while isinstance(content, Mapping) and (nests := [n for n in _NESTS if isinstance(content.get(n), Mapping)]):
        content = content[nests[0]]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict: expected tensors by name, at the top or under state_dict")
    return {_modern(str(key).removeprefix("module.")): value for key, value in content.items()}


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{path} is not a whole safetensors file ({err}); copy or save it again") from err


def _read_pytorch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise CheckpointError(
            f"{path} is not a file of plain tensors: it is damaged, or loading it would run code. Save "
            "model.state_dict() where it was made, best as .safetensors"
        ) from err
    except (OSError, RuntimeError, EOFError, ValueError) as err:
        raise CheckpointError(f"{path} is not a whole PyTorch file ({_first_line(err)}); copy it again") from err


def _download(url: str, path: Path) -> None:
    name = path.name
    digest = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    except (OSError, RuntimeError) as err:  # no network, no space, or a wrong hash
        raise CheckpointError(
            f"the ImageNet weights {name} are not on this machine and could not be downloaded ({_first_line(err)}). "
            f"Download {url} elsewhere, then put the file into {path.parent} or give its path: --weights {name}"
        ) from err


def _may_differ(module: nn.Module, name: str, given: Tensor) -> bool:
    """Head: another number of outputs. Stem: another kernel size or number of inputs."""
    network, own = describe(module), module.state_dict()[name]
    if name in (network.head_weight[0], (network.head_bias or ("",))[0]):
        return tuple(given.shape[1:]) == tuple(own.shape[1:])
    is_stem = bool(network.convs) and name == network.convs[0].weight
    return is_stem and given.ndim == own.ndim and len(given) == len(own)


def _modern(key: str) -> str:
    return _OLD_DENSENET.sub(r"\1\2", key)


def _first_line(err: Exception) -> str:
    return (str(err) or type(err).__name__).splitlines()[0]
