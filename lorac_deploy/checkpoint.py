"""A trained network as a folder: ``model.safetensors`` and ``config.json``, which says how to build and feed it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lorac_deploy.lora_layers import LoraLayer
from lorac_deploy.models import AXES, ModelSpec, architecture, build
from lorac_deploy.partial_layers import PartialLayer
from lorac_runtime.errors import CheckpointError, listed
from lorac_runtime.files import output_folder, staged
from lorac_runtime.manifest import InputSpec, sha256
from lorac_runtime.manifest_checks import input_problems
from lorac_runtime.schema import decode
from lorac_runtime.tasks import CLASSIFICATION, REGRESSION

FORMAT = "lorac-checkpoint"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The content of config.json."""

    format: str
    version: int
    model: ModelSpec
    input: InputSpec
    class_names: tuple[str, ...]
    metrics: dict[str, float]
    weights_sha256: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; ``module`` is in evaluation mode."""

    module: nn.Module
    spec: ModelSpec
    input: InputSpec
    class_names: tuple[str, ...]
    metrics: dict[str, float]


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    spec: ModelSpec,
    *,
    input_spec: InputSpec,
    class_names: tuple[str, ...],
    metrics: Mapping[str, float],
) -> None:
    """Write ``module``, which ``build(spec)`` made, into ``folder``; other files there stay.

    ``metrics`` are figures worth keeping, such as accuracies (fractions). Both files are written beside their
    targets and then renamed; config.json holds the hash of the weights, so that a mixture of two saves is seen.

    Raises ValueError if the module still has adapters or contradicts ``spec``, ``input_spec`` or ``class_names``;
    OutputError if the folder cannot be written.
    """
    _require_consistent(module, spec, input_spec, class_names=class_names, metrics=metrics)
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    config = CheckpointConfig(
        format=FORMAT,
        version=VERSION,
        model=spec,
        input=input_spec,
        class_names=class_names,
        metrics={name: float(value) for name, value in metrics.items()},
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    text = json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n"
    output_folder(folder)
    with staged(folder / WEIGHTS) as weights_part, staged(folder / CONFIG) as config_part:
        weights_part.write_bytes(weights)
        config_part.write_text(text, encoding="utf-8")


def task_of(folder: Path) -> str:
    """What the network in a folder was trained for; classification where there is none, which loading it will say.

    Raises CheckpointError for a description that cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return CLASSIFICATION
    return _read_config(folder / CONFIG).model.task


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that `save_checkpoint` wrote.

    Raises CheckpointError for anything missing, damaged or contradictory, naming all of it.
    """
    config = _read_config(folder / CONFIG)
    module = build(config.model)
    tensors = _read_tensors(folder / WEIGHTS, config)
    problems = _differences(module.state_dict(), tensors)
    if problems:
        raise CheckpointError(listed(f"{folder / WEIGHTS} does not hold a {config.model.name}:", problems))
    module.load_state_dict(tensors)
    return Checkpoint(module.eval(), config.model, config.input, config.class_names, config.metrics)


def _require_consistent(
    module: nn.Module,
    spec: ModelSpec,
    input_spec: InputSpec,
    *,
    class_names: tuple[str, ...],
    metrics: Mapping[str, float],
) -> None:
    if any(isinstance(part, LoraLayer | PartialLayer) for part in module.modules()):
        raise ValueError("a checkpoint holds a plain network: save fuse(module), or detach(module) first")
    problems = _contradictions(spec, input_spec, class_names)
    with torch.device("meta"):
        problems += _differences(build(spec).state_dict(), module.state_dict())
    problems += [f"metric {name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if problems:
        raise ValueError(listed(f"this network cannot be saved as a {spec.name}:", problems))


def _contradictions(spec: ModelSpec, input_spec: InputSpec, class_names: tuple[str, ...]) -> list[str]:
    problems = input_problems(input_spec)
    axes = architecture(spec.name).axes
    if len(input_spec.shape) == axes and input_spec.shape[0] != spec.channels:
        problems.append(f"input: {input_spec.shape[0]} channels, the model takes {spec.channels}")
    elif len(input_spec.shape) != axes and not problems:
        problems.append(f"input: shape {input_spec.shape}, the model takes {AXES[axes]}")
    if len(class_names) != (0 if spec.task == REGRESSION else spec.classes):
        problems.append(f"class_names: {len(class_names)} names for {spec.classes} classes")
    return problems


def _differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in expected]
    for name, value in expected.items():
        if name in given and given[name].shape != value.shape:
            problems.append(f"{name} has shape {tuple(given[name].shape)}, expected {tuple(value.shape)}")
    return problems


def _read_config(path: Path) -> CheckpointConfig:
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CheckpointError(f"{path} not found: {path.parent} is not a checkpoint folder") from err
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read ({err}); train or copy the checkpoint again") from err
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is not a checkpoint of this version (expected {FORMAT} {VERSION})")
    problems: list[str] = []
    try:
        config: CheckpointConfig | None = decode(CheckpointConfig, raw, "", problems)
    except ValueError as err:  # ModelSpec's own check
        raise CheckpointError(f"{path}: {err}") from err
    if config is not None:
        problems += _contradictions(config.model, config.input, config.class_names)
    if config is None or problems:
        raise CheckpointError(listed(f"{path} does not describe a checkpoint:", problems))
    return config


def _read_tensors(path: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} not found: the checkpoint is not complete")
    if sha256(path) != config.weights_sha256:
        raise CheckpointError(
            f"{path} was altered, cut short, or belongs to another save than {CONFIG} beside it: "
            "train or copy the checkpoint again"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{path} is not a whole safetensors file ({err})") from err
    return tensors
