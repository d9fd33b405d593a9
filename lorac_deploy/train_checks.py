"""Questions asked before training starts: do network, data and settings fit, and which run is this?"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
from torch import nn

from lorac_deploy.batches import ordered_batches
from lorac_deploy.data import Dataset
from lorac_deploy.forward_order import REFUSALS, said
from lorac_deploy.lora import LoraConfig, detach, select_trainable
from lorac_deploy.models import AXES
from lorac_deploy.train_config import LOSS_SETTINGS, TrainConfig
from lorac_runtime.data import LocalData, fingerprint
from lorac_runtime.errors import ConversionError, DataError
from lorac_runtime.manifest import InputSpec
from lorac_runtime.tasks import CLASSIFICATION, LOSSES_OF, REGRESSION, SEGMENTATION


def require_fit(module: nn.Module, dataset: Dataset, spec: InputSpec) -> None:
    """Raise where the network cannot classify these images (or signals).

    Raises DataError for those of another shape; ConversionError if the network cannot process an image; ValueError
    if its outputs are not the classes.
    """
    if (dataset.shape, dataset.is_image) != (spec.shape, spec.is_image):
        raise DataError(
            f"the {dataset.key} are {dataset.shape} {AXES[len(dataset.shape)]}, the network takes {spec.shape}"
        )
    outputs, classes = _outputs(module, dataset, spec), len(dataset.class_names)
    wanted = {SEGMENTATION: (classes, *dataset.labels.shape[1:]), REGRESSION: dataset.labels.shape[1:]}
    if outputs != wanted.get(dataset.task, (classes,)):
        if dataset.task == CLASSIFICATION and len(outputs) == 1:
            raise ValueError(f"the network has {outputs[0]} outputs, the data {classes} classes")
        expected = wanted.get(dataset.task, (classes,))
        raise ValueError(f"the network answers with {outputs} for each sample, the {dataset.task} data want {expected}")


def require_classes(dataset: Dataset) -> None:
    """Raise DataError for images of fewer than two classes."""
    if dataset.task != CLASSIFICATION:
        return
    present = np.unique(dataset.labels)
    if len(present) < 2:
        raise DataError(
            f"there are {len(dataset)} {dataset.key} of {len(present)} class: a network trained on them would always "
            f"give the same answer. Give {dataset.key} of at least two classes"
        )


def require_loss(dataset: Dataset, config: TrainConfig) -> None:
    """Raise ValueError for a loss that does not go with the task of the data, and for settings of another loss."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    idle = [n for n, loss in LOSS_SETTINGS.items() if loss != config.loss and getattr(config, n) != fields[n]]
    if idle:
        raise ValueError(f"{idle[0]} is a setting of the loss {LOSS_SETTINGS[idle[0]]}, and the loss is {config.loss}")
    able = LOSSES_OF[dataset.task]
    if config.loss not in able:
        raise ValueError(f"loss {config.loss!r} does not go with task {dataset.task}: choose {' or '.join(able)}")


def require_batches(samples: int, steps: int, config: TrainConfig) -> None:
    """Raise ValueError if batch statistics would be taken of single images."""
    if config.bn_policy == "batch" and samples // steps < 2:
        raise ValueError(
            f"{samples} training images in batches of {config.batch_size} leave one image alone, whose batch "
            "statistics mean nothing: choose batches of 2 or more, or another BN policy"
        )


def require_parts(images: int, processes: int) -> None:
    """Raise ValueError if the smallest batch has fewer images than there are processes to share it."""
    if images < processes:
        raise ValueError(
            f"a batch of {images} images cannot be shared by {processes} processes: choose a larger --batch-size "
            "(it counts the images of all processes together) or fewer processes"
        )


def require_fresh_head_trains(
    module: nn.Module, fresh: tuple[str, ...], spec: InputSpec, *, method: str, config: TrainConfig, lora: LoraConfig
) -> None:
    """Raise ValueError if the classifier is among the tensors that start ``fresh`` and would not train."""
    report = select_trainable(module, method, lora, bn_policy=config.bn_policy, input_shape=spec.shape)
    detach(module)
    changing = {t.name for t in report.trainables} | {a.weight for a in report.adapters}
    changing |= {p.weight for p in report.partials}
    if (weight := f"{report.head}.weight") in fresh and weight not in changing:
        where = f" in blocks {', '.join(lora.blocks)}" if lora.blocks else ""
        advice = "add head to the blocks" if lora.blocks else "train it first, with a method that does, such as head"
        raise ValueError(
            f"the new classifier {report.head} starts from random numbers, and method {method}{where} would leave it "
            f"at them: {advice}"
        )


def identity(
    module: nn.Module, dataset: Dataset, spec: InputSpec, *, method: str, config: TrainConfig, lora: LoraConfig
) -> dict[str, str]:
    """What makes a run this run, as text by name. The number of threads is left out, it may change."""
    facts = {"method": method, "input": repr(spec), "classes": ", ".join(dataset.class_names)}
    facts |= {name: repr(value) for name, value in dataclasses.asdict(config).items() if name != "threads"}
    facts |= {f"lora_{name}": repr(value) for name, value in dataclasses.asdict(lora).items()}
    facts["images"] = fingerprint(_local(dataset))[:16]
    facts["starting weights"] = _digest(module)[:16]
    return facts


def _local(dataset: Dataset) -> LocalData:
    if dataset.task == CLASSIFICATION:
        return LocalData(dataset.images, dataset.labels)
    return LocalData(dataset.images, None, None, {"targets": dataset.labels})


def _outputs(module: nn.Module, dataset: Dataset, spec: InputSpec) -> tuple[int, ...]:
    """The shape of the answer to a sample."""
    training = module.training
    images, _ = next(ordered_batches(dataset.select(np.arange(1)), spec, 1))
    try:
        with torch.no_grad():
            logits = module.eval()(images)
    except REFUSALS as err:
        raise ConversionError(
            f"the network cannot process {dataset.key} of {dataset.shape} {AXES[len(dataset.shape)]}: {said(err)}"
        ) from err
    finally:
        module.train(training)
    return tuple(logits.shape[1:])


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().numpy()).data)
    return digest.hexdigest()
