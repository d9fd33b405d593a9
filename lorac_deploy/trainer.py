"""Training in PyTorch: one loop for every method, resumable to the bit.

>>> import numpy as np
>>> from lorac_deploy.data import Dataset, input_spec
>>> rng, labels = np.random.default_rng(0), np.arange(40) % 2
>>> images = (labels[:, None, None, None] * 128 + rng.integers(0, 128, (40, 8, 8, 3))).astype(np.uint8)
>>> data = Dataset(images, labels, ("dark", "bright"))
>>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
>>> report = train(net, data, input_spec=input_spec(images), config=TrainConfig(lr=0.05))
>>> report.val_accuracy, len(report.history)
(1.0, 10)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lorac_deploy.acceleration import Acceleration, accelerated
from lorac_deploy.batches import require_augmentable
from lorac_deploy.data import Dataset
from lorac_deploy.lora import METHODS, LoraConfig, detach, report_of, select_trainable
from lorac_deploy.task_evaluation import METRICS
from lorac_deploy.train_checks import identity, require_classes, require_fit, require_loss
from lorac_deploy.train_config import DEFAULTS, TrainConfig
from lorac_deploy.training_report import TrainReport
from lorac_deploy.training_run import OnProgress, Run, evaluate
from lorac_deploy.training_state import load_state, save_state
from lorac_runtime.errors import CheckpointError
from lorac_runtime.manifest import InputSpec

__all__ = ["DEFAULTS", "TrainConfig", "TrainReport", "evaluate", "train"]


def train(
    module: nn.Module,
    dataset: Dataset,
    *,
    input_spec: InputSpec,
    method: str = "full",
    config: TrainConfig | None = None,
    lora: LoraConfig | None = None,
    test: Dataset | None = None,
    state: Path | None = None,
    restart: bool = False,
    on_progress: OnProgress | None = None,
) -> TrainReport:
    """Train a plain ``module`` in place by a method of `METHODS`; it is left prepared, with the kept weights.

    If anything is raised, ``module`` is plain and as it was, to the bit.

    ``config`` defaults to the method's own (`DEFAULTS`). A part of ``dataset`` is held out for validation; ``test``
    images are looked at in the end only. With a file ``state``, written after each epoch, the same call goes on where
    a run was interrupted, and ends as if it had not been (same machine, same number of threads); ``restart`` begins
    anew. Order, augmentation and dropout follow from ``config.seed``; global random states are not touched.
    Where accelerate started several processes, each calls this and all end with the same weights (docs/cloud.md);
    only the first tells of progress and writes. Afterwards remove the file; `lorac_deploy.lora.fuse` gives a plain
    network, `lorac_deploy.adapter_files.save_module_adapter` an adapter file.

    Raises DivergenceError if the loss becomes non-finite; DataError, ValueError or ConversionError if data, module
    and settings do not fit together; CheckpointError if ``state`` is of another run; EngineError if accelerate is
    needed and missing; OutputError.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config, lora = config or DEFAULTS[method], lora or LoraConfig()
    METHODS[method].loss_of(config.loss)
    require_loss(dataset, config)
    require_classes(dataset)
    require_augmentable(dataset.images, config.augment)
    for images in [dataset] if test is None else [dataset, test]:
        require_fit(module, images, input_spec)
    with accelerated(config.precision) as acceleration:
        config = dataclasses.replace(config, precision=acceleration.precision)
        base = copy.deepcopy(module).eval().to(acceleration.device) if config.loss == "distillation" else None
        who = identity(module, dataset, input_spec, method=method, config=config, lora=lora)
        select_trainable(module, method, lora, bn_policy=config.bn_policy, input_shape=input_spec.shape)
        tell = on_progress if acceleration.index == 0 else None
        try:
            with _threads(config.threads), _channels_last(module), acceleration.placed(module):
                run = Run(
                    module, dataset, input_spec, config=config, on_progress=tell, acceleration=acceleration, base=base
                )
                with acceleration.sharing(module):
                    _carry_out(run, who, state, restart=restart)
                return _report(run, test)
        except BaseException:
            detach(module)
            raise


def _carry_out(run: Run, who: dict[str, str], state: Path | None, *, restart: bool) -> None:
    """All epochs that are left, the state saved after each; the module ends with the kept weights."""
    if state is not None and _left_behind(state, run.acceleration) and not restart:
        run.restore(load_state(state, who))
    else:
        run.begin()
    while len(run.history) < run.epochs:
        run.epoch()
        if state is not None and run.acceleration.index == 0:
            save_state(state, run.state(who))
    run.take_kept()


def _left_behind(state: Path, acceleration: Acceleration) -> bool:
    """Whether an interrupted run left its state. All processes must see it, or none."""
    exists = state.exists()
    (seen,) = acceleration.total(exists)
    if seen not in (0, acceleration.processes):
        raise CheckpointError(
            f"{state} is there for {seen:.0f} of {acceleration.processes} processes: they need one output folder "
            "that all machines share"
        )
    return exists


def _report(run: Run, test: Dataset | None) -> TrainReport:
    plan, history = report_of(run.module), tuple(run.history)
    lora = dataclasses.asdict(plan.config) if plan.adapters else {"blocks": plan.config.blocks}
    lora |= {"share": plan.config.share, "seed": plan.config.seed} if plan.partials else {}
    config = dataclasses.asdict(run.config) | {"lr": run.config.peak_lr}
    config |= {f"lora_{name}": value for name, value in lora.items() if plan.adapters or value}
    return TrainReport(
        method=plan.method,
        bn_policy=plan.bn_policy,
        config=config,
        train_images=len(run.train),
        val_images=0 if run.val is None else len(run.val),
        trained_parameters=plan.trained_parameters,
        model_parameters=plan.model_parameters,
        history=history,
        kept_epoch=run.kept_epoch,
        accuracy_before=run.accuracy_before,
        val_accuracy=run.val_accuracy(),
        test_accuracy=None if test is None else evaluate(run.module, test, run.spec, acceleration=run.acceleration)[1],
        metric=METRICS[run.task].name,
        seconds=sum(record.seconds for record in history),
    )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    """Weights in the memory format of the batches (see `lorac_deploy.batches`); afterwards in the usual one."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
