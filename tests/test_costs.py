"""Costs of a step, against the arithmetic of layers."""

from pathlib import Path

import pytest
from small_artifacts import export
from torch import nn

from lorac_exporters.costs import artifact_costs
from lorac_exporters.plan import LoraConfig
from lorac_runtime.errors import ArtifactError
from lorac_runtime.manifest import load

PIXELS, BATCH = 100, 4
STEM, BODY, LAST, HEAD = 27 * 16 * PIXELS, 144 * 16 * PIXELS, 16 * 24 * PIXELS, 24 * 4  # multiply-adds of an image


def net() -> nn.Sequential:
    """Same sizes throughout, so that the gradient of an input costs what the layer costs."""
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *convs, nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)
    )


def test_full_training_takes_every_layer_three_times_but_no_gradient_of_the_images(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="full")
    costs = artifact_costs(tmp_path / "a", BATCH)
    assert costs.multiply_adds == BATCH * (2 * STEM + 3 * (BODY + LAST + HEAD))
    assert costs.interconnections == 0
    assert costs.trained_parameters == load(tmp_path / "a").trained_parameters


def test_the_head_alone_takes_one_forward_pass_and_its_own_gradient(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="head")
    costs = artifact_costs(tmp_path / "a", BATCH)
    assert costs.multiply_adds + costs.prefix_multiply_adds == BATCH * (STEM + BODY + LAST + 2 * HEAD)
    assert costs.interconnections == 1


def test_a_frozen_front_part_runs_apart_and_its_features_are_counted(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="full", lora=LoraConfig(blocks=("4", "8")))
    costs = artifact_costs(tmp_path / "a", BATCH)
    assert costs.prefix_multiply_adds == BATCH * (STEM + BODY)
    assert costs.multiply_adds == BATCH * (2 * LAST + 3 * HEAD)
    assert costs.feature_bytes == 4 * 16 * PIXELS
    assert costs.interconnections == 1


def test_a_trained_layer_between_fixed_ones_is_entered_and_left(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="full", lora=LoraConfig(blocks=("2",)))
    assert artifact_costs(tmp_path / "a", BATCH).interconnections == 2


def test_an_adapter_beside_a_fixed_layer_takes_from_one_fixed_layer_and_gives_to_the_next(tmp_path: Path) -> None:
    lora = LoraConfig(rank=1, rank_mode="r", blocks=("2",))
    export(tmp_path / "a", net(), lora=lora, form="branch")
    assert artifact_costs(tmp_path / "a", BATCH).interconnections == 2


def test_costs_grow_with_the_batch_alone_where_all_work_is_per_image(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="full")
    one, many = (artifact_costs(tmp_path / "a", batch) for batch in (1, 8))
    assert many.multiply_adds == 8 * one.multiply_adds
    assert many.saved_bytes == 8 * one.saved_bytes > 0
    assert one.bytes_moved < many.bytes_moved < 8 * one.bytes_moved  # weights are read once for all images


def test_an_artifact_of_the_other_engine_has_no_step_graph_to_read(tmp_path: Path) -> None:
    export(tmp_path / "a", net(), method="head", engine="onnxruntime-training")
    with pytest.raises(ArtifactError, match="--engine onnxruntime"):
        artifact_costs(tmp_path / "a")
