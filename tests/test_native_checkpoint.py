"""The native checkpoint's optimizer state: found by name, written in place, and no harm from a damaged file."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from artifacts import Tiny
from engine_cases import batch, engine_of, maker
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_runtime.engines import wheel
from lorac_runtime.engines.native_checkpoint import NativeCheckpoint
from lorac_runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return maker(tmp_path_factory)()


@pytest.fixture(scope="module")
def content(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What the library writes after three steps."""
    engine, folder = engine_of(tiny), tmp_path_factory.mktemp("native")
    for i in range(3):
        engine.train_step(*batch(8, i), 0.01)
    path = folder / "checkpoint"
    wheel.load().api.CheckpointState.save_checkpoint(engine._state, path, include_optimizer_state=True)
    return path.read_bytes()


def test_moments_and_steps_are_found(tiny: Tiny, content: bytes) -> None:
    native = NativeCheckpoint(bytearray(content))
    assert native.steps is not None
    assert native.steps.tolist() == [3]
    assert {n: {m: v.shape for m, v in found.items()} for n, found in native.moments.items()} == {
        t.name: {"momentum0": t.shape, "momentum1": t.shape} for t in tiny.manifest.trainables
    }
    for found in native.moments.values():
        assert np.all(found["momentum1"] >= 0)  # the mean of squares
        assert np.any(found["momentum0"] < 0)


def test_writing_to_a_view_changes_those_bytes_and_no_others(content: bytes) -> None:
    native = NativeCheckpoint(bytearray(content))
    assert native.steps is not None
    native.steps[0] = 77
    native.moments["fc.bias"]["momentum1"][...] = [1, 2, 3]
    changed = [i for i, (a, b) in enumerate(zip(content, native.content, strict=True)) if a != b]
    assert len(changed) <= 8 + 12
    again = NativeCheckpoint(native.content)
    assert again.steps is not None
    assert again.steps.tolist() == [77]
    assert again.moments["fc.bias"]["momentum1"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"", b"x" * 7, b"x" * 500, b"\0\0\0\0ODTC", b"\xff\xff\xff\xffODTC" + b"\xff" * 99])
def test_what_is_no_such_file_is_refused(damage: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint of onnxruntime-training 1\.19"):
        NativeCheckpoint(bytearray(damage))


def test_a_position_before_the_file_is_refused(content: bytes) -> None:
    """The table of fields may lie before its table, so its offset has a sign."""
    broken = bytearray(content)
    (root,) = struct.unpack_from("<I", broken, 0)
    struct.pack_into("<i", broken, root, root + 8)
    with pytest.raises(CheckpointError, match=r"it points to bytes -8\.\.-6 of"):
        NativeCheckpoint(broken)


@settings(max_examples=300)
@given(data=st.data())
def test_damage_anywhere_is_refused_or_stays_within_the_file(content: bytes, data: st.DataObject) -> None:
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(broken) - 4))
        broken[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    end = data.draw(st.integers(0, len(broken)))
    for candidate in (broken, broken[:end]):
        try:
            native = NativeCheckpoint(candidate)
        except CheckpointError:
            continue
        for found in native.moments.values():
            assert all(value.base is not None and value.dtype == np.float32 for value in found.values())
