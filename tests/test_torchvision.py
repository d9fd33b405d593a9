"""The guarded import of torchvision, in fresh processes."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


def test_models_and_data_sets_can_be_used() -> None:
    done = run(
        "import torch; from lorac_deploy._torchvision import datasets, models;"
        "print(tuple(models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape), datasets.CIFAR10.__name__)"
    )
    assert (done.returncode, done.stdout.split()[-1]) == (0, "CIFAR10"), done.stderr


def test_nothing_is_declared_where_the_operators_exist_already() -> None:
    done = run(
        "import torch; library = torch.library.Library('torchvision', 'DEF');"
        "schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor';"
        "library.define('nms' + schema); library.define('qnms' + schema);"
        "from lorac_deploy import _torchvision; assert _torchvision._DECLARED is None"
    )
    assert done.returncode == 0, done.stderr


def test_without_torchvision_the_message_says_how_to_install_it() -> None:
    done = run(
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'torchvision' else find(name, *a);"
        "import lorac_deploy._torchvision"
    )
    assert done.returncode == 1
    assert "ImportError: torchvision is not installed: pip install 'torchvision>=0.28,<0.29'" in done.stderr
