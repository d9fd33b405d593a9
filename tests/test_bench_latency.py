"""`lorac-deploy bench latency`: structure first, then figures, then words and an exit status that follow from both.

Times come from a stand-in for the worker (see bench_worker.py), by the names of the files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tflite_pairs import adapted, artifact

from lorac_deploy.bench import contest, latency, pairs
from lorac_deploy.bench.runtimes import runtimes
from lorac_deploy.commands.bench import main
from lorac_exporters.graph_tools import save
from lorac_exporters.onnx_file import read_graph
from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError, EngineError

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact and what was fused from it, in both formats."""
    folder = tmp_path_factory.mktemp("pair")
    one = artifact(folder / "artifact", "float32")
    return one, adapted(one, folder / "adapted")


@pytest.fixture
def folders(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return tuple(shutil.copytree(path, tmp_path / path.name) for path in made)


@pytest.fixture
def fused(folders: tuple[Path, Path]) -> Path:
    return folders[1] / "fused.onnx"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(contest, "WORKER", Path(__file__).with_name("bench_worker.py"))
    monkeypatch.setenv("BENCH_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def slow_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the files of the controls names that make the stand-in take longer."""
    make = pairs.entries

    def named(pair: pairs.Pair, scratch: Path, **options: object) -> tuple[list[contest.Entry], str]:
        found, note = make(pair, scratch, **options)  # type: ignore[arg-type]
        slow = (pairs.INPUTS, pairs.BRANCH)
        renamed = [
            e.path.rename(e.path.with_name(f"{e.path.stem}x1.40{e.path.suffix}")) for e in found if e.name in slow
        ]
        paths = iter(renamed)
        return [contest.Entry(e.name, next(paths) if e.name in slow else e.path, e.feeds) for e in found], note

    monkeypatch.setattr(latency, "entries", named)


def slower(entry: contest.Entry) -> contest.Entry:
    path = entry.path.rename(entry.path.with_name(f"{entry.path.stem}x1.40{entry.path.suffix}"))
    return contest.Entry(entry.name, path, entry.feeds)


@pytest.fixture
def bench(log: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main(["latency", *map(str, arguments), "--processes", "3"])
        except SystemExit as usage:
            status = int(str(usage.code))
        return status, *capsys.readouterr()

    return call


def test_equal_files_are_a_drop_in_and_the_same_on_every_runtime(
    bench: Bench, folders: tuple[Path, Path], slow_controls: None
) -> None:
    status, out, _ = bench(*folders, "--json")
    report = json.loads(out)
    assert (status, report["outcome"]) == (0, "same")
    assert [s["ok"] for s in report["structures"]] == [True, True]
    measured = {(line["format"], line["variant"]) for line in report["lines"]}
    onnx = {"base", "fused", "unmerged", "adapters as inputs", "adapter branch"}
    assert measured == {("onnx", name) for name in onnx} | {("tflite", n) for n in ("base", "fused", "adapter branch")}
    assert len(report["words"]) == 2
    assert all("is as fast as base within 1%" in text for text in report["words"])


def test_every_control_is_made_and_fed(
    bench: Bench, folders: tuple[Path, Path], log: Path, slow_controls: None
) -> None:
    bench(*folders)
    opened = [r for _, r in map(json.loads, log.read_text().splitlines()) if r["do"] == "open"]
    assert {Path(r["path"]).name for r in opened} >= {"unmerged.onnx", "inputsx1.40.onnx", "branchx1.40.tflite"}


def test_the_table_is_readable_and_fits(bench: Bench, folders: tuple[Path, Path], slow_controls: None) -> None:
    status, out, _ = bench(*folders)
    assert status == 0
    assert "fused.onnx is a drop-in, " in out
    assert out.count("same") >= 3
    assert "1.4000" in out
    assert max(map(len, out.splitlines()[2:])) <= 160


def test_a_slower_file_is_different_though_its_structure_is_equal(bench: Bench, folders: tuple[Path, Path]) -> None:
    one = folders[1] / "slowx1.05.onnx"
    shutil.copy(folders[1] / "fused.onnx", one)
    status, out, _ = bench(folders[0] / "base.onnx", one, "--no-controls")
    assert status == 1
    assert "slowx1.05.onnx takes 1.05" in out
    assert "subnormal" in out


def test_a_noisy_machine_is_not_concluded_on(bench: Bench, folders: tuple[Path, Path]) -> None:
    one = folders[1] / "noisy.onnx"
    shutil.copy(folders[1] / "fused.onnx", one)
    status, out, _ = bench(folders[0] / "base.onnx", one, "--no-controls")
    assert status == 3
    assert "too noisy to tell within 1%" in out
    assert "measure longer with --processes" in out


def test_controls_that_are_not_slower_make_the_figures_worthless(bench: Bench, folders: tuple[Path, Path]) -> None:
    status, out, _ = bench(*folders)
    assert status == 3
    assert "the control 'adapter branch' should be slower than base" in out


def test_an_extra_node_is_no_drop_in_whatever_the_times_say(bench: Bench, folders: tuple[Path, Path]) -> None:
    from lorac_deploy.bench.controls import extra_node

    save(extra_node(read_graph(folders[1] / "fused.onnx")), folders[1] / "fused.onnx")
    status, out, _ = bench(folders[0] / "base.onnx", folders[1] / "fused.onnx", "--no-controls")
    assert status == 1
    assert "NOT a drop-in" in out
    assert "operators: base has" in out
    assert "is as fast as base" in out


def test_an_int8_tflite_file_says_that_it_has_no_control(bench: Bench, log: Path, tmp_path: Path) -> None:
    one = artifact(tmp_path / "int8", "int8")
    two = adapted(one, tmp_path / "adapted")
    status, out, _ = bench(one / "base.tflite", two / "fused.tflite")
    assert status == 0
    assert "no control beside" in out
    assert "float32 or fp16" in out


def test_files_without_an_artifact_are_measured_too(bench: Bench, folders: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("base.onnx", "base.tflite"):
        shutil.copy(folders[0] / name, alone / name)
    for kind in ("onnx", "tflite"):
        status, out, _ = bench(alone / f"base.{kind}", folders[1] / f"fused.{kind}", "--no-controls")
        assert (status, "is as fast as base" in out) == (0, True), kind


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("ARTIFACT", "NOWHERE"), "nowhere not found; expected a folder with fused files"),
        (("NOWHERE", "ADAPTED"), "nowhere not found; expected an artifact's folder or a model file"),
        (("ARTIFACT", "ARTIFACT"), "has no fused.onnx or fused.tflite whose base is in"),
        (("ARTIFACT", "ADAPTED/fused.onnx"), "give two folders (an artifact, fused files) or two model files"),
        (("ADAPTED", "ADAPTED"), "manifest.json not found"),
        (("ARTIFACT/base.onnx", "ADAPTED/fused.tflite"), "is ONNX,"),
        (("ARTIFACT/base.onnx", "ADAPTED/adapter.safetensors"), "is not an ONNX file, or is truncated"),
    ],
)
def test_files_that_are_not_what_they_claim_are_refused(
    bench: Bench, folders: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, str], text: str
) -> None:
    places = {"ARTIFACT": folders[0], "ADAPTED": folders[1], "NOWHERE": tmp_path / "nowhere"}
    paths = [places[first] / rest for first, _, rest in (a.partition("/") for a in arguments)]
    status, _, err = bench(*paths)
    assert status == 1
    assert err.startswith("error: ")
    assert text in err


def test_models_with_other_inputs_are_refused_by_the_real_worker(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        contest.Effort, "up_to", lambda processes: contest.QUICK
    )  # what is measured of the base is no matter here
    model = read_graph(folders[1] / "fused.onnx")
    model.graph.inputs[0].name = "pixels"
    save(model, tmp_path / "fused.onnx")
    arguments = [str(folders[0] / "base.onnx"), str(tmp_path / "fused.onnx"), "--no-controls", "--processes", "3"]
    assert main(["latency", *arguments]) == 1
    out = capsys.readouterr().out
    assert "inputs: input: FLOAT['N', 3, 10, 10] -> pixels" in out or "NOT a drop-in" in out
    assert "could not run fused.onnx: ValueError" in out
    assert "takes {'pixels'" in out


def test_a_damaged_base_is_refused(bench: Bench, folders: tuple[Path, Path]) -> None:
    content = bytearray((folders[0] / "base.onnx").read_bytes())
    content[-1] ^= 1
    (folders[0] / "base.onnx").write_bytes(content)
    status, _, err = bench(*folders)
    assert status == 1
    assert "base.onnx" in err


def test_no_runtime_is_said_with_what_to_install(
    bench: Bench, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "runtimes", lambda _: [])
    status, _, err = bench(*folders)
    assert status == 1
    assert "install onnxruntime or ai-edge-litert, or --python PATH names" in err


def test_a_format_without_a_runtime_is_named_and_the_other_measured(
    bench: Bench, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = [runtime for runtime in runtimes([Path(sys.executable)]) if runtime.format == "onnx"]
    monkeypatch.setattr(latency, "runtimes", lambda _: only)
    status, out, _ = bench(*folders, "--no-controls")
    assert status == 0
    assert "fused.tflite was not measured: no ai-edge-litert is installed here" in out


@pytest.mark.parametrize("path", ["/bin/ls", "nowhere/python"])
def test_what_is_no_interpreter_is_refused(path: str) -> None:
    with pytest.raises(EngineError, match="does not answer like a Python interpreter"):
        runtimes([Path(path)])


def test_runtimes_are_found_once_with_their_versions() -> None:
    found = runtimes([Path(sys.executable)] * 2)
    assert {(r.name, r.version, r.format) for r in found} >= {("onnxruntime-training", "1.19.2", "onnx")}
    assert len(found) == len({str(r) for r in found})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--batch", "0"), "batch and threads count from 1, got 0 and 1"),
        (("--threads", "-1"), "batch and threads count from 1, got 1 and -1"),
    ],
)
def test_wrong_options_are_usage_errors(
    bench: Bench, folders: tuple[Path, Path], options: tuple[str], text: str
) -> None:
    status, _, err = bench(*folders, *options)
    assert (status, text in err) == (2, True)


def test_too_few_processes_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["latency", "a", "b", "--processes", "2"])
    assert "at least 3 are needed" in capsys.readouterr().err


def test_batch_and_threads_reach_the_worker(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (pair,) = [p for p in pairs.find_pairs(*folders) if p.format == "onnx"]
    found, _ = pairs.entries(pair, tmp_path, batch=7, with_controls=False)
    assert [np.load(entry.feeds)["input"].shape for entry in found] == [(7, 3, 10, 10)] * 2
    assert json.loads(contest.command(contest.Contest("onnx", Path("p"), (), threads=2))[-1])["threads"] == 2


def test_an_input_of_unknown_size_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import onnx

    model = onnx.load(folders[0] / "base.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    for name in ("base.onnx", "fused.onnx"):
        onnx.save(model, tmp_path / name)
    (pair,) = pairs.find_pairs(tmp_path / "base.onnx", tmp_path / "fused.onnx")
    with pytest.raises(ArtifactError, match="leaves open how large input is"):
        pairs.feeds(pair, 1)


def test_raw_images_are_fed_as_such(log: Path, tmp_path: Path) -> None:
    one = artifact(tmp_path / "raw", "float32", in_graph=True)
    two = adapted(one, tmp_path / "adapted")
    for pair in pairs.find_pairs(one, two):
        (value,) = pairs.feeds(pair, 2).values()
        assert (value.dtype, value.shape) == (np.uint8, (2, 10, 10, 3))
    (first, _) = pairs.find_pairs(one, two)
    assert first.manifest == mf.load(one)


def test_without_scipy_the_extra_is_named(
    bench: Bench, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    status, _, err = bench(*made)
    assert (status, "pip install 'lorac-deploy[bench]'" in err) == (1, True)
