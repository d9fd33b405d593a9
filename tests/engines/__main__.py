"""Train the same artifacts in several environments: `make test-engines`.

Run from the root of a checkout as ``PYTHONPATH=tests python -m engines NAME=PYTHON ...``: each PYTHON fine-tunes every
artifact with the same data, seed and order, and its losses and adapters must be those of the Python that runs this.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engines.cases import CASES, Case, write, write_data
from engines.comparison import CHANGE, LOSS, Deviation, Outcome, compare, read, version_problem

from lorac_deploy import verify

FINETUNE = Path("runtime") / "ort_finetune.py"


def main(argv: list[str]) -> int:
    """Exit status 1 if an environment fails or disagrees."""
    p = argparse.ArgumentParser(prog="python -m engines", description=__doc__)
    p.add_argument("environments", nargs="+", metavar="NAME=PYTHON", help="NAME: Python's version, -, onnxruntime's")
    given = dict(text.partition("=")[::2] for text in p.parse_args(argv).environments)
    print(f"Each loss may differ by {LOSS:g}, each tensor's change by {CHANGE:g} of its norm. Differences:")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder / "data.npz")
        expected = {case.name: _prepared(case, folder) for case in CASES}
        problems = [text for name, python in given.items() for text in _tried(name, python, folder, expected)]
    for text in problems:
        print(f"FAILED {text}")
    return 1 if problems else 0


def _prepared(case: Case, folder: Path) -> Outcome:
    """Export the artifact of a case, and train it here."""
    write(case, folder / case.name)
    return _trained(case, sys.executable, folder, "reference")


def _trained(case: Case, python: str, folder: Path, name: str) -> Outcome:
    """Fine-tune in a process of ``python``. Raises RuntimeError with what it printed if it fails."""
    artifact, out = folder / case.name, folder / f"{case.name} {name}"
    command = [python, FINETUNE, artifact, "--data", folder / "data.npz", "--out", out, "--engine", "onnxruntime"]
    command += ["--val-fraction", "0", "--threads", "1", "--quiet", *case.options]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=clean, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {case.name}: exit status {done.returncode}\n{done.stderr.strip()}")
    return read(artifact, out)


def _tried(name: str, python: str, folder: Path, expected: dict[str, Outcome]) -> list[str]:
    """Train every case in one environment and print its line; returns what is wrong with it."""
    problems, cells = [], []
    for case in CASES:
        try:
            found = _trained(case, python, folder, name)
        except RuntimeError as err:
            return [*problems, str(err)]
        deviation = compare(found, expected[case.name])
        cells.append(_cell(case, found, deviation))
        if not deviation.ok:
            off = f"a loss is {deviation.loss:.1e} off, {deviation.tensor} {deviation.change:.1e}"
            problems.append(f"{name}, {case.name}: {off}")
        if not verify(folder / case.name / "base.onnx", folder / f"{case.name} {name}" / "fused.onnx").ok:
            problems.append(f"{name}, {case.name}: the fused file is no drop-in for the base")
    other = version_problem(name, found.versions)
    held = ", ".join(f"{package} {found.versions[package]}" for package in ("python", "onnxruntime", "numpy"))
    print(f"{held}: {'; '.join(cells)}", flush=True)
    return problems if other is None else [other, *problems]


def _cell(case: Case, found: Outcome, deviation: Deviation) -> str:
    return (
        f"{case.name}: loss {found.losses[0]:.3f} to {found.losses[-1]:.3f} ({deviation.loss:.0e}), adapter "
        f"{deviation.change:.0e}, {1e3 * found.step_seconds:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
