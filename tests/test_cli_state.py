"""The device's command line with a model that stays in place: outcomes, statuses, events, looking after a state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from artifacts import Tiny, build
from cli_runs import Run, runner
from finetune_runs import contents, write_data
from tiny_network import Recipe

from lorac_runtime import cli
from lorac_runtime.files import locked

KEEP = ("--keep-if-better", "--lr", "0.01", "--threads", "1", "--epochs", "4")
WORSE = ("--keep-if-better", "--lr", "1e-9", "--threads", "1", "--epochs", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz", 300)


@pytest.fixture
def run(tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(tiny.folder, data, tmp_path, capsys=capsys)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = cli.main(list(map(str, words)))
        except SystemExit as usage:
            status = int(str(usage.code))
        return status, *capsys.readouterr()

    return call


def test_accepted_and_not_better_have_statuses_of_their_own(run: Run, tmp_path: Path) -> None:
    status, stdout, _ = run(*WORSE)
    assert status == 3
    first = [line.split()[0] for line in stdout.splitlines()]
    assert stdout.startswith(f"not better  generation 0 is in place in {tmp_path / 'out'}\n")
    assert (first[0], set(first[1:-1]), first[-1]) == ("not", {"because"}, "accuracy")
    status, stdout, _ = run(*KEEP)
    assert status == 0
    assert stdout.startswith(f"accepted    generation 1 is in place in {tmp_path / 'out'}\n")
    status, stdout, stderr = run(*KEEP)
    assert (status, "made before" in stderr, "repeated" in stdout) == (0, True, True)


def test_json_holds_verdict_and_report(run: Run, tmp_path: Path) -> None:
    _, stdout, _ = run(*KEEP, "--json")
    found = json.loads(stdout)
    assert found["verdict"]["accepted"] is True
    assert found["generation"] == 1
    assert found["report"] == json.loads((tmp_path / "out/generations/0001/report.json").read_text())


def test_status_rollback_and_resume(run: Run, command: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*KEEP)
    status, stdout, _ = command("status", out)
    assert status == 0
    lines = stdout.splitlines()
    assert lines[0].startswith("generation 0 ")
    assert "the artifact's own model" in lines[0]
    assert lines[1].startswith("generation 1    in place")
    assert "on held-out samples when it was accepted" in lines[1]
    assert command("rollback", out)[:2] == (0, "generation 0 is in place again; before it was 1\n")
    status, _, stderr = command("rollback", out)
    assert (status, "there is nothing before it" in stderr) == (1, True)
    assert command("rollback", out, "--to", 1)[0] == 0
    assert command("rollback", out, "--to", 7)[2] == f"error: {out} has no generation 7; there are 0, 1\n"
    status, stdout, stderr = command("resume", out)
    assert (status, "made before" in stderr) == (0, True)
    found = json.loads(command("status", out, "--json")[1])
    assert (found["current"], [kept["number"] for kept in found["kept"]]) == (1, [0, 1])


def test_resume_stays_in_the_folder_whatever_it_says(run: Run, command: Run, tmp_path: Path) -> None:
    assert run(*KEEP)[0] == 0
    remembered = json.loads((tmp_path / "out/command.json").read_text())
    remembered["words"] += ["--out", str(tmp_path / "elsewhere")]
    (tmp_path / "out/command.json").write_text(json.dumps(remembered))
    (tmp_path / "out").rename(tmp_path / "moved")
    status, stdout, _ = command("resume", tmp_path / "moved")
    assert (status, "repeated" in stdout) == (0, True)
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "out").exists()


def test_resume_goes_on_with_what_was_stopped(run: Run, command: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = run(*KEEP, "--time-budget", "0.001s")
    assert (status, stdout) == (75, "")
    assert "the time is up after step 1; the same command goes on" in stderr
    assert "an attempt is unfinished, after step 1" in command("status", out)[1]
    words = json.loads((out / "command.json").read_text())
    words["words"] = words["words"][:-2]  # without the time budget
    (out / "command.json").write_text(json.dumps(words))
    status, stdout, stderr = command("resume", out)
    assert (status, stdout.startswith("accepted")) == (0, True)
    assert "resuming after step 1, in epoch 1 of 4" in stderr


def test_a_busy_folder_has_its_own_status(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        for options in ((), KEEP):
            status, _, stderr = run(*options)
            assert status == 4
            assert "in use by another process" in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--margin", "0.1"), "--margin would change nothing without --keep-if-better"),
        (("--generations", "2", "--wrong-labels", "0.5"), "--wrong-labels, --generations would change nothing"),
        (("--keep-if-better", "--generations", "0"), "generations must be at least 1"),
        (("--keep-if-better", "--margin", "2"), "margin is a share"),
        (("--keep-if-better", "--adapter", "a"), "training starts from the model in place"),
        (("--nice", "0"), "nice must be 1 to 19"),
        (("--events", "--json"), "--events prints JSON already"),
        (("--time-budget", "soon"), "'soon' is not a time; write it like 90s, 10m or 1.5h"),
    ],
)
def test_options_that_mean_nothing_are_refused(run: Run, options: tuple[str, ...], message: str) -> None:
    status, _, stderr = run(*options)
    assert status == 2
    assert message in stderr


def events(stdout: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_events_are_one_json_object_per_line(run: Run) -> None:
    status, stdout, stderr = run(*KEEP, "--events")
    assert (status, stderr) == (0, "")
    found = events(stdout)
    assert [e["epoch"] for e in found if e["event"] == "epoch"] == [1, 2, 3, 4]
    assert found[-1]["event"] == "judged"
    assert (found[-1]["accepted"], found[-1]["generation"]) == (True, 1)
    status, stdout, _ = run(*WORSE, "--events")
    assert (status, events(stdout)[-1]["accepted"]) == (3, False)


def test_a_plain_run_has_events_too(run: Run) -> None:
    status, stdout, _ = run("--events")
    assert status == 0
    last = events(stdout)[-1]
    assert (last["event"], last["train_images"], last["val_images"]) == ("finished", 240, 60)


def test_an_error_is_an_event_and_says_nothing_of_the_data(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "photo-of-alice.npz"
    secret.write_bytes(b"not an archive")
    status, stdout, stderr = run("--data", secret, "--events")
    assert (status, stderr) == (1, "")
    last = events(stdout)[-1]
    assert (last["event"], last["kind"], last["status"]) == ("failed", "DataError", 1)
    assert "alice" not in stdout
    status, _, stderr = run("--data", secret)
    assert (status, "alice" in stderr) == (1, True)


def test_a_state_that_was_copied_works_where_it_is(run: Run, command: Run, tmp_path: Path) -> None:
    run(*KEEP)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "out")
    before = (tmp_path / "copy/fused.onnx").read_bytes()
    assert command("rollback", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy/fused.onnx").read_bytes() != before


def test_no_state_no_answer(command: Run, tmp_path: Path) -> None:
    for name in ("status", "rollback", "resume"):
        status, _, stderr = command(name, tmp_path)
        assert status == 1
        assert "keep-if-better" in stderr
    assert contents(tmp_path) == {}
