"""The engine against PyTorch and against formulas written here."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_torch
import torch
from artifacts import BN_FIELDS, BNS, CLASSES, EPS, Arrays, C, H, Recipe, Tiny, W, build

from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.engines.onnxruntime_training import OnnxRuntimeTraining
from lorac_runtime.errors import CheckpointError, DataError, EngineError

Make = Callable[..., Tiny]
SMOOTH, RELU = 1e-5, 1e-4  # relative, per tensor; a ReLU near zero may switch between two float32 routes


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by recipe, each built once."""
    built: dict[Recipe, Tiny] = {}

    def get(**recipe: object) -> Tiny:
        key = Recipe(**recipe)
        if key not in built:
            built[key] = build(tmp_path_factory.mktemp("artifact") / "a", key)
        return built[key]

    return get


def engine_of(tiny: Tiny) -> Engine:
    return open_engine(tiny.folder, tiny.manifest, threads=1)


def batch(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size)
    return (rng.standard_normal((size, C, H, W)) + labels[:, None, None, None]).astype(np.float32), labels


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def worst(found: Arrays, expected: Arrays) -> tuple[float, str]:
    assert found.keys() == expected.keys()
    return max((distance(found[k], expected[k]), k) for k in expected)


def reference_values(tiny: Tiny) -> tuple[Arrays, str]:
    """The numbers that the training graph holds, and how PyTorch must treat BN."""
    return (tiny.unfolded, "train") if tiny.manifest.bn_policy == "batch" else (tiny.folded, "folded")


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize(("activation", "tolerance"), [("Tanh", SMOOTH), ("Relu", RELU)])
def test_loss_and_every_gradient_agree_with_pytorch(make: Make, policy: str, activation: str, tolerance: float) -> None:
    tiny = make(bn_policy=policy, optimizer="sgd", clip_norm=0.0, activation=activation, lora_b=1.0)
    values, bn = reference_values(tiny)
    x, y = batch(16)
    loss, expected = tiny_torch.gradients(tiny_torch.tensors(values, tiny.start), x, y, bn=bn, activation=activation)
    engine, lr = engine_of(tiny), 1e4  # so large that the old weights vanish beside the step
    found_loss = engine.train_step(x, y, lr)
    after = engine.state()
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert worst({k: (tiny.start[k] - after[k]) / lr for k in tiny.start}, expected)[0] < tolerance


@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_weights_after_sgd_steps_agree_with_pytorch(make: Make, policy: str) -> None:
    tiny = make(bn_policy=policy, optimizer="sgd", clip_norm=0.0, activation="Tanh", lora_b=1.0)
    values, bn = reference_values(tiny)
    oracle, engine = tiny_torch.tensors(values, tiny.start), engine_of(tiny)
    optimizer = torch.optim.SGD([oracle[k] for k in tiny.start], lr=0.1)
    for step, size in enumerate((16, 16, 5)):
        x, y = batch(size, step)
        loss = torch.nn.functional.cross_entropy(
            tiny_torch.logits(oracle, x, bn=bn, activation="Tanh"), torch.tensor(y)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert engine.train_step(x, y, 0.1) == pytest.approx(loss.item(), rel=1e-5)
    after = {k: v for k, v in engine.state().items() if k in tiny.start}
    moved = {k: oracle[k].detach().numpy() - tiny.start[k] for k in tiny.start}
    assert worst({k: after[k] - tiny.start[k].astype(np.float64) for k in after}, moved)[0] < SMOOTH


def adamw(values: Arrays, gradient: Arrays, memory: dict[str, Arrays], step: int, *, lr: float, decay: float) -> None:
    """AdamW as Hugging Face wrote it: bias correction in the step size, decay after the step, eps outside."""
    for name, g in gradient.items():
        m = memory["m"][name] = 0.9 * memory["m"].get(name, 0.0) + 0.1 * g
        v = memory["v"][name] = 0.999 * memory["v"].get(name, 0.0) + 0.001 * g * g
        size = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        values[name] = values[name] - size * m / (np.sqrt(v) + 1e-8)
        values[name] = values[name] - lr * decay * values[name]


def clipped(gradient: Arrays, limit: float) -> Arrays:
    """All gradients scaled alike so that their common norm is at most ``limit``."""
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in gradient.values()))
    return {k: g * min(1.0, limit / (norm + 1e-6)) for k, g in gradient.items()}


@pytest.mark.parametrize(("clip", "decay"), [(100.0, 0.0), (0.05, 0.0), (0.05, 0.1)])
def test_weights_after_adamw_steps_agree_with_the_formula(make: Make, clip: float, decay: float) -> None:
    tiny = make(activation="Tanh", lora_b=1.0, clip_norm=clip, weight_decay=decay)
    engine = engine_of(tiny)
    values = {k: v.astype(np.float64) for k, v in tiny.start.items()}
    memory: dict[str, Arrays] = {"m": {}, "v": {}}
    for step, lr in enumerate((0.01, 0.02, 0.005), start=1):
        x, y = batch(12, step)
        oracle = tiny_torch.tensors(tiny.folded, values)
        loss, gradient = tiny_torch.gradients(oracle, x, y, bn="folded", activation="Tanh")
        assert engine.train_step(x, y, lr) == pytest.approx(loss, rel=1e-5)
        limited = clipped(gradient, clip)
        assert (limited["fc.bias"][0] != gradient["fc.bias"][0]) == (clip < 1)  # the limit is felt, or not
        adamw(values, limited, memory, step, lr=lr, decay=decay)
    moved = {k: values[k] - tiny.start[k] for k in values}
    found = {k: v - tiny.start[k].astype(np.float64) for k, v in engine.state().items()}
    assert worst(found, moved)[0] < 1e-4  # Adam divides by |g|: rounding of small gradients counts in full


@pytest.mark.parametrize("momentum", [0.1, 0.3])
def test_running_statistics_under_batch_are_those_of_pytorch(make: Make, momentum: float) -> None:
    tiny = make(bn_policy="batch", optimizer="sgd", clip_norm=0.0, momentum=momentum, lora_b=1.0)
    oracle, engine = tiny_torch.tensors(tiny.unfolded, tiny.start), engine_of(tiny)
    for step, size in enumerate((8, 2, 1, 16)):  # small batches: n / (n - 1) is far from 1
        x, y = batch(size, step)
        tiny_torch.logits(oracle, x, bn="train", momentum=momentum)
        engine.train_step(x, y, 0.0)
    statistics = {k: v for k, v in engine.state().items() if "running" in k}
    assert len(statistics) == 2 * len(BNS)
    assert worst(statistics, {k: oracle[k].numpy() for k in statistics})[0] < 1e-6
    x, y = batch(9, 9)
    expected = tiny_torch.logits(oracle, x, bn="eval").detach().numpy()
    assert distance(engine.eval_step(x, y)[1], expected) < SMOOTH  # and evaluation uses them


def test_a_batch_without_variance_is_refused_under_batch(make: Make) -> None:
    tiny = make(bn_policy="batch")
    flat = tuple(dataclasses.replace(bn, positions=1) for bn in tiny.manifest.batchnorms)
    engine = open_engine(tiny.folder, dataclasses.replace(tiny.manifest, batchnorms=flat), threads=1)
    with pytest.raises(DataError, match="bn1 sees one value per channel in a batch of 1 image"):
        engine.train_step(*batch(1), 0.1)
    assert math.isfinite(engine.train_step(*batch(2), 0.1))


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_evaluation_agrees_with_pytorch_and_changes_nothing(make: Make, policy: str) -> None:
    tiny = make(bn_policy=policy, lora_b=1.0)
    values, _ = reference_values(tiny)
    bn = "eval" if policy == "batch" else "folded"
    engine, (x, y) = engine_of(tiny), batch(7)
    oracle = tiny_torch.logits(tiny_torch.tensors(values, tiny.start), x, bn=bn)
    before = engine.state()
    loss, logits = engine.eval_step(x, y)
    assert distance(logits, oracle.detach().numpy()) < SMOOTH
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(oracle, torch.tensor(y)).item(), rel=1e-5)
    assert all(np.array_equal(before[k], v) for k, v in engine.state().items())


def recalibrated_oracle(tiny: Tiny, parts: list[np.ndarray]) -> tiny_torch.Tensors:
    """The unfolded base with statistics averaged over batches by torch's own BatchNorm2d(momentum=None)."""
    oracle = tiny_torch.tensors(tiny.unfolded, {})
    for count, x in enumerate(parts, start=1):
        tiny_torch.logits(oracle, x, bn="train", momentum=1.0 / count)  # what momentum=None means in torch
    return oracle


def test_recalibrated_statistics_are_pytorchs_cumulative_average(make: Make) -> None:
    tiny = make(bn_policy="recalibrate")
    parts = [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 8, 3)]
    engine = engine_of(tiny)
    engine.recalibrate(iter(parts))
    oracle = recalibrated_oracle(tiny, parts)
    found = {k: v for k, v in engine.state().items() if "running" in k}
    assert len(found) == 2 * len(BNS)
    assert worst(found, {k: oracle[k].numpy() for k in found})[0] < SMOOTH


def test_recalibration_refolds_frozen_and_trained_tensors(make: Make) -> None:
    """Seen from the unfolded network, only its statistics change: the training so far is kept."""
    tiny = make(bn_policy="recalibrate", lora_b=1.0)
    engine = engine_of(tiny)
    engine.train_step(*batch(16), 0.05)
    trained = engine.state()
    parts = [batch(n, n)[0] * 1.7 + 0.5 for n in (8, 5)]
    oracle = recalibrated_oracle(tiny, parts)
    for name, bn in (("conv1.weight", "bn1"), ("conv2.lora_b", "bn2")):
        g = tiny.unfolded[f"{bn}.weight"] / np.sqrt(tiny.unfolded[f"{bn}.running_var"] + EPS)
        rows = np.repeat(g, trained[name].shape[0] // g.size)
        oracle[name] = torch.tensor(trained[name] / rows.reshape(-1, *[1] * (trained[name].ndim - 1))).double()
    for name in ("conv2.lora_a", "conv3.lora_a", "conv3.lora_b", "fc.weight", "fc.bias"):
        oracle[name] = torch.tensor(trained[name]).double()
    engine.recalibrate(parts)
    x, y = batch(9, 9)
    before = tiny_torch.logits(tiny_torch.tensors(tiny.folded, tiny.start), x, bn="folded").detach().numpy()
    found = engine.eval_step(x, y)[1]
    assert distance(found, tiny_torch.logits(oracle, x, bn="eval").numpy()) < SMOOTH
    assert distance(found, before) > 0.01
    assert np.array_equal(engine.state()["fc.weight"], trained["fc.weight"])


def test_training_after_recalibration_differentiates_the_refolded_network(make: Make) -> None:
    recipe = {"bn_policy": "recalibrate", "optimizer": "sgd", "clip_norm": 0.0, "activation": "Tanh"}
    tiny = make(**recipe, lora_b=1.0)
    engine, (x, y) = engine_of(tiny), batch(8)
    engine.recalibrate([x * 2])
    start = {k: v for k, v in engine.state().items() if k in tiny.start}
    statistics = {k: v for k, v in engine.state().items() if "running" in k}
    unfolded = tiny.unfolded | statistics
    from artifacts import fold

    oracle = tiny_torch.tensors(fold(unfolded), start)
    loss, expected = tiny_torch.gradients(oracle, x, y, bn="folded", activation="Tanh")
    assert engine.train_step(x, y, 1e4) == pytest.approx(loss, rel=1e-5)
    after = engine.state()
    assert worst({k: (start[k] - after[k]) / 1e4 for k in start}, expected)[0] < SMOOTH


def test_recalibration_needs_images_with_variance_and_its_policy(make: Make) -> None:
    with pytest.raises(ValueError, match="'frozen', not 'recalibrate'"):
        engine_of(make()).recalibrate([batch(4)[0]])
    with pytest.raises(DataError, match="no image"):
        engine_of(make(bn_policy="recalibrate")).recalibrate([])


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(
    make: Make, policy: str, clip: float, tmp_path: Path
) -> None:
    tiny = make(bn_policy=policy, lora_b=1.0, clip_norm=clip)
    whole = engine_of(tiny)
    if policy == "recalibrate":
        whole.recalibrate([batch(8)[0]])
    expected = [whole.train_step(*batch(8, i), 0.01 / (i + 1)) for i in range(3)]
    whole.save(tmp_path)
    expected += [whole.train_step(*batch(6, i), 0.02) for i in range(3, 7)]
    resumed = engine_of(tiny)
    resumed.train_step(*batch(4, 9), 0.5)  # whatever it did before must be forgotten
    resumed.restore(tmp_path)
    found = [resumed.train_step(*batch(6, i), 0.02) for i in range(3, 7)]
    x, y = batch(5)
    logits = resumed.eval_step(x, y)[1], whole.eval_step(x, y)[1]
    if clip:  # the library adds up the gradients' norm in an order that differs between two sessions
        assert found == pytest.approx(expected[3:], rel=1e-5)
        assert distance(*logits) < 1e-4
        return
    assert found == expected[3:]
    assert np.array_equal(*logits)
    assert all(np.array_equal(v, whole.state()[k]) for k, v in resumed.state().items())


def test_optimizer_memory_is_part_of_what_is_restored(make: Make, tmp_path: Path) -> None:
    """The control of the test above: weights alone do not continue the run."""
    tiny = make(lora_b=1.0)
    whole, weights_only = engine_of(tiny), engine_of(tiny)
    for i in range(3):
        whole.train_step(*batch(8, i), 0.01)
    weights_only.load_state(whole.state())
    for engine in (whole, weights_only):
        engine.train_step(*batch(8, 5), 0.01)
    assert distance(whole.state()["fc.weight"], weights_only.state()["fc.weight"]) > 1e-4


@pytest.mark.parametrize("damage", ["truncated", "absent", "garbage"])
def test_a_damaged_checkpoint_is_refused(make: Make, damage: str, tmp_path: Path) -> None:
    engine = engine_of(make())
    engine.save(tmp_path)
    path = tmp_path / "checkpoint"
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else b"x" * 500)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.restore(tmp_path)


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_state_goes_out_and_in_again_unchanged(make: Make, policy: str) -> None:
    tiny = make(bn_policy=policy, lora_b=1.0)
    trained, fresh = engine_of(tiny), engine_of(tiny)
    if policy == "recalibrate":
        trained.recalibrate([batch(8)[0] * 2])
    for i in range(3):
        trained.train_step(*batch(8, i), 0.05)
    state = trained.state()
    fresh.load_state(state)
    x, y = batch(6)
    assert all(np.array_equal(v, state[k]) for k, v in fresh.state().items())
    assert distance(fresh.eval_step(x, y)[1], trained.eval_step(x, y)[1]) < 1e-6
    state["fc.weight"][:] = 0  # a copy: the engine does not see this
    assert np.any(trained.state()["fc.weight"])


def test_a_state_with_other_batchnorm_tensors_refolds_the_base(make: Make) -> None:
    """Gamma, beta and statistics from elsewhere; the oracle is the unfolded network with them."""
    tiny, rng = make(bn_policy="recalibrate", lora_b=1.0), np.random.default_rng(3)
    changed = {
        f"{bn}.{field}": rng.uniform(0.5, 2, channels).astype(np.float32)
        for bn, (_, channels, _) in BNS.items()
        for field in BN_FIELDS
    }
    oracle = tiny_torch.tensors(tiny.unfolded | tiny.start | changed, {})
    state = tiny.start | changed  # trained tensors as they are folded with the new ones
    for name, bn in (("conv1.weight", "bn1"), ("conv2.lora_b", "bn2")):
        unfolded = tiny.unfolded.get(name, tiny.start[name])
        oracle[name] = torch.tensor(unfolded).double()
        g = changed[f"{bn}.weight"] / np.sqrt(changed[f"{bn}.running_var"] + EPS)
        rows = np.repeat(g, len(unfolded) // g.size)
        state[name] = unfolded * rows.reshape(-1, *[1] * (unfolded.ndim - 1))
    engine = engine_of(tiny)
    engine.load_state(state)
    x, y = batch(6)
    assert distance(engine.eval_step(x, y)[1], tiny_torch.logits(oracle, x, bn="eval").numpy()) < SMOOTH
    assert all(np.array_equal(v, state[k].astype(np.float32)) for k, v in engine.state().items())


def test_load_state_names_everything_that_does_not_belong(make: Make) -> None:
    with pytest.raises(ValueError, match="not a state of this model") as caught:
        engine_of(make()).load_state({"bn1.running_mean": np.zeros(6), "fc.bias": np.zeros(5)})
    for line in ("fc.weight is missing", "bn1.running_mean is unknown", "fc.bias has shape (5,), expected (3,)"):
        assert line in str(caught.value)


def test_a_loss_that_is_not_finite_leaves_the_weights(make: Make) -> None:
    engine = engine_of(make(lora_b=1.0))
    x, y = batch(4)
    before = engine.state()
    x[0, 0, 0, 0] = np.nan
    assert math.isnan(engine.train_step(x, y, 0.1))
    assert all(np.array_equal(v, before[k]) for k, v in engine.state().items())
    assert math.isfinite(engine.train_step(*batch(4), 0.1))  # nor does the gradient linger


def test_raw_images_go_in_where_the_graph_preprocesses(make: Make) -> None:
    plain, raw = make(lora_b=1.0), make(lora_b=1.0, in_graph=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, H, W, C), np.uint8)
    y = np.arange(6) % CLASSES
    x = (pixels.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2)  # not contiguous, on purpose
    first, second = engine_of(plain), engine_of(raw)
    assert distance(second.eval_step(pixels, y)[1], first.eval_step(x, y)[1]) < SMOOTH
    assert second.train_step(pixels, y, 0.01) == pytest.approx(first.train_step(x, y, 0.01), rel=1e-5)


def test_what_the_native_library_refuses_is_an_engine_error(make: Make) -> None:
    x, y = batch(4)
    with pytest.raises(EngineError, match=r"could not train: (?s:.)*invalid dimensions"):
        engine_of(make()).train_step(x[:, :2], y, 0.1)


def test_files_that_do_not_fit_the_manifest_are_refused_by_name(make: Make) -> None:
    tiny = make()
    renamed = dataclasses.replace(tiny.manifest.trainables[0], name="conv1.weights")
    other = dataclasses.replace(tiny.manifest, trainables=(renamed, *tiny.manifest.trainables[1:]))
    with pytest.raises(EngineError, match=r"(?s)conv1.weights does not train.*conv1.weight trains"):
        open_engine(tiny.folder, other, threads=1)


def test_an_artifact_for_another_engine_is_refused(make: Make) -> None:
    tiny = make()
    entry = tiny.manifest.engines["onnxruntime-training"]
    with pytest.raises(EngineError, match="was made for abacus; this runtime has onnxruntime-training"):
        open_engine(tiny.folder, dataclasses.replace(tiny.manifest, engines={"abacus": entry}))


def test_the_engine_says_what_it_is(make: Make) -> None:
    engine = engine_of(make())
    assert isinstance(engine, OnnxRuntimeTraining)
    assert (engine.name, engine.version) == ("onnxruntime-training", "1.19.2")


THREADS = """
import sys
from pathlib import Path
from lorac_runtime.engines import open_engine
from lorac_runtime.manifest import load
folder = Path(sys.argv[1])
engine = open_engine(folder, load(folder), threads=int(sys.argv[2]))
print(len(list(Path("/proc/self/task").iterdir())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_sets_the_number_of_threads(make: Make) -> None:
    one, four = (
        int(subprocess.run([sys.executable, "-c", THREADS, make().folder, n], capture_output=True, check=True).stdout)
        for n in ("1", "4")
    )
    assert four - one in (6, 9)  # three threads more for each session's pool
