"""What a page of documentation takes for granted: the files that its commands work on, small ones."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from author_lora import wrapped
from PIL import Image
from safetensors.torch import save_file
from small_artifacts import NAMES as CLASSES
from small_artifacts import export
from torch import nn

from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.export import ArtifactConfig, export_training_artifact
from lorac_deploy.models import ModelSpec, build
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.manifest import InputSpec, TrainingDefaults

SPEC = InputSpec("input", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.25,) * 3)
NAMES = tuple("abcdefghij")
CHANGED = ("layer1.0.conv1", "layer2.0.conv2")


def class_folders(npz: Path, folder: Path, names: tuple[str, ...]) -> None:
    """The same images as files, a folder for each class."""
    with np.load(npz) as data:
        for i, (image, label) in enumerate(zip(data["images"], data["labels"], strict=True)):
            path = folder / names[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def device(folder: Path) -> None:
    """An artifact that learns fast, and images in folders, whose brightness tells the class."""
    export(folder / "artifact", training=TrainingDefaults(lr=0.02, epochs=4))
    labels = np.arange(300) % 4
    images = np.random.default_rng(0).normal(60, 30, (300, 10, 10, 3)) + 45 * labels[:, None, None, None]
    np.savez(folder / "local.npz", images=np.clip(images, 0, 255).astype(np.uint8), labels=labels)
    class_folders(folder / "local.npz", folder / "local", CLASSES)
    (folder / "labelled").symlink_to("local")


def domains(folder: Path) -> None:
    """An artifact with both base files, and two adapters that fit it."""
    export(folder / "artifact")
    for name in ("day", "night"):
        (folder / f"adapted_{name}").mkdir()
        shutil.copy(folder / "artifact" / "adapter.safetensors", folder / f"adapted_{name}")


def network() -> nn.Module:
    return build(ModelSpec("resnet20", classes=10), seed=0).eval()


def cloud(folder: Path) -> None:
    """A checkpoint and local data."""
    spec = ModelSpec("resnet20", classes=10)
    save_checkpoint(folder / "base", network(), spec, input_spec=SPEC, class_names=NAMES, metrics={})
    labels = np.arange(60) % 10
    images = np.random.default_rng(0).normal(60, 20, (60, 8, 8, 3)) + 12 * labels[:, None, None, None]
    np.savez(folder / "local.npz", images=np.clip(images, 0, 255).astype(np.uint8), labels=labels)


def exported(folder: Path, method: str = "lora-c") -> None:
    """The same with an artifact and what a run made of it."""
    cloud(folder)
    export_training_artifact(folder / "base", folder / "artifact", config=ArtifactConfig(method=method))
    start = load_adapter(folder / "artifact" / "adapter.safetensors")
    moved = {n: v + np.float32(0.01) if n.endswith("lora_b") else v for n, v in start.tensors.items()}
    (folder / "adapted").mkdir()
    save_adapter(folder / "adapted" / "adapter.safetensors", moved, start.metadata)


def frozen_front(folder: Path) -> None:
    exported(folder, "head")


def others(folder: Path) -> None:
    """A checkpoint and an artifact, and adapters of them that other libraries made."""
    exported(folder)
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(CHANGED))
    peft.get_peft_model(network(), config).save_pretrained(folder / "adapter_dir")
    torch.save(wrapped(network(), CHANGED, r=2, alpha=8.0).state_dict(), folder / "checkpoint.pt")
    tuned = copy.deepcopy(network().state_dict())
    tuned[f"{CHANGED[0]}.weight"] += 0.01 * torch.randn_like(tuned[f"{CHANGED[0]}.weight"])
    save_file(tuned, folder / "tuned.safetensors")


def nothing(folder: Path) -> None:
    """The page makes all that it needs."""


@dataclasses.dataclass(frozen=True)
class Page:
    """A page whose blocks a test runs in a folder that ``fill`` prepares."""

    name: str
    fill: Callable[[Path], None]


PAGES = (
    Page("device.md", device),
    Page("domains.md", domains),
    Page("howto/choosing-a-method.md", exported),
    Page("howto/mobile.md", cloud),
    Page("howto/raspberry-pi.md", device),
    Page("interchange.md", others),
    Page("methods.md", frozen_front),
    Page("signals.md", nothing),
    Page("tflite.md", exported),
)
