"""Tasks other than classification: their descriptions, data files and folders, figures, and the weights of batches."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorac_runtime.data import LocalData, fingerprint
from lorac_runtime.errors import DataError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.metrics import Error, Overlap
from lorac_runtime.task_data import load_task_data
from lorac_runtime.tasks import IGNORED, Output, Target, Task, built_in_targets, task_problems, weight_of

SPEC = InputSpec("input", (3, 6, 8), 1 / 255, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
SCORES = Output("out", (3, 6, 8))
SEGMENTATION = Task("segmentation", (SCORES,), built_in_targets("segmentation", SCORES), IGNORED)
REGRESSION = Task("regression", (Output("out", (2,)),), (Target("targets", "float32", (2,)),))
CUSTOM = Task("custom", (Output("a", (2,)),), (Target("where", "float32", (4,)), Target("what", "int64", ())))


def manifest(*, needs_labels: bool = True) -> Any:
    """What loading data asks of one."""
    return types.SimpleNamespace(input=SPEC, needs_labels=needs_labels)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)


def masks(count: int) -> np.ndarray:
    found = np.random.default_rng(1).integers(0, 3, (count, 6, 8), dtype=np.uint8)
    found[:, 0] = IGNORED
    return found


def load(path: Path, task: Task, **arrays: Any) -> LocalData:
    np.savez(path / "data.npz", **arrays)
    return load_task_data(path / "data.npz", manifest(), task)


def test_masks_come_with_their_images(tmp_path: Path) -> None:
    data = load(tmp_path, SEGMENTATION, images=images(3).transpose(0, 3, 1, 2), labels=masks(3))
    np.testing.assert_array_equal(data.images, images(3))
    np.testing.assert_array_equal(data.targets["labels"], masks(3))
    assert data.labels is None
    assert data.nbytes == images(3).nbytes + masks(3).nbytes


def test_targets_of_a_loss_graph_come_by_their_names(tmp_path: Path) -> None:
    where, what = np.ones((2, 4)), np.array([5, -3], np.int32)
    data = load(tmp_path, CUSTOM, images=images(2), where=where, what=what, ids=np.array(["b", "a"]))
    assert data.targets["where"].dtype == np.float32
    assert data.targets["what"].tolist() == [5, -3]
    assert data.ids is not None
    assert data.ids.tolist() == ["b", "a"]


def wrong(**changes: Any) -> dict[str, Any]:
    return {"images": images(2), "labels": masks(2)} | changes


BAD: dict[str, tuple[Task, dict[str, Any], str]] = {
    "shape": (SEGMENTATION, wrong(labels=masks(2)[:, :5]), r"labels are .* of shape \(2, 5, 8\), expected integers"),
    "classes": (
        SEGMENTATION,
        wrong(labels=masks(2) + np.uint8(7)),
        r"must be 0 to 2, or 255 .* there are 6 \(16 pixels\)",
    ),
    "floats": (SEGMENTATION, wrong(labels=masks(2) / 2), "expected integers"),
    "count": (SEGMENTATION, wrong(labels=masks(3)), "2 images or samples but 3 labels"),
    "all ignored": (SEGMENTATION, wrong(labels=np.full((2, 6, 8), 255)), "no pixel has a label"),
    "none": (SEGMENTATION, {"images": images(2)}, "no labels"),
    "empty": (SEGMENTATION, {"images": images(0), "labels": masks(0)}, "holds no images"),
    "nan": (REGRESSION, {"images": images(2), "targets": np.full((2, 2), np.nan)}, "4 values of 4 that are not finite"),
    "integers": (REGRESSION, {"images": images(2), "targets": np.zeros((2, 2), np.int64)}, "expected finite floats"),
    "two missing": (CUSTOM, {"images": images(2)}, "no where and no what"),
    "two wrong": (
        CUSTOM,
        {"images": images(2), "where": np.zeros((2, 5)), "what": np.zeros((2, 1))},
        r"(?s)where are .*expected finite floats \(N, 4\).*what are .*expected integers \(N\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    task, arrays, text = BAD[case]
    with pytest.raises(DataError, match=text):
        load(tmp_path, task, **arrays)


def test_a_huge_target_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    labels = np.zeros((3, 3000, 8000), np.uint8)
    np.savez_compressed(tmp_path / "data.npz", images=images(3), labels=labels)
    with pytest.raises(DataError, match=r"labels of .* have shape \(3, 3000, 8000\), expected \(N, 6, 8\)"):
        load_task_data(tmp_path / "data.npz", manifest(), SEGMENTATION)


def folder(path: Path, count: int = 3) -> Path:
    for name in ("images", "masks"):
        (path / name).mkdir()
    for number, (image, mask) in enumerate(zip(images(count), masks(count), strict=True)):
        Image.fromarray(image).save(path / "images" / f"{number}.png")
        picture = Image.fromarray(mask)
        if number == 1:
            picture = picture.convert("P")
            picture.putpalette(list(range(256)) * 3)
        picture.save(path / "masks" / f"{number}.{'bmp' if number == 2 else 'png'}")
    return path


def test_a_folder_has_masks_beside_images(tmp_path: Path) -> None:
    data = load_task_data(folder(tmp_path), manifest(), SEGMENTATION)
    np.testing.assert_array_equal(data.images, images(3))
    np.testing.assert_array_equal(data.targets["labels"], masks(3))


def test_without_masks_there_are_none_where_none_are_needed(tmp_path: Path) -> None:
    for path in folder(tmp_path).glob("masks/*"):
        path.unlink()
    assert load_task_data(tmp_path, manifest(needs_labels=False), SEGMENTATION).targets == {}
    with pytest.raises(DataError, match=r"(?s)images/0\.png has no mask.*images/2\.png has no mask"):
        load_task_data(tmp_path, manifest(), SEGMENTATION)


def test_every_mask_that_cannot_be_used_is_listed(tmp_path: Path) -> None:
    masks_ = folder(tmp_path) / "masks"
    Image.fromarray(images(1)[0]).save(masks_ / "0.png")
    Image.fromarray(masks(1)[0].T).save(masks_ / "1.png")
    (masks_ / "2.bmp").write_bytes(b"BM nothing")
    with pytest.raises(DataError) as caught:
        load_task_data(tmp_path, manifest(), SEGMENTATION)
    text = str(caught.value)
    assert "0.png has mode RGB, expected a grey image" in text
    assert "1.png is 6 x 8 pixels, expected 8 x 6 (width x height)" in text
    assert "2.bmp is not a readable image" in text


def test_partners_are_found_by_name(tmp_path: Path) -> None:
    masks_ = folder(tmp_path) / "masks"
    (masks_ / "0.png").rename(masks_ / "zero.png")
    with pytest.raises(DataError, match=r"(?s)images/0\.png has no mask.*masks/zero\.png has no image"):
        load_task_data(tmp_path, manifest(), SEGMENTATION)
    Image.fromarray(masks(1)[0]).save(masks_ / "1.bmp")
    with pytest.raises(DataError, match=r"differ by their ending only: 1\.bmp, 1\.png"):
        load_task_data(tmp_path, manifest(), SEGMENTATION)


def test_only_segmentation_reads_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the task regression takes an \.npz file with images and targets"):
        load_task_data(folder(tmp_path), manifest(), REGRESSION)


def test_targets_tell_runs_apart() -> None:
    one = LocalData(images(2), None, None, {"labels": masks(2)})
    other = dataclasses.replace(one, targets={"labels": np.roll(masks(2), 1)})
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, targets={"masks": masks(2)}))


WRONG_TASKS: dict[str, tuple[Task, str, str]] = {
    "kind": (dataclasses.replace(SEGMENTATION, kind="pose"), "cross_entropy", "task.kind: 'pose' is not one of"),
    "loss": (SEGMENTATION, "l1", "training.loss: 'l1' is not one of those of segmentation"),
    "outputs": (
        dataclasses.replace(SEGMENTATION, outputs=(SCORES, Output("b", (1,)))),
        "focal",
        "2, the task segmentation has one",
    ),
    "no output": (dataclasses.replace(CUSTOM, outputs=()), "graph", "there is none"),
    "twice": (dataclasses.replace(CUSTOM, targets=CUSTOM.targets * 2), "graph", "'what' is named twice"),
    "dtype": (dataclasses.replace(CUSTOM, targets=(Target("x", "bool", ()),)), "graph", "'bool' is not one of"),
    "size": (dataclasses.replace(CUSTOM, outputs=(Output("a", (0,)),)), "graph", "must be positive"),
    "ignored": (dataclasses.replace(REGRESSION, ignore_index=3), "l1", "has no labels to ignore"),
    "target": (
        dataclasses.replace(REGRESSION, outputs=(Output("out", (3,)),)),
        "l1",
        r"expected targets is float32 \(3\)",
    ),
    "flat": (
        dataclasses.replace(SEGMENTATION, outputs=(Output("out", (3,)),)),
        "focal",
        r"expected \(classes, height, width\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_TASKS)
def test_a_task_that_contradicts_itself_is_named(case: str) -> None:
    import re

    task, loss, text = WRONG_TASKS[case]
    assert re.search(text, "\n".join(task_problems(task, loss)))


@pytest.mark.parametrize(("task", "loss"), [(SEGMENTATION, "focal"), (REGRESSION, "mse"), (CUSTOM, "graph")])
def test_a_sound_task_has_no_problem(task: Task, loss: str) -> None:
    assert task_problems(task, loss) == []


def test_a_part_of_a_batch_weighs_what_has_a_label() -> None:
    labels = np.array([[0, 255], [255, 255], [1, 2]])
    part = slice(0, 2)
    assert weight_of(SEGMENTATION, "cross_entropy", {"labels": labels}, part, 3) == 1
    assert weight_of(SEGMENTATION, "distillation", {"labels": labels}, part, 3) == 2
    assert weight_of(dataclasses.replace(SEGMENTATION, ignore_index=None), "focal", {"labels": labels}, part, 3) == 4
    assert weight_of(REGRESSION, "l1", {"targets": np.zeros((3, 2))}, part, 3) == 2
    assert weight_of(None, "cross_entropy", np.zeros(3), part, 3) == 2


def test_overlaps_are_those_of_a_count_by_hand() -> None:
    rng, meter = np.random.default_rng(0), Overlap(4, IGNORED)
    truth = rng.integers(0, 3, (6, 5, 5))
    truth[0, 0] = IGNORED
    answers = rng.integers(0, 3, (6, 5, 5))
    scores = np.eye(4)[answers].transpose(0, 3, 1, 2)
    for part in (slice(0, 2), slice(2, 6)):
        meter.add(scores[part], {"labels": truth[part]})
    kept = truth != IGNORED
    shares = [
        ((truth == c) & (answers == c)).sum() / (((truth == c) | (answers == c)) & kept).sum() for c in range(3)
    ]  # class 3 neither occurs nor is answered
    figures = meter.figures()
    assert figures.mean_iou == pytest.approx(np.mean(shares))
    assert figures.accuracy == pytest.approx((answers == truth)[kept].mean())


def test_without_a_labelled_pixel_there_are_no_figures() -> None:
    meter = Overlap(2, IGNORED)
    meter.add(np.zeros((1, 2, 2, 2)), {"labels": np.full((1, 2, 2), IGNORED)})
    assert (meter.figures().accuracy, meter.figures().mean_iou) == (None, None)


def test_errors_are_means_over_everything() -> None:
    meter = Error()
    meter.add(np.array([[1.0, 2.0]]), {"targets": np.array([[0.0, 4.0]])})
    meter.add(np.array([[1.0, 1.0], [0.0, 0.0]]), {"targets": np.zeros((2, 2))})
    assert meter.figures().error == pytest.approx(5 / 6)
