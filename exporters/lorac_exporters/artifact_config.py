"""What a training artifact trains and how: its settings, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses

from lorac_exporters.choices import (
    ENGINE_CHOICES,
    FORM_CHOICES,
    TFLITE_CHOICES,
    EngineChoice,
    FormChoice,
    TfliteChoice,
)
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_exporters.task_config import TaskConfig
from lorac_runtime import manifest as mf
from lorac_runtime.manifest_checks import training_problems
from lorac_runtime.tasks import CLASSIFICATION, LOSSES_OF


@dataclasses.dataclass(frozen=True)
class ArtifactConfig:
    """What a training artifact trains and how; see `LoraConfig` and `TrainingDefaults` for their fields.

    ``bn_policy`` and ``training`` None are the method's own (see `policy` and `settings`). A method that needs a
    certain loss refuses another one in ``training``. ``engine`` says what it is for: ``auto`` is `onnxruntime` wherever
    that can train the model. ``form`` is how that engine computes adapters: thin branches, updated weights, or for each
    layer what costs less (``auto``). ``tflite`` says how base.tflite stores its weights; ``auto`` is float32, or no
    such file where TFLite cannot do the model. ``task`` is what the network does.

    Raises ValueError for a value out of range.
    """

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    method: str = "lora-c"
    bn_policy: mf.BnPolicy | None = None
    engine: EngineChoice = "auto"
    form: FormChoice = "auto"
    tflite: TfliteChoice = "auto"
    training: mf.TrainingDefaults | None = None
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        METHODS[self.method].policy(self.bn_policy)
        METHODS[self.method].loss_of(self.settings.loss)
        problems = [*training_problems(self.settings), *_engine_problems(self.engine, self.settings)]
        if self.form not in FORM_CHOICES:
            problems.append(f"form {self.form!r} is not one of {', '.join(FORM_CHOICES)}")
        elif self.form != "auto" and not METHODS[self.method].adapts:
            problems.append(f"form {self.form!r} is one of adapters, and method {self.method} has none: leave it out")
        if self.settings.loss == "distillation" and self.policy == "recalibrate":
            problems.append(
                "loss 'distillation' compares with the base as it is, and BN policy 'recalibrate' changes it"
            )
        problems += _task_problems(self.task, self.settings, self.engine)
        if self.tflite not in TFLITE_CHOICES:
            problems.append(f"tflite {self.tflite!r} is not one of {', '.join(TFLITE_CHOICES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def policy(self) -> mf.BnPolicy:
        """``bn_policy``, or the method's default."""
        return METHODS[self.method].policy(self.bn_policy)

    @property
    def settings(self) -> mf.TrainingDefaults:
        """``training``, or the method's own.

        >>> ArtifactConfig(method="head").settings.lr, ArtifactConfig(method="full").settings.lr
        (0.03, 0.001)
        """
        return METHODS[self.method].training() if self.training is None else self.training


def _task_problems(task: TaskConfig, training: mf.TrainingDefaults, engine: EngineChoice) -> list[str]:
    """A loss that is not one of the task's, and an engine that has the classifier's only; a line each."""
    able = LOSSES_OF[task.kind]
    problems = []
    if training.loss not in able:
        problems.append(f"loss {training.loss!r} does not go with task {task.kind}: choose {' or '.join(able)}")
    if task.kind != CLASSIFICATION and engine not in ("auto", "onnxruntime"):
        problems.append(f"engine {engine!r} has the losses of classifiers only: task {task.kind} needs onnxruntime")
    return problems


def _engine_problems(choice: EngineChoice, training: mf.TrainingDefaults) -> list[str]:
    """Settings that an engine asked for cannot offer, a line each."""
    if choice not in ENGINE_CHOICES:
        return [f"engine {choice!r} is not one of {', '.join(ENGINE_CHOICES)}"]
    if choice in ("auto", "onnxruntime"):
        return []
    from lorac_exporters.training_ort import optimizer_problems

    return optimizer_problems(training)
