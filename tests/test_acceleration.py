"""Training through accelerate: several processes together do what one does, and number formats are what was asked."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from acceleration_cases import CASES, SETTINGS, fresh_images, plain_network, train_case
from torch import nn
from training_cases import QUICK, equal, network, run, state_of

from lorac_deploy import acceleration
from lorac_deploy.acceleration import Accelerated, accelerated, is_main, launched, several
from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.commands.train import main
from lorac_deploy.shared_batchnorm import shared_statistics
from lorac_deploy.training_report import Progress
from lorac_runtime.errors import CheckpointError, EngineError

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]


def launch(processes: int, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run a script through accelerate's launcher, on the CPU."""
    free = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    environment = free | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    command = [*LAUNCHER, str(processes), "--main_process_port", "0", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def interrupted_state(path: Path) -> None:
    """What a single process leaves that was interrupted in its third epoch."""

    def interrupt(p: Progress) -> None:
        if p.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_case(plain_network(), "full", state=path, on_progress=interrupt)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes wrote into."""
    out = tmp_path_factory.mktemp("two")
    interrupted_state(out / "state")
    done = launch(2, Path(__file__).parent / "launched_training.py", out)
    assert done.returncode == 0, done.stderr
    return out


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(two: Path, case: str) -> None:
    net, seen = plain_network(), []
    expected = train_case(net, case, test=fresh_images(), on_progress=seen.append)
    assert equal(weights(two / f"{case}-0.safetensors"), weights(two / f"{case}-1.safetensors"))
    for name, value in state_of(net).items():
        torch.testing.assert_close(
            weights(two / f"{case}-0.safetensors")[name], value, rtol=1e-4, atol=1e-5, msg=f"{case} {name}"
        )
    reports = [json.loads((two / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    for record, *found in zip(expected.history, *(report["history"] for report in reports), strict=True):
        assert [f["loss"] for f in found] == pytest.approx([record.loss] * 2, rel=1e-4)
        assert [f["val_loss"] for f in found] == pytest.approx([record.val_loss] * 2, rel=1e-4)
    for report in reports:
        assert report["test_accuracy"] == pytest.approx(expected.test_accuracy, abs=0.004)  # an image of 300
        assert report["types"] == sorted({type(part).__name__ for part in net.modules()})
        assert report["several"]
    assert [report["told"] for report in reports] == [len(seen), 0]
    assert [report["main"] for report in reports] == [True, False]


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_interrupted(two: Path) -> None:
    net = plain_network()
    train_case(net, "full")
    for name, value in state_of(net).items():
        for rank in (0, 1):
            found = weights(two / f"resumed-{rank}.safetensors")[name]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert equal(weights(two / "resumed-0.safetensors"), weights(two / "finished-0.safetensors"))
    told = [json.loads((two / f"resumed-{rank}.json").read_text()) for rank in (0, 1)]
    assert set(told[0]) == {3}
    assert told[1] == []


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_by_every_process(two: Path) -> None:
    for rank in (0, 1):
        text = (two / f"refusal-{rank}.txt").read_text()
        assert "a batch of 1 images cannot be shared by 2 processes" in text


@pytest.mark.slow
def test_the_command_writes_once_and_speaks_once(two: Path) -> None:
    assert {path.name for path in (two / "out").iterdir()} >= {"config.json", "model.safetensors", "report.json"}
    assert not (two / "out" / "training_state.safetensors").exists()
    assert (two / "command-0.txt").read_text().count("epoch 1/1") == 1
    assert (two / "command-1.txt").read_text() == ""
    assert load_checkpoint(two / "out").spec.name == "resnet20"


@pytest.mark.slow
def test_several_processes_do_not_download(two: Path) -> None:
    for rank in (0, 1):
        assert "download with a single one first" in (two / f"download-{rank}.txt").read_text()


class FakeLibrary:
    """accelerate, where no process finds another. (Its own state would outlive the test.)"""

    class utils:  # noqa: N801  a module there
        parse_flag_from_env = bool

    class PartialState:
        num_processes = 1

        def __init__(self, cpu: bool) -> None: ...


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "_library", lambda precision="auto": FakeLibrary)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="2 processes were started, but accelerate joins 1"):
        is_main()


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorac_deploy", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lorac-deploy ")


def test_without_accelerate_training_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with accelerated("auto") as auto, accelerated("no") as no:
        assert auto is no is acceleration.ALONE
    assert (launched(), is_main(), several()) == (False, True, False)
    run(network(), config=dataclasses.replace(QUICK, epochs=1))


def test_one_accelerated_process_in_float32_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, through = network(), network()
    run(plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
    run(through)
    assert equal(state_of(plain), state_of(through))
    assert (is_main(), several()) == (True, False)


def test_bfloat16_is_near_float32_and_not_equal() -> None:
    nets = [plain_network(), plain_network()]
    reports = [
        train_case(net, "full", config=dataclasses.replace(SETTINGS, precision=precision))
        for net, precision in zip(nets, ("no", "bf16"), strict=True)
    ]
    losses = [[record.loss for record in report.history] for report in reports]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert all(value.dtype == torch.float32 for name, value in state_of(nets[1]).items() if "num_batches" not in name)
    assert [report.config["precision"] for report in reports] == ["no", "bf16"]


def test_auto_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = plain_network(), plain_network()
    train_case(asked, "head", config=dataclasses.replace(CASES["head"][1], precision="bf16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    report = train_case(told, "head")
    assert equal(state_of(asked), state_of(told))
    assert report.config["precision"] == "bf16"


def test_the_state_of_another_precision_is_refused(tmp_path: Path) -> None:
    run(network(), state=tmp_path / "state")
    with pytest.raises(CheckpointError, match="precision was 'no', now 'bf16'"):
        run(network(), state=tmp_path / "state", config=dataclasses.replace(QUICK, precision="bf16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_without_a_gpu_is_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU, and there is none: choose bf16"):
        run(net, config=dataclasses.replace(QUICK, precision="fp16"))
    assert type(net[0]) is nn.Conv2d


def test_a_missing_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(EngineError, match=r"precision is 'bf16', which needs .* pip install 'lorac-deploy\[accel"):
        run(network(), config=dataclasses.replace(QUICK, precision="bf16"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(EngineError, match="accelerate launch or torchrun started this process"):
        run(network())


def test_the_command_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    np.savez(tmp_path / "data.npz", images=fresh_images().images, labels=fresh_images().labels)
    argv = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out"), "--model", "resnet20"]
    assert main([*argv, "--precision", "bf16"]) == 1
    assert "pip install 'lorac-deploy[accelerate]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "configured for gradient accumulation"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "configured for compilation by EAGER"),
    ],
)
def test_what_accelerate_would_do_besides_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError, match=text):
        run(network())


class Fake:
    """What `Accelerated` asks of an accelerator, for shares and sums without other processes."""

    def __init__(self, processes: int, index: int) -> None:
        self.num_processes, self.process_index = processes, index
        self.device, self.mixed_precision = torch.device("cpu"), "no"


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_parts_of_a_batch_are_the_batch(processes: int) -> None:
    images, labels = torch.arange(22.0).reshape(11, 2), torch.arange(11)
    every = [Accelerated(Fake(processes, index)) for index in range(processes)]  # type: ignore[arg-type]
    parts = [each.part(images, labels) for each in every]
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert {len(part) for _, part in parts} <= {11 // processes, 11 // processes + 1}
    shares = [list(each.every(range(5))) for each in every]
    assert sorted(number for share in shares for number in share) == list(range(5))
    assert len({tuple(each.seeds(3, 1)) for each in every}) == processes
    assert every[0].seeds(3, 1) == [3, 1]


@pytest.fixture
def group(tmp_path: Path):
    """A group of this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (6, 5)),
        (nn.BatchNorm1d, (6, 5, 3)),
        (nn.BatchNorm2d, (4, 5, 3, 2)),
        (nn.BatchNorm3d, (2, 5, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_shared_statistics_of_one_process_are_batch_normalisation(
    group: None, kind: type[nn.Module], shape: tuple[int, ...], options: dict
) -> None:
    layers = [kind(5, **options), kind(5, **options)]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in layers]
    for repeat in range(2):
        expected = layers[0](inputs[0])
        with shared_statistics(nn.Sequential(layers[1])):
            found = layers[1](inputs[1])
        torch.testing.assert_close(found, expected)
        for y in (expected, found):
            (y.square() * torch.linspace(0, 1 + repeat, y.numel()).view(y.shape)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    for name, value in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[name], value)
    for theirs, ours in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert type(layers[1]) is kind
