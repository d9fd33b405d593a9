"""LoRA-C for CNNs: train in PyTorch, export a training artifact, fine-tune on the device, fuse into a drop-in file.

Names load on first use, so that ``lorac-deploy --help`` and ``verify`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorac_runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from lorac_deploy.adapter_files import attach_adapter, load_module_adapter, save_module_adapter
    from lorac_deploy.checkpoint import load_checkpoint, save_checkpoint
    from lorac_deploy.export import OnnxSource, export_training_artifact
    from lorac_deploy.lora import attach, detach, fuse
    from lorac_deploy.trainer import train
    from lorac_exporters.artifact import ArtifactConfig
    from lorac_exporters.plan import LoraConfig
    from lorac_exporters.verify import verify
    from lorac_runtime.session import finetune

__all__ = [
    "ArtifactConfig",
    "LoraConfig",
    "OnnxSource",
    "attach",
    "attach_adapter",
    "detach",
    "export_training_artifact",
    "finetune",
    "fuse",
    "load_checkpoint",
    "load_module_adapter",
    "save_checkpoint",
    "save_module_adapter",
    "train",
    "verify",
]

_HOMES = {
    "lorac_deploy.adapter_files": ("attach_adapter", "load_module_adapter", "save_module_adapter"),
    "lorac_deploy.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "lorac_deploy.export": ("OnnxSource", "export_training_artifact"),
    "lorac_deploy.lora": ("attach", "detach", "fuse"),
    "lorac_deploy.trainer": ("train",),
    "lorac_exporters.artifact": ("ArtifactConfig",),
    "lorac_exporters.plan": ("LoraConfig",),
    "lorac_exporters.verify": ("verify",),
    "lorac_runtime.session": ("finetune",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'lorac_deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
