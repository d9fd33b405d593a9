"""The network that a training starts from: a checkpoint folder, or a new network, perhaps with pretrained weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.models import ModelSpec, build, load_imagenet, load_weights, replace_head, require_axes
from lorac_runtime.manifest import InputSpec

IMAGENET = "imagenet"


@dataclasses.dataclass(frozen=True)
class Start:
    """A plain network and what it takes and gives.

    ``folder`` is a checkpoint that holds this very network, None if there is none. ``fresh`` names tensors that have
    random first values although weights were loaded.
    """

    module: nn.Module
    spec: ModelSpec
    input: InputSpec
    class_names: tuple[str, ...]
    folder: Path | None = None
    fresh: tuple[str, ...] = ()


def from_checkpoint(folder: Path) -> Start:
    """The network of a checkpoint folder. Raises CheckpointError."""
    found = load_checkpoint(folder)
    return Start(found.module, found.spec, found.input, found.class_names, folder)


def with_new_head(start: Start, class_names: tuple[str, ...], *, seed: int = 0) -> Start:
    """The same network with a fresh head for these classes; its module is changed in place."""
    head = replace_head(start.module, len(class_names), seed=seed)
    fresh = tuple(name for name in start.module.state_dict() if name.startswith(f"{head}."))
    spec = dataclasses.replace(start.spec, classes=len(class_names))
    return Start(start.module, spec, start.input, class_names, None, fresh)


def from_model(
    spec: ModelSpec,
    input_spec: InputSpec,
    *,
    class_names: tuple[str, ...],
    weights: Path | None = None,
    seed: int = 0,
) -> Start:
    """A new network, with the ``weights`` of a file, or torchvision's or timm's where ``weights`` is `IMAGENET`.

    A head for another number of classes and a stem of another size keep their first values.

    >>> from lorac_deploy.data import input_spec, load_dataset
    >>> digits = load_dataset("digits", size=(16, 16))
    >>> start = from_model(ModelSpec("resnet20", 10), input_spec(digits.images), class_names=digits.class_names)
    >>> start.input.shape, start.folder
    ((3, 16, 16), None)

    Raises CheckpointError if the weights cannot be had or do not fit; ValueError if there are none by that name, or if
    the network takes samples of another kind.
    """
    require_axes(spec.name, input_spec.shape)
    module = build(spec, seed=seed)
    if weights is None:
        return Start(module, spec, input_spec, class_names)
    named = str(weights) == IMAGENET
    report = load_imagenet(module, spec.name) if named else load_weights(module, weights, name=spec.name)
    return Start(module, spec, input_spec, class_names, None, report.fresh)
