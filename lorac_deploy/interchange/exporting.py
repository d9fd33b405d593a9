"""From adapter.safetensors to what other libraries load: a folder of PEFT's, or a plain state dict."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.interchange.change import Doubles
from lorac_deploy.interchange.factorise import Fit, tensors_of
from lorac_deploy.interchange.peft import CONFIG, PREFIX, WEIGHTS
from lorac_deploy.lora import adapter_tensors, fuse, report_of
from lorac_deploy.lora_report import AttachReport
from lorac_exporters.plan import layer_of
from lorac_runtime.delta import delta
from lorac_runtime.errors import ConversionError
from lorac_runtime.files import atomic_write, output_folder

CARD = "README.md"
ZERO = 1e-10  # of the largest singular value: factors are float32, their product was computed in float64


@dataclasses.dataclass(frozen=True)
class Shared:
    """What was written: files by name with their sha256, and how well each layer's change is held."""

    path: Path
    files: dict[str, str]
    fits: tuple[Fit, ...] = ()


def export_state_dict(base: Path, adapter: Path, out: Path) -> Shared:
    """Write the network of the checkpoint folder ``base`` with an adapter fused into it as a safetensors file.

    Same names and shapes as ``base``/model.safetensors. Raises CheckpointError, AdapterError, OutputError.
    """
    module = load_checkpoint(base).module
    attach_adapter(adapter, module)
    content = save({name: value.contiguous() for name, value in fuse(module).state_dict().items()})
    atomic_write(out, content)
    return Shared(out, {out.name: hashlib.sha256(content).hexdigest()})


def export_peft(base: Path, adapter: Path, out: Path, *, rank: int | None = None) -> Shared:
    """Write an adapter as a folder that ``peft.PeftModel.from_pretrained`` loads onto the network of ``base``.

    Adapted layers become low-rank factors of the rank that holds their change exactly, or of ``rank``, with the error
    that `Shared.fits` states; what trains in full (stem, head) and grouped convolutions go along whole.

    Raises ConversionError for statistics of batch normalisations that changed, which PEFT does not carry;
    CheckpointError, AdapterError, OutputError.
    """
    checkpoint = load_checkpoint(base)
    prepared = copy.deepcopy(checkpoint.module)
    attach_adapter(adapter, prepared)
    report = report_of(prepared)
    if report.bn_policy != "frozen":
        raise ConversionError(
            f"{adapter} comes with statistics of batch normalisations (policy {report.bn_policy}), which a PEFT folder "
            "does not carry; export the state dict"
        )
    folder = _folder(checkpoint.module, prepared, rank)
    files = {CONFIG: _as_json(folder.config), WEIGHTS: save(folder.tensors, {"format": "pt"})}
    files[CARD] = _card(checkpoint.spec.name, folder).encode()
    output_folder(out)
    for name, content in files.items():
        atomic_write(out / name, content)
    return Shared(out, {n: hashlib.sha256(content).hexdigest() for n, content in files.items()}, folder.fits)


@dataclasses.dataclass(frozen=True)
class _Folder:
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    fits: tuple[Fit, ...]


def _folder(base: nn.Module, prepared: nn.Module, rank: int | None) -> _Folder:
    fused, deltas = fuse(prepared), _deltas(base, prepared)
    whole = [layer for layer in _changed_layers(prepared) if _is_whole(base, layer, report_of(prepared))]
    _require_unlike_others(base, whole)
    tensors, fits, ranks = _whole(fused, whole), [], {}
    for layer, change in deltas.items():
        if layer not in whole:
            a, b, fit = _factors(layer, change, rank if f"{layer}.weight" not in report_of(prepared).full else None)
            ranks[layer] = a.shape[0]
            fits.append(fit)
            for which, factor in (("A", a), ("B", b)):
                tensors[f"{PREFIX}{layer}.lora_{which}.weight"] = torch.from_numpy(factor.astype(np.float32))
    if not ranks:
        raise ConversionError("a PEFT folder without low-rank factors is none; export the state dict")
    return _Folder(_config(ranks, whole), tensors, tuple(fits))


def _deltas(base: nn.Module, prepared: nn.Module) -> dict[str, Doubles]:
    """The change of each weight, by layer; of adapters from their factors, so that nothing is rounded."""
    report, before = report_of(prepared), tensors_of(base)
    tensors = {name: value.double().numpy() for name, value in adapter_tensors(prepared).items()}
    found: dict[str, Doubles] = {}
    for adapter in report.adapters:
        alpha = adapter.alpha if adapter.lora_alpha is None else float(tensors[adapter.lora_alpha].item())
        a, b = tensors[adapter.lora_a], tensors[adapter.lora_b]
        shape, scale = adapter.weight_shape, alpha / adapter.r
        found[adapter.layer] = delta(a, b, shape, scale, adapter.arrangement, pairs=adapter.pairs)
    for name in report.full:
        if name.endswith(".weight"):
            found[layer_of(name)] = tensors[name] - before[name]
    return found


def _changed_layers(prepared: nn.Module) -> list[str]:
    report = report_of(prepared)
    return list(dict.fromkeys([*(a.layer for a in report.adapters), *map(layer_of, report.full)]))


def _is_whole(base: nn.Module, layer: str, report: AttachReport) -> bool:
    """Whether PEFT's factors cannot hold it: its bias changes too, or it works in groups."""
    grouped = int(getattr(base.get_submodule(layer), "groups", 1)) > 1
    return grouped or any(name in report.full for name in (f"{layer}.bias",))


def _require_unlike_others(base: nn.Module, whole: list[str]) -> None:
    """PEFT takes every layer whose name ends so: raise ConversionError where that is another one."""
    for layer in whole:
        others = [name for name, _ in base.named_modules() if name.endswith(layer) and name != layer]
        if others:
            raise ConversionError(
                f"PEFT cannot keep {layer} whole without {', '.join(others[:3])}, whose names end the same; export the "
                "state dict"
            )


def _whole(fused: nn.Module, layers: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of these layers, as ``modules_to_save`` holds them."""
    return {
        f"{PREFIX}{layer}.{name}": value.contiguous()
        for layer in layers
        for name, value in fused.get_submodule(layer).state_dict().items()
    }


def _factors(layer: str, change: Doubles, rank: int | None) -> tuple[Doubles, Doubles, Fit]:
    """PEFT's A (r, c_in, k_h, k_w) and B (c_out, r, 1, 1), or matrices for a fully connected layer."""
    flat = change.reshape(change.shape[0], -1)
    u, s, vt = np.linalg.svd(flat, full_matrices=False)
    noise = float(s[0]) * ZERO if s.size else 0.0
    exact = max(1, int(np.count_nonzero(s > noise)))
    kept = exact if rank is None else min(rank, exact)
    roots = np.sqrt(s[:kept])
    a = (roots[:, np.newaxis] * vt[:kept]).reshape(kept, *change.shape[1:])
    b = (u[:, :kept] * roots).reshape(change.shape[0], kept, *[1] * (change.ndim - 2))
    size = float(np.linalg.norm(s))
    return a, b, Fit(layer, kept, float(np.linalg.norm(s[kept:])) / size if size else 0.0)


def _config(ranks: Mapping[str, int], whole: list[str]) -> dict[str, Any]:
    """alpha = r everywhere, so that the change is B A."""
    most = max(ranks.values(), default=1)
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": dict(others),
        "alpha_pattern": dict(others),
        "target_modules": "|".join(map(re.escape, sorted(ranks))),  # as a list, PEFT would take names that end so too
        "modules_to_save": sorted(whole) or None,
    }


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _card(model: str, folder: _Folder) -> str:
    """A model card in the convention of Hugging Face: metadata in front, words behind."""
    rows = "\n".join(f"| {fit.layer} | {fit.rank} | {fit.error:.1e} |" for fit in folder.fits)
    return (
        f"---\nlibrary_name: peft\ntags:\n- lora\n- {model}\n---\n\n# Adapter for {model}\n\n"
        "Converted from a LoRA-C adapter file. PEFT's factors of a convolution are others, so ranks are higher.\n\n"
        f"| layer | rank | error of the change |\n|---|---|---|\n{rows}\n"
    )
