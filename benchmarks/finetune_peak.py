"""The most multiply-adds a second that onnxruntime reaches on this machine, which steps are held against."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import step_competitors as sc
from benchmarks.finetune_cases import BENCHMARK
from benchmarks.rows import Row
from benchmarks.step_process import WorkerError, Workers
from benchmarks.step_protocol import Job
from lorac_runtime.manifest import BASE

SIDE, CHANNELS, PIXELS = 1024, 256, 32
RUNS = 20
PRODUCT, CONVOLUTION = f"MatMul {SIDE} x {SIDE} x {SIDE}", f"3 x 3 convolution, {CHANNELS} channels"
WORK = {PRODUCT: SIDE**3, CONVOLUTION: 9 * CHANNELS**2 * PIXELS**2}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Multiply-adds a second by number of threads; empty where it could not be measured."""

    best: Mapping[int, float]

    def share(self, work: int, seconds: float | None, threads: int) -> dict[str, float]:
        """What share of it a step of ``work`` multiply-adds reaches."""
        if seconds is None or threads not in self.best:
            return {}
        return {"share of peak": work / seconds / self.best[threads]}


def measured(workers: Workers, threads: tuple[int, ...]) -> tuple[Peak, list[Row]]:
    """The peak, and rows that tell where it comes from."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for count in threads for row in _rows(workers, Path(scratch), count)]
    found: dict[int, float] = {}
    for row in rows:
        if row.figure is not None:
            count = int(row.settings["threads"])
            found[count] = max(row.figure, found.get(count, 0.0))
    return Peak(found), rows


def _rows(workers: Workers, scratch: Path, threads: int) -> Iterator[Row]:
    for name, write in ((PRODUCT, _product), (CONVOLUTION, _convolution)):
        folder = scratch / name.partition(" ")[0]
        folder.mkdir(exist_ok=True)
        model, images = write()
        onnx.save(model, folder / BASE)
        np.savez(folder / "batch.npz", images=images, labels=np.zeros(len(images), np.int64))
        yield _row(workers, name, folder, threads)


def _row(workers: Workers, name: str, folder: Path, threads: int) -> Row:
    competitor = dataclasses.replace(sc.forward(name, "", passes=1))
    job = Job(str(folder), str(folder / "batch.npz"), threads, competitor.options)
    made = Row(
        benchmark=BENCHMARK,
        model="",
        format="onnx",
        runtime=competitor.environment,
        variant=name,
        quantity="multiply-adds",
        figure=None,
        unit="1/s",
        settings={"threads": threads},
        note="not measured",
    )
    try:
        session = workers.open_job(competitor, job)
        seconds = session.ask("step", count=RUNS)["seconds"]
        session.ask("close")
    except (WorkerError, FileNotFoundError) as err:
        return dataclasses.replace(made, note=str(err))
    details = {"minimum": min(seconds), "multiply-adds": WORK[name]}
    return dataclasses.replace(made, figure=WORK[name] / min(seconds), details=details, note=session.note)


def _product() -> tuple[onnx.ModelProto, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _model([node], matrix, (SIDE, SIDE), (SIDE, SIDE)), matrix


def _convolution() -> tuple[onnx.ModelProto, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    images = rng.standard_normal((1, CHANNELS, PIXELS, PIXELS)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["z"], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["z"], ["y"]),
    ]
    return _model(nodes, weight, images.shape, (1, CHANNELS * PIXELS**2)), images


def _model(
    nodes: list[onnx.NodeProto], weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], *shapes: tuple[int, ...]
) -> onnx.ModelProto:
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip("xy", shapes, strict=True)
    )
    graph = helper.make_graph(nodes, "peak", [given], [made], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
