"""The runtime on 64-bit Arm, emulated: `make test-arm`, on an x86-64 Debian. Minutes the first time, then fewer.

    python tests/arm/run.py HOME [--log FILE] [--tests]

The same two steps on this machine and on Arm must give the same losses to 1e-4, and fused files with the same answers.
With ``--tests`` the runtime's own tests run there too. The log is in docs/results/arm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

TOLERANCE = 1e-4  # of losses and, relative to the largest, of answers


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("home", type=Path, help="folder for the emulated system, kept for the next time")
    p.add_argument("--log", type=Path, help="write versions, losses and differences to this JSON file")
    p.add_argument("--tests", action="store_true", help="run the runtime's tests too")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compared(args.home, Path(folder))
        if args.tests:
            found["tests of the runtime"] = tested(args.home, Path(folder) / "tests.xml")
    print(json.dumps(found, indent=1))
    if args.log is not None:
        args.log.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = found.get("tests of the runtime", {})
    return int(max(found["differences"].values()) > TOLERANCE or bad.get("failures", 0) + bad.get("errors", 0) > 0)


def tested(home: Path, results: Path) -> dict[str, int]:
    """How the runtime's own tests end on Arm."""
    on_arm(home, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", ROOT / "tests/runtime")
    suite = ElementTree.parse(results).find("testsuite")
    assert suite is not None
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def compared(home: Path, folder: Path) -> dict[str, Any]:
    """Both machines on the same artifact and images."""
    from small_artifacts import NAMES, SPEC, export

    artifact = export(folder / "artifact").folder
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, *SPEC.shape[1:], SPEC.shape[0]), np.uint8)
    np.savez(folder / "local.npz", images=images, labels=np.arange(20) % len(NAMES))
    words = [HERE / "two_steps.py", artifact, folder / "local.npz"]
    host = subprocess.run(list(map(str, [sys.executable, *words, folder / "host"])), capture_output=True, check=True)
    arm = on_arm(home, *words, folder / "arm", capture_output=True, check=True)
    here, there = json.loads(host.stdout), json.loads(arm.stdout)
    return {"host": here, "arm": there, "differences": differences(here, there)}


def differences(here: dict[str, Any], there: dict[str, Any]) -> dict[str, float]:
    """The largest ones: of losses as they are, of answers relative to the largest; of the two formats on Arm."""
    assert len(here["losses"]) == len(there["losses"]) == 2
    found = {"losses": float(np.abs(np.subtract(here["losses"], there["losses"])).max())}
    pairs = {name: (here[name], there[name]) for name in ("onnx", "tflite")}
    pairs["onnx and tflite on Arm"] = (there["onnx"], there["tflite"])
    for name, (one, other) in pairs.items():
        found[name] = float(np.abs(np.subtract(one, other)).max() / max(1.0, np.abs(one).max()))
    return found


def on_arm(home: Path, *words: object, **how: Any) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([str(ROOT / "runtime"), str(HERE.parent)])
    command = [str(HERE / "python"), str(home), *map(str, words)]
    return subprocess.run(
        command, env={**os.environ, "ARM_PYTHONPATH": path}, cwd=ROOT, check=how.pop("check", False), **how
    )


if __name__ == "__main__":
    sys.exit(main())
