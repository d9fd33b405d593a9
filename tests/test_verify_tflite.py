"""`verify` on .tflite files: artifacts and what was fused from them, files of others, and damaged ones."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hand_tflite import floats, write
from tflite_pairs import adapted, artifact, copies

from lorac_deploy.commands.verify import main
from lorac_exporters.checks import BYTES_CHECK, DropinReport
from lorac_exporters.references import UNFUSED_CHECK
from lorac_exporters.tflite import running
from lorac_exporters.tflite.verify import PATCHED_CHECK, rounded_check
from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.patch import fuse

WEIGHTS = ("float32", "fp16", "int8")
Folders = tuple[Path, Path]  # the artifact and what was fused from it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Folders]:
    """Artifacts by weights and input, each made once."""

    @functools.cache
    def make(weights: str, in_graph: bool) -> Folders:
        folder = tmp_path_factory.mktemp("pair")
        one = artifact(folder / "artifact", weights, in_graph=in_graph)
        return one, adapted(one, folder / "adapted")

    return make


@pytest.fixture(params=[(w, g) for w in WEIGHTS for g in (False, True)], ids=str)
def folders(request: pytest.FixtureRequest, made: Callable[[str, bool], Folders]) -> Folders:
    return made(*request.param)


@pytest.fixture
def floating(made: Callable[[str, bool], Folders]) -> Folders:
    return made("float32", False)


def report(folders: Folders, **options: Path) -> DropinReport:
    return verify(folders[0] / mf.BASE_TFLITE, folders[1] / "fused.tflite", **options)


def verdicts(found: DropinReport) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks}


def detail(found: DropinReport, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a refusal prints."""
    assert main([str(a) for a in argv]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err + printed.out
    return printed.err


def test_what_a_device_fuses_is_a_drop_in_in_every_form(folders: Folders) -> None:
    found = report(folders)
    assert set(verdicts(found).values()) == {"pass"}, found
    assert {BYTES_CHECK, PATCHED_CHECK, UNFUSED_CHECK} <= set(verdicts(found))


def test_an_adapter_that_was_not_fused_is_told_by_the_numbers_and_the_answers(folders: Folders, tmp_path: Path) -> None:
    made, fused = copies(*folders, tmp_path)
    shutil.copy(made / mf.BASE_TFLITE, fused / "fused.tflite")
    found = report((made, fused))
    failed = {name for name, verdict in verdicts(found).items() if verdict == "fail"}
    assert PATCHED_CHECK in failed
    assert failed <= {PATCHED_CHECK, UNFUSED_CHECK}
    if mf.load(made).tflite.weights != "int8":  # its own error may hide a small adapter
        assert UNFUSED_CHECK in failed


def test_one_adapter_more_in_the_file_than_in_the_folder_is_told(folders: Folders, tmp_path: Path) -> None:
    made, fused = copies(*folders, tmp_path)
    file = load_adapter(fused / mf.ADAPTER)
    name = next(n for n in file.tensors if n.endswith("lora_b"))
    save_adapter(fused / mf.ADAPTER, file.tensors | {name: np.zeros_like(file.tensors[name])}, file.metadata)
    found = report((made, fused))
    assert verdicts(found)[PATCHED_CHECK] == "fail"
    assert name.removesuffix("lora_b") + "weight" in detail(found, PATCHED_CHECK)


def test_a_weight_with_channels_in_the_wrong_order_is_told(folders: Folders, tmp_path: Path) -> None:
    made, fused = copies(*folders, tmp_path)
    manifest = mf.load(made)
    patch = next(p for p in manifest.patches if p.file == mf.BASE_TFLITE and p.tensor == "3.weight")
    content = bytearray((fused / "fused.tflite").read_bytes())
    row = patch.nbytes // 16
    first, second = (slice(patch.offset + i * row, patch.offset + (i + 1) * row) for i in (0, 1))
    content[first], content[second] = content[second], content[first]
    (fused / "fused.tflite").write_bytes(content)
    found = report((made, fused))
    assert verdicts(found)[PATCHED_CHECK] == "fail"
    assert verdicts(found)[BYTES_CHECK] == "pass"
    assert "3.weight" in detail(found, PATCHED_CHECK)


def test_without_the_adapter_the_rest_is_checked(floating: Folders, tmp_path: Path) -> None:
    made, fused = copies(*floating, tmp_path)
    (fused / mf.ADAPTER).unlink()
    found = report((made, fused))
    assert found.ok
    assert verdicts(found)[UNFUSED_CHECK] == verdicts(found)[PATCHED_CHECK] == "not checked"
    assert "--adapter" in detail(found, UNFUSED_CHECK)
    assert verdicts(report((made, fused), adapter=floating[1] / mf.ADAPTER))[UNFUSED_CHECK] == "pass"


def test_without_a_runtime_the_answers_are_not_checked_and_the_command_is_named(
    floating: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_RUNTIMES", ("no_such_runtime",))
    found = report(floating)
    assert found.ok
    assert verdicts(found)[UNFUSED_CHECK] == "not checked"
    assert "pip install 'lorac-deploy[tflite]'" in detail(found, UNFUSED_CHECK)


def test_a_flipped_bit_outside_the_patch_table_is_told_by_the_bytes_alone(folders: Folders, tmp_path: Path) -> None:
    made, fused = copies(*folders, tmp_path)
    content = bytearray((fused / "fused.tflite").read_bytes())
    content[content.index(b"\4\0\0\0main") + 4] ^= 1  # the graph's own name, which nothing reads
    (fused / "fused.tflite").write_bytes(content)
    assert {n for n, verdict in verdicts(report((made, fused))).items() if verdict == "fail"} == {BYTES_CHECK}


def test_somebody_elses_files_are_compared_by_structure_alone(tmp_path: Path) -> None:
    base, fused = write(floats(0), tmp_path / "own.tflite"), write(floats(1), tmp_path / "new.tflite")
    found = verify(base, fused)
    assert found.ok
    assert verdicts(found)[BYTES_CHECK] == "not checked"
    assert UNFUSED_CHECK not in verdicts(found)


def test_another_file_in_an_artifacts_folder_has_no_patch_table(floating: Folders, tmp_path: Path) -> None:
    made, fused = copies(*floating, tmp_path)
    own = write(floats(0), made / "own.tflite")
    found = verify(own, write(floats(1), fused / "new.tflite"))
    assert found.ok
    assert "not the base.tflite that the manifest of" in detail(found, BYTES_CHECK)


def test_a_base_of_another_hash_is_refused(
    floating: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, fused = copies(*floating, tmp_path)
    content = bytearray((made / mf.BASE_TFLITE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.tflite").write_bytes(content)
    error = refused(capsys, tmp_path / "other.tflite", fused / "fused.tflite", "--artifact", made)
    assert "other.tflite is not the base.tflite that the manifest of" in error
    assert "another sha256" in error
    (made / mf.BASE_TFLITE).write_bytes(content)
    error = refused(capsys, made / mf.BASE_TFLITE, fused / "fused.tflite")
    assert "base.tflite was altered: its sha256 is not the one in the manifest" in error


def test_files_of_two_formats_are_refused_and_the_certificate_is_named(
    floating: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    made, fused = floating
    error = refused(capsys, made / mf.BASE, fused / "fused.tflite")
    assert "base.onnx is ONNX" in error
    assert "fused.tflite is TFLite" in error
    assert "lorac-deploy certify" in error
    assert "certify" in refused(capsys, made / mf.BASE_TFLITE, fused / "fused.onnx")


def test_files_under_the_name_of_another_format_are_refused(
    floating: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, fused = floating
    shutil.copy(fused / "fused.onnx", tmp_path / "onnx.tflite")
    shutil.copy(fused / "fused.tflite", tmp_path / "lite.onnx")
    error = refused(capsys, made / mf.BASE_TFLITE, tmp_path / "onnx.tflite")
    assert "onnx.tflite is not a TFLite file" in error
    assert "lite.onnx is named .onnx, but its content is TFLite" in refused(
        capsys, made / mf.BASE, tmp_path / "lite.onnx"
    )


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\0\0\0TFL3", b"\x1c\0\0\0TFL3" + bytes(100), b"text" * 50])
def test_what_is_no_tflite_file_is_refused_in_one_line(
    floating: Folders, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.tflite").write_bytes(content)
    for pair in ((floating[0] / mf.BASE_TFLITE, tmp_path / "bad.tflite"), (tmp_path / "bad.tflite",) * 2):
        assert "bad.tflite" in refused(capsys, *pair)


def test_a_fused_file_cut_anywhere_fails_in_one_way_or_another(
    floating: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (floating[1] / "fused.tflite").read_bytes()
    shutil.copy(floating[1] / mf.ADAPTER, tmp_path)
    for size in np.linspace(9, len(content) - 1, 12, dtype=int):
        (tmp_path / "cut.tflite").write_bytes(content[:size])
        assert main([str(floating[0] / mf.BASE_TFLITE), str(tmp_path / "cut.tflite")]) == 1
        assert "Traceback" not in "".join(capsys.readouterr())


def test_missing_files_and_folders_are_named(
    floating: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "gone.tflite not found" in refused(capsys, floating[0] / mf.BASE_TFLITE, tmp_path / "gone.tflite")
    assert "Is a directory" in refused(capsys, floating[0] / mf.BASE_TFLITE, tmp_path)


def test_an_empty_onnx_file_is_no_drop_in_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert "a.onnx is not an ONNX file" in refused(capsys, tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_the_report_is_printed_as_json_too(floating: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(floating[0] / mf.BASE_TFLITE), str(floating[1] / "fused.tflite"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert len(found["checks"]) == 15


def test_fp16_and_int8_files_are_measured_by_their_bases_own_error() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((20, 5)).astype(np.float32)
    noise = rng.standard_normal((20, 5)).astype(np.float32)
    base = (exact, exact + 0.01 * noise)
    assert rounded_check("n", (exact, exact + 0.04 * noise), base, 1e-4).verdict == "pass"
    assert rounded_check("n", (exact, exact + 0.06 * noise), base, 1e-4).verdict == "fail"
    assert rounded_check("n", (exact, exact * np.nan), base, 1e-4).verdict == "fail"
    assert rounded_check("n", (exact, exact[:, :4]), base, 1e-4).verdict == "fail"


def test_int8_files_that_left_their_ranges_are_told_and_fail_when_the_answers_are_others() -> None:
    rng = np.random.default_rng(0)
    exact, noise = rng.standard_normal((2, 200, 5)).astype(np.float32)
    base = (exact, exact + 0.01 * noise)
    near, outside, lost = (
        rounded_check("n", (exact, exact + size * noise), base, 1e-4, step=0.02) for size in (0.04, 0.4, 0.6)
    )
    assert (near.verdict, outside.verdict, lost.verdict) == ("pass", "pass", "fail")
    assert "(2.0 output steps)" in near.detail
    assert "(0.5 output steps)" in near.detail
    assert "calibrate anew" not in near.detail
    assert "calibrate anew" in outside.detail
    assert "calibrate anew" in lost.detail


def test_an_adapter_of_another_artifact_is_refused(
    floating: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, fused = copies(*floating, tmp_path)
    file = load_adapter(fused / mf.ADAPTER)
    kept = dict(list(file.tensors.items())[:2])
    save_adapter(fused / mf.ADAPTER, kept, file.metadata)
    assert "adapter does not fit" in refused(capsys, made / mf.BASE_TFLITE, fused / "fused.tflite")


def test_fusing_twice_gives_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    state = load_adapter(folders[1] / mf.ADAPTER).tensors
    fuse(folders[0], tmp_path / "again.tflite", state, base=mf.BASE_TFLITE)
    assert (tmp_path / "again.tflite").read_bytes() == (folders[1] / "fused.tflite").read_bytes()
