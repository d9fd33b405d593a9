"""The latency worker: it runs the file that it is given, on what it is given, and says why where it cannot."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import torch
from hand_tflite import floats, write
from torch.nn import functional

from lorac_deploy.bench import worker
from lorac_deploy.bench.contest import Contest, command
from lorac_deploy.bench.processes import Worker, WorkerError

TEXT = """<ir_version: 8, opset_import: ["": 18]>
g (float[n, 2, 3, 4] x) => (float[n, 2, 3, 4] y) <float two = {2}> { y = Mul(x, two) }"""


@pytest.fixture
def doubling(tmp_path: Path) -> tuple[str, str]:
    """An ONNX file that doubles its input, and what feeds it."""
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "double.onnx")
    np.savez(tmp_path / "feeds.npz", x=np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4))
    return str(tmp_path / "double.onnx"), str(tmp_path / "feeds.npz")


def bench(kind: str = "onnx") -> worker.Bench:
    return worker.Bench({"format": kind, "threads": 1})


def test_an_onnx_file_answers_what_onnxruntime_answers(doubling: tuple[str, str]) -> None:
    path, feeds = doubling
    own = bench()
    assert set(own.open("a", path, feeds)) == {"load", "first"}
    expected = onnxruntime.InferenceSession(path).run(None, dict(np.load(feeds)))[0]
    np.testing.assert_array_equal(own.answer("a")["output"], expected)


def test_turns_have_as_many_runs_as_asked_in_the_order_asked(doubling: tuple[str, str]) -> None:
    own = bench()
    for name in "ab":
        own.open(name, *doubling)
    found = own.turns(["a", "b", "b", "a"], [3, 1, 2, 4])["seconds"]
    assert [len(turn) for turn in found] == [3, 1, 2, 4]
    assert all(second > 0 for turn in found for second in turn)


def test_warming_runs_until_it_no_longer_gets_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = [*np.geomspace(5.0, 3.0, 12)]
    times = iter([*faster, *[3.0] * 99])
    monkeypatch.setattr(worker, "_timed", lambda _run, count: [next(times) for _ in range(count)])
    found = worker._warmed(lambda: None, 1e9)
    assert found[:12] == faster
    assert 12 + 3 <= len(found) <= 12 + worker.WINDOW * 2


def test_warming_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(np.geomspace(1.0, 1e-9, 500))
    monkeypatch.setattr(worker, "_timed", lambda _run, count: [next(times) for _ in range(count)])
    assert len(worker._warmed(lambda: None, 0.1)) == worker.FEWEST


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({"x": np.zeros((2, 2, 3, 5), np.float32)}, r"takes .*'n', 2, 3, 4.* given are .*2, 2, 3, 5"),
        ({"z": np.zeros((2, 2, 3, 4), np.float32)}, r"takes .*'x'.* given are .*'z'"),
        ({"x": np.zeros((2, 2, 3, 4), np.float32), "z": np.zeros(1)}, r"given are .*'z'"),
    ],
)
def test_inputs_that_differ_are_named(
    doubling: tuple[str, str], tmp_path: Path, feeds: dict[str, np.ndarray], text: str
) -> None:
    np.savez(tmp_path / "other.npz", **feeds)
    with pytest.raises(ValueError, match=text):
        bench().open("a", doubling[0], str(tmp_path / "other.npz"))


def test_the_process_answers_pinned_to_one_core_and_tells_reasons(doubling: tuple[str, str]) -> None:
    path, feeds = doubling
    with Worker(command(Contest("onnx", Path(sys.executable), ()))) as process:
        said = process.ask("hello")
        assert "1.19.2" in said["runtimes"].values()
        assert said["cores"] == sorted(os.sched_getaffinity(0))[-1:]
        process.ask("open", name="a", path=path, feeds=feeds)
        assert len(process.ask("turns", names=["a"], counts=[2])["seconds"][0]) == 2
        with pytest.raises(WorkerError, match="nothing is known of 'dance'"):
            process.ask("dance")
        with pytest.raises(WorkerError, match=r"nowhere\.onnx"):
            process.ask("open", name="b", path="nowhere.onnx", feeds=feeds)


def test_pinning_that_is_not_allowed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_pid: int, _cores: list[int]) -> None:
        raise PermissionError

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    worker.pin([0])
    assert os.sched_getaffinity(0) == before


def test_a_tflite_file_takes_images_with_channels_first_and_another_batch(tmp_path: Path) -> None:
    network = floats()
    path, images = write(network, tmp_path / "m.tflite"), torch.randn(3, 3, 6, 6)
    np.savez(tmp_path / "feeds.npz", x=images.numpy())
    own = bench("tflite")
    own.open("a", str(path), str(tmp_path / "feeds.npz"))
    values = {t.name: torch.from_numpy(np.asarray(t.data)) for t in network.constants()}
    hidden = functional.conv2d(images, values["conv.weight"].permute(0, 3, 1, 2), values["conv.bias"]).relu()
    expected = functional.linear(hidden.mean((2, 3)), values["fc.weight"], values["fc.bias"])
    np.testing.assert_allclose(own.answer("a")["output"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_tflite_file_refuses_images_of_another_size(tmp_path: Path) -> None:
    path = write(floats(), tmp_path / "m.tflite")
    np.savez(tmp_path / "feeds.npz", x=np.zeros((1, 3, 7, 6), np.float32))
    with pytest.raises(ValueError, match=r"takes \(1, 6, 6, 3\), given is \(1, 3, 7, 6\)"):
        bench("tflite").open("a", str(path), str(tmp_path / "feeds.npz"))


def test_the_job_is_read_from_the_command_line() -> None:
    assert json.loads(command(Contest("tflite", Path("p"), (), threads=2))[-1])["threads"] == 2
