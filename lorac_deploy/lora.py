"""LoRA-C on a network: `attach` and `detach` undo each other, `fuse` gives a new plain network.

>>> import torch
>>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
...                     nn.Linear(16, 10))
>>> report = attach(net, LoraConfig(rank=2))
>>> print(report)
lora-c: 1,168 trained of 2,938 parameters (39.75 %); 1 adapted layers, 2 tensors in full, 0 layers frozen
>>> plain = fuse(net)                                  # a new network: same keys and shapes as before `attach`
>>> sorted(detach(net))                                # `net` is what it was, to the bit
['0.weight', '1.lora_a', '1.lora_b', '4.weight']
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorac_deploy.batchnorm import apply_policy, restore_policy
from lorac_deploy.folding import norm_layers
from lorac_deploy.lora_layers import LayerAdapter, LoraConv1d, LoraConv2d, LoraLayer, adapt, merge, release
from lorac_deploy.lora_report import AttachReport, attach_report
from lorac_deploy.partial_layers import PartialLayer, merge_channels, release_channels, take_channels
from lorac_deploy.site_modules import add_modules, remove_modules
from lorac_deploy.structure import describe
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.stages import needs_sizes
from lorac_runtime.errors import AdapterError, listed
from lorac_runtime.manifest import BnPolicy

__all__ = [
    "METHODS",
    "AttachReport",
    "LoraConfig",
    "LoraConv1d",
    "LoraConv2d",
    "adapter_tensors",
    "attach",
    "detach",
    "fuse",
    "load_adapter_tensors",
    "report_of",
    "require_plain",
    "select_trainable",
    "tensor_problems",
]

_STATE = "_lorac_attached"  # attribute of the root module; a plain object, so state_dict() does not see it


@dataclass(frozen=True)
class _Attached:
    """What `detach` needs to undo `select_trainable`."""

    report: AttachReport
    originals: dict[str, Tensor]  # the network's own tensors that training may change
    learned: dict[str, bool]  # requires_grad of every parameter as it was


def attach(
    module: nn.Module,
    config: LoraConfig,
    *,
    bn_policy: BnPolicy = "frozen",
    stem: str | None = None,
    head: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> AttachReport:
    """Put LoRA-C on ``module``, in place: adapters on every convolution but the first, stem and head in full.

    In a network without convolutions the fully connected layers take their part.
    Everything else stops training (``requires_grad`` False). With ``lora_b`` zero the outputs do not change.
    ``stem`` and ``head`` name those layers where the first convolution defined and the last nn.Linear (or a last
    1x1 convolution) are not they. BN follows ``bn_policy`` (see `lorac_deploy.batchnorm.apply_policy`). Where
    ``config.blocks`` holds front, middle or rear, ``input_shape`` must say what a sample is, such as (channels, height,
    width). Base keys of the state dict stay; `detach` undoes all of it.

    Raises ValueError if the network already has adapters, no head can be found, or its BN cannot be frozen.
    """
    return select_trainable(
        module, "lora-c", config, bn_policy=bn_policy, stem=stem, head=head, input_shape=input_shape
    )


def select_trainable(
    module: nn.Module,
    method: str,
    config: LoraConfig,
    *,
    bn_policy: BnPolicy | None = None,
    stem: str | None = None,
    head: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> AttachReport:
    """Prepare ``module``, in place, for a method of `METHODS`, such as ``lora-c`` or ``full``.

    BN follows ``bn_policy`` (see `lorac_deploy.batchnorm.apply_policy`), None is the method's own. Its scale and shift
    train under ``batch`` if the method is ``full``, and with the methods made for them; elsewhere BN is a constant.
    ``input_shape``, the shape of a sample, is needed where ``config.blocks`` holds front, middle or rear. `detach`
    undoes all of it.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    >>> select_trainable(net, "head", LoraConfig()).full
    ('2.weight', '2.bias')

    Raises ValueError for an unknown method, a BN policy that it does not go with, a network that is already prepared
    or has no head, or blocks in ``config.blocks`` that it does not have.
    """
    require_plain(module)
    _require_known("method", method, tuple(METHODS))
    policy = METHODS[method].policy(bn_policy)
    shape = input_shape if needs_sizes(config.blocks) else None
    network = describe(module, bn_policy=policy, stem=stem, head=head, input_shape=shape)
    if METHODS[method].batchnorm != "constant":
        network = dataclasses.replace(network, norms=norm_layers(module))
    report = attach_report(network, METHODS[method](network, config), config=config, bn_policy=policy)
    apply_policy(module, policy)
    _remember(module, report)
    _add_adapters(module, report)
    trained = {t.name for t in report.trainables}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    return report


def report_of(module: nn.Module) -> AttachReport:
    """The report of the `attach` or `select_trainable` that prepared ``module``.

    Raises ValueError if neither was called on this very module.
    """
    return _state(module).report


def detach(module: nn.Module) -> dict[str, Tensor]:
    """Undo `attach` or `select_trainable` in place and return the trained tensors (see `adapter_tensors`).

    The network gets back its classes (BN layers are ordinary ones again), its ``requires_grad`` flags and, to the
    bit, its state dict: tensors trained in full and BN statistics too.

    Raises ValueError if ``module`` is not prepared.
    """
    tensors, originals = adapter_tensors(module), _state(module).originals
    _end(module, release, release_channels)
    state = module.state_dict()
    with torch.no_grad():
        for name, value in originals.items():
            state[name].copy_(value)
    return tensors


def fuse(module: nn.Module) -> nn.Module:
    """A new plain network, in evaluation mode, whose layers hold W + delta; ``module`` stays as it is.

    Same classes, keys and shapes as before `attach`, same outputs as ``module.eval()``. There is no way back.

    Raises ValueError if ``module`` is not prepared, or by a method that adds layers of its own (skip, attention).
    """
    _require_fusable(_state(module).report)
    fused = copy.deepcopy(module)
    _end(fused, merge, merge_channels)
    return fused.eval()


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor that the method trains or an adapter needs, by state-dict key.

    Under ``freeze_a`` these include ``lora_a``, which does not train. `load_adapter_tensors` puts them back.

    Raises ValueError if ``module`` is not prepared.
    """
    return {name: module.get_parameter(name).detach().clone() for name in _shapes(report_of(module))}


def load_adapter_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set every tensor that the method trains or an adapter needs, as `adapter_tensors` returned them.

    Raises AdapterError listing every missing, unexpected, ill-shaped or non-finite tensor; then nothing changed.
    Raises ValueError if ``module`` is not prepared.
    """
    problems = tensor_problems(report_of(module), tensors)
    if problems:
        raise AdapterError(listed("these tensors are not those of this network's adapter:", problems))
    with torch.no_grad():
        for name, value in tensors.items():
            module.get_parameter(name).copy_(value)


def tensor_problems(report: AttachReport, tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``tensors`` from being those of a network's adapter; empty if nothing does.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> tensor_problems(attach(net, LoraConfig()), {"2.weight": torch.zeros(3, 8)})
    ['0.weight is missing', '2.weight has shape (3, 8), expected (2, 8)']
    """
    expected = _shapes(report)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not trained in this network")
        elif tuple(value.shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {expected[name]}")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds NaN or infinite values")
    return problems


def _shapes(report: AttachReport) -> dict[str, tuple[int, ...]]:
    """Everything that an adapter file of this network holds, but BN statistics."""
    return {t.name: t.shape for t in report.trainables} | report.fixed


def _remember(module: nn.Module, report: AttachReport) -> None:
    """Keep what `detach` needs."""
    state = module.state_dict()
    kept = {*report.full, *(name for name, _ in module.named_buffers())} & set(state)
    originals = {name: state[name].clone() for name in state if name in kept}
    learned = {name: p.requires_grad for name, p in module.named_parameters()}
    vars(module)[_STATE] = _Attached(report, originals, learned)


def require_plain(module: nn.Module) -> None:
    """Raise ValueError if ``module`` or a part of it is prepared for training already."""
    for name, part in module.named_modules():
        if _STATE in vars(part) or isinstance(part, LoraLayer | PartialLayer):
            where = f"its part {name!r}" if name else "it"
            raise ValueError(
                f"this network is already prepared for training ({where} holds an adapter or a method's state): "
                "call detach(module) first, or fuse(module) and go on with the result"
            )


def _state(module: nn.Module) -> _Attached:
    state = vars(module).get(_STATE)
    if state is None:
        raise ValueError(
            "this network is not prepared for training: call attach(module, LoraConfig(...)) or "
            "select_trainable(...) on this very module first"
        )
    return cast(_Attached, state)


def _require_fusable(report: AttachReport) -> None:
    if report.modules:
        raise ValueError(
            f"method {report.method} adds layers of its own at {len(report.modules)} places, which no weight of the "
            "network can hold, so there is no plain network to fuse into: keep this module and save_module_adapter, "
            "or export an artifact (export-training-artifact --adapter), whose files hold these layers"
        )


def _require_known(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{what} {given!r} is not one of {', '.join(known)}")


def _add_adapters(module: nn.Module, report: AttachReport) -> None:
    generator = torch.Generator().manual_seed(report.config.seed)
    for adapter in report.adapters:
        conv = cast(Any, module.get_submodule(adapter.layer))
        settings = LayerAdapter(
            r=adapter.r,
            rank=adapter.rank,
            alpha=adapter.alpha,
            layout=adapter.arrangement,
            learnable_alpha=adapter.lora_alpha is not None,
            pairs=adapter.pairs,
        )
        adapt(conv, settings, generator=generator)
    for partial in report.partials:
        take_channels(module.get_submodule(partial.layer), partial)
    add_modules(module, report.modules, head=report.head, generator=generator)


def _end(
    module: nn.Module,
    finish: Callable[[LoraLayer], nn.Module],
    finish_channels: Callable[[PartialLayer], nn.Module],
) -> None:
    """Give every layer its plain class back, and all parameters their old ``requires_grad``."""
    state = _state(module)
    restore_policy(module)
    remove_modules(module, state.report.modules)
    for adapter in state.report.adapters:
        finish(cast(LoraLayer, module.get_submodule(adapter.layer)))
    for partial in state.report.partials:
        finish_channels(cast(PartialLayer, module.get_submodule(partial.layer)))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(state.learned[name])
    del vars(module)[_STATE]
