"""What a well-typed manifest can still get wrong: paths, shapes, byte ranges, choices, numbers out of range."""

from __future__ import annotations

import collections
import math

from lorac_runtime.additions import addition_problems
from lorac_runtime.delta import LAYOUTS, adapter_shapes
from lorac_runtime.description import (
    BASE,
    BN_POLICIES,
    INPUT_DTYPES,
    LOSSES,
    OPTIMIZERS,
    ROLES,
    Adapter,
    InputSpec,
    Manifest,
    Partial,
    TrainingDefaults,
)
from lorac_runtime.patch_checks import patch_problems, tflite_problems
from lorac_runtime.tasks import CLASSIFICATION, LOSSES_OF, OWN_LOSS, task_problems

FRONT = ("onnxruntime", "prefix_step.onnx")  # the engine that takes features, and what computes them
_OPTIONS_OF = {"adamw": ("betas", "eps", "amsgrad"), "sgd": ("momentum", "dampening", "nesterov")}
_LOSS_OF = {
    "label_smoothing": "cross_entropy",
    "focal_gamma": "focal",
    "temperature": "distillation",
    "distillation_weight": "distillation",
}


def contradictions(m: Manifest) -> list[str]:
    """Every contradiction in a manifest, a line each."""
    shapes = {t.name: t.shape for t in m.trainables}
    problems = [f"files.{name}: names must stay inside the folder" for name in m.files if not _is_plain(name)]
    if BASE not in m.files:
        problems.append(f"files: {BASE} is missing")
    for engine, entry in m.engines.items():
        problems += [f"engines.{engine}: {f} is not in files" for f in entry.files if f not in m.files]
    for name, choice, allowed in _choices(m):
        if choice not in allowed:
            problems.append(f"{name}: {choice!r} is not one of {', '.join(allowed)}")
    problems += _doubles(m)
    for adapter in m.adapters:
        problems += _adapter_problems(adapter, shapes)
    for partial in m.partials:
        problems += _partial_problems(partial, shapes)
    problems += patch_problems(m.patches, m.files) + tflite_problems(m)
    problems += [] if m.additions is None else addition_problems(m.additions)
    problems += input_problems(m.input)
    problems += _feature_problems(m)
    problems += [f"training.{text}" for text in training_problems(m.training)]
    problems += _task_problems(m)
    if len(m.class_names) != m.output.classes:
        problems.append(f"class_names: {len(m.class_names)} names for {m.output.classes} classes")
    return problems


def _task_problems(m: Manifest) -> list[str]:
    if m.task is not None:
        problems = task_problems(m.task, m.training.loss)
        if not problems and (m.output.name, m.output.classes) != (m.task.outputs[0].name, m.task.classes):
            problems.append(f"output: {m.output}, but the first of task.outputs is {m.task.outputs[0]}")
        return problems
    if m.training.loss in LOSSES and m.training.loss not in LOSSES_OF[CLASSIFICATION]:
        return [f"training.loss: {m.training.loss!r} does not go with classification"]
    return ["training.loss: 'graph' needs a task"] if m.training.loss == OWN_LOSS else []


def _choices(m: Manifest) -> list[tuple[str, str, tuple[str, ...]]]:
    roles = [(f"trainables.{t.name}.role", t.role, ROLES) for t in m.trainables]
    return [
        ("bn_policy", m.bn_policy, BN_POLICIES),
        ("coordinates", m.coordinates, ("folded", "unfolded")),
        *roles,
    ]


def _doubles(m: Manifest) -> list[str]:
    """Tensors that are described twice: the second description would be taken for the first."""
    described = {
        "trainables": [t.name for t in m.trainables],
        "adapters": [n for a in m.adapters for n in (a.lora_a, a.lora_b, a.lora_alpha) if n is not None],
        "partials": [p.tensor for p in m.partials],
        "patches": [f"{p.tensor} in {p.file}" for p in m.patches],
    }
    counts = {where: collections.Counter(names) for where, names in described.items()}
    return [
        f"{where}: {name} occurs {n} times" for where, found in counts.items() for name, n in found.items() if n > 1
    ]


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _adapter_problems(a: Adapter, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    where = f"adapters.{a.layer}"
    if a.layout not in LAYOUTS:
        return [f"{where}.layout: {a.layout!r} is not one of {', '.join(LAYOUTS)}"]
    if len(a.weight_shape) not in (2, 3, 4) or min(a.weight_shape) < 1 or a.r < 1 or a.rank < 1:
        return [f"{where}: weight_shape (2 to 4 numbers), r and rank must be positive"]
    if a.pairs < 1 or a.weight_shape[0] % a.pairs:
        return [f"{where}.pairs: {a.pairs} pairs cannot share {a.weight_shape[0]} output channels"]
    shape_a, shape_b = adapter_shapes(a.weight_shape, a.rank, a.pairs)
    problems = []
    for name, shape in ((a.lora_a, shape_a), (a.lora_b, shape_b)):
        if name in shapes and shapes[name] != shape:
            problems.append(f"{where}: {name} has shape {shapes[name]}, expected {shape}")
    still = [name for name in (a.lora_b, a.lora_alpha) if name is not None and name not in shapes]
    return problems + [f"{where}: {name} is not among the trainables" for name in still]


def input_problems(spec: InputSpec) -> list[str]:
    """What is wrong with the description of an input: the first contradiction, a line."""
    if spec.dtype not in INPUT_DTYPES:
        return [f"input.dtype: {spec.dtype!r} is not one of {', '.join(INPUT_DTYPES)}"]
    if len(spec.shape) not in ((3,) if spec.is_image else (1, 2)):
        axes = "(channels, height, width)" if spec.is_image else "(features,) or (channels, length)"
        return [f"input.shape: {spec.shape} of {spec.dtype} {spec.key}, expected {axes}"]
    if any(d < 1 for d in spec.shape):
        return [f"input.shape: {spec.shape} must be positive"]
    if spec.in_graph and not spec.is_image:
        return ["input.in_graph: only images are normalised inside of the graph"]
    if len(spec.mean) != spec.channels or len(spec.std) != spec.channels:
        return [f"input: mean and std need {spec.channels} values each (one per channel)"]
    numbers = (spec.scale, *spec.mean, *spec.std)
    if not all(math.isfinite(v) for v in numbers) or not all(s > 0 for s in (spec.scale, *spec.std)):
        return ["input: scale, mean and std must be finite numbers, scale and std positive"]
    return []


def _partial_problems(p: Partial, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    where = f"partials.{p.layer}"
    if len(p.weight_shape) not in (2, 3, 4) or min(p.weight_shape) < 1 or p.groups < 1:
        return [f"{where}: weight_shape must be 2 to 4 positive numbers, groups at least 1"]
    inside = bool(p.channels) and min(p.channels) >= 0 and max(p.channels) < p.weight_shape[1]
    if not inside or sorted(set(p.channels)) != list(p.channels):
        return [f"{where}.channels: must ascend within 0 to {p.weight_shape[1] - 1}, got {_few(p.channels)}"]
    if p.tensor not in shapes:
        return [f"{where}: {p.tensor} is not among the trainables"]
    if shapes[p.tensor] != p.shape:
        return [f"{where}: {p.tensor} has shape {shapes[p.tensor]}, expected {p.shape}"]
    return []


def _few(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "") if numbers else "none"


def _feature_problems(m: Manifest) -> list[str]:
    names = [feature.name for feature in m.features]
    problems = [f"features: {name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"features: {m.input.name!r} is the name of the images"] if m.input.name in names else []
    wrong = [feature for feature in m.features if any(size < 1 for size in feature.shape)]
    problems += [f"features.{feature.name}: shape {feature.shape} must be positive" for feature in wrong]
    engine, file = FRONT
    if m.features and engine in m.engines and file not in m.engines[engine].files:
        problems.append(f"engines.{engine}: features need {file}, which is not among its files")
    return problems


def training_problems(t: TrainingDefaults) -> list[str]:
    """What is out of range in training settings, or would have no effect, a line each.

    >>> training_problems(TrainingDefaults(epochs=0, momentum=0.9))
    ['epochs: must be at least 1, got 0', 'momentum: is an option of sgd, the optimizer is adamw']
    """
    counts = {"epochs": t.epochs, "batch_size": t.batch_size}
    problems = [f"{name}: must be at least 1, got {count}" for name, count in counts.items() if count < 1]
    for name, value, fits, expected in _ranges(t):
        if not (fits and math.isfinite(value)):
            problems.append(f"{name}: {value} is out of range, expected {expected}")
    return problems + _optimizer_problems(t) + _loss_problems(t)


def _ranges(t: TrainingDefaults) -> list[tuple[str, float, bool, str]]:
    """Name, value, whether it fits, and what would fit; NaN never does."""
    least = {n: getattr(t, n) for n in ("weight_decay", "clip_norm", "momentum", "eps")}
    below_one = {"betas[0]": t.betas[0], "betas[1]": t.betas[1], "label_smoothing": t.label_smoothing}
    return [
        ("lr", t.lr, t.lr > 0, "above 0"),
        ("warmup", t.warmup, 0 <= t.warmup <= 1, "0 to 1"),
        ("dampening", t.dampening, True, "a finite number"),
        ("focal_gamma", t.focal_gamma, t.focal_gamma == 0 or t.focal_gamma >= 1, "0, or 1 and more"),
        ("temperature", t.temperature, t.temperature > 0, "above 0"),
        ("distillation_weight", t.distillation_weight, 0 < t.distillation_weight < 1, "above 0 and below 1"),
        *((name, value, value >= 0, "0 or more") for name, value in least.items()),
        *((name, value, 0 <= value < 1, "at least 0 and below 1") for name, value in below_one.items()),
    ]


def _optimizer_problems(t: TrainingDefaults) -> list[str]:
    """An unknown optimizer, options of the other one, and options that need another: none is ignored."""
    if t.optimizer not in OPTIMIZERS:
        return [f"optimizer: {t.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"]
    default = TrainingDefaults()
    foreign = [(owner, name) for owner, names in _OPTIONS_OF.items() if owner != t.optimizer for name in names]
    idle = [(owner, name) for owner, name in foreign if getattr(t, name) != getattr(default, name)]
    problems = [f"{name}: is an option of {owner}, the optimizer is {t.optimizer}" for owner, name in idle]
    if t.optimizer == "sgd" and t.dampening and not t.momentum:
        problems.append("dampening: needs a momentum above 0")
    if t.optimizer == "sgd" and t.nesterov and (not t.momentum or t.dampening):
        given = f"got momentum {t.momentum} and dampening {t.dampening}"
        problems.append(f"nesterov: needs a momentum above 0 and no dampening, {given}")
    return problems


def _loss_problems(t: TrainingDefaults) -> list[str]:
    if t.loss not in (*LOSSES, OWN_LOSS):
        return [f"loss: {t.loss!r} is not one of {', '.join(LOSSES)}"]
    default = TrainingDefaults()
    idle = [(name, loss) for name, loss in _LOSS_OF.items() if getattr(t, name) != getattr(default, name)]
    return [f"{name}: needs the loss {loss}, got {t.loss}" for name, loss in idle if loss != t.loss]
