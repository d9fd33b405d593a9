"""LoRA of PEFT (Hugging Face): a folder with adapter_config.json and adapter_model.safetensors.

A convolution's adapter is a k x k convolution down to r channels and a 1 x 1 one up. Element [o, i, u, v] of the change
is ``scale * sum_r B[o, r] A[r, i, u, v]``, scale = alpha / r. As a matrix of rows (o, u) and columns (i, v) it has rank
r * k_h at most, so LoRA-C of the same r in rank mode ``rk`` holds it exactly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorac_deploy.interchange.change import Change, Doubles, Tensors
from lorac_deploy.interchange.tensors import read_tensors
from lorac_runtime.errors import AdapterError, listed

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAX_BYTES = 16 << 20  # of the config
# Settings under which the change is not scale * B A.
_OTHERS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
)
# Starts that take a part of the base's weights out, to which the factors then belong.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight")


def is_peft(path: Path) -> bool:
    """Whether ``path`` looks like a folder of PEFT's."""
    return path.is_dir() and ((path / CONFIG).exists() or (path / WEIGHTS).exists() or (path / PICKLED).exists())


def read_peft(folder: Path, base: Tensors) -> Change:
    """What a PEFT folder changes. Raises AdapterError naming what is missing, damaged, or no plain LoRA."""
    config = _config(folder)
    tensors = {name.removeprefix(PREFIX): value for name, value in _weights(folder).items()}
    factors: dict[str, dict[str, Doubles]] = {}
    values: dict[str, Doubles] = {}
    for name, value in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            values[_own_name(name, base)] = np.asarray(value, np.float64)
        else:
            factors.setdefault(match["layer"], {})[match["which"]] = np.asarray(value, np.float64)
    deltas, problems = _deltas(factors, config, base)
    if problems:
        raise AdapterError(listed(f"{folder} cannot be imported:", problems))
    ranks = [pair["A"].shape[0] for pair in factors.values()]
    return Change(deltas, values, rank=max(ranks, default=None))


def _deltas(
    factors: Mapping[str, dict[str, Doubles]], config: Mapping[str, Any], base: Tensors
) -> tuple[dict[str, Doubles], list[str]]:
    deltas, problems = {}, []
    for layer, pair in factors.items():
        weight = f"{layer}.weight"
        missing = [f"{layer}.lora_{which}.weight is missing" for which in "AB" if which not in pair]
        problems += missing
        if not missing:
            try:
                change = product(pair["A"], pair["B"]) * scale(config, layer, pair["A"].shape[0])
                deltas[weight] = change.T if config.get("fan_in_fan_out") else change
            except ValueError as err:
                problems.append(f"{layer}: {err}")
            if weight in base and base[weight].shape[1:2] != pair["A"].shape[1:2] and base[weight].ndim > 2:
                problems.append(f"{layer} is a convolution in groups, for which PEFT's factors are no low-rank change")
    return deltas, problems


def product(a: Doubles, b: Doubles) -> Doubles:
    """B A as a weight: of ``a`` (r, c_in, ...) and ``b`` (c_out, r, 1, ...).

    >>> product(np.ones((2, 3, 5, 5)), np.ones((4, 2, 1, 1))).shape
    (4, 3, 5, 5)

    Raises ValueError for factors that do not belong together.
    """
    if a.ndim != b.ndim or a.shape[0] != b.shape[1] or any(n != 1 for n in b.shape[2:]):
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not belong together")
    return np.asarray(np.tensordot(b.reshape(b.shape[:2]), a, 1))


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT multiplies B A with: alpha / r, or alpha / sqrt(r) with ``use_rslora``; patterns choose by layer.

    >>> scale({"lora_alpha": 8, "alpha_pattern": {"conv1": 2}}, "layer1.conv1", 4)
    0.5
    """
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    chosen = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)]
    alpha = float(chosen[0] if chosen else config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise AdapterError(f"{path} not found: the folder is no PEFT adapter, or was not written to its end") from err
    except (OSError, ValueError, RecursionError) as err:
        raise AdapterError(f"{path} cannot be read ({err}); copy or save it again") from err
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} describes {kind!r}; only LORA is a low-rank change of weights that can be imported")
    other = [name for name in _OTHERS if found.get(name)]
    if other:
        raise AdapterError(f"{path} sets {', '.join(other)}: the change is not scale * B A; merge it in PEFT first")
    start = str(found.get("init_lora_weights")).lower()
    if start.startswith(_MOVED):
        raise AdapterError(
            f"{path} began with {start!r}, which moved the base's weights: save it in PEFT with "
            "path_initial_model_for_weight_conversion, then it belongs to the base as it was"
        )
    return dict(found)


def _weights(folder: Path) -> Tensors:
    if not (folder / WEIGHTS).exists() and not (folder / PICKLED).exists():
        parts = sorted(path.name for path in folder.glob("*.incomplete"))
        why = f", but {', '.join(parts)}: fetch it again" if parts else "; the folder was not written to its end"
        raise AdapterError(f"{folder} holds no {WEIGHTS}{why}")
    return read_tensors(folder / (WEIGHTS if (folder / WEIGHTS).exists() else PICKLED))


def _own_name(name: str, base: Tensors) -> str:
    """The network's name of a tensor that was saved whole: a head (``modules_to_save``) or a bias."""
    for inner in ("base_layer.", "modules_to_save.default.", "original_module."):
        if name not in base and inner in name:
            name = name.replace(inner, "")
    return name
