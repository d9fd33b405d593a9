"""A change as an adapter of this project: low-rank factors by singular values, or whole weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import nn

from lorac_deploy.interchange.change import Change, Doubles, Tensors
from lorac_deploy.lora import load_adapter_tensors, select_trainable
from lorac_deploy.lora_report import AttachReport
from lorac_deploy.structure import describe
from lorac_exporters.plan import LoraConfig, layer_of
from lorac_runtime.delta import conv_dims
from lorac_runtime.errors import AdapterError, listed
from lorac_runtime.manifest import Adapter

Kind = Literal["lora-c", "full"]
KINDS: tuple[Kind, ...] = ("lora-c", "full")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well the adapter of a layer holds its change: ``error`` is ||change - adapter|| / ||change||.

    ``rank`` is the inner dimension of the factors, None where the whole weight is kept.
    """

    layer: str
    rank: int | None
    error: float


def fitted(module: nn.Module, change: Change, *, kind: Kind = "lora-c", rank: int | None = None) -> tuple[Fit, ...]:
    """Prepare ``module``, in place, so that it computes what ``change`` makes of it; how well each layer does.

    ``lora-c``: by factors of the best approximation of ``rank`` (Eckart and Young 1936), in rank mode ``rk``; None
    takes the rank that holds the change exactly, if its format told it. ``full``: by whole weights, exactly. Only the
    layers that change are prepared. Afterwards `lorac_deploy.adapter_files.save_module_adapter` writes it.

    Raises AdapterError listing what neither can hold, such as other statistics of a batch normalisation.
    """
    base = tensors_of(module)
    config = _config(module, change, base, rank)
    report = select_trainable(module, kind, config, bn_policy="frozen")
    problems = _not_held(change, report)
    if problems:
        raise AdapterError(listed(f"an adapter of the method {kind} cannot hold this change:", problems))
    found, fits = _tensors(report, change, base)
    load_adapter_tensors(module, {name: torch.from_numpy(value.astype(np.float32)) for name, value in found.items()})
    return fits


def tensors_of(module: nn.Module) -> Tensors:
    """Copies of all tensors of a network, by name."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def _config(module: nn.Module, change: Change, base: Tensors, rank: int | None) -> LoraConfig:
    layers = tuple(dict.fromkeys(layer_of(name) for name in (*change.deltas, *change.values)))
    network = describe(module, bn_policy="frozen")
    whole = {network.head_weight[0], *(layer.weight for layer in network.body[:1])}  # these train in full
    factored = {name: delta for name, delta in change.deltas.items() if name not in whole}
    r = rank or change.rank or _enough(factored, base)
    flat = any(base[name].ndim == 2 for name in change.deltas)
    return LoraConfig(
        rank=r,
        rank_mode="rk",
        layout=change.layout,
        biases="all" if any(name.endswith(".bias") for name in change.values) else "none",
        small_layers="full",
        linear=flat and any(value.ndim > 2 for value in base.values()),
        blocks=layers,
    )


def _enough(deltas: Mapping[str, Doubles], base: Tensors) -> int:
    """The r with which every delta is held but for what float32 rounds off the weight itself."""
    ranks = [1]
    for name, delta in deltas.items():
        values = np.linalg.svd(matrix(delta, "spatial"), compute_uv=False)
        rounding = np.finfo(np.float32).eps * float(np.linalg.norm(base[name]))
        ranks.append(-(-int(np.count_nonzero(values > rounding)) // conv_dims(delta.shape)[3]))
    return max(ranks)


def matrix(delta: Doubles, layout: str) -> Doubles:
    """`lorac_runtime.delta.arrange` undone: (c_out * k_h, c_in/groups * k_w).

    >>> from lorac_runtime.delta import arrange
    >>> m = np.arange(8.0).reshape(4, 2)
    >>> bool((matrix(arrange(m, (2, 1, 2, 2), "spatial"), "spatial") == m).all())
    True
    """
    c_out, c_in, k_h, k_w = conv_dims(delta.shape)
    if layout == "spatial":
        delta = delta.reshape(c_out, c_in, k_h, k_w).swapaxes(1, 2)
    return np.asarray(delta.reshape(c_out * k_h, c_in * k_w))


def _not_held(change: Change, report: AttachReport) -> list[str]:
    held = {a.weight for a in report.adapters} | set(report.full)
    adapted = {a.weight for a in report.adapters} - set(report.full)
    missing = [f"{name}: nothing of the kind trains" for name in (*change.deltas, *change.values) if name not in held]
    return missing + [f"{name}: it is replaced, not added to" for name in change.values if name in adapted]


def _tensors(report: AttachReport, change: Change, base: Tensors) -> tuple[dict[str, Doubles], tuple[Fit, ...]]:
    after = change.applied(base)
    found = {name: after.get(name, np.asarray(base[name], np.float64)) for name in report.full}
    fits = [Fit(layer_of(name), None, 0.0) for name in found if name in change.deltas]
    for adapter in report.adapters:
        delta = change.deltas.get(adapter.weight)
        a, b, error = _factors(adapter, np.zeros(adapter.weight_shape) if delta is None else delta)
        found |= {adapter.lora_a: a, adapter.lora_b: b}
        fits.append(Fit(adapter.layer, adapter.rank, error))
    return found, tuple(fits)


def _factors(adapter: Adapter, delta: Doubles) -> tuple[Doubles, Doubles, float]:
    """(lora_a, lora_b, relative error): the singular values are shared out evenly."""
    target = matrix(delta, adapter.layout) / (adapter.alpha / adapter.r)
    u, s, vt = np.linalg.svd(target, full_matrices=False)
    roots = np.sqrt(s[: adapter.rank])
    a, b = roots[:, np.newaxis] * vt[: adapter.rank], u[:, : adapter.rank] * roots
    size = float(np.linalg.norm(target))
    return a, b, float(np.linalg.norm(s[adapter.rank :])) / size if size else 0.0
