"""A device's process holds no framework, whether these are installed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifacts import Tiny, build
from finetune_runs import (
    in_new_python,
    write_data,
)
from tiny_network import Recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Without clipping, so that runs repeat to the last bit (see the engine's tests)."""
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


FRAMEWORKS = ("torch", "onnx", "onnx_ir", "onnxscript", "h5py", "sympy", "tensorflow", "torchvision")


WATCH = """
import json, sys
from pathlib import Path
from lorac_runtime import FinetuneConfig, finetune
finetune(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), FinetuneConfig(epochs=1))
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[4].split(","):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize("policy", ["frozen", "batch", "recalibrate"])
def test_a_whole_run_imports_no_framework_although_they_are_installed(policy: str, data: Path, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(bn_policy=policy))
    done = in_new_python(WATCH, tiny.folder, data, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {"numpy", "onnxruntime", "safetensors"} <= loaded
    assert loaded & set(FRAMEWORKS) == set()
    assert done.stderr == ""  # nor does the native library write its log


def test_a_whole_run_works_where_no_framework_can_be_imported(tiny: Tiny, data: Path, out: Path) -> None:
    done = in_new_python(BLOCK + WATCH, tiny.folder, data, out, ",".join(FRAMEWORKS))
    assert done.returncode == 0, done.stderr
    assert (out / "fused.onnx").exists()


def test_the_blocker_blocks_what_it_is_told_to() -> None:
    for name in ("torch", "onnx"):
        blocked = in_new_python(f"{BLOCK}\nimport {name}", 1, 2, 3, ",".join(FRAMEWORKS))
        assert blocked.returncode == 1
        assert f"{name} is blocked" in blocked.stderr
    free = in_new_python(f"{BLOCK}\nimport onnx", 1, 2, 3, "nothing")
    assert free.returncode == 0, free.stderr
