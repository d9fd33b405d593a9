"""Blocks of output channels and their bytes: cut anywhere they are the whole, bit for bit, each byte once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_runtime import manifest as mf
from lorac_runtime import stored
from lorac_runtime.channels import Channels, Scratch
from lorac_runtime.fused import fused_channels, fused_weights
from lorac_runtime.patch import batchnorm_tensors

Array = np.ndarray
TYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "int32": "<i4"}


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A shape, another view of it, an order of its axes, a dtype, and how a quantized one has its scales."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    views: list[tuple[int, ...] | None] = [None, (math.prod(shape),), (shape[0], math.prod(shape[1:]))]
    view = draw(st.sampled_from(views))
    rank = len(shape if view is None else view)
    permute = draw(st.one_of(st.none(), st.permutations(range(rank)).map(tuple)))
    dtype = draw(st.sampled_from(["float32", "float16", "int8"]))
    axis = draw(st.integers(0, len(shape) - 1))
    return {
        "shape": shape,
        "view": view,
        "permute": permute,
        "dtype": dtype,
        "axis": axis,
        "one_scale": draw(st.booleans()),
        "step": draw(st.integers(1, 3)),
        "block": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 9999)),
    }


def counted(value: Array, step: int) -> Channels:
    """A tensor whose blocks lie in shared memory, as those of an adapted weight do."""

    def rows(o: int, p: int, scratch: Scratch) -> Array:
        assert o % step == 0
        assert p % step == 0 or p == len(value)
        block = scratch.array("block", (p - o, *value.shape[1:]))
        block[...] = value[o:p]
        return block

    return Channels(value.shape, rows, step)


def case(given: dict[str, Any]) -> tuple[list[mf.Patch], dict[str, Channels], dict[str, Array], int]:
    """Patches of a weight, and of its bias where it is quantized, in a file of so many bytes."""
    rng = np.random.default_rng(given["seed"])
    weight = (rng.standard_normal(given["shape"]) * 10.0 ** rng.integers(-9, 4)).astype(np.float32)
    channels = given["shape"][given["axis"]]
    bias = (rng.standard_normal(channels) * 10.0 ** rng.integers(-3, 11)).astype(
        np.float32
    )  # often too large for int32
    dtype, end = given["dtype"], 0

    def place(nbytes: int) -> mf.ByteRange:
        nonlocal end
        end += nbytes
        return mf.ByteRange(end - nbytes, nbytes)

    def patch(name: str, value: Array, kind: str, partner: str, **order: Any) -> mf.Patch:
        quantized = None
        if dtype == "int8":
            scales = place(4 if given["one_scale"] else 4 * channels)
            quantized = mf.Quantized(0 if name == "b" else given["axis"], scales, partner, 0.25)
        where = place(np.dtype(TYPES[kind]).itemsize * value.size)
        return mf.Patch(name, "f", where.offset, where.nbytes, kind, value.shape, quantization=quantized, **order)

    patches = [patch("w", weight, dtype, "b", view=given["view"], permute=given["permute"])]
    if dtype == "int8":
        patches.insert(0, patch("b", bias, "int32", "w"))
    values = {"w": counted(weight, given["step"]), "b": Channels.of(bias)}
    return patches, values, {"w": weight, "b": bias}, end


def assembled(pieces: Iterator[stored.Piece], nbytes: int) -> bytes:
    """The file that pieces make; every byte once."""
    content, seen = bytearray(nbytes), np.zeros(nbytes, int)
    for offset, piece in pieces:
        content[offset : offset + len(piece)] = piece
        seen[offset : offset + len(piece)] += 1
    assert np.all(seen == 1)
    return bytes(content)


def by_hand(patches: list[mf.Patch], arrays: dict[str, Array], given: dict[str, Any], nbytes: int) -> bytes:
    """The same file from whole tensors."""
    content = bytearray(nbytes)
    weight, bias = arrays["w"], arrays["b"]
    numbers: dict[str, Array] = {"w": weight}
    if given["dtype"] == "int8":
        axis = given["axis"]
        rows = np.moveaxis(weight, axis, 0).reshape(len(bias), -1).astype(np.float64)
        least = np.maximum(2.0**-28 / 0.25, np.abs(bias.astype(np.float64)) / (0.25 * 2.0**30))
        scales = np.maximum(np.abs(rows).max(1) / 127, least).astype(np.float32)
        if given["one_scale"]:
            scales = scales.max(keepdims=True)
        along = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        steps = (scales.astype(np.float64) * 0.25).astype(np.float32)
        numbers = {
            "w": np.clip(np.rint(weight / along), -127, 127),
            "b": np.rint(bias.astype(np.float64) / steps),
        }
        for patch, found in zip(patches, (steps, scales), strict=True):
            assert patch.quantization is not None
            content[patch.quantization.scales.offset : patch.quantization.scales.end] = found.tobytes()
    for patch in patches:
        value = numbers[patch.tensor].reshape(patch.view or patch.shape)
        value = value if patch.permute is None else value.transpose(patch.permute)
        content[patch.content.offset : patch.content.end] = value.astype(TYPES[patch.dtype]).tobytes()
    return bytes(content)


@given(given=layouts())
@settings(max_examples=300, deadline=None)
def test_blocks_of_any_size_give_the_bytes_of_the_whole(given: dict[str, Any]) -> None:
    patches, values, arrays, nbytes = case(given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stored, "BLOCK", given["block"])
        patched.setattr(Channels.blocks, "__defaults__", (given["block"],))
        found = assembled(stored.pieces(patches, values, stored.Losses()), nbytes)
    assert found == by_hand(patches, arrays, given, nbytes)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    rank=st.integers(1, 4),
    layout=st.sampled_from(["spatial", "paper"]),
    kernel=st.sampled_from(["2-D", "1-D"]),
    elements=st.integers(1, 200),
    work=st.integers(1, 400),
)
@settings(max_examples=200, deadline=None)
def test_adapted_weights_are_the_same_bits_in_blocks_and_as_a_whole(
    shape: tuple[int, ...], rank: int, layout: str, kernel: str, elements: int, work: int
) -> None:
    if kernel == "1-D":
        shape = (*shape[:2], shape[3])
    c_out, c_in, k_h, k_w = shape if len(shape) == 4 else (*shape[:2], 1, shape[2])
    rng = np.random.default_rng(math.prod(shape))
    base = rng.standard_normal(shape).astype(np.float32)
    state = {
        "a": rng.standard_normal((rank, c_in * k_w)).astype(np.float32),
        "b": rng.standard_normal((c_out * k_h, rank)).astype(np.float32),
    }
    adapter = mf.Adapter("l", "w", "a", "b", shape, 1, 2, rank, 3.0, layout)
    facts = {"adapters": (adapter,), "trainables": (), "partials": (), "refolded": (), "live_batchnorm": False}
    manifest: Any = type("M", (), facts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorac_runtime.fused._BLOCK", work)
        (value,) = fused_channels(manifest, {"w": base}, state, {}).values()
        whole = value.whole()
        blocks = np.concatenate([block.copy() for block in value.blocks(elements)])
    assert np.array_equal(blocks, whole)
    product = state["b"].astype(np.float64) @ state["a"]
    if layout == "spatial":
        product = product.reshape(c_out, k_h, c_in, k_w).swapaxes(1, 2)
    np.testing.assert_allclose(whole, base + 1.5 * product.reshape(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
@pytest.mark.parametrize("elements", [1, 30])
@pytest.mark.parametrize("zero_channels", [False, True])
def test_refolded_weights_are_the_same_bits_in_blocks_and_as_a_whole(
    small: Callable[..., Any], policy: str, elements: int, zero_channels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorac_runtime.fused._BLOCK", 1)  # one output channel at a time
    artifact = small(policy, zero_channels=zero_channels)
    batchnorm = batchnorm_tensors(artifact.folder, artifact.manifest)
    given = (artifact.manifest, artifact.base, artifact.state, batchnorm)
    cut = 0
    for name, value in fused_channels(*given).items():
        blocks = [block.copy() for block in value.blocks(elements)]
        np.testing.assert_array_equal(np.concatenate(blocks), fused_weights(*given)[name])
        cut += len(blocks) > 1
    assert cut >= 3


def test_blocks_are_as_large_as_asked_for_and_never_less_than_a_step() -> None:
    value = counted(np.arange(40, dtype=np.float32).reshape(10, 4), 3)
    assert [len(block) for block in value.blocks(4)] == [3, 3, 3, 1]
    assert [len(block) for block in value.blocks(24)] == [6, 4]
    assert [len(block) for block in value.blocks(1000)] == [10]
    assert value.whole().shape == (10, 4)


def test_a_number_without_axes_is_one_channel() -> None:
    value = Channels.of(np.float32(3).reshape(()))
    patch = mf.Patch("x", "f", 2, 4, "float32", ())
    ((offset, content),) = stored.pieces([patch], {"x": value}, stored.Losses())
    assert (offset, bytes(content)) == (2, np.float32(3).tobytes())
    assert value.whole().shape == ()


def test_a_weight_without_bias_gets_the_scale_of_its_numbers() -> None:
    quantized = mf.Quantized(0, mf.ByteRange(6, 8), None, 0.5)
    patch = mf.Patch("w", "f", 0, 6, "int8", (2, 3), quantization=quantized)
    value = np.float32([[1.27, 0, -0.5], [2.54, 2, 0.01]])
    content = assembled(stored.pieces([patch], {"w": Channels.of(value)}, stored.Losses()), 14)
    assert np.frombuffer(content[:6], "i1").tolist() == [127, 0, -50, 127, 100, 0]
    np.testing.assert_allclose(np.frombuffer(content[6:], "<f4"), [0.01, 0.02], rtol=1e-6)


def test_half_precision_rounds_to_the_nearest_even_number_at_every_edge() -> None:
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = ((every[:-1].astype(np.float64) + every[1:]) / 2).astype(np.float32)  # ties, exact in float32
    beside = [np.nextafter(between, side, dtype=np.float32) for side in (0, np.inf)]
    lower = np.arange(0x7BFF, dtype=np.uint16)
    even = lower + (lower & 1)
    for numbers, expected in ((every[:-1], lower), (between, even), (beside[0], lower), (beside[1], lower + 1)):
        for sign in (1, -1):
            found, overflowed = stored.as_half(sign * numbers)
            assert overflowed == 0
            np.testing.assert_array_equal(found.view(np.uint16) & 0x7FFF, expected)
            assert np.all((found.view(np.uint16) >> 15) == (sign < 0))


def test_half_precision_agrees_with_numpy_on_any_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0, -0.0, 2**-24, 2**-25, 2**-14, np.inf])])
    with np.errstate(over="ignore"):
        plain = numbers.astype(np.float16)
    for size in (1, 7, len(numbers)):
        found, overflowed = stored.as_half(numbers[-size:])
        expected = plain[-size:].copy()
        infinite = np.isinf(expected)
        expected[infinite] = np.copysign(np.float16(65504), expected[infinite])
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
        assert overflowed == np.count_nonzero(infinite)
    small = numbers[np.abs(numbers) < 65504]
    np.testing.assert_array_equal(stored.as_half(small)[0].view(np.uint16), small.astype(np.float16).view(np.uint16))
    assert np.isnan(stored.as_half(np.float32([1, np.nan]))[0]).tolist() == [False, True]
