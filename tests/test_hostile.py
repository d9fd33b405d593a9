"""Files that somebody made to do harm, or that a disk damaged: an error of this project, in no time, and nothing else.

Here are a few hundred changes to each; `make fuzz` makes millions, guided by coverage.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_steps import StepRecipe
from hostile import Target, npz, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_artifacts import build_steps

from lorac_runtime import domains
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.data import load_data
from lorac_runtime.engines import open_engine, training_state
from lorac_runtime.errors import AdapterError, ArtifactError, CheckpointError, DataError
from lorac_runtime.job import start_of
from lorac_runtime.manifest import InputSpec

JSON = ("manifest", "patch table", "checkpoint", "generation", "state", "report")
BINARY = ("adapter", "training state", "npz")
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**40, 0.5, 1e308, "", "../../x", "/etc/passwd", "a/b",
    "base.onnx", "\0", "x" * 5000, [], {}, [[[]]], [2**62] * 4, {"a": {}},
]  # fmt: skip
SOME = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("hostile"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value holds another one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, child in inner for found in places(child, (*path, key))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def traced(target: Target, content: bytes) -> tuple[BaseException | None, int]:
    """The fault, and the most bytes that Python and numpy held at a time."""
    tracemalloc.start()
    try:
        return target.fault(content), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check(target: Target, content: bytes) -> None:
    """No fault, no more than 5 seconds, no more than twice the memory that a valid file of this size takes."""
    honest = max(traced(target, target.seed)[1], len(content)) + (1 << 20)
    started = time.monotonic()
    fault, peak = traced(target, content)
    assert fault is None, repr(fault)
    assert time.monotonic() - started < 5
    assert peak < 2 * honest


@pytest.mark.parametrize("name", JSON)
@SOME
@given(data=st.data())
def test_altered_values_are_refused(known: dict[str, Target], name: str, data: st.DataObject) -> None:
    value = json.loads(known[name].seed)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(value)))
        value = replaced(value, path, data.draw(st.sampled_from(ODD)))
    check(known[name], json.dumps(value).encode())


@pytest.mark.parametrize("name", JSON + BINARY)
@SOME
@given(data=st.data())
def test_altered_bytes_are_refused(known: dict[str, Target], name: str, data: st.DataObject) -> None:
    content = bytearray(known[name].seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "repeat", "number"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        elif kind == "repeat":
            content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
        else:
            content[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"]))
        content = content or bytearray(b"x")
    check(known[name], bytes(content))


@pytest.mark.parametrize("name", JSON + BINARY)
@pytest.mark.parametrize("content", [b"", b"\0", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b"1" * 10_000, b"PK\3\4"])
def test_what_is_something_else_is_refused(known: dict[str, Target], name: str, content: bytes) -> None:
    check(known[name], content)


SPEC = InputSpec("input", (3, 8, 8), 1.0, (0.0,) * 3, (1.0,) * 3)


def archive(path: Path, shape: tuple[int, ...], dtype: str = "|u1", content: bytes = b"") -> Path:
    """A file whose images say that they have a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.save(labels, np.arange(4) % 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("images.npy", header.getvalue() + content)
        made.writestr("labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ((10**6, 8, 8, 3), b"", "is damaged: images are uint8"),
        ((2**62, 8, 8, 3), b"", "is damaged: images are uint8"),
        ((-1, 8, 8, 3), b"", "is not a readable .npz of plain arrays"),
        ((2**32, 2**32, 2**32), b"", "is damaged: images are uint8"),
    ],
)
def test_shapes_that_lie_are_refused_before_memory_is_asked_for(
    tmp_path: Path, shape: tuple[int, ...], content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_data(archive(tmp_path / "a.npz", shape, content=content), SPEC, 2, ("a", "b"))


def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    """Two gigabytes of zeros in two megabytes of file; the shape is true, and no image of this model."""
    shape = (1, 20_000, 20_000, 3)
    path = archive(tmp_path / "bomb.npz", shape, content=bytes(20_000 * 20_000 * 3))
    assert path.stat().st_size < 2_000_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"have shape \(1, 20000, 20000, 3\), expected \(N, 8, 8, 3\)"):
        load_data(path, SPEC, 2, ("a", "b"))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "harm"),))

    np.savez(tmp_path / "a.npz", images=np.array([Harm()], object), labels=np.array([0]))
    with pytest.raises(DataError):
        load_data(tmp_path / "a.npz", SPEC, 2, ("a", "b"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    """A pipe would be waited for, a device read without end."""
    path = tmp_path / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(AdapterError, match="expected a file"):
        load_adapter(path)
    if kind != "folder":
        with pytest.raises(DataError, match="expected a file"):
            load_data(path, SPEC, 2, ("a", "b"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/manifest.json").symlink_to(path)
    with pytest.raises(ArtifactError):
        mf.load(tmp_path / "a")


def lying_adapter(path: Path) -> Path:
    """A well-formed file with a tensor of 40 GB, of which the disk holds a few bytes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * 10**10)
    return path


def test_an_adapter_larger_than_any_of_this_artifact_is_not_read(tmp_path: Path) -> None:
    """As what a run starts from, as a domain, as the result of a run, and as a training state."""
    artifact = build_steps(tmp_path / "a", StepRecipe()).folder
    manifest, path = mf.load(artifact), lying_adapter(tmp_path / "x.safetensors")
    store = domains.create(tmp_path / "store", artifact)
    engine = open_engine(artifact, manifest, threads=1)
    expected = r"it has 40,000,000,\d+ bytes, at most 1[67],\d+,\d+ are expected"
    with pytest.raises(AdapterError, match=expected):
        start_of(artifact, manifest, path)
    with pytest.raises(AdapterError, match=expected):
        domains.add(store, "fog", path)
    lying_adapter(store.folder / domains.FOLDER / "snow.safetensors")
    assert re.search(expected, domains.domains(store)[1].problem)
    lying_adapter(tmp_path / training_state.FILE_NAME)
    with pytest.raises(CheckpointError, match=expected):
        engine.restore(tmp_path)


def test_links_out_of_the_artifact_are_refused(tmp_path: Path) -> None:
    folder = build_steps(tmp_path / "a", StepRecipe()).folder
    shutil.move(folder / "base.onnx", tmp_path / "elsewhere.onnx")
    (folder / "base.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactError, match=r"base\.onnx is a link that leads out of the folder"):
        mf.verify_files(folder, mf.load(folder))


def test_the_seeds_are_valid(known: dict[str, Target]) -> None:
    """Otherwise the first check would catch every change, and nothing behind it would be tried."""
    for name, target in known.items():
        target.read(target.seed)
        assert target.seed, name
    assert npz()[:2] == b"PK"
