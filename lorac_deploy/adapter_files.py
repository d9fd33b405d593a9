"""adapter.safetensors between PyTorch and a device: same tensors, same names, coordinates converted exactly.

With g = gamma / sqrt(var + eps) per output channel, a device's folded weight is g times PyTorch's. A low-rank update
moves between the two by scaling the rows of ``lora_b``; fully trained weights and biases move too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lorac_deploy.batchnorm import bn_tensors
from lorac_deploy.folding import array, conv_bn_pairs, is_folded
from lorac_deploy.lora import (
    adapter_tensors,
    detach,
    load_adapter_tensors,
    report_of,
    require_plain,
    select_trainable,
    tensor_problems,
)
from lorac_deploy.lora_report import AttachReport
from lorac_deploy.structure import describe
from lorac_deploy.unfolding import Tensors, as_shifts, unfold
from lorac_exporters.methods import METHODS
from lorac_exporters.methods.paca import partial_metadata
from lorac_exporters.modules.additions import module_metadata
from lorac_exporters.plan import Layer, LoraConfig, SmallLayers
from lorac_runtime.adapter import FORMAT, SCHEMA, AdapterFile, load_adapter, save_adapter
from lorac_runtime.delta import Layout, RankMode
from lorac_runtime.errors import AdapterError, ConversionError, listed
from lorac_runtime.expected import channels_digest
from lorac_runtime.manifest import BnPolicy
from lorac_runtime.version import __version__

Coordinates = Literal["folded", "unfolded"]


def coordinates(module: nn.Module) -> Coordinates:
    """What the adapters of ``module`` add to: weights that a device's export will fold, or final ones.

    >>> coordinates(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), coordinates(nn.Conv2d(3, 8, 3))
    ('unfolded', 'folded')
    """
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return "folded"
    try:
        return "unfolded" if conv_bn_pairs(module) else "folded"
    except ConversionError:
        return "unfolded"  # there is BN, only its convolutions are not known


def save_module_adapter(path: Path, module: nn.Module, *, model: str) -> None:
    """Write all that the method trains in ``module``, or adapters need, as an adapter file for the network ``model``.

    Under the BN policies ``batch`` and ``recalibrate`` BN statistics, scale and shift go with it.

    Raises ValueError if ``module`` is not prepared (`lorac_deploy.lora.attach`); OutputError if it cannot be written.
    """
    report = report_of(module)
    if is_folded(module) and _trains_batchnorm(module, report):
        raise ValueError(
            "this network was folded by fold_batchnorm and trains a batch normalisation that was left: no coordinates "
            "hold for both. Train the network as it was before folding"
        )
    tensors = adapter_tensors(module) | ({} if report.bn_policy == "frozen" else bn_tensors(module))
    save_adapter(path, {n: array(t.float()) for n, t in tensors.items()}, _metadata(module, report, model))


def load_module_adapter(path: Path, module: nn.Module, *, pairs: Mapping[str, str] | None = None) -> None:
    """Set the trained tensors of a prepared ``module`` from an adapter file, converting coordinates where needed.

    ``pairs`` (BN layer -> convolution) is needed only where the forward pass cannot be traced.

    Raises ValueError if ``module`` is not prepared; AdapterError listing every mismatch of settings and tensors, or
    every layer whose folded weights cannot be unfolded; ConversionError if ``pairs`` is needed. Then nothing changed.
    """
    report, file = report_of(module), load_adapter(path)
    trained = {t.name for t in report.trainables}
    known = bn_tensors(module)
    statistics = {n: v for n, v in file.tensors.items() if n in known and n not in trained}
    tensors = {n: v for n, v in file.tensors.items() if n not in statistics}
    problems = _setting_problems(module, report, file.metadata)
    problems += _statistics_problems(report, {n: tuple(v.shape) for n, v in known.items()}, statistics)
    unfolding, found = not problems and file.metadata["coordinates"] == "folded", {}
    if unfolding:
        if _needs_unfolding(module, report, file):
            found = conv_bn_pairs(module) if pairs is None else dict(pairs)
        tensors = as_shifts(found, tensors, trained)
    problems += tensor_problems(report, _torch(tensors)) + _bias_advice(module, tensors)
    if unfolding and not problems:
        tensors, problems = unfold(module, found, tensors, statistics)
    if problems:
        raise AdapterError(listed(f"{path} does not fit this network:", problems))
    load_adapter_tensors(module, _torch(tensors))
    state = module.state_dict()
    with torch.no_grad():
        for name, value in _torch(statistics).items():
            state[name].copy_(value)


def attach_adapter(
    path: Path,
    module: nn.Module,
    *,
    pairs: Mapping[str, str] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> AttachReport:
    """Prepare a plain ``module`` as an adapter file says (method, rank, layout, BN policy, ...) and load it.

    ``input_shape``, the shape of a sample, is needed where it was trained in the blocks front, middle or rear.

    Raises ValueError if ``module`` is already prepared; otherwise as `load_module_adapter`, after which ``module`` is
    plain again.
    """
    file = load_adapter(path)
    policy = cast(BnPolicy, file.metadata.get("bn_policy", "frozen"))
    config = _config(module, file)
    require_plain(module)
    try:
        select_trainable(module, file.metadata.get("method", ""), config, bn_policy=policy, input_shape=input_shape)
    except ValueError as err:
        raise AdapterError(f"{path} cannot be attached to this network: {err}") from err
    try:
        load_module_adapter(path, module, pairs=pairs)
    except (AdapterError, ConversionError):
        detach(module)
        raise
    return report_of(module)


def settings_of(path: Path, module: nn.Module) -> tuple[str, LoraConfig]:
    """Method and settings that an adapter file for the plain ``module`` was trained with.

    Raises AdapterError if it is no adapter file, or of none of the methods.
    """
    file = load_adapter(path)
    method = file.metadata.get("method", "")
    if method not in METHODS:
        raise AdapterError(f"{path} says that its method is {method!r}, which is none of {', '.join(METHODS)}")
    return method, _config(module, file)


def _metadata(module: nn.Module, report: AttachReport, model: str) -> dict[str, str]:
    config = report.config
    return {
        "model": model,
        "method": report.method,
        "layout": config.layout,
        "r": str(config.rank),
        "rank_mode": report.rank_mode,
        "alpha": repr(config.effective_alpha),
        "freeze_a": "true" if report.fixed else "false",
        "blocks": ",".join(config.blocks),
        "bn_policy": report.bn_policy,
        "coordinates": _own_coordinates(module, report),
        "base_sha256": "",
        "producer": f"lorac-deploy {__version__}",
        **partial_metadata(report.partials, config),
        **module_metadata(report.modules, config),
    }


def _own_coordinates(module: nn.Module, report: AttachReport) -> Coordinates:
    live = report.bn_policy == "batch" or (not is_folded(module) and _trains_batchnorm(module, report))
    return "unfolded" if live else coordinates(module)


def _trains_batchnorm(module: nn.Module, report: AttachReport) -> bool:
    return any(name in report.full for name in bn_tensors(module))


def _needs_unfolding(module: nn.Module, report: AttachReport, file: AdapterFile) -> bool:
    return file.metadata["coordinates"] == "folded" and _own_coordinates(module, report) == "unfolded"


def _setting_problems(module: nn.Module, report: AttachReport, metadata: Mapping[str, str]) -> list[str]:
    wanted = {"format": FORMAT, "schema": SCHEMA, "method": report.method, "bn_policy": report.bn_policy}
    if report.partials:
        wanted["channels"] = channels_digest(report.partials)
    wanted |= module_metadata(report.modules, report.config)
    if report.adapters:
        wanted |= {"layout": report.config.layout, "r": str(report.config.rank)}
        wanted |= {} if report.config.learnable_alpha else {"alpha": repr(report.config.effective_alpha)}
    problems = [
        f"{key}: the file says {metadata.get(key)!r}, this network has {value!r}"
        for key, value in wanted.items()
        if not _equal(metadata.get(key), value)
    ]
    given = metadata.get("coordinates")
    if given not in ("folded", "unfolded"):
        problems.append(f"coordinates: expected 'folded' or 'unfolded', the file says {given!r}")
    elif given == "unfolded" and _own_coordinates(module, report) == "folded":
        problems.append("coordinates: the file adds to weights before BN folding, and this network has no BN to fold")
    return problems


def _equal(given: str | None, wanted: str) -> bool:
    try:
        return given is not None and (given == wanted or float(given) == float(wanted))
    except ValueError:
        return False


def _statistics_problems(report: AttachReport, shapes: dict[str, tuple[int, ...]], given: Tensors) -> list[str]:
    if report.bn_policy == "frozen":
        return [f"{name} is BN's, which is frozen in this network" for name in given]
    needed = [name for name in shapes if name.endswith(("running_mean", "running_var"))]
    problems = [f"{name} is missing" for name in needed if name not in given]
    for name, value in given.items():
        if value.shape != shapes[name]:
            problems.append(f"{name} has shape {value.shape}, expected {shapes[name]}")
        elif not np.isfinite(value).all() or (name.endswith("running_var") and (value < 0).any()):
            problems.append(f"{name} holds values that no statistic has")
    return problems


def _bias_advice(module: nn.Module, tensors: Tensors) -> list[str]:
    """A device trains the biases that folding gave to convolutions; PyTorch's own have none."""
    layers = dict(module.named_modules())
    names = [n for n in tensors if n.endswith(".bias") and getattr(layers.get(n[: -len(".bias")]), "bias", 0) is None]
    if not names:
        return []
    return [
        f"{names[0]} and others belong to convolutions without a bias: use fold_batchnorm(network), which gives one"
    ]


def _config(module: nn.Module, file: AdapterFile) -> LoraConfig:
    """The settings that a file was trained with; which biases and small layers train shows in its tensors."""
    m, network = file.metadata, describe(module)
    head_bias = network.head_bias[0] if network.head_bias else ""
    biases = file.tensors.keys() & {layer.bias for layer in network.body}
    chosen = network.body if "share" in m else network.body[1:]  # whose size decides whether they train in full
    linear = {name for c in network.linears for name in (c.weight, c.bias, f"{c.name}.lora_b")}
    try:
        return LoraConfig(
            rank=int(m.get("r") or 1),
            alpha=float(m.get("alpha") or 1),
            rank_mode=cast(RankMode, m.get("rank_mode") or "auto"),
            layout=cast(Layout, m.get("layout") or "spatial"),
            learnable_alpha=any(n.endswith(".lora_alpha") for n in file.tensors),
            biases="all" if biases else ("head" if head_bias in file.tensors else "none"),
            small_layers=_small_layers(chosen, file.tensors),
            freeze_a=m.get("freeze_a") == "true",
            linear=bool(network.convs and linear & file.tensors.keys()),
            blocks=tuple(m["blocks"].split(",")) if m.get("blocks") else (),
            share=float(m.get("share") or LoraConfig().share),
            reduction=int(m.get("reduction") or LoraConfig().reduction),
            seed=int(m.get("seed") or 0),
        )
    except ValueError as err:
        raise AdapterError(f"this adapter file's metadata cannot be used: {err}") from err


def _small_layers(layers: Iterable[Layer], tensors: Tensors) -> SmallLayers:
    """What became of layers whose adapter is not smaller than their weight, as far as the tensors show it."""
    chosen = list(layers)
    if any(layer.weight in tensors for layer in chosen):
        return "full"
    adapters = {c.name: [tensors.get(f"{c.name}.lora_{leaf}") for leaf in "ab"] for c in chosen}
    sizes = {name: sum(t.size for t in pair if t is not None) for name, pair in adapters.items()}
    large = any(sizes[layer.name] >= math.prod(layer.shape) for layer in chosen)
    return "adapter" if large else "frozen"


def _torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tensors.items()}
