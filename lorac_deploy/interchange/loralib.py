"""LoRA of loralib and of the LoRA-C authors' code: a checkpoint with LAYER.lora_A and LAYER.lora_B.

A convolution's factors are A (r * k, c_in * k) and B (c_out / groups * k, r * k); its change is
``alpha / r * reshape(B A)`` in the shape of the weight (LoRA-C, arXiv 2410.16954), which is the layout ``paper``.
The file says neither alpha nor whether its weights hold the change already: both codes merge it when they switch to
evaluation, and a checkpoint saved then, loaded once more, has it twice. With the base at hand it can be told.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorac_deploy.interchange.change import Change, Doubles, Tensors
from lorac_deploy.interchange.tensors import read_tensors
from lorac_runtime.delta import conv_dims
from lorac_runtime.errors import AdapterError, listed

_A, _B = ".lora_A", ".lora_B"
CLOSE = 1e-3  # of the change's norm: how near a weight has to be to the base's, or to the base's and the change
_IGNORED = ("num_batches_tracked",)


def is_loralib(path: Path) -> bool:
    """Whether ``path`` is a file whose tensors are called as loralib calls them."""
    return path.is_file() and any(name.endswith(_A) for name in read_tensors(path))


def read_loralib(path: Path, base: Tensors, *, alpha: float | None) -> Change:
    """What a checkpoint changes. ``alpha`` is the one that it was trained with, which it does not say.

    Raises AdapterError where ``alpha`` is missing, a layer is, or the weights are neither the base's nor merged ones.
    """
    if alpha is None:
        raise AdapterError(f"{path} does not say which alpha it was trained with: give it (--alpha)")
    tensors = {_own_name(name): value for name, value in read_tensors(path).items()}
    layers = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    deltas: dict[str, Doubles] = {}
    problems, ranks = [], [1]
    for layer in layers:
        try:
            deltas[f"{layer}.weight"], rank = _delta(layer, tensors, base, alpha)
            ranks.append(rank)
        except ValueError as err:
            problems.append(f"{layer}: {err}")
    if problems:
        raise AdapterError(listed(f"{path} cannot be imported:", problems))
    merged, strange = _merged(deltas, tensors, base, alpha)
    if strange:
        raise AdapterError(
            listed(f"{path} holds weights that are neither the base's nor the base's with the change in them:", strange)
        )
    return Change(deltas, _values(tensors, deltas, base), max(ranks), "paper", _notes(deltas, merged, tensors))


def _own_name(name: str) -> str:
    """loralib wraps a convolution, whose weight is then LAYER.conv.weight."""
    return name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias") if ".conv." in name else name


def _delta(layer: str, tensors: Tensors, base: Tensors, alpha: float) -> tuple[Doubles, int]:
    """(change of the weight, r). Raises ValueError for factors that do not fit it."""
    weight = f"{layer}.weight"
    if weight not in base:
        raise ValueError(f"the network has no {weight}")
    if layer + _B not in tensors:
        raise ValueError("lora_B is missing")
    a, b = (np.asarray(tensors[layer + end], np.float64) for end in (_A, _B))
    shape = base[weight].shape
    kernel = conv_dims(shape)[3]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % kernel:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not belong together")
    if b.shape[0] * a.shape[1] != base[weight].size:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not make a weight {shape}")
    rank = a.shape[0] // kernel
    return (b @ a).reshape(shape) * (alpha / rank), rank


def _merged(deltas: dict[str, Doubles], tensors: Tensors, base: Tensors, alpha: float) -> tuple[list[str], list[str]]:
    """(weights that hold the change already, what is wrong with those that are neither so nor the base's)."""
    merged, strange = [], []
    for name, delta in deltas.items():
        size = float(np.linalg.norm(delta))
        if name not in tensors or size == 0:
            continue
        moved = np.asarray(tensors[name], np.float64) - np.asarray(base[name], np.float64)
        apart, beyond = float(np.linalg.norm(moved)) / size, float(np.linalg.norm(moved - delta)) / size
        if beyond < CLOSE:
            merged.append(name)
        elif apart >= CLOSE:
            share = float(np.vdot(moved, delta)) / size**2
            fits = float(np.linalg.norm(moved - share * delta)) / size < CLOSE
            advice = f"; with --alpha {alpha * share:.4g} it would be the merged one" if fits else ""
            strange.append(
                f"{name}: {apart:.3g} times the change from the base, {beyond:.3g} from the merged one{advice}"
            )
    return merged, strange


def _values(tensors: Tensors, deltas: dict[str, Doubles], base: Tensors) -> dict[str, Doubles]:
    """Other tensors that differ from the base's, such as a trained head."""
    found = {}
    for name, value in tensors.items():
        adapter = name.endswith((_A, _B)) or name in deltas or name.endswith(_IGNORED)
        if not adapter and not (name in base and np.array_equal(value, base[name])):
            found[name] = np.asarray(value, np.float64)
    return found


def _notes(deltas: dict[str, Doubles], merged: list[str], tensors: Tensors) -> tuple[str, ...]:
    held = [name for name in deltas if name in tensors]
    if not held:
        return ("the file holds no weights but the factors",)
    if not merged:
        return (f"the {len(held)} weights in the file are the base's: the change was not merged",)
    apart = f", {len(held) - len(merged)} are not" if len(merged) < len(held) else ""
    return (f"the change is merged into {len(merged)} of the file's weights already{apart}; it is counted once",)
