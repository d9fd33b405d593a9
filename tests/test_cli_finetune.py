"""The device's command line: what a user sees."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from artifacts import Tiny, build
from cli_runs import Run, arrays, runner
from tiny_network import Recipe

from lorac_runtime import cli
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.gate import GateConfig
from lorac_runtime.training import Progress


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "local.npz", **arrays())
    return tmp_path / "local.npz"


@pytest.fixture
def run(tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(tiny.folder, data, tmp_path, capsys=capsys)


def test_progress_goes_to_stderr_and_a_table_to_stdout(run: Run, tmp_path: Path) -> None:
    status, stdout, stderr = run()
    assert status == 0
    lines = stderr.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[0] == "engine onnxruntime-training; not onnxruntime: the artifact has no files for it"
    assert all(word in lines[2] for word in ("step 6/6", "loss ", "lr ", " s ", "eta 0 s"))
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert list(rows) == ["accuracy", "loss", "trained", "samples", "time", "memory", "written"]
    assert rows["trained"].startswith("729 of 1,307 parameters (55.78%)")
    assert rows["samples"] == "19 for training, 5 held out"
    assert str(tmp_path / "out" / "fused.onnx") in rows["written"]


def test_json_is_the_report_and_quiet_is_quiet(run: Run, tmp_path: Path) -> None:
    status, stdout, stderr = run("--json", "--quiet")
    assert (status, stderr) == (0, "")
    assert json.loads(stdout) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_without_held_out_images_the_table_says_so(run: Run) -> None:
    status, stdout, stderr = run("--val-fraction", "0")
    assert status == 0
    assert "not measured: no samples were held out" in stdout
    assert "no samples are held out" in stderr


def test_the_same_command_again_says_that_it_is_finished(run: Run) -> None:
    _, first, _ = run()
    status, second, stderr = run()
    assert (status, second) == (0, first)
    assert "holds this very run, finished" in stderr
    status, _, stderr = run("--seed", "1")
    assert status == 1
    assert "seed: '0' before, '1' now" in stderr
    status, _, stderr = run("--seed", "1", "--restart")
    assert status == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(epochs: int = 2, per_epoch: int = 2) -> list[Progress]:
    return [
        Progress(1 + s // per_epoch, epochs, s + 1, epochs * per_epoch, 10.0 ** (1 - s), 1e-3, s + 1.0)
        for s in range(epochs * per_epoch)
    ]


def test_a_terminal_shows_every_step_in_place() -> None:
    stream = Terminal()
    display = cli.Display(stream, quiet=False)
    for progress in steps():
        display.progress(progress)
    display.message("done")
    lines = stream.getvalue().split("\n")
    assert len(lines) == 4
    assert [part[:9] for part in lines[0].split("\r")] == ["epoch 1/2"] * 2
    assert [part[:9] for part in lines[1].split("\r")] == ["epoch 2/2"] * 2
    assert lines[2:] == ["done", ""]
    first, second = lines[0].split("\r")
    assert len(second) >= len(first)  # a shorter line leaves nothing of the longer one


def test_a_message_does_not_end_up_in_an_unfinished_line() -> None:
    stream = Terminal()
    display = cli.Display(stream, quiet=False)
    display.progress(steps()[0])
    display.message("warning: x")
    assert stream.getvalue().split("\n")[1] == "warning: x"


def test_a_file_gets_a_line_per_epoch_and_quiet_none() -> None:
    for quiet, expected in ((False, 2), (True, 0)):
        stream = io.StringIO()
        display = cli.Display(stream, quiet=quiet)
        for progress in steps():
            display.progress(progress)
        assert len(stream.getvalue().splitlines()) == expected
        assert "\r" not in stream.getvalue()


def test_the_options_are_the_fields_of_the_config() -> None:
    actions = {a.dest: a for a in cli.parser()._actions}
    fields = {f.name: f for f in dataclasses.fields(FinetuneConfig)}
    gate = {f.name for f in dataclasses.fields(GateConfig)}
    others = {"help", "version", "artifact", "data", "out", "adapter", "json", "quiet", "events", "nice"}
    assert set(actions) - set(fields) - gate == others | {"keep_if_better", "generations"}
    assert all(actions[name].default == field.default for name, field in fields.items())
    assert all(action.help and action.help is not argparse.SUPPRESS for action in actions.values())
    cli.parser().format_help()  # every % in a help text is a valid one
    typed = cli.parser().parse_args(["a", "--data", "d", "--out", "o", "--lr", "3", "--epochs", "4", "--restart"])
    assert (typed.lr, typed.epochs, typed.restart) == (3.0, 4, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--epochs", "1.5"), "invalid int value"),
        (("--lr", "nan"), "lr must be positive, got nan"),
        (("--engine", "abacus"), "argument --engine: invalid choice: 'abacus'"),
        (("--micro-batch", "0"), "micro_batch must be at least 1, got 0"),
        (("--val-fraction", "1"), "val_fraction must be at least 0 and below 1"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_command_line_is_status_2(run: Run, options: tuple[str, ...], message: str) -> None:
    status, _, stderr = run(*options)
    assert status == 2
    assert message in stderr
