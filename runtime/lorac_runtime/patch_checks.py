"""What a patch table can get wrong: sizes, orders of axes, byte ranges, and entries that do not belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lorac_runtime.description import BASE, BASE_TFLITE, Manifest
from lorac_runtime.places import ITEM_SIZES, TFLITE_WEIGHTS, ByteRange, FileEntry, Patch, Quantized, TfliteEntry

Table = Mapping[tuple[str, str], Patch]  # by file and tensor
_PARTNER_DTYPE = {"int8": "int32", "int32": "int8"}
_DTYPES_OF = {"float32": ("float32",), "fp16": ("float32", "float16"), "int8": ("float32", "int8", "int32")}
_IO_DTYPES = ("float32", "uint8", "int8")


def patch_problems(patches: Sequence[Patch], files: Mapping[str, FileEntry]) -> list[str]:
    """Every contradiction in a patch table, a line each."""
    table = {(p.file, p.tensor): p for p in patches}
    problems = []
    for patch in patches:
        reason = _entry_problem(patch, files) or _relation_problem(patch, table)
        problems += [f"patches.{patch.tensor}: {reason}"] if reason else []
    return problems + _overlaps(patches)


def tflite_problems(m: Manifest) -> list[str]:
    """Contradictions between what the manifest says of base.tflite, its patch entries, and its files."""
    listed, patched = BASE_TFLITE in m.files, any(p.file == BASE_TFLITE for p in m.patches)
    if m.tflite is None:
        return [f"tflite: nothing is said about {BASE_TFLITE}, which has patch entries"] if patched else []
    if not listed:
        return [f"tflite: {BASE_TFLITE} is not in files"]
    problems = _description_problems(m.tflite)
    for what, found, expected in (
        ("input_shape", m.tflite.input_shape, (1, *m.input.channels_last)),
        ("output_shape", m.tflite.output_shape, _tflite_output(m)),
    ):
        problems += [] if found == expected else [f"tflite.{what}: {found}, expected {expected}"]
    allowed = _DTYPES_OF.get(m.tflite.weights, tuple(ITEM_SIZES))
    problems += [
        f"patches.{p.tensor}: {p.dtype}, but tflite.weights is {m.tflite.weights}"
        for p in m.patches
        if p.file == BASE_TFLITE and p.dtype not in allowed
    ]
    return problems


def _tflite_output(m: Manifest) -> tuple[int, ...]:
    """The shape of base.tflite's output, channels last."""
    if m.task is None:
        return (1, m.output.classes)
    shape = m.task.outputs[0].shape
    return (1, *shape[1:], *shape[:1])


def _description_problems(entry: TfliteEntry) -> list[str]:
    choices = (
        ("weights", entry.weights, TFLITE_WEIGHTS),
        ("input_dtype", entry.input_dtype, _IO_DTYPES),
        ("output_dtype", entry.output_dtype, _IO_DTYPES),
    )
    return [
        f"tflite.{name}: {choice!r} is not one of {', '.join(allowed)}"
        for name, choice, allowed in choices
        if choice not in allowed
    ]


def _entry_problem(p: Patch, files: Mapping[str, FileEntry]) -> str:
    """The first thing that is wrong with an entry by itself."""
    if p.file not in files:
        return f"{p.file} is not in files"
    if p.nbytes != ITEM_SIZES.get(p.dtype, -1) * math.prod(p.shape) or any(d < 1 for d in p.shape):
        return f"{p.nbytes} bytes of {p.dtype} do not hold shape {p.shape}"
    if p.file == BASE and (p.dtype != "float32" or p.view is not None or p.quantization is not None):
        return f"{BASE} holds float32 in a tensor's own shape, this is {p.dtype} with view {p.view}"
    if p.view is not None and (any(d < 1 for d in p.view) or math.prod(p.view) != math.prod(p.shape)):
        return f"view {p.view} is not another shape for the numbers of {p.shape}"
    axes = p.shape if p.view is None else p.view
    if p.permute is not None and sorted(p.permute) != list(range(len(axes))):
        return f"permute {p.permute} is not an order of the {len(axes)} axes"
    if (p.quantization is not None) != (p.dtype in _PARTNER_DTYPE):
        return f"{p.dtype} {'needs a' if p.quantization is None else 'has no'} quantization"
    return _range_problem(p, files[p.file].nbytes) or _quantization_problem(p)


def _range_problem(p: Patch, size: int) -> str:
    outside = [(what, r) for what, r in _ranges(p) if r.offset < 0 or r.end > size]
    return "; ".join(f"{what}bytes {r.offset}..{r.end} lie outside {p.file}" for what, r in outside)


def _quantization_problem(p: Patch) -> str:
    q = p.quantization
    if q is None:
        return ""
    if not 0 <= q.axis < len(p.shape):
        return f"quantization.axis {q.axis} is not among the {len(p.shape)} axes"
    if q.scales.nbytes not in (4, 4 * p.shape[q.axis]):
        return f"{q.scales.nbytes} bytes of scales are neither one for the tensor nor one for each of its channels"
    if p.dtype == "int32" and math.prod(p.shape) != p.shape[q.axis]:
        return f"a bias has one number for each output channel, not the shape {p.shape}"
    if not (math.isfinite(q.input_scale) and q.input_scale > 0):
        return f"quantization.input_scale must be positive and finite, got {q.input_scale}"
    return ""


def _relation_problem(p: Patch, table: Table) -> str:
    """Whether the entries that this one needs are there and fit."""
    if p.file == BASE:
        return ""
    original = table.get((BASE, p.tensor))
    if original is None or original.shape != p.shape:
        found = "none there" if original is None else f"the shape {original.shape} there"
        return f"its float32 numbers are read from {BASE}, and it has {found}, {p.shape} in {p.file}"
    return "" if p.quantization is None else _partner_problem(p, p.quantization, table)


def _partner_problem(p: Patch, q: Quantized, table: Table) -> str:
    what = "weight" if p.dtype == "int32" else "bias"
    if q.partner is None:
        return f"a quantized bias needs its {what}" if p.dtype == "int32" else ""
    other = table.get((p.file, q.partner))
    if other is None or other.quantization is None or other.dtype != _PARTNER_DTYPE[p.dtype]:
        return f"its {what} {q.partner} has no entry of dtype {_PARTNER_DTYPE[p.dtype]} in {p.file}"
    if (other.quantization.partner, other.quantization.input_scale) != (p.tensor, q.input_scale):
        return f"its {what} {q.partner} has another partner or input_scale"
    if other.quantization.scales.nbytes != q.scales.nbytes or _channels(p) != _channels(other):
        return f"its {what} {q.partner} has another number of channels or scales"
    return ""


def _channels(p: Patch) -> int | None:
    """Output channels, None where ``axis`` is none of the tensor's."""
    return p.shape[p.quantization.axis] if p.quantization and 0 <= p.quantization.axis < len(p.shape) else None


def _overlaps(patches: Sequence[Patch]) -> list[str]:
    """Neighbours in a file that share bytes, scales included."""
    ranges = sorted((p.file, r.offset, r.end, f"patches.{p.tensor}: {what}") for p in patches for what, r in _ranges(p))
    problems = []
    reach: dict[str, tuple[int, str]] = {}  # by file: the end of all ranges so far, and whose it is
    for file, offset, end, what in ranges:
        before, other = reach.get(file, (0, ""))
        if other and offset < before:
            problems.append(f"{what}bytes {offset}..{end} of {file} overlap {other.removesuffix(': ')}")
        reach[file] = max((end, what), (before, other))
    return problems


def _ranges(p: Patch) -> Iterator[tuple[str, ByteRange]]:
    yield "", p.content
    if p.quantization is not None:
        yield "scales at ", p.quantization.scales
