"""Training steps of other tasks than classification against PyTorch: losses, and every tensor after the steps."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from task_networks import CLASSES, SPEC, Arrays, Detector, Loss, export, in_pytorch, unet
from torch import Tensor, nn
from torch.nn import functional

from lorac_exporters.task_config import TaskConfig
from lorac_runtime.engines import open_engine
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.tasks import IGNORED

SGD = TrainingDefaults(optimizer="sgd", clip_norm=0.0, batch_size=4)
LR = 0.1
STEPS = 3


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SPEC.shape)).astype(np.float32)


def masks(count: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, CLASSES + 1, (count, *SPEC.shape[1:]))
    return np.where(found == CLASSES, IGNORED, found)


def flattened(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n, classes) and labels (n,) of the pixels that have one."""
    kept = labels != IGNORED
    return scores.movedim(1, -1)[kept], labels[kept]


def focal(scores: Tensor, labels: Tensor, gamma: float) -> Tensor:
    surprise = functional.cross_entropy(*flattened(scores, labels), reduction="none")
    return ((1 - torch.exp(-surprise)) ** gamma * surprise).mean()


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels, ignore_index=IGNORED)


def smoothed(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels, ignore_index=IGNORED, label_smoothing=0.1)


SEGMENTATION: dict[str, tuple[TrainingDefaults, Loss]] = {
    "cross_entropy": (SGD, cross_entropy),
    "smoothed": (dataclasses.replace(SGD, label_smoothing=0.1), smoothed),
    "focal": (dataclasses.replace(SGD, loss="focal"), lambda s, labels: focal(s, labels, 2.0)),
    "focal_gamma": (dataclasses.replace(SGD, loss="focal", focal_gamma=3.5), lambda s, labels: focal(s, labels, 3.5)),
}
REGRESSION: dict[str, Loss] = {
    "l1": lambda values, targets: functional.l1_loss(values, targets),
    "mse": lambda values, targets: functional.mse_loss(values, targets),
}


def check(folder: Path, net: nn.Module, loss: Loss, targets: Callable[[int, int], Arrays], manifest: object) -> None:
    engine = open_engine(folder, manifest, engine="onnxruntime", threads=1)  # type: ignore[arg-type]
    batches = [(images(4, seed), targets(4, seed)) for seed in range(STEPS)]
    expected, after = in_pytorch(folder, manifest, copy.deepcopy(net), loss, batches, LR)  # type: ignore[arg-type]
    evaluated = engine.eval_step(*batches[0])[0]
    losses = [engine.train_step(x, t, LR) for x, t in batches]
    assert evaluated == pytest.approx(losses[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-5)
    start, found = _start(folder), engine.state()
    for name, value in after.items():
        moved = np.abs(value - start[name]).max()
        assert moved > 0, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * moved + 1e-7, err_msg=name)


def _start(folder: Path) -> Arrays:
    from lorac_runtime.adapter import load_adapter
    from lorac_runtime.manifest import ADAPTER

    return dict(load_adapter(folder / ADAPTER).tensors)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_steps_are_those_of_pytorch(tmp_path: Path, name: str) -> None:
    training, loss = SEGMENTATION[name]
    net = unet()
    manifest = export(tmp_path / "a", net, TaskConfig("segmentation"), training, classes=CLASSES)
    check(tmp_path / "a", net, loss, lambda n, seed: {"labels": masks(n, seed)}, manifest)


@pytest.mark.parametrize("name", REGRESSION)
def test_regression_steps_are_those_of_pytorch(tmp_path: Path, name: str) -> None:
    net = unet(2)
    manifest = export(tmp_path / "a", net, TaskConfig("regression"), dataclasses.replace(SGD, loss=name))

    def targets(count: int, seed: int) -> Arrays:
        return {"targets": np.random.default_rng(seed + 9).standard_normal((count, 2, 12, 12)).astype(np.float32)}

    check(tmp_path / "a", net, REGRESSION[name], targets, manifest)


def test_distillation_steps_are_those_of_pytorch(tmp_path: Path) -> None:
    net, base = unet(), unet().double()
    training = dataclasses.replace(SGD, loss="distillation", temperature=3.0, distillation_weight=0.25)
    manifest = export(tmp_path / "a", net, TaskConfig("segmentation"), training, classes=CLASSES)
    seen: list[np.ndarray] = []

    def targets(count: int, seed: int) -> Arrays:
        seen.append(images(count, seed))
        return {"labels": masks(count, seed)}

    steps = iter(range(STEPS))

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            known = functional.log_softmax(base(torch.from_numpy(seen[next(steps)]).double()) / 3.0, 1)
        soft = functional.log_softmax(scores / 3.0, 1)
        kl = functional.kl_div(soft, known, log_target=True, reduction="none").sum(1).mean()
        total = functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
        return 0.75 * total / labels.numel() + 0.25 * 9.0 * kl

    check(tmp_path / "a", net, loss, targets, manifest)


def detector_loss(outputs: tuple[Tensor, Tensor], found: Tensor, boxes: Tensor) -> Tensor:
    """Scores of all cells, boxes of those that hold an object; as many objects as there are count."""
    scores, guesses = outputs
    present = functional.binary_cross_entropy_with_logits(scores, found)
    error = functional.smooth_l1_loss(guesses, boxes, reduction="none").mean(1, keepdim=True)
    return present + (error * found).sum() / found.sum().clamp(min=1.0)


DETECTOR_LOSS = """
<ir_version: 9, opset_import: ["": 18]>
detector_loss (float[batch,1,3,3] scores, float[batch,4,3,3] boxes, float[batch,1,3,3] found, float[batch,4,3,3] wanted)
    => (float loss) {
  one = Constant <value = float {1}> ()
  half = Constant <value = float {0.5}> ()
  axis = Constant <value = int64[1] {1}> ()
  soft = Softplus(scores)
  claimed = Mul(scores, found)
  surprise = Sub(soft, claimed)
  present = ReduceMean <keepdims = 0> (surprise)
  difference = Sub(boxes, wanted)
  size = Abs(difference)
  near = Less(size, one)
  square = Mul(size, size)
  below = Mul(square, half)
  above = Sub(size, half)
  huber = Where(near, below, above)
  error = ReduceMean(huber, axis)
  counted = Mul(error, found)
  total = ReduceSum <keepdims = 0> (counted)
  objects = ReduceSum <keepdims = 0> (found)
  many = Max(objects, one)
  boxed = Div(total, many)
  loss = Add(present, boxed)
}
"""


def exported_detector(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(1)
    net, path = Detector().eval(), tmp_path / "detector.onnx"
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        torch.onnx.export(
            net,
            (torch.zeros(2, *SPEC.shape),),
            path,
            dynamo=True,
            opset_version=18,
            input_names=["input"],
            output_names=["scores", "boxes"],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    return net, path


def cells(count: int, seed: int) -> Arrays:
    rng = np.random.default_rng(seed + 40)
    found = (rng.random((count, 1, 3, 3)) < 0.3).astype(np.float32)
    return {"found": found, "wanted": rng.normal(0, 2, (count, 4, 3, 3)).astype(np.float32)}


def test_a_detector_with_its_owners_loss_graph_steps_as_in_pytorch(tmp_path: Path) -> None:
    from lorac_exporters.artifact import ArtifactConfig, write_artifact
    from lorac_exporters.onnx_file import read_graph
    from lorac_exporters.plan import LoraConfig

    net, path = exported_detector(tmp_path)
    onnx.save(onnx.parser.parse_model(DETECTOR_LOSS), tmp_path / "loss.onnx")
    task = TaskConfig("custom", tmp_path / "loss.onnx")
    training = dataclasses.replace(SGD, loss="graph")
    config = ArtifactConfig(lora=LoraConfig(rank=2), task=task, training=training)
    manifest = write_artifact(
        read_graph(path), tmp_path / "a", name="net", spec=SPEC, class_names=(), config=config
    ).manifest
    assert manifest.task is not None
    assert [(t.name, t.dtype, t.shape) for t in manifest.task.targets] == [
        ("found", "float32", (1, 3, 3)),
        ("wanted", "float32", (4, 3, 3)),
    ]
    full = {t.name for t in manifest.trainables if t.role == "weight"}
    assert full == {"stem.weight", "score.weight", "box.weight"}

    def loss(outputs: tuple[Tensor, Tensor], found: Tensor, wanted: Tensor) -> Tensor:
        return detector_loss(outputs, found, wanted)

    check(tmp_path / "a", net, loss, cells, manifest)
