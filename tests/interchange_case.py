"""A network's checkpoint folder, an adapter file for it, and what the adapted network answers."""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from networks import NAMES, SPEC, touch_adapters, trained
from torch import nn

from lorac_deploy.adapter_files import save_module_adapter
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.export import export_training_artifact
from lorac_deploy.lora import attach
from lorac_deploy.models import ModelSpec
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.plan import LoraConfig

INPUTS = torch.randn(4, *SPEC.shape, generator=torch.Generator().manual_seed(7))


def answers(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net.eval()(INPUTS)
    return found


def with_small_stem() -> nn.Module:
    return trained("resnet18", cifar_stem=True)


def saved(net: nn.Module, folder: Path) -> Path:
    """The checkpoint folder of `with_small_stem`."""
    spec = ModelSpec("resnet18", classes=10, cifar_stem=True)
    save_checkpoint(folder, net, spec, input_spec=SPEC, class_names=NAMES, metrics={})
    return folder


class Case:
    def __init__(self, folder: Path, name: str, config: LoraConfig) -> None:
        self.net, self.config, self.folder = trained(name), config, folder
        spec = ModelSpec(name, classes=10)
        self.base, self.adapter = folder / "base", folder / "adapter.safetensors"
        save_checkpoint(self.base, self.net, spec, input_spec=SPEC, class_names=NAMES, metrics={})
        adapted = copy.deepcopy(self.net)
        attach(adapted, config)
        touch_adapters(adapted)
        save_module_adapter(self.adapter, adapted, model=name)
        self.expected = answers(adapted)

    @functools.cached_property
    def artifact(self) -> Path:
        export_training_artifact(self.base, self.folder / "artifact", config=ArtifactConfig(lora=self.config))
        return self.folder / "artifact"

    def far(self, found: torch.Tensor) -> float:
        """How far answers are from the adapted network's, relative to the largest."""
        return float((found - self.expected).abs().max() / self.expected.abs().max())


def in_peft(net: nn.Module, source: Path | str, **options: Any) -> torch.Tensor:
    """What PEFT makes of a network with the adapter at ``source``."""
    peft = importlib.import_module("peft")  # after ours: it loads torchvision, which we can load without its operators
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups, of a base without a name
        return answers(peft.PeftModel.from_pretrained(copy.deepcopy(net), str(source), **options))
