"""On real images: with default settings, adaptation helps on drifted images and LoRA-C beats the head alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.adaptation import Row, measure, table
from benchmarks.cifar10 import local_and_test, resnet20_checkpoint
from lorac_deploy.export import export_training_artifact
from lorac_exporters.artifact import ArtifactConfig


def study(tmp_path: Path, realdata: Path, cells: list[tuple[str, int]], methods: tuple[str, ...]) -> list[Row]:
    local, test = local_and_test(1000, 0, realdata)
    base = resnet20_checkpoint(tmp_path / "base", realdata)
    rows = []
    for method in methods:
        export_training_artifact(base, tmp_path / method, config=ArtifactConfig(method=method))
        for corruption, severity in cells:
            row = measure(tmp_path / method, tmp_path, corruption=corruption, severity=severity, local=local, test=test)
            rows.append(row)
    print("\n" + table(rows))
    return rows


@pytest.mark.realdata
@pytest.mark.slow
def test_lora_c_beats_the_head_alone_on_noise_and_contrast(tmp_path: Path, realdata: Path) -> None:
    rows = study(tmp_path, realdata, [("gaussian_noise", 3), ("contrast", 5)], ("lora-c", "head", "full"))
    by_cell = {(row.method, row.corruption): row for row in rows}
    for corruption in ("gaussian_noise", "contrast"):
        lora, head, full = (by_cell[method, corruption] for method in ("lora-c", "head", "full"))
        assert lora.base_clean == pytest.approx(0.915, abs=0.001)
        assert lora.adapted_drifted > head.adapted_drifted + 0.15
        assert lora.adapted_drifted > full.adapted_drifted - 0.03
        assert lora.adapted_drifted > lora.base_drifted + 0.3


@pytest.mark.realdata
@pytest.mark.slow
def test_no_corruption_leaves_the_model_worse_than_it_was(tmp_path: Path, realdata: Path) -> None:
    names = ("impulse_noise", "contrast", "brightness", "jpeg_compression", "pixelate", "fog")
    for row in study(tmp_path, realdata, [(name, 5) for name in names], ("lora-c",)):
        assert row.adapted_drifted >= row.base_drifted, row
