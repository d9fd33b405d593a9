"""The engine's steps against PyTorch and against formulas written here, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny_torch
import torch
from engine_cases import RELU, SMOOTH, Make, batch, distance, engine_of, maker, reference_values, worst
from tiny_network import CLASSES, Arrays, C, H, W

from lorac_runtime.engines import open_engine
from lorac_runtime.engines.onnxruntime_training import OnnxRuntimeTraining
from lorac_runtime.errors import EngineError


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


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


def test_an_optimizer_that_the_engine_does_not_know_is_refused(make: Make) -> None:
    tiny = make()
    training = dataclasses.replace(tiny.manifest.training, optimizer="lion")
    with pytest.raises(EngineError, match="its optimizer is 'lion', expected adamw or sgd"):
        open_engine(tiny.folder, dataclasses.replace(tiny.manifest, training=training), threads=1)


def test_micro_batches_are_refused(make: Make) -> None:
    tiny = make()
    with pytest.raises(EngineError, match="onnxruntime-training has no micro-batches: leave --micro-batch out"):
        open_engine(tiny.folder, tiny.manifest, micro_batch=4)


def test_an_artifact_for_another_engine_is_refused(make: Make) -> None:
    tiny = make()
    entry = tiny.manifest.engines["onnxruntime-training"]
    with pytest.raises(EngineError, match="was made for abacus; this runtime has onnxruntime, onnxruntime-training"):
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
