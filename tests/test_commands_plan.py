"""`lorac-deploy plan`: what fits into a device's memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import NAMES, SPEC
from shared_export import export_graph

from lorac_deploy.cifar_resnets import CifarResNet
from lorac_deploy.commands import export_training_artifact
from lorac_deploy.commands.plan import main
from lorac_exporters import memory_plan
from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.memory import PROCESS
from lorac_exporters.plan import LoraConfig
from lorac_runtime import manifest as mf
from lorac_runtime.cli import parser as finetune_parser
from lorac_runtime.config import size_in_bytes
from lorac_runtime.manifest import TrainingDefaults


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA-C of rank 2 on a CIFAR ResNet of one block for each stage, batches of 16."""
    folder = tmp_path_factory.mktemp("plan") / "artifact"
    config = ArtifactConfig(lora=LoraConfig(rank=2), training=TrainingDefaults(batch_size=16))
    torch.manual_seed(0)
    graph = export_graph(CifarResNet(1, len(NAMES)).eval(), SPEC.shape)
    write_artifact(graph, folder, name="resnet8", spec=SPEC, class_names=NAMES, config=config)
    return folder


@pytest.fixture(scope="module", autouse=True)
def planned_once() -> Iterator[None]:
    """Tests that ask the same question share the answer: a plan differentiates the network some thirty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "plan_memory", functools.cache(memory_plan.plan_memory))
        yield


def planned(artifact: Path, memory: str, *more: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    status = main([str(artifact), "--memory", memory, "--json", *more])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MB", 256_000_000),
        ("256 mb", 256_000_000),
        ("1GiB", 1 << 30),
        ("0.5MiB", 1 << 19),
        ("12K", 12_000),
        ("300", 300),
        ("7b", 7),
    ],
)
def test_sizes_are_read_in_thousands_and_in_powers_of_two(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "256 TB", "1e9", "2,5GB", "0MB", "256IB"])
def test_a_size_that_cannot_be_read_is_a_mistake_in_the_command_line(
    text: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(artifact), f"--memory={text}"])
    assert ended.value.code == 2
    assert f"{text!r} is not a size; write it like 256MB" in capsys.readouterr().err


def test_a_batch_of_no_images_is_a_mistake_in_the_command_line(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(artifact), "--memory", "1GB", "--batch-size", "0"])
    assert ended.value.code == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err


def test_with_plenty_of_memory_everything_trains_in_whole_batches(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, plan = planned(artifact, "2GB", capsys=capsys)
    assert status == 0
    assert {choice["images_at_once"] for choice in plan["choices"]} == {plan["batch_size"]} == {16}
    best = plan["choices"][plan["recommended"]]
    assert (best["what"], best["export_options"]) == ("everything", ["--method", "full"])
    assert best["finetune_options"] == ["--batch-size", "16"]


def test_the_recommended_choice_trains_most_of_those_with_the_largest_pieces(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plenty = planned(artifact, "2GB", "--batch-size", "64", capsys=capsys)
    adapters = next(c for c in plenty["choices"] if c["what"] == "adapters" and c["rank"] == 1)
    status, plan = planned(artifact, str(adapters["peak"] - 1), "--batch-size", "64", capsys=capsys)
    assert status == 0
    best = plan["choices"][plan["recommended"]]
    whole = [c for c in plan["choices"] if c["images_at_once"] == 64]
    assert best["trained_parameters"] == max(c["trained_parameters"] for c in whole)
    assert all(c["peak"] < adapters["peak"] for c in plan["choices"] if c["images_at_once"])
    pieces = next(c for c in plan["choices"] if c["what"] == "adapters" and c["rank"] == 1)
    assert 0 < pieces["images_at_once"] < 64
    assert pieces["finetune_options"] == ["--batch-size", "64", "--micro-batch", str(pieces["images_at_once"])]


def test_the_artifact_as_it_is_stands_first_and_equals_its_own_choice(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = planned(artifact, "2GB", capsys=capsys)
    now = plan["choices"][0]
    same = next(c for c in plan["choices"] if c["what"] == "adapters" and c["rank"] == 2)
    manifest = mf.load(artifact)
    assert now["what"] == "now (as exported)"
    assert now["trained_parameters"] == same["trained_parameters"] == manifest.trained_parameters
    assert now["peak_parts"] == same["peak_parts"]
    names = {*manifest.engines["onnxruntime"].files, "base.onnx"}
    assert now["storage"] == sum((artifact / name).stat().st_size for name in names)
    assert abs(same["storage"] - now["storage"]) < 0.15 * now["storage"]


def test_every_option_it_names_is_one_of_the_commands(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plan = planned(artifact, "80MB", "--batch-size", "64", capsys=capsys)
    export, run = export_training_artifact.parser(), finetune_parser()
    fitting = [c for c in plan["choices"] if c["images_at_once"]]
    assert any("--blocks" in (c["export_options"] or ()) for c in fitting)
    for choice in fitting:
        export.parse_args(["--onnx", "x", "--out", "o", *(choice["export_options"] or ())])
        run.parse_args(["a", "--data", "d", "--out", "o", *choice["finetune_options"]])


def test_the_table_shows_the_recommendation_and_how_to_get_it(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert main([str(artifact), "--memory", "2GB"]) == 0
    shown = capsys.readouterr().out
    assert "now (as exported)" in shown
    assert "16 of 16" in shown
    assert "recommended: everything, a peak of " in shown
    assert "export-training-artifact ... --method full --bn frozen --engine onnxruntime" in shown
    assert f"python runtime/ort_finetune.py {shlex.quote(str(artifact))} ... --batch-size 16" in shown


def test_a_budget_below_the_process_itself_fits_nothing_and_the_least_is_named(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, plan = planned(artifact, str(PROCESS), capsys=capsys)
    assert (status, plan["recommended"]) == (1, None)
    assert {choice["images_at_once"] for choice in plan["choices"]} == {0}
    least = min(choice["peak"] for choice in plan["choices"])
    assert main([str(artifact), "--memory", str(PROCESS)]) == 1
    shown = capsys.readouterr().out
    assert f"nothing fits: the least is {least / 1e6:,.1f} MB" in shown
    assert f"Python and onnxruntime alone take {PROCESS / 1e6:,.1f} MB" in shown


def test_a_folder_that_is_no_artifact_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--memory", "1GB"]) == 1
    assert f"{tmp_path} is not a training artifact folder" in capsys.readouterr().err


def test_a_damaged_artifact_is_an_error(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in artifact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base.onnx").write_bytes(b"no model")
    assert main([str(tmp_path), "--memory", "1GB"]) == 1
    assert "base.onnx has 8 bytes" in capsys.readouterr().err


def test_an_artifact_of_the_other_engine_alone_has_no_line_of_its_own(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = mf.load(artifact)
    files = {n: f for n, f in manifest.files.items() if not n.endswith("_step.onnx")}
    for name in files:
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    other = {"onnxruntime-training": mf.EngineEntry(("base.onnx",), "1")}
    without = dataclasses.replace(manifest, files=files, engines=other)
    (tmp_path / "manifest.json").write_text(without.to_json(), encoding="utf-8")
    status, plan = planned(tmp_path, "1GB", capsys=capsys)
    assert status == 0
    assert plan["choices"][0]["what"] == "everything"
