"""report.json in and out, and the memory figure."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorac_runtime.config import Settings
from lorac_runtime.errors import OutputError
from lorac_runtime.report import FinetuneReport, package_version, read_report, versions, write_report

REPORT = FinetuneReport(
    engine="e",
    method="lora-c",
    model="net",
    bn_policy="frozen",
    accuracy_before=0.5,
    accuracy_after=None,
    loss_before=None,
    loss_after=0.25,
    losses=(1.0, 0.5),
    epoch_losses=(0.75,),
    train_images=8,
    val_images=2,
    step_seconds=0.1,
    seconds=3.5,
    fuse_seconds=0.01,
    peak_memory_bytes=None,
    trained_parameters=10,
    model_parameters=100,
    seed=0,
    settings=Settings(1, 4, 1e-3, 0.3, 0.2, 0),
    versions={"python": "3"},
    run={"data": "a"},
)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    write_report(tmp_path, REPORT)
    assert read_report(tmp_path) == REPORT


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"engine": 1}', "[" * 100_000, '{"losses": [NaN]}'])
def test_another_file_of_that_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(OutputError, match=r"is not the report of a run; choose another output folder"):
        read_report(tmp_path)


def test_a_figure_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, dataclasses.replace(REPORT, seconds=float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_versions_name_everything_that_took_part() -> None:
    found = versions("some-engine", "9.9")
    assert found["some-engine"] == "9.9"
    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["safetensors"] == package_version("safetensors") != "not installed"
    assert package_version("no-such-distribution") == "not installed"


MEASURE = """
import json
import numpy as np
from lorac_runtime.report import peak_memory_bytes
before = peak_memory_bytes()
held = np.ones(64 << 20, np.uint8)
with_it = peak_memory_bytes()
del held
print(json.dumps([before, with_it, peak_memory_bytes()]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no measure of peak memory there")
def test_peak_memory_grows_by_what_is_held_and_stays(tmp_path: Path) -> None:
    """In a process of its own; it must not inherit the peak of the larger one that starts it."""
    ballast = np.ones(200 << 20, np.uint8)
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, with_it, after = json.loads(done.stdout)
    assert 5 << 20 < before < 150 << 20 < ballast.size
    assert 60 << 20 < with_it - before < 80 << 20
    assert after > with_it - (1 << 20)  # the kernel counts in batches of pages
