"""What training leaves in its output folder can be loaded, and gives the same answers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import dataset, equal, spec, state_of

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.batches import ordered_batches
from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.start import Start, from_model
from lorac_deploy.trainer import TrainConfig, TrainReport, train
from lorac_deploy.training_outputs import save_training

DATA = dataset(30)
SPEC = ModelSpec("resnet20", 3)
QUICK = TrainConfig(epochs=1, batch_size=15, val_fraction=0.2, lr=0.01)


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """As where matplotlib is not installed: drawing takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


def trained(method: str, policy: str) -> tuple[Start, TrainReport]:
    start = from_model(SPEC, spec(DATA), class_names=DATA.class_names)
    config = dataclasses.replace(QUICK, bn_policy=policy)
    report = train(start.module, DATA, input_spec=start.input, method=method, config=config, test=dataset(12, seed=2))
    return start, report


def logits(net: torch.nn.Module) -> np.ndarray:
    images = next(ordered_batches(DATA, spec(DATA), 30))[0]
    with torch.no_grad():
        return net.eval()(images).numpy()


@pytest.mark.parametrize(("method", "policy"), [("full", "batch"), ("head", "frozen"), ("head", "batch")])
def test_full_and_head_leave_a_checkpoint(tmp_path: Path, method: str, policy: str) -> None:
    start, report = trained(method, policy)
    assert save_training(tmp_path, start, report) == tmp_path
    found = load_checkpoint(tmp_path)
    np.testing.assert_array_equal(logits(found.module), logits(start.module))
    assert found.class_names == DATA.class_names
    assert found.metrics == {"val_accuracy": report.val_accuracy, "test_accuracy": report.test_accuracy}
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "report.json"}


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_lora_c_leaves_an_adapter_and_the_base_it_belongs_to(tmp_path: Path, policy: str) -> None:
    start, report = trained("lora-c", policy)
    assert save_training(tmp_path, start, report) == tmp_path / "adapter.safetensors"
    base = load_checkpoint(tmp_path / "base").module
    assert equal(state_of(base), state_of(build(SPEC)))
    before = logits(base)
    attach_adapter(tmp_path / "adapter.safetensors", base)
    np.testing.assert_allclose(logits(base), logits(start.module), atol=1e-5)
    assert np.abs(logits(base) - before).max() > 1e-3


def test_no_base_is_written_where_a_checkpoint_holds_it(tmp_path: Path) -> None:
    start, report = trained("lora-c", "frozen")
    save_training(tmp_path, dataclasses.replace(start, folder=tmp_path), report)
    assert not (tmp_path / "base").exists()
