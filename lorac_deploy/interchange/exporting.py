"""From adapter.safetensors to what other libraries load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from lorac_deploy.interchange.adapted import read_adapted
from lorac_deploy.interchange.folders import Folder, Shared, hashes, write_folder
from lorac_deploy.interchange.hub import Repository, write_snapshot
from lorac_deploy.interchange.onnx_adapter import onnx_adapter_folder
from lorac_deploy.interchange.own_folder import own_folder
from lorac_deploy.interchange.peft_folder import peft_folder
from lorac_runtime.files import atomic_write

FOLDERS = ("peft", "onnx_adapter", "adapter")
STATE_DICT = "state-dict"


@dataclasses.dataclass(frozen=True)
class ShareConfig:
    """``to`` is one of `FOLDERS`; ``rank`` is the most channels of PEFT's factors, ``name`` that of the .onnx_adapter.

    Raises ValueError for settings that do not go together.
    """

    to: str
    rank: int | None = None
    name: str = "adapter"

    def __post_init__(self) -> None:
        if self.to not in FOLDERS:
            raise ValueError(f"format {self.to!r} is not one of {', '.join(FOLDERS)}")
        if self.rank is not None and (self.to != "peft" or self.rank < 1):
            raise ValueError("a rank is for the format peft, and at least 1")
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            raise ValueError(f"the name of an adapter has letters, digits, '.', '_' and '-', got {self.name!r}")


def export_folder(source: Path, adapter: Path, out: Path | Repository, config: ShareConfig) -> Shared:
    """Write an adapter of ``source``, a checkpoint folder or a training artifact, as a folder of another library.

    ``peft``: what ``peft.PeftModel.from_pretrained`` loads (`lorac_deploy.interchange.peft_folder`). ``onnx_adapter``:
    of an artifact, a model and a file for ``RunOptions.add_active_adapter``. ``adapter``: the adapter file itself. All
    have a model card. ``out`` is a folder, or a repository in the local cache of a model hub.

    Raises CheckpointError, ArtifactError, AdapterError or OutputError; ConversionError for what the format cannot hold.
    """
    folder = _folder(source, adapter, config)
    return write_snapshot(folder, out) if isinstance(out, Repository) else write_folder(folder, out)


def _folder(source: Path, adapter: Path, config: ShareConfig) -> Folder:
    if config.to == "peft":
        return peft_folder(read_adapted(source, adapter), rank=config.rank)
    if config.to == "onnx_adapter":
        return onnx_adapter_folder(source, adapter, name=config.name)
    return own_folder(source, adapter)


def export_state_dict(source: Path, adapter: Path, out: Path) -> Shared:
    """Write the network of ``source`` with an adapter fused into it as a safetensors file of plain tensors.

    Of a checkpoint folder: names and shapes of its model.safetensors. Of an artifact: those of base.onnx, batch
    normalisations folded. Raises CheckpointError, ArtifactError, AdapterError, OutputError.
    """
    tensors = {n: torch.from_numpy(np.asarray(v, order="C")) for n, v in read_adapted(source, adapter).fused.items()}
    content = save(tensors, {"format": "pt"})
    atomic_write(out, content)
    return Shared(out, hashes({out.name: content}))
