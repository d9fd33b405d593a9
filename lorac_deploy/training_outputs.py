"""What a finished training leaves in its output folder."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.lora import detach, fuse, report_of
from lorac_deploy.start import Start
from lorac_deploy.training_report import TrainReport, save_report
from lorac_runtime.manifest import ADAPTER

BASE = "base"


def save_training(out: Path, start: Start, report: TrainReport) -> Path:
    """Save what `lorac_deploy.trainer.train` made of ``start``; returns the adapter file or the checkpoint folder.

    A method of adapters leaves adapter.safetensors, and, where no checkpoint holds the network that it started from,
    that network in ``base/``; other methods leave a checkpoint. report.json and plot.png come with both.

    Raises OutputError.
    """
    prepared = report_of(start.module)
    adapted = bool(prepared.adapters or prepared.partials or prepared.modules)
    if adapted:
        if start.folder is None:
            plain = copy.deepcopy(start.module)
            detach(plain)
            _save(out / BASE, plain, start, {})
        save_module_adapter(out / ADAPTER, start.module, model=start.spec.name)
    else:
        _save(out, fuse(start.module), start, _metrics(report))
    save_report(report, out)
    return out / ADAPTER if adapted else out


def _save(folder: Path, module: nn.Module, start: Start, metrics: dict[str, float]) -> None:
    save_checkpoint(folder, module, start.spec, input_spec=start.input, class_names=start.class_names, metrics=metrics)


def _metrics(report: TrainReport) -> dict[str, float]:
    found = {"val_accuracy": report.val_accuracy, "test_accuracy": report.test_accuracy}
    return {name: value for name, value in found.items() if value is not None}
