"""The suite's latency benchmark: every file on every runtime, the structure beside each figure, problems named.

Times come from a stand-in for the worker (see bench_worker.py).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import interpreters as envs
from benchmarks import latency
from benchmarks import rows as rs
from benchmarks.latency_files import Subject
from benchmarks.latency_pooled import POOLED, pooled
from benchmarks.networks import network, parsed
from lorac_deploy.bench import contest
from lorac_deploy.bench.contest import Effort
from lorac_deploy.bench.equivalence import equivalence
from lorac_exporters.tflite_config import Weights

SMALL = "resnet8:16"
EVERYWHERE = dict.fromkeys((*latency.RUNTIMES["onnx"], *latency.RUNTIMES["tflite"]), Path(sys.executable))
SETTINGS = latency.Settings((SMALL,), (), (2,), ("float32", "fp16"), effort=Effort((3,), 0.1, 1), python=EVERYWHERE)
VARIANTS = {"base", "fused", "unmerged", "adapters as inputs", "adapter branch"}
FAULTS = {"fault: extra node", "fault: unfolded branch"}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(network(SMALL), tmp_path_factory.mktemp("subject") / "resnet8")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[rs.Row]:
    """All rows of a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "WORKER", Path(__file__).with_name("bench_worker.py"))
        patch.setenv("BENCH_LOG", str(tmp_path_factory.mktemp("log") / "log"))
        return latency.rows(SETTINGS, lambda _: None)


def named(found: list[rs.Row], **wanted: str) -> list[rs.Row]:
    return [r for r in found if all({**dataclasses.asdict(r), **r.settings}.get(k) == v for k, v in wanted.items())]


def test_every_variant_of_every_format_has_a_row_on_the_newest_runtime_and_plain_ones_on_all(
    found: list[rs.Row],
) -> None:
    rs.check_unique(found)
    for precision, more, count in (("float32", FAULTS, 2), ("fp16", set(), 1)):
        for kind, names in latency.RUNTIMES.items():
            assert {r.runtime for r in named(found, format=kind, precision=precision)} == set(names[:count])
            for runtime in names[:count]:
                its = named(found, format=kind, runtime=runtime, precision=precision, quantity="latency")
                assert {row.variant for row in its} == VARIANTS | (more if kind == "onnx" else set())


def test_what_tflite_cannot_hold_is_said(found: list[rs.Row]) -> None:
    for row in named(found, format="tflite", quantity="latency"):
        assert (row.figure is None) == (row.variant in latency.NOT_IN_TFLITE)
        assert (row.note == "") == (row.figure is not None)


def test_load_and_first_run_have_rows_of_their_own(found: list[rs.Row]) -> None:
    for quantity, figure in (("load", 0.5), ("first run", 0.25)):
        its = named(found, quantity=quantity)
        assert len(its) == len([r for r in named(found, quantity="latency") if r.figure is not None])
        assert {row.figure for row in its} == {figure}


def test_the_structure_stands_beside_every_latency(found: list[rs.Row]) -> None:
    for row in [r for r in named(found, quantity="latency") if r.ratio is not None]:
        text = row.details["structure"]
        assert text.startswith("drop-in: " if row.variant == "fused" else "not a drop-in: "), (row.key, text)


def test_the_stand_ins_equal_times_are_a_problem_for_every_control_and_no_fused_file(found: list[rs.Row]) -> None:
    said = latency.problems(found)
    assert len(said) == len([r for r in found if r.details.get("must") == "different"])
    assert all("must be different and is same at 1.000" in text for text in said)


def test_fused_files_that_differ_and_drop_ins_that_are_none_are_problems() -> None:
    details = {"must": "same", "structure": "drop-in: 12 checks"}
    row = rs.Row("latency", "m", "onnx", "r", "fused", "latency", 1.0, "s", 1.2, "base", "different", details=details)
    assert latency.problems([row]) == ["m onnx None on r: fused must be same and is different at 1.200"]
    noisy = dataclasses.replace(row, verdict="too noisy")
    assert latency.problems([noisy]) == []
    planted = dataclasses.replace(noisy, details={"must": "same", "structure": "not a drop-in: operators"})
    assert "its structure says not a drop-in: operators" in latency.problems([planted])[0]
    faster = dataclasses.replace(row, ratio=0.8, details={"must": "different", "structure": "not a drop-in: x"})
    assert "must be different and is different at 0.800" in latency.problems([faster])[0]


def test_a_runtime_that_is_not_installed_is_reported_for_every_variant(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, tmp_path: Path
) -> None:
    monkeypatch.setattr(envs, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "environments").mkdir(parents=True)
    case = latency.Case(subject, "tflite", "float32", 2, False)
    its = latency.case_rows(case, dataclasses.replace(SETTINGS, python={}), lambda _: None)
    assert {(r.runtime, r.variant, r.figure) for r in its} == {
        (envs.LITERT, variant, None) for variant in ("base", "fused")
    }
    assert all("not installed" in r.note and "python -m benchmarks setup" in r.note for r in its)


@pytest.mark.parametrize(
    ("precision", "batch", "full", "older"),
    [("float32", 2, True, True), ("float32", 2, False, False), ("float32", 8, True, False), ("int8", 2, True, False)],
)
def test_older_runtimes_run_the_plain_case_of_a_network_in_full(
    subject: Subject, precision: Weights, batch: int, full: bool, older: bool
) -> None:
    for kind, (newest, old) in latency.RUNTIMES.items():
        its = latency.runtimes(latency.Case(subject, kind, precision, batch, full), SETTINGS)
        assert its == ((newest, old) if older else (newest,))


def test_all_fused_files_together_are_one_more_row_for_each_format(found: list[rs.Row]) -> None:
    together = named(found, quantity=POOLED)
    assert [r.format for r in together] == ["onnx", "tflite", "onnx and tflite"][-len(together) :]
    own = [r.ratio for r in named(found, quantity="latency", variant="fused")]
    test = equivalence([ratio for ratio in own if ratio])
    assert (together[-1].ratio, together[-1].verdict) == (test.ratio, test.verdict)
    assert (together[-1].details["low"], together[-1].details["high"]) == (test.low, test.high)
    assert together[-1].details["structure"] == f"drop-in: all {len(own)}"


def test_a_mean_over_files_that_are_slower_or_no_drop_in_is_a_problem() -> None:
    slow = [fused(f"net{i}", ratio=1.02 + 0.001 * i, verdict="too noisy") for i in range(6)]
    (row,) = pooled(slow)
    assert row.verdict == "different"
    assert "fused must be same and is different at 1.022" in latency.problems([row])[0]
    (row,) = pooled([*slow[:5], fused("odd", ratio=1.02, structure="not a drop-in: operators: two more")])
    assert "its structure says not a drop-in: odd" in latency.problems([row])[1]
    assert pooled(slow[:3]) == [], "three rows make no mean"


def fused(model: str, *, ratio: float, verdict: rs.Verdict = "same", structure: str = "drop-in: 11 checks") -> rs.Row:
    details = {"structure": structure, "must": "same"}
    place = ("latency", model, "onnx", "onnxruntime", "fused", "latency", 1.0, "s")
    return rs.Row(*place, ratio=ratio, verdict=verdict, details=details)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_onnx_files_of_other_precisions_answer_about_alike_and_are_smaller(subject: Subject, precision: str) -> None:
    import onnxruntime

    plain = subject.files("onnx", "float32", full=True)
    other = subject.files("onnx", precision, full=True)  # type: ignore[arg-type]
    images = {"input": subject._normalised()}
    for name in VARIANTS - {"adapters as inputs"}:
        answers = [onnxruntime.InferenceSession(p[name]).run(None, images)[0] for p in (plain, other)]
        spread = np.abs(answers[0]).max()
        assert np.abs(answers[1] - answers[0]).max() < (0.02 if precision == "fp16" else 0.3) * spread, name
        assert other[name].stat().st_size < plain[name].stat().st_size
    assert subject.structure("onnx", precision, other, "fused").ok  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["resnet18:64:", "resnet18:64:0", "resnet18:64:1,x", "resnet18:64:1:8", "resnet18"])
def test_batch_sizes_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latency.main(["--full", text])
    assert f"{text}: expected NAME:PIXELS" in capsys.readouterr().err


def test_a_network_in_full_has_its_own_batch_sizes_or_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(latency, "Subject", lambda net, folder: net)
    monkeypatch.setattr(latency, "case_rows", lambda case, *_: seen.append((case.subject.size, case.batch)) or [])
    full = ("resnet8:16:4", "resnet8:24:1,3", "resnet8:32")
    settings = dataclasses.replace(SETTINGS, full=full, others=("resnet8:40",), batches=(2, 5), precisions=("float32",))
    latency.rows(settings, lambda _: None)
    assert sorted(set(seen)) == [(16, 4), (24, 1), (24, 3), (32, 2), (32, 5), (40, 2)]


@pytest.mark.parametrize("text", ["resnet18", "resnet18:", "resnet18:4", "resnet18:x", "vgg:32", "mlp:32"])
def test_what_names_no_network_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"expected NAME:PIXELS|no model \w+: choose from resnet8, resnet18,"):
        parsed(text)
    with pytest.raises(SystemExit):
        latency.main(["--full", text])
    assert text in capsys.readouterr().err
