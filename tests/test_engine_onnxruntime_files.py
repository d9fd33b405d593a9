"""The engine ``onnxruntime`` and its files: when it opens them, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_cases import batch
from step_artifacts import Make, StepArtifact, maker, opened

from lorac_runtime.engines import open_engine
from lorac_runtime.errors import AdapterError, EngineError


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


def test_sessions_are_opened_once_and_one_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen: list[str] = []

    class Session(onnxruntime.InferenceSession):
        alive = 0

        def __init__(self, path: str, *args: object, **kwargs: object) -> None:
            super().__init__(path, *args, **kwargs)
            seen.append(Path(path).stem)
            Session.alive += 1
            assert Session.alive == 1, f"{seen} are open together"

        def __del__(self) -> None:
            Session.alive -= 1

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    engine = opened(make(bn_policy="recalibrate"))
    del seen[:]  # what it looked at while it opened
    for _ in range(3):
        engine.eval_step(*batch(4))
    engine.recalibrate([batch(4)[0]])
    for _ in range(3):
        engine.train_step(*batch(4), 0.01)
    engine.eval_step(*batch(4))
    assert seen == ["eval_step", "stats_model", "train_step", "eval_step"]


def edited(artifact: StepArtifact, folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> StepArtifact:
    """A copy with one graph changed."""
    folder.mkdir()
    for path in artifact.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    onnx.save(model, folder / name)
    return dataclasses.replace(artifact, folder=folder)


def without_inputs(model: onnx.ModelProto) -> None:
    """fc.bias is a constant of the graph now, and another tensor an input."""
    value = next(i for i in model.graph.input if i.name == "fc.bias")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "fc.bias"))
    model.graph.input.remove(value)
    model.graph.input.append(onnx.helper.make_tensor_value_info("stranger", 1, [2]))
    next(o for o in model.graph.output if o.name == "fc.bias.next").name = "loss.next"
    next(n for n in model.graph.node if n.output[0] == "fc.bias.next").output[0] = "loss.next"


@pytest.mark.parametrize(("graph", "micro_batch"), [("train_step", None), ("optimizer_step", 4)])
def test_a_graph_that_does_not_fit_the_manifest_is_refused_with_all_mismatches(
    make: Make, tmp_path: Path, graph: str, micro_batch: int | None
) -> None:
    broken = edited(make(), tmp_path / "a", f"{graph}.onnx", without_inputs)
    with pytest.raises(EngineError, match=f"{graph}.onnx does not fit its manifest") as caught:
        opened(broken, micro_batch=micro_batch)
    for line in ("input fc.bias is missing", "input stranger is unknown", "output fc.bias.next is missing"):
        assert line in str(caught.value)


def test_every_graph_is_checked_when_it_is_opened(make: Make, tmp_path: Path) -> None:
    def rename_loss(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["cost" if o == "loss" else o for o in node.output]
        next(o for o in model.graph.output if o.name == "loss").name = "cost"

    evaluation = edited(make(), tmp_path / "a", "eval_step.onnx", rename_loss)
    with pytest.raises(EngineError, match=r"eval_step.onnx does not fit its manifest:\n  - output loss is missing"):
        opened(evaluation).eval_step(*batch(2))
    gradient = edited(make(), tmp_path / "b", "gradient_step.onnx", rename_loss)
    with pytest.raises(EngineError, match=r"gradient_step.onnx does not fit its manifest:\n  - output loss is missing"):
        opened(gradient, micro_batch=2).train_step(*batch(2), 0.1)


def test_another_shape_or_type_is_a_mismatch(make: Make) -> None:
    artifact = make()
    spec = dataclasses.replace(artifact.manifest.input, in_graph=True)
    output = dataclasses.replace(artifact.manifest.output, classes=7)
    other = dataclasses.replace(artifact.manifest, input=spec, output=output)
    with pytest.raises(EngineError, match=r"input is float \(batch, 3, 8, 8\), expected uint8 \(batch, 8, 8, 3\)"):
        open_engine(artifact.folder, other, threads=1)
    other = dataclasses.replace(artifact.manifest, output=output)
    with pytest.raises(EngineError, match=r"output logits is float \(batch, 3\), expected float \(batch, 7\)"):
        open_engine(artifact.folder, other, threads=1).eval_step(*batch(2))


@pytest.mark.parametrize("text", ["[[", '["fc.bias"]', "3", "[[1]]", ""])
def test_groups_that_cannot_be_read_are_refused(make: Make, tmp_path: Path, text: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {"lorac.groups": text, "lorac.optimizer": "adamw"})

    broken = edited(make(), tmp_path / "a", "train_step.onnx", change)
    with pytest.raises(EngineError, match=r"lorac.groups should be a list of lists of tensor names"):
        opened(broken)


def test_groups_and_optimizer_must_be_those_of_the_manifest(make: Make, tmp_path: Path) -> None:
    groups = [["fc.weight", "hidden.lora_a"], ["fc.weight"]]

    def change(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {"lorac.groups": json.dumps(groups), "lorac.optimizer": "sgd"})

    broken = edited(make(), tmp_path / "a", "train_step.onnx", change)
    with pytest.raises(EngineError) as caught:
        opened(broken)
    for line in (
        "fc.bias does not train",
        "hidden.lora_a trains, the manifest does not say so",
        "fc.weight stands in lorac.groups twice",
        "lorac.optimizer is 'sgd', the manifest says 'adamw'",
    ):
        assert line in str(caught.value)


def test_what_the_native_library_refuses_is_an_engine_error(make: Make, tmp_path: Path) -> None:
    x, y = batch(4)
    with pytest.raises(EngineError, match=r"onnxruntime could not train: (?s:.)*invalid dimensions"):
        opened(make()).train_step(x[:, :2], y, 0.1)
    with pytest.raises(EngineError, match=r"onnxruntime could not evaluate: (?s:.)*invalid dimensions"):
        opened(make()).eval_step(x[:, :2], y)
    artifact = edited(make(), tmp_path / "a", "train_step.onnx", lambda model: None)
    (artifact.folder / "train_step.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"onnxruntime could not open .*train_step.onnx"):
        opened(artifact)


def test_an_adapter_in_the_artifact_that_does_not_fit_is_refused(make: Make) -> None:
    artifact = make()
    other = dataclasses.replace(artifact.manifest, model="another")
    with pytest.raises(AdapterError, match="model: the adapter has 'step', the artifact 'another'"):
        open_engine(artifact.folder, other, threads=1)


THREADS = """
import sys
from pathlib import Path
import numpy as np
from lorac_runtime.engines import open_engine
from lorac_runtime.manifest import load
folder = Path(sys.argv[1])
engine = open_engine(folder, load(folder), threads=int(sys.argv[2]))
engine.eval_step(np.zeros((2, 3, 8, 8), np.float32), np.zeros(2, np.int64))
engine.train_step(np.zeros((2, 3, 8, 8), np.float32), np.zeros(2, np.int64), 0.1)
watched = {"torch", "onnx", "tensorflow", "sympy", "h5py"} & set(sys.modules)
print(len(list(Path("/proc/self/task").iterdir())), *watched)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_sets_the_number_of_threads_and_no_framework_is_loaded(make: Make) -> None:
    one, four = (
        int(subprocess.run([sys.executable, "-c", THREADS, make().folder, n], capture_output=True, check=True).stdout)
        for n in ("1", "4")
    )
    assert four - one == 3  # a single session is open
