"""adapter.safetensors: every trained tensor under its name, and what it was trained for as metadata.

The bytes are the same for the same content: the safetensors library writes metadata in a random order, so the
header is sorted here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorac_runtime.delta import conv_dims
from lorac_runtime.errors import AdapterError, listed
from lorac_runtime.expected import adapter_problems, missing_batchnorm
from lorac_runtime.files import atomic_write, size_of
from lorac_runtime.folding import fold_bias, fold_factor, fold_rows, scale_rows
from lorac_runtime.manifest import Adapter, BatchNorm, Manifest, Partial

FORMAT = "lorac-adapter"
SCHEMA = "1"
MOST_HEADER = 16 << 20  # names, shapes and metadata

Tensors = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter file in memory. ``metadata`` is all text: format, schema, model, method, layout, r, rank_mode,
    alpha, bn_policy, coordinates ("folded" | "unfolded"), base_sha256 (empty when made in PyTorch), producer.
    """

    tensors: Tensors
    metadata: dict[str, str]


def save_adapter(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write tensors and metadata (``format`` and ``schema`` are added) atomically; equal content, equal bytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(Path(folder) / "a.safetensors", {"x": np.ones(2, np.float32)}, {"model": "net"})
    ...     load_adapter(Path(folder) / "a.safetensors").metadata["model"]
    'net'

    Raises OutputError if the file cannot be written.
    """
    # The library writes the memory of an array as it lies, so a transposed view would come back as another tensor.
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    data = save(whole, {**metadata, "format": FORMAT, "schema": SCHEMA})
    atomic_write(path, _with_sorted_header(data))


def load_adapter(path: Path, *, most: int | None = None) -> AdapterFile:
    """Read an adapter file; whether it fits a model is asked with `check_adapter`.

    Raises AdapterError if it is missing, truncated or no safetensors file, or has more than ``most`` bytes.
    """
    tensors: Tensors = {}
    try:
        size_of(path, most)
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            # Not a dict: the handle is not iterable.
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    except FileNotFoundError as err:
        raise AdapterError(f"{path} not found: give the path of an adapter.safetensors file") from err
    except (OSError, SafetensorError, UnicodeDecodeError) as err:
        raise AdapterError(f"{path} is not a whole safetensors file ({err}); copy or save it again") from err
    except (TypeError, AttributeError, KeyError) as err:
        # numpy has no bfloat16 or float8; the library then fails while it looks the type up.
        raise AdapterError(f"{path} holds a type that numpy does not have ({err}); save it as float32") from err
    foreign = sorted(name for name, value in tensors.items() if value.dtype.kind not in "biuf")
    if foreign:  # another package taught numpy bfloat16
        raise AdapterError(f"{path} holds a type that numpy does not have ({foreign[0]}); save it as float32")
    return AdapterFile(tensors, metadata)


def most_bytes(manifest: Manifest, *, copies: int = 1) -> int:
    """More bytes than so many ``copies`` of all that an artifact trains, and of its base, take in any number type."""
    values = manifest.model_parameters + sum(math.prod(t.shape) for t in manifest.trainables)
    return copies * 8 * values + MOST_HEADER


def check_adapter(manifest: Manifest, file: AdapterFile) -> None:
    """Ask whether an adapter fits an artifact, in its own coordinates (see `to_manifest_coordinates`).

    Under the policies ``batch`` and ``recalibrate`` the running statistics of every batch normalisation are
    needed, and its weight and bias may come with them; under ``frozen`` none of these is accepted.

    Raises AdapterError listing every contradiction of the metadata and every tensor that is missing,
    unexpected, ill-shaped, of another type or not finite.
    """
    problems = []
    for key, expected in (("format", FORMAT), ("schema", SCHEMA)):
        if file.metadata.get(key) != expected:
            problems.append(f"{key}: expected {expected!r}, got {file.metadata.get(key)!r}")
    problems += adapter_problems(manifest, file.tensors, file.metadata)
    if problems:
        raise AdapterError(listed(f"the adapter does not fit the artifact of {manifest.model!r}:", problems))


def to_manifest_coordinates(manifest: Manifest, batchnorm: Tensors, file: AdapterFile) -> Tensors:
    """The adapter's tensors as the artifact wants them; an unfolded adapter moves to folded weights exactly.

    ``batchnorm`` is the content of batchnorm.safetensors; statistics that the adapter carries replace it.
    Rows of ``lora_b``, trained channels and weights are multiplied by gamma / sqrt(var + eps), biases follow, and
    a trained bias that the unfolded network did not have starts at the folded one; the shift of a batch normalisation
    that trained in its place (method ``bias`` in PyTorch) goes into it: (bias - mean) * gamma / sigma + shift.

    Raises AdapterError if the adapter does not fit (`check_adapter`), or if the artifact kept no batch
    normalisation to fold with.
    """
    check_adapter(manifest, file)
    state = dict(file.tensors)
    if file.metadata["coordinates"] == manifest.coordinates:
        return state
    current = {**batchnorm, **file.tensors}
    missing = missing_batchnorm(manifest, current)
    if missing:
        raise AdapterError(
            f"the adapter counts from unfolded weights, but the artifact has no {', '.join(missing)}: "
            "export the artifact again from the checkpoint that the adapter was trained on"
        )
    trained = {t.name: t.shape for t in manifest.trainables}
    adapters = {a.weight: a for a in manifest.adapters}
    partials = {p.weight: p for p in manifest.partials}
    for bn in manifest.batchnorms:
        if bn.affine:
            state.update(_affine(bn, current, trained))
        else:
            weight = bn.folded_into[0]
            state.update(_folded(bn, adapters.get(weight), partials.get(weight), current, trained))
    shifts = set() if manifest.carries_statistics else {bn.bias for bn in manifest.batchnorms} - trained.keys()
    return {name: value for name, value in state.items() if name not in shifts}  # these are in biases now


def _folded(
    bn: BatchNorm,
    adapter: Adapter | None,
    partial: Partial | None,
    current: Tensors,
    trained: dict[str, tuple[int, ...]],
) -> Tensors:
    """What changes with a batch normalisation that was folded into a convolution."""
    factor = fold_factor(current[bn.weight], current[bn.running_var], bn.eps)
    weight, bias = bn.folded_into
    moved: Tensors = {}
    if adapter is not None:
        k_h = conv_dims(adapter.weight_shape)[2]
        moved[adapter.lora_b] = scale_rows(current[adapter.lora_b], factor, k_h)
    for name in (weight, partial.tensor if partial is not None else weight):
        if name in trained:
            moved[name] = fold_rows(current[name], factor)
    if bias in trained:
        before = current.get(bias, current[f"{bn.name}.conv_bias"])
        moved[bias] = fold_bias(before, factor, current[bn.bias], current[bn.running_mean])
    return moved


def _affine(bn: BatchNorm, current: Tensors, trained: dict[str, tuple[int, ...]]) -> Tensors:
    """What changes with a batch normalisation that became a Mul + Add."""
    factor = fold_factor(current[bn.weight], current[bn.running_var], bn.eps)
    scale, shift = bn.folded_into
    moved: Tensors = {}
    if scale in trained:
        moved[scale] = factor.astype(np.float32).reshape(trained[scale])
    if shift in trained:
        folded = fold_bias(None, factor, current[bn.bias], current[bn.running_mean])
        moved[shift] = folded.reshape(trained[shift])
    return moved


def _with_sorted_header(data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned, as the library does
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
