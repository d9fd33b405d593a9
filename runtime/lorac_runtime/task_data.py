"""Local data of other tasks than classification: an ``.npz`` file with targets of the loss, or images with masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_runtime.data import LocalData, is_folder, load_data, raw_samples, sample_shapes
from lorac_runtime.errors import DataError, listed
from lorac_runtime.image_folder import read_masks
from lorac_runtime.manifest import Manifest
from lorac_runtime.npz import read_named
from lorac_runtime.sample_ids import checked_ids
from lorac_runtime.signals import described
from lorac_runtime.tasks import LABELS, SEGMENTATION, Target, Task

Array = npt.NDArray[Any]
_KINDS = {"int64": "iu", "float32": "f"}
_SAID = {"int64": "integers", "float32": "finite floats"}


def load_local(path: Path, manifest: Manifest) -> LocalData:
    """The data that an artifact trains on, whatever its task; what training needs must be there.

    Raises DataError saying what was found and what was expected.
    """
    if manifest.task is not None:
        return load_task_data(path, manifest, manifest.task)
    required = 2 if manifest.needs_labels else 0
    return load_data(path, manifest.input, manifest.output.classes, manifest.class_names, require_classes=required)


def load_task_data(path: Path, manifest: Manifest, task: Task) -> LocalData:
    """Images (or signals) and the targets of a task, by name.

    An ``.npz`` file holds ``images`` or ``samples`` as `load_data` takes them, and an array (N, *shape) for each
    target: of segmentation ``labels``, integers 0 to classes - 1 or the task's ``ignore_index``; of regression
    ``targets``, floats. Segmentation takes a folder too: ``images`` and, with equal names but for the ending,
    ``masks``, whose pixels are numbers of classes.

    Raises DataError saying what was found and what was expected.
    """
    if is_folder(path):
        data = _from_folder(path, manifest, task)
    else:
        data = _from_file(path, manifest, task)
    if not len(data):
        raise DataError(f"{path} holds no {manifest.input.key}")
    problems = [text for target in task.targets for text in _target_problems(data, target, task)]
    if problems:
        raise DataError(listed(f"the targets of {path} do not fit:", problems))
    return dataclasses.replace(data, targets={name: _stored(value) for name, value in data.targets.items()})


def _from_file(path: Path, manifest: Manifest, task: Task) -> LocalData:
    spec = manifest.input
    shapes: dict[str, list[tuple[int, ...]]] = {spec.key: sample_shapes(spec), "ids": [()]}
    shapes |= {t.name: [t.shape] for t in task.targets}
    wanted = [t.name for t in task.targets] if manifest.needs_labels else []
    found = read_named(path, shapes, needed=(spec.key, *wanted))
    images = raw_samples(path, found[spec.key], spec)
    targets = {t.name: found[t.name] for t in task.targets if t.name in found}
    ids = None if "ids" not in found else checked_ids(path, found["ids"], len(images))
    return LocalData(np.ascontiguousarray(images), None, ids, targets)


def _from_folder(path: Path, manifest: Manifest, task: Task) -> LocalData:
    if task.kind != SEGMENTATION or not manifest.input.is_image:
        names = ", ".join(t.name for t in task.targets)
        raise DataError(
            f"{path} is a folder: the task {task.kind} takes an .npz file with {manifest.input.key} and {names}"
        )
    images, masks = read_masks(path, manifest.input, task.targets[0].shape, need_masks=manifest.needs_labels)
    return LocalData(images, None, None, {} if masks is None else {LABELS: masks})


def _target_problems(data: LocalData, target: Target, task: Task) -> list[str]:
    if target.name not in data.targets:
        return []
    values = data.targets[target.name]
    expected = f"{_SAID[target.dtype]} (N{''.join(f', {size}' for size in target.shape)})"
    if values.dtype.kind not in _KINDS[target.dtype] or values.shape[1:] != target.shape:
        return [f"{target.name} are {described(values)} of shape {values.shape}, expected {expected}"]
    if len(values) != len(data):
        return [f"there are {len(data)} images or samples but {len(values)} {target.name}; there must be one each"]
    if target.dtype == "float32":
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        return [f"{target.name} have {bad} values of {values.size} that are not finite"] if bad else []
    return _label_problems(values, task) if task.kind == SEGMENTATION else []


def _label_problems(labels: Array, task: Task) -> list[str]:
    values, counts = np.unique(labels, return_counts=True)
    known = (values >= 0) & (values < task.classes) | (values == task.ignore_index)
    if known.all():
        return [] if (values != task.ignore_index).any() else ["no pixel has a label: all are to be ignored"]
    wrong = [f"{v} ({n} pixels)" for v, n in zip(values[~known], counts[~known], strict=True)]
    shown = ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else "")
    spared = "" if task.ignore_index is None else f", or {task.ignore_index} for pixels that do not count"
    return [f"labels must be 0 to {task.classes - 1}{spared}, but there are {shown}"]


def _stored(values: Array) -> Array:
    """Masks stay as small as they came: an engine widens those of a batch."""
    return np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else None)
