"""The engine ``onnxruntime`` on step graphs written by hand: its steps against PyTorch, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import step_artifacts as steps
import torch
from engine_cases import SMOOTH, batch, distance, worst
from step_artifacts import StepArtifact, StepRecipe, build_steps
from tiny_network import EPS, Arrays

from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.errors import AdapterError, DataError, EngineError
from lorac_runtime.patch import fuse

Make = Callable[..., StepArtifact]
SGD = {"optimizer": "sgd"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by recipe, each built once."""
    built: dict[StepRecipe, StepArtifact] = {}

    def get(**recipe: object) -> StepArtifact:
        key = StepRecipe(**recipe)
        if key not in built:
            built[key] = build_steps(tmp_path_factory.mktemp("steps") / "a", key)
        return built[key]

    return get


def opened(artifact: StepArtifact, **options: object) -> Engine:
    return open_engine(artifact.folder, artifact.manifest, engine="onnxruntime", threads=1, **options)


def loss_of(values: dict[str, torch.Tensor], x: np.ndarray, y: np.ndarray, bn: str = "folded") -> torch.Tensor:
    return torch.nn.functional.cross_entropy(steps.logits(values, x, bn), torch.tensor(y))


def names(artifact: StepArtifact) -> list[str]:
    return [t.name for t in artifact.manifest.trainables]


def mode(artifact: StepArtifact) -> str:
    return "train" if artifact.recipe.bn_policy == "batch" else "folded"


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("freeze_a", [True, False])
def test_loss_and_every_gradient_agree_with_pytorch(make: Make, policy: str, freeze_a: bool) -> None:
    artifact = make(bn_policy=policy, freeze_a=freeze_a, **SGD)
    oracle, (x, y) = steps.tensors(artifact), batch(16)
    loss = loss_of(oracle, x, y, mode(artifact))
    loss.backward()
    engine, lr = opened(artifact), 1e4  # so large that the old weights vanish beside the step
    assert engine.train_step(x, y, lr) == pytest.approx(loss.item(), rel=1e-6)
    after = engine.state()
    found = {n: (artifact.start[n] - after[n]) / lr for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


OPTIMIZERS = {
    "adamw": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "adamw clipped": ({"clip_norm": 0.05}, {"weight_decay": 0.0}),
    "amsgrad": ({"amsgrad": True}, {"weight_decay": 0.0, "amsgrad": True}),
    "sgd": ({"clip_norm": 0.05, **SGD}, {}),
    "momentum": ({"momentum": 0.9, **SGD}, {"momentum": 0.9}),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_weights_after_some_steps_agree_with_pytorch(make: Make, case: str, policy: str) -> None:
    recipe, options = OPTIMIZERS[case]
    artifact = make(bn_policy=policy, freeze_a=False, **recipe)
    engine, oracle = opened(artifact), steps.tensors(artifact)
    trained = [oracle[n] for n in names(artifact)]
    kind = torch.optim.SGD if artifact.recipe.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(trained, lr=0.1, **options)
    for step, size in enumerate((16, 16, 5, 9)):
        x, y = batch(size, step)
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (1 + step)
        optimizer.zero_grad()
        loss = loss_of(oracle, x, y, mode(artifact))
        loss.backward()
        if artifact.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, artifact.recipe.clip_norm)
        optimizer.step()
        assert engine.train_step(x, y, lr) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: v - artifact.start[n] for n, v in engine.state().items() if n in names(artifact)}
    assert worst(found, {n: oracle[n].detach().numpy() - artifact.start[n] for n in found})[0] < 1e-4


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_evaluation_agrees_with_pytorch_and_changes_nothing(make: Make, policy: str, micro_batch: int | None) -> None:
    artifact = make(bn_policy=policy)
    if policy == "batch" and micro_batch:
        pytest.skip("refused, see below")
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(7)
    oracle = steps.logits(steps.tensors(artifact), x, "eval" if policy == "batch" else "folded").detach()
    before = engine.state()
    loss, logits = engine.eval_step(x, y)
    assert distance(logits, oracle.numpy()) < SMOOTH
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(oracle, torch.tensor(y)).item(), rel=1e-5)
    assert all(np.array_equal(before[n], v) for n, v in engine.state().items())
    assert before.keys() == artifact.start.keys()
    assert all(np.array_equal(before[n], v) for n, v in artifact.start.items())


def test_running_statistics_under_batch_are_those_of_pytorch(make: Make) -> None:
    artifact = make(bn_policy="batch")
    engine, oracle = opened(artifact), steps.tensors(artifact)
    for step, size in enumerate((8, 2, 16)):
        x, y = batch(size, step)
        steps.logits(oracle, x, "train")
        engine.train_step(x, y, 0.0)
    found = {n: v for n, v in engine.state().items() if "running" in n}
    assert len(found) == 2
    assert worst(found, {n: oracle[n].numpy() for n in found})[0] < 1e-6
    with pytest.raises(DataError, match="bn sees one value per channel in a batch of 1 image"):
        engine.train_step(*batch(1), 0.1)


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("recipe", [{"clip_norm": 0.05}, {"momentum": 0.9, "freeze_a": False, **SGD}])
def test_micro_batches_give_what_the_whole_batch_gives(make: Make, micro_batch: int, recipe: dict[str, object]) -> None:
    artifact = make(**recipe)
    whole, parts = opened(artifact), opened(artifact, micro_batch=micro_batch)
    for step in range(4):
        x, y = batch(10, step)  # by 3 or 4: the last piece is smaller
        assert parts.train_step(x, y, 0.05) == pytest.approx(whole.train_step(x, y, 0.05), rel=1e-6)
    found, expected = ({n: v - artifact.start[n] for n, v in e.state().items()} for e in (parts, whole))
    assert worst(found, expected)[0] < SMOOTH
    assert parts.eval_step(x, y)[0] == pytest.approx(whole.eval_step(x, y)[0], rel=1e-5)


def test_micro_batches_are_refused_where_statistics_are_those_of_the_batch(make: Make) -> None:
    with pytest.raises(EngineError, match="micro-batches do not go with BN policy 'batch'"):
        opened(make(bn_policy="batch"), micro_batch=4)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(make: Make, micro_batch: int | None) -> None:
    artifact = make()
    engine, control = (opened(artifact, micro_batch=micro_batch) for _ in range(2))
    x, y = batch(4)
    x[3, 0, 0, 0] = np.nan
    assert math.isnan(engine.train_step(x, y, 0.1))
    assert all(np.array_equal(v, artifact.start[n]) for n, v in engine.state().items())
    for i in range(2):  # nor has the optimizer counted or remembered that step
        assert engine.train_step(*batch(4, i), 0.1) == control.train_step(*batch(4, i), 0.1)
    assert all(np.array_equal(v, control.state()[n]) for n, v in engine.state().items())


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_gradient_that_is_not_finite_leaves_everything_too_and_counts_as_a_loss(
    make: Make, micro_batch: int | None
) -> None:
    artifact = make(freeze_a=False)
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(4)
    state = engine.state()
    state["hidden.lora_a"][:], state["hidden.lora_b"][:] = 1e30, 0  # the square of lora_b's gradient overflows
    engine.load_state(state)
    assert math.isfinite(engine.eval_step(x, y)[0])
    assert math.isnan(engine.train_step(x, y, 1e-3))
    assert all(np.array_equal(v, state[n]) for n, v in engine.state().items())


def test_a_learning_rate_beyond_float32_shows_in_the_weights(make: Make) -> None:
    engine = opened(make(**SGD))
    engine.train_step(*batch(4), 1e39)
    assert not np.all(np.isfinite(engine.state()["fc.weight"]))


def test_what_is_frozen_in_an_adapter_is_part_of_the_state_but_cannot_be_set(make: Make) -> None:
    artifact = make(freeze_a=True)
    engine = opened(artifact)
    state = engine.state()
    assert "hidden.lora_a" not in names(artifact)
    assert np.array_equal(state["hidden.lora_a"], artifact.start["hidden.lora_a"])
    state["fc.bias"] += 1
    engine.load_state(state)
    assert np.array_equal(engine.state()["fc.bias"], state["fc.bias"])
    state["hidden.lora_a"] += 1
    with pytest.raises(ValueError, match=r"lora_a does not train in this artifact .* export the artifact again"):
        engine.load_state(state)
    del state["hidden.lora_a"], state["fc.bias"]
    with pytest.raises(ValueError, match=r"(?s)fc.bias is missing.*more is unknown.*fc.weight has shape \(2,\)"):
        engine.load_state(state | {"more": np.zeros(1), "fc.weight": np.zeros(2)})


def recalibrated(artifact: StepArtifact, parts: list[np.ndarray], start: Arrays) -> dict[str, torch.Tensor]:
    """The unfolded network with statistics averaged by torch; ``start`` holds folded trained tensors."""
    oracle = {n: torch.from_numpy(v).double() for n, v in steps.numbers(artifact.recipe.seed).items()}
    plain = oracle | {"hidden.lora_b": torch.zeros_like(oracle["hidden.lora_b"])}
    g = oracle["bn.weight"] / torch.sqrt(oracle["bn.running_var"] + EPS)
    for count, x in enumerate(parts, start=1):
        z = torch.from_numpy(x).double().mean((2, 3)) @ plain["hidden.weight"].reshape(6, 3).T + plain["hidden.bias"]
        torch.nn.functional.batch_norm(
            z, oracle["bn.running_mean"], oracle["bn.running_var"], training=True, momentum=1 / count
        )
    trained = {n: torch.from_numpy(v).double() for n, v in start.items() if n in names(artifact)}
    trained["hidden.lora_b"] = trained["hidden.lora_b"] / g[:, None]
    return oracle | trained | {"hidden.lora_a": torch.from_numpy(start["hidden.lora_a"]).double()}


def test_recalibration_folds_the_base_anew_and_keeps_the_training_so_far(make: Make) -> None:
    artifact = make(bn_policy="recalibrate")
    engine, parts = opened(artifact), [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 5)]
    engine.train_step(*batch(8), 0.05)
    oracle = recalibrated(artifact, parts, engine.state())
    before = engine.eval_step(*batch(9, 9))[1]
    engine.recalibrate(iter(parts))
    state = engine.state()
    assert all(distance(state[n], oracle[n].numpy()) < SMOOTH for n in ("bn.running_mean", "bn.running_var"))
    x, y = batch(9, 9)
    found, expected = engine.eval_step(x, y)[1], steps.logits(oracle, x, "eval").numpy()
    assert distance(found, expected) < SMOOTH
    assert distance(found, before) > 0.01


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_training_after_recalibration_differentiates_the_new_base(make: Make, micro_batch: int | None) -> None:
    artifact = make(bn_policy="recalibrate", **SGD)
    engine, (x, y) = opened(artifact, micro_batch=micro_batch), batch(8)
    engine.recalibrate([x * 2])
    state = engine.state()
    new = steps.folded(steps.numbers(0) | {n: v for n, v in state.items() if n.startswith("bn.")})
    oracle = steps.tensors(artifact, **new, **{n: state[n] for n in names(artifact)})
    loss = loss_of(oracle, x, y)
    loss.backward()
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: (state[n] - engine.state()[n]) / 1e4 for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


def test_recalibration_needs_its_policy_and_images(make: Make) -> None:
    with pytest.raises(ValueError, match="'frozen', not 'recalibrate'"):
        opened(make()).recalibrate([batch(4)[0]])
    with pytest.raises(DataError, match="no image"):
        opened(make(bn_policy="recalibrate")).recalibrate([])


def test_weight_and_bias_of_live_batch_normalisation_can_be_set(make: Make) -> None:
    """They do not train, but an adapter from the cloud may bring others; the graphs have them as external data."""
    artifact = make(bn_policy="batch", **SGD)
    engine, rng, (x, y) = opened(artifact), np.random.default_rng(3), batch(8)
    engine.train_step(x, y, 0.0)
    state = engine.state() | {f"bn.{f}": rng.uniform(0.5, 2, 6).astype(np.float32) for f in steps.FIELDS}
    engine.load_state(state)
    assert all(np.array_equal(v, state[n]) for n, v in engine.state().items())
    oracle = steps.tensors(artifact, **state)
    assert distance(engine.eval_step(x, y)[1], steps.logits(oracle, x, "eval").detach().numpy()) < SMOOTH
    loss = loss_of(oracle, x, y, "train")
    loss.backward()
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss.item(), rel=1e-5)
    found = {n: (state[n] - engine.state()[n]) / 1e4 for n in names(artifact)}
    assert worst(found, {n: oracle[n].grad.numpy() for n in found})[0] < SMOOTH


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_the_fused_base_does_what_the_engine_does(make: Make, policy: str, tmp_path: Path) -> None:
    import onnxruntime

    artifact = make(bn_policy=policy)
    engine, (x, y) = opened(artifact), batch(8)
    for i in range(3):
        engine.train_step(*batch(8, i), 0.05)
    fuse(artifact.folder, tmp_path / "fused.onnx", engine.state())
    session = onnxruntime.InferenceSession(str(tmp_path / "fused.onnx"), providers=["CPUExecutionProvider"])
    assert distance(session.run(None, {"input": x})[0], engine.eval_step(x, y)[1]) < SMOOTH


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
