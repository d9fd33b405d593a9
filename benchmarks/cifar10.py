"""Real CIFAR-10 images and a pretrained ResNet-20 from the data folder beside the checkout (see its README)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac_deploy.checkpoint import CONFIG, save_checkpoint
from lorac_deploy.models import ModelSpec, build, load_weights
from lorac_runtime.manifest import InputSpec

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INPUT = InputSpec("input", (3, 32, 32), 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OFFICIAL_TEST = 50_000  # index of the first official test image in the pack

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def images(folder: Path = DATA) -> tuple[Images, Labels]:
    """(51000, 32, 32, 3) images and labels: 50,000 for training, then 1,000 official test images."""
    spec = importlib.util.spec_from_file_location("load_data", folder / "load_data.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels, labels = module.cifar10_full(folder / "cifar10_lossless.npz")
    return pixels, labels.astype(np.int64)


def local_and_test(count: int, seed: int, folder: Path = DATA) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """``count`` training images drawn by ``seed``, and the 1,000 official test images."""
    pixels, labels = images(folder)
    chosen = np.sort(np.random.default_rng(seed).choice(OFFICIAL_TEST, count, replace=False))
    return (pixels[chosen], labels[chosen]), (pixels[OFFICIAL_TEST:], labels[OFFICIAL_TEST:])


def resnet20_checkpoint(out: Path, folder: Path = DATA) -> Path:
    """The pretrained ResNet-20 as a checkpoint folder."""
    return pretrained_checkpoint(out, "resnet20", folder)


def pretrained_checkpoint(out: Path, name: str, folder: Path = DATA, *, classes: int = 10) -> Path:
    """A pretrained network as a checkpoint folder, made where it is not there yet.

    With other than 10 ``classes`` its head is a fresh one.
    """
    if not (out / CONFIG).is_file():
        spec = ModelSpec(name=name, classes=classes)
        module = build(spec)
        load_weights(module, folder / "weights" / f"{name}_cifar10_akamaster.safetensors")
        names = NAMES if classes == 10 else tuple(str(i) for i in range(classes))
        save_checkpoint(out, module, spec, input_spec=INPUT, class_names=names, metrics={})
    return out
