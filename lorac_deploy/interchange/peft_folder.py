"""From an adapted network to a folder that ``peft.PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from lorac_deploy.interchange.adapted import Adapted
from lorac_deploy.interchange.change import Doubles
from lorac_deploy.interchange.factorise import Fit
from lorac_deploy.interchange.folders import CARD, Folder, card
from lorac_deploy.interchange.peft import CONFIG, PREFIX, WEIGHTS
from lorac_exporters.plan import layer_of
from lorac_runtime.errors import ConversionError

ZERO = 1e-10  # of the largest singular value: factors are float32, their product was computed in float64
ROUNDED = 1e-6  # where the change is the difference of two float32 weights
_WORDS = "Converted from a LoRA-C adapter. PEFT's factors of a convolution are others, so ranks are higher."
_FOLDED = (
    " Its weights count from the network with batch normalisations folded into convolutions, as in the artifact's "
    "base.onnx and as lorac_deploy.folding.fold_batchnorm makes it."
)


def peft_folder(adapted: Adapted, *, rank: int | None = None) -> Folder:
    """Files of PEFT's: factors of the rank that holds each change exactly, or of ``rank`` with the error of `Fit`.

    Layers whose bias or statistics change too, and grouped convolutions, go along whole. A rank for weights that train
    in full (stem, head) is always exact.

    Raises ConversionError where PEFT cannot tell one layer's name from another's, or nothing is of low rank;
    for an artifact whose method added layers.
    """
    if adapted.additions:
        raise ConversionError(
            f"the artifact's method added layers to {adapted.model}, which the network that PEFT loads does not have; "
            "export an ONNX or TFLite file"
        )
    whole = _whole_layers(adapted)
    _require_unlike_others(adapted.layers, whole)
    tensors, fits = _whole(adapted, whole), []
    for weight in adapted.changed():
        layer = layer_of(weight)
        if layer not in whole:
            most = rank if weight in adapted.deltas else None
            noise = ZERO if weight in adapted.deltas else ROUNDED
            a, b, fit = _factors(layer, adapted.change_of(weight), most, noise)
            fits.append(fit)
            for which, factor in (("A", a), ("B", b)):
                tensors[f"{PREFIX}{layer}.lora_{which}.weight"] = torch.from_numpy(factor.astype(np.float32))
    if not fits:
        raise ConversionError("a PEFT folder without low-rank factors is none; export the state dict")
    config = _config({fit.layer: int(fit.rank or 0) for fit in fits}, whole)
    files = {CONFIG: _as_json(config), WEIGHTS: save(tensors, {"format": "pt"}), CARD: _card(adapted, fits, whole)}
    return Folder(files, tuple(fits))


def _whole_layers(adapted: Adapted) -> list[str]:
    """Layers that PEFT's factors cannot hold: more changes than their weight, or they work in groups."""
    found = [layer_of(n) for n in adapted.changed() if not n.endswith(".weight") or adapted.base[n].ndim < 2]
    found += [layer_of(n) for n in adapted.changed() if layer_of(n) in adapted.grouped]
    return list(dict.fromkeys(found))


def _require_unlike_others(layers: Sequence[str], whole: list[str]) -> None:
    """PEFT takes every layer whose name ends so: raise ConversionError where that is one that stays."""
    for layer in whole:
        others = [name for name in layers if name.endswith(layer) and name not in whole]
        if others:
            raise ConversionError(
                f"PEFT cannot keep {layer} whole without {', '.join(others[:3])}, whose names end the same; export the "
                "state dict"
            )


def _whole(adapted: Adapted, layers: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of these layers, as ``modules_to_save`` holds them."""
    return {
        PREFIX + name: torch.from_numpy(np.asarray(value, order="C"))
        for name, value in adapted.fused.items()
        if layer_of(name) in layers
    }


def _factors(layer: str, change: Doubles, rank: int | None, noise: float) -> tuple[Doubles, Doubles, Fit]:
    """PEFT's A (r, c_in, k_h, k_w) and B (c_out, r, 1, 1), or matrices for a fully connected layer."""
    u, s, vt = np.linalg.svd(change.reshape(change.shape[0], -1), full_matrices=False)
    exact = max(1, int(np.count_nonzero(s > noise * s.max(initial=0.0))))
    kept = exact if rank is None else min(rank, exact)
    roots = np.sqrt(s[:kept])
    a = (roots[:, np.newaxis] * vt[:kept]).reshape(kept, *change.shape[1:])
    b = (u[:, :kept] * roots).reshape(change.shape[0], kept, *[1] * (change.ndim - 2))
    size = float(np.linalg.norm(s))
    return a, b, Fit(layer, kept, float(np.linalg.norm(s[kept:])) / size if size else 0.0)


def _config(ranks: Mapping[str, int], whole: list[str]) -> dict[str, Any]:
    """alpha = r everywhere, so that the change is B A."""
    most = max(ranks.values())
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


def _card(adapted: Adapted, fits: Sequence[Fit], whole: list[str]) -> bytes:
    rows = [("layer", "rank", "error of the change")]
    rows += [(fit.layer, str(fit.rank), f"{fit.error:.1e}") for fit in fits]
    rows += [(layer, "whole", "0") for layer in whole]
    return card(adapted.model, "peft", _WORDS + (_FOLDED if adapted.folded else ""), rows=rows)
