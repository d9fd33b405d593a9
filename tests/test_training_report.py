"""report.json and the plot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import PIL.Image
import pytest

from lorac_deploy.training_report import EpochRecord, TrainReport, save_report
from lorac_runtime.errors import OutputError

REPORT = TrainReport(
    method="full",
    bn_policy="batch",
    config={"epochs": 2, "lr": 0.001, "threads": None},
    train_images=9,
    val_images=3,
    trained_parameters=10,
    model_parameters=20,
    history=(EpochRecord(1, 1.0, 1.2, 0.5, 0.1), EpochRecord(2, 0.5, 0.7, 0.75, 0.1)),
    kept_epoch=2,
    accuracy_before=0.25,
    val_accuracy=0.75,
    test_accuracy=None,
    seconds=0.2,
)


def test_the_report_is_json_with_every_field(tmp_path: Path) -> None:
    save_report(REPORT, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found) == {field.name for field in dataclasses.fields(TrainReport)}
    assert found["history"][1] == {"epoch": 2, "loss": 0.5, "val_loss": 0.7, "val_accuracy": 0.75, "seconds": 0.1}
    assert found["config"]["threads"] is None


@pytest.mark.parametrize("validated", [True, False])
def test_a_plot_is_drawn_with_and_without_validation(tmp_path: Path, validated: bool) -> None:
    pytest.importorskip("matplotlib")
    report = REPORT
    if not validated:
        history = tuple(dataclasses.replace(r, val_loss=None, val_accuracy=None) for r in REPORT.history)
        report = dataclasses.replace(REPORT, history=history, val_images=0, val_accuracy=None)
    save_report(report, tmp_path)
    with PIL.Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 500
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 50
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "plot.png"}


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_report(REPORT, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json"}


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        save_report(REPORT, tmp_path / "nowhere")
