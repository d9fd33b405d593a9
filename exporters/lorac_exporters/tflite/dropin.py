"""Is a fused .tflite a drop-in for its base? The checks of a pair of files, as `lorac_exporters.dropin` has for ONNX.

The checks: same operators (kind, version, order), edges, options; same tensors (names, dtypes, shapes, signatures);
same inputs, outputs and signature; same zero points, axes and scales, but for the scales of weights; same whole
numbers that steer operators (axes, paddings, shapes); the same tensors share bytes; same metadata and appended files;
same file size; and (with the artifact's manifest) only bytes inside the patch table differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from lorac_exporters.checks import Check, DropinReport, bytes_check, same, same_list, shortened
from lorac_exporters.tflite.network import Network, Tensor
from lorac_exporters.tflite.reading import read_content
from lorac_exporters.tflite.schema import buffer_ranges, from_bytes
from lorac_runtime.manifest import Patch
from lorac_runtime.stored import ranges

Range = tuple[int, int]  # offset, nbytes
STEERING_KINDS = "iub"  # whole numbers and truth values of constants without a scale


def compare_files(base: Path, fused: Path, patches: Iterable[Patch] | None = None) -> DropinReport:
    """Compare two .tflite files; ``patches`` (of the base file) allow the check of every single byte.

    Raises ArtifactError if a file is missing or is not TFLite.
    """
    table = None if patches is None else list(patches)
    contents = read_content(base), read_content(fused)
    old, new = from_bytes(contents[0], str(base)), from_bytes(contents[1], str(fused))
    patched, rescaled = (set(), None) if table is None else _touched(contents[0], table)
    checks = [
        *compare_networks(old, new, rescaled=rescaled),
        _sharing_check(old, new, patched),
        same("file size", len(contents[0]), len(contents[1]), "bytes"),
        bytes_check(base, fused, None if table is None else _ranges(table)),
    ]
    return DropinReport(str(base), str(fused), tuple(checks))


def compare_networks(old: Network, new: Network, *, rescaled: Collection[str] | None = None) -> list[Check]:
    """The structural checks, on networks in memory.

    ``rescaled`` names the constants whose scales fusing may change; None, without a patch table: any constant.
    """
    return [
        same_list("operators", _operators(old), _operators(new), "operators"),
        same_list("edges", _edges(old), _edges(new), "operators"),
        same_list("options", _options(old), _options(new), "operators"),
        same_list("tensors", _tensors(old.tensors()), _tensors(new.tensors()), "tensors"),
        same_list("inputs", _tensors(old.inputs), _tensors(new.inputs), "inputs"),
        same_list("outputs", _tensors(old.outputs), _tensors(new.outputs), "outputs"),
        same_list("signature", _signature(old), _signature(new), "names"),
        _quantization_check(old, new, rescaled),
        same_list("steering numbers", _steering(old), _steering(new), "constants"),
        same_list("metadata", _metadata(old), _metadata(new), "entries"),
    ]


def _ranges(patches: list[Patch]) -> list[Range]:
    """Where fusing writes: numbers, and scales of the quantized."""
    return [(stretch.offset, stretch.nbytes) for patch in patches for stretch in ranges(patch)]


def _touched(content: bytes, patches: list[Patch]) -> tuple[set[str], set[str]]:
    """Names of the constants whose numbers lie where a patch goes, and of those whose scales do."""
    numbers = {p.offset for p in patches}
    scales = {p.quantization.scales.offset for p in patches if p.quantization is not None}
    places = buffer_ranges(content)
    patched = {name for name, found in places.items() if found.data.offset in numbers}
    return patched, {name for name, found in places.items() if found.scales and found.scales.offset in scales}


def _operators(network: Network) -> list[str]:
    return [f"{number} {op.kind} version {op.version}" for number, op in enumerate(network.operators)]


def _edges(network: Network) -> list[str]:
    """Tensors by their number in the order of use: a name that differs is another check's to tell."""
    numbers = {tensor: number for number, tensor in enumerate(network.tensors())}

    def listed(tensors: Iterable[Tensor | None]) -> str:
        return ",".join("-" if t is None else f"#{numbers[t]}" for t in tensors)

    return [f"{number} {listed(op.inputs)} => {listed(op.outputs)}" for number, op in enumerate(network.operators)]


def _options(network: Network) -> list[str]:
    """Each operator's options as text; sorted, since their order means nothing."""
    return [
        f"{number} ({', '.join(f'{name}={value!r}' for name, value in sorted(op.options.items()))})"
        for number, op in enumerate(network.operators)
    ]


def _tensors(tensors: Iterable[Tensor]) -> list[str]:
    return [f"{t.name}: {t.dtype}{list(t.shape)} {_role(t)}" for t in tensors]


def _role(tensor: Tensor) -> str:
    return "constant" if tensor.data is not None else f"signature {list(tensor.signature)}"


def _signature(network: Network) -> list[str]:
    """The names under which apps find inputs and outputs."""
    sides = (("input", network.input_keys), ("output", network.output_keys))
    return [f"{side} {number}: {key}" for side, keys in sides for number, key in enumerate(keys)]


def _quantization_check(old: Network, new: Network, rescaled: Collection[str] | None) -> Check:
    pairs = list(zip(old.tensors(), new.tensors(), strict=False))
    different, moved = [], 0
    for a, b in pairs:
        free = a.data is not None and (rescaled is None or a.name in rescaled)
        different += [f"{a.name}: {fact}" for fact in _quantization_differences(a, b, scales_free=free)]
        moved += int(free and not _same_scales(a, b))
    if different:
        return Check("quantization", "fail", shortened(different))
    quantized = sum(a.quantization is not None for a, _ in pairs)
    text = f"{quantized} tensors have equal zero points, axes and activation scales; scales of {moved} constants differ"
    return Check("quantization", "pass", text if quantized else "no tensor is quantized")


def _quantization_differences(a: Tensor, b: Tensor, *, scales_free: bool) -> list[str]:
    """What differs between the quantization of two tensors of the same place."""
    old, new = a.quantization, b.quantization
    if old is None or new is None:
        return [] if old is new else ["quantized in one file only"]
    found = []
    if old.zero_point.tolist() != new.zero_point.tolist():
        found.append(f"zero point {_text(old.zero_point)} -> {_text(new.zero_point)}")
    if old.axis != new.axis:
        found.append(f"axis {old.axis} -> {new.axis}")
    if old.scale.shape != new.scale.shape:
        found.append(f"{old.scale.size} scales -> {new.scale.size}")
    elif not scales_free and not _same_scales(a, b):
        found.append(f"scale {_text(old.scale)} -> {_text(new.scale)}")
    return found


def _same_scales(a: Tensor, b: Tensor) -> bool:
    if a.quantization is None or b.quantization is None:
        return a.quantization is b.quantization
    return a.quantization.scale.tobytes() == b.quantization.scale.tobytes()


def _text(numbers: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
    """One number as it is, of several the first and how many there are."""
    first = str(numbers.reshape(-1)[0]) if numbers.size else "none"
    return first if numbers.size <= 1 else f"{first} ... ({numbers.size})"


def _steering(network: Network) -> list[str]:
    """Constants that say what operators do: axes, paddings, shapes. No adapter changes them."""
    return [
        f"{number} {tensor.name} {tensor.data.reshape(-1)[:16].tolist()} {_digest(tensor.data.tobytes())}"
        for number, tensor in enumerate(network.tensors())
        if tensor.data is not None and tensor.data.dtype.kind in STEERING_KINDS and tensor.quantization is None
    ]


def _metadata(network: Network) -> list[str]:
    entries = {f"metadata {name}": content for name, content in network.metadata.items()}
    entries |= {f"file {name}": content for name, content in network.files.items()}
    listed = [f"{name}: {len(content)} bytes {_digest(content)}" for name, content in sorted(entries.items())]
    return [f"description {network.description!r}", *listed]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _sharing_check(old: Network, new: Network, patched: Collection[str]) -> Check:
    """Whether the same tensors share bytes in both files, and no patched one with another."""
    name = "shared buffers"
    before, after = _shared(old), _shared(new)
    if before != after:
        return Check(name, "fail", f"base shares {_groups(before)}; fused {_groups(after)}")
    hit = [group for group in before if any(name in patched for name in group)]
    if hit:
        return Check(name, "fail", f"a patch of one changes the others too: {_groups(hit)}")
    return Check(name, "pass", f"the same in both files: {_groups(before)}")


def _shared(network: Network) -> list[tuple[str, ...]]:
    """Groups of constants that lie in the same bytes."""
    places: dict[int, list[str]] = {}
    for tensor in network.constants():
        if tensor.data is not None and tensor.data.size:
            places.setdefault(tensor.data.__array_interface__["data"][0], []).append(tensor.name)
    return [tuple(group) for group in places.values() if len(group) > 1]


def _groups(found: list[tuple[str, ...]]) -> str:
    return shortened([" and ".join(group) for group in found]) or "none"
