"""The device's command line: what a user sees, and that bad input ends in one clear message."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from artifacts import Recipe, Tiny, W, build
from isolated import run_isolated
from safetensors.numpy import load_file, save_file

from lorac_runtime import cli
from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.training import Progress

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in tiny.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def arrays(count: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"images": rng.integers(0, 256, (count, W, W, 3), np.uint8), "labels": np.arange(count) % 3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "local.npz", **arrays())
    return tmp_path / "local.npz"


@pytest.fixture
def run(tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; returns (status, stdout, stderr) and checks that nothing was damaged."""

    def call(*options: object, artifact: Path = tiny.folder, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        before = {p.name: p.read_bytes() for p in artifact.iterdir()} if artifact.is_dir() else {}
        arguments = ["--data", data, "--out", out, "--epochs", 2, *options]
        try:
            status = cli.main([str(artifact), *map(str, arguments)])
        except SystemExit as usage:
            status = int(str(usage.code))
        after = {p.name: p.read_bytes() for p in artifact.iterdir()} if artifact.is_dir() else {}
        assert after == before
        return status, *capsys.readouterr()

    return call


def test_progress_goes_to_stderr_and_a_table_to_stdout(run: Run, tmp_path: Path) -> None:
    status, stdout, stderr = run()
    assert status == 0
    lines = stderr.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(word in lines[1] for word in ("step 6/6", "loss ", "lr ", " s ", "eta 0 s"))
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert list(rows) == ["accuracy", "loss", "trained", "images", "time", "memory", "written"]
    assert rows["trained"].startswith("729 of 1,307 parameters (55.78%)")
    assert rows["images"] == "19 for training, 5 held out"
    assert str(tmp_path / "out" / "fused.onnx") in rows["written"]


def test_json_is_the_report_and_quiet_is_quiet(run: Run, tmp_path: Path) -> None:
    status, stdout, stderr = run("--json", "--quiet")
    assert (status, stderr) == (0, "")
    assert json.loads(stdout) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_without_held_out_images_the_table_says_so(run: Run) -> None:
    status, stdout, stderr = run("--val-fraction", "0")
    assert status == 0
    assert "not measured: no images were held out" in stdout
    assert "no images are held out" in stderr


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
    assert set(actions) - set(fields) == {"help", "artifact", "data", "out", "adapter", "json", "quiet"}
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
        (("--val-fraction", "1"), "val_fraction must be at least 0 and below 1"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_command_line_is_status_2(run: Run, options: tuple[str, ...], message: str) -> None:
    status, _, stderr = run(*options)
    assert status == 2
    assert message in stderr


def edited(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_manifest_truncated(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-300])


def damage_manifest_version(folder: Path) -> None:
    edited(folder, schema_version=99)


def damage_manifest_keys(folder: Path) -> None:
    edited(folder, adapters="none", extra=1)


def damage_manifest_missing(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_escapes(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edited(folder, files=files | {"../base.onnx": files["base.onnx"]})


def damage_base(folder: Path) -> None:
    content = bytearray((folder / "base.onnx").read_bytes())
    content[1000] ^= 1
    (folder / "base.onnx").write_bytes(content)


def damage_training_file(folder: Path) -> None:
    (folder / "training_model.onnx").write_bytes(b"")


def damage_file_missing(folder: Path) -> None:
    (folder / "checkpoint").unlink()


DAMAGED = {
    damage_manifest_truncated: "is not valid JSON",
    damage_manifest_version: "schema_version 99, this runtime reads 1",
    damage_manifest_keys: "adapters: expected a list",
    damage_manifest_missing: "is not a training artifact folder",
    damage_manifest_escapes: "names must stay inside the folder",
    damage_base: "base.onnx was altered",
    damage_training_file: "training_model.onnx has 0 bytes",
    damage_file_missing: "checkpoint is missing",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda f: f.__name__)
def test_a_damaged_artifact_is_refused(run: Run, copy: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(copy)
    status, stdout, stderr = run(artifact=copy)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert DAMAGED[damage] in stderr
    assert not any((tmp_path / "out").glob("*"))


def with_nan(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    images = found["images"].astype(np.float32)
    images[0] = np.nan
    return found | {"images": images}


BAD_DATA = {
    "labels out of range": (lambda a: a | {"labels": a["labels"] + 7}, "labels .* must be 0 to 2"),
    "negative labels": (lambda a: a | {"labels": a["labels"] - 1}, r"-1 \(8 times\)"),
    "float labels": (lambda a: a | {"labels": a["labels"] / 2}, "expected integers 0 to 2"),
    "another size": (lambda a: a | {"images": a["images"][:, :5]}, "have shape .* resize or convert"),
    "another type": (lambda a: a | {"images": a["images"] / 255}, "float64, expected uint8"),
    "NaN": (with_nan, "hold NaN"),
    "empty": (lambda a: {k: v[:0] for k, v in a.items()}, "holds no images"),
    "one class": (lambda a: a | {"labels": a["labels"] * 0}, "are of class 'class 0'"),
    "unequal lengths": (lambda a: a | {"labels": a["labels"][:-1]}, "24 images but 23 labels"),
    "no labels": (lambda a: {"images": a["images"]}, "has no labels"),
    "objects": (lambda a: a | {"labels": np.array([{}] * 24)}, "is not a readable .npz of plain arrays"),
    "too few to hold out": (lambda a: {k: v[:2] for k, v in a.items()}, "too few to hold out"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used_is_refused(run: Run, data: Path, case: str) -> None:
    change, message = BAD_DATA[case]
    np.savez(data, **change(arrays()))
    status, _, stderr = run()
    assert status == 1
    assert stderr.startswith("error: ")
    assert re.search(message, stderr, re.DOTALL)


def test_files_that_are_no_data_are_refused(run: Run, data: Path) -> None:
    whole = data.read_bytes()
    for content in (b"", b"PK\3\4 nothing", whole[: len(whole) // 2]):
        data.write_bytes(content)
        status, _, stderr = run()
        assert status == 1
        assert "is not a readable .npz" in stderr
    data.unlink()
    status, _, stderr = run()
    assert (status, "cannot be read" in stderr) == (1, True)


def test_an_adapter_that_does_not_fit_is_refused_with_all_mismatches(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(tiny.folder / "adapter.safetensors")
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    tensors["fc.weight"] = np.full_like(tensors["fc.weight"], np.inf)
    del tensors["conv3.lora_b"]
    save_file(tensors, path, metadata=metadata | {"r": "64", "base_sha256": "0" * 64})
    status, _, stderr = run("--adapter", path)
    assert status == 1
    for part in ("fc.weight has 24 values", "conv3.lora_b is missing", "r: the adapter has '64'", "base_sha256"):
        assert part in stderr
    path.write_bytes(path.read_bytes()[:40])
    status, _, stderr = run("--adapter", path)
    assert (status, "is not a whole safetensors file" in stderr) == (1, True)
    status, _, stderr = run("--adapter", tmp_path / "none")
    assert (status, "not found" in stderr) == (1, True)


def test_an_output_folder_that_cannot_be_written_is_refused(run: Run, data: Path) -> None:
    for out in (data, data / "below", Path("/proc/version/out"), Path("/dev/null")):
        status, _, stderr = run(out=out)
        assert (status, stderr.startswith("error: cannot write")) == (1, True), stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(run: Run, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    status, _, stderr = run(out=locked / "out")
    assert (status, "may write to" in stderr) == (1, True)


def test_divergence_advises_and_fails(run: Run, tmp_path: Path) -> None:
    status, _, stderr = run("--lr", "1e38", "--warmup", "0")
    assert status == 1
    assert "training diverged" in stderr
    assert "(--restart) with a lower one, such as --lr 3e+37" in stderr
    assert not (tmp_path / "out" / "fused.onnx").exists()


def process(root: Path, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    """The script of the checkout in a new Python, after running ``before`` in it."""
    script = root / "runtime" / "ort_finetune.py"
    code = f"{before}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(script.parent)!r})\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = started.communicate(timeout=60)
    return started.returncode, stdout, stderr


def test_the_script_runs_from_a_checkout_that_is_not_installed(
    tiny: Tiny, data: Path, tmp_path: Path, root: Path
) -> None:
    command = [root / "runtime" / "ort_finetune.py", tiny.folder, "--data", data, "--out", tmp_path / "out"]
    done = run_isolated([*command, "--epochs", 1], tmp_path / "site", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "held-out images" in done.stdout
    assert (tmp_path / "out" / "fused.onnx").exists()


def test_ctrl_c_says_how_to_go_on(tiny: Tiny, data: Path, tmp_path: Path, root: Path) -> None:
    arguments = (tiny.folder, "--data", data, "--out", tmp_path / "out", "--epochs", 2000, "--threads", 1)
    with process(root, *arguments) as started:
        assert started.stderr is not None
        while "epoch    2/2000" not in started.stderr.readline():
            assert started.poll() is None
        started.send_signal(signal.SIGINT)
        status, _, stderr = finished(started)
    assert status == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command goes on after the last whole epoch"
    assert "Traceback" not in stderr


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_was_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: cli.Display, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Display, "progress", interrupted)
    status, _, stderr = run()
    assert (status, stderr.splitlines()[-1]) == (130, "interrupted; no epoch was finished, nothing was kept")


LIMIT_FILE_SIZE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
LIMIT_MEMORY = """
import resource
from lorac_runtime.engines import wheel
wheel.load()
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((now << 10) + (60 << 20),) * 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_that_cannot_grow_ends_in_a_message(tiny: Tiny, data: Path, tmp_path: Path, root: Path) -> None:
    """Writing fails in the middle of the engine's own checkpoint, as on a full disk."""
    arguments = (tiny.folder, "--data", data, "--out", tmp_path / "out", "--epochs", 1)
    status, _, stderr = finished(process(root, *arguments, before=LIMIT_FILE_SIZE))
    assert status == 1
    assert "a checkpoint could not be written" in stderr
    assert "Traceback" not in stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    status, _, stderr = finished(process(root, *arguments))
    assert status == 0, stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_too_little_memory_ends_in_advice(tiny: Tiny, tmp_path: Path, root: Path) -> None:
    np.savez(tmp_path / "big.npz", **arrays(20_000))
    arguments = ("--data", tmp_path / "big.npz", "--out", tmp_path / "out", "--batch-size", 20_000, "--threads", 1)
    status, _, stderr = finished(process(root, tiny.folder, *arguments, before=LIMIT_MEMORY))
    assert status == 1
    assert re.search(r"error: not enough memory \(.*\)\. Try a smaller --batch-size", stderr)
    assert "Traceback" not in stderr
