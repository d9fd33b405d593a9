"""A device's process holds no framework, whether these are installed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import build
from finetune_runs import in_new_python, write_data
from hand_steps import StepRecipe
from step_artifacts import build_steps
from tiny_network import Recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


def artifact(engine: str, policy: str, folder: Path) -> Path:
    """A tiny artifact for one engine."""
    if engine == "onnxruntime":
        return build_steps(folder, StepRecipe(bn_policy=policy)).folder
    return build(folder, Recipe(bn_policy=policy)).folder


ENGINES = ("onnxruntime", "onnxruntime-training")
FRAMEWORKS = ("torch", "onnx", "onnx_ir", "onnxscript", "h5py", "sympy", "tensorflow", "torchvision")


WATCH = """
import json, sys
from pathlib import Path
from lorac_runtime import FinetuneConfig, finetune
config = FinetuneConfig(epochs=1, micro_batch=int(sys.argv[4]) or None)
report = finetune(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), config)
print(json.dumps({"engine": report.engine, "loaded": sorted({name.split(".")[0] for name in sys.modules})}))
"""


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[5].split(","):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def check_no_framework_loaded(engine: str, folder: Path, data: Path, out: Path, micro_batch: int = 0) -> None:
    done = in_new_python(WATCH, folder, data, out, micro_batch)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"] == engine
    assert {"numpy", "onnxruntime", "safetensors"} <= set(found["loaded"])
    assert set(found["loaded"]) & set(FRAMEWORKS) == set()
    assert done.stderr == ""  # nor does the native library write its log


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_run_imports_no_framework_although_they_are_installed(
    engine: str, policy: str, data: Path, tmp_path: Path
) -> None:
    check_no_framework_loaded(engine, artifact(engine, policy, tmp_path / "a"), data, tmp_path / "out")


def test_a_run_in_micro_batches_imports_no_framework_either(data: Path, tmp_path: Path) -> None:
    folder = artifact("onnxruntime", "frozen", tmp_path / "a")
    check_no_framework_loaded("onnxruntime", folder, data, tmp_path / "out", micro_batch=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_run_works_where_no_framework_can_be_imported(engine: str, data: Path, tmp_path: Path) -> None:
    folder, out = artifact(engine, "frozen", tmp_path / "a"), tmp_path / "out"
    done = in_new_python(BLOCK + WATCH, folder, data, out, 0, ",".join(FRAMEWORKS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == engine
    assert (out / "fused.onnx").exists()


def test_the_blocker_blocks_what_it_is_told_to() -> None:
    for name in ("torch", "onnx"):
        blocked = in_new_python(f"{BLOCK}\nimport {name}", 1, 2, 3, 0, ",".join(FRAMEWORKS))
        assert blocked.returncode == 1
        assert f"{name} is blocked" in blocked.stderr
    free = in_new_python(f"{BLOCK}\nimport onnx", 1, 2, 3, 0, "nothing")
    assert free.returncode == 0, free.stderr
