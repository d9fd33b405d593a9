"""An adapter of this project as a folder for the hub: adapter.safetensors, and a card that says what it belongs to."""

from __future__ import annotations

import copy
from pathlib import Path

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.checkpoint import CONFIG, WEIGHTS, load_checkpoint
from lorac_deploy.interchange.folders import CARD, Folder, card
from lorac_exporters.references import adapted_state
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import FORMAT, load_adapter

_WORDS = (
    "An adapter file of lorac-deploy. `lorac-deploy import` checks it and takes it out of this folder; it then trains "
    "on, fuses and switches as one that was made at home."
)
_SHOWN = ("method", "layout", "r", "rank_mode", "alpha", "bn_policy", "coordinates", "producer")


def own_folder(source: Path, adapter: Path) -> Folder:
    """The adapter file as it is, and its card. ``source``: the checkpoint folder or artifact that it belongs to.

    Raises CheckpointError, ArtifactError or AdapterError, if it does not fit.
    """
    file = load_adapter(adapter)
    model, digest = _checked(source, adapter)
    settings = [(key, file.metadata[key] or "none") for key in _SHOWN if key in file.metadata]
    rows = [("setting", "value"), *settings, ("tensors", str(len(file.tensors)))]
    about = card(model, "lorac-deploy", _WORDS, rows=rows, base_hash=digest)
    return Folder({mf.ADAPTER: adapter.read_bytes(), CARD: about})


def is_own(path: Path) -> bool:
    """Whether ``path`` is a folder with an adapter file of this project, or such a file."""
    file = path / mf.ADAPTER if path.is_dir() else path
    return file.suffix == ".safetensors" and file.is_file() and _metadata(file).get("format") == FORMAT


def own_file(path: Path) -> Path:
    """The adapter file in a folder, or the file itself."""
    return path / mf.ADAPTER if path.is_dir() else path


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError, UnicodeDecodeError):
        return {}  # reading it whole says what is wrong


def _checked(source: Path, adapter: Path) -> tuple[str, str]:
    """The network's name and the hash of its weights, once the adapter was put on it."""
    if (source / CONFIG).exists() and not (source / mf.FILE_NAME).exists():
        checkpoint = load_checkpoint(source)
        attach_adapter(adapter, copy.deepcopy(checkpoint.module))
        return checkpoint.spec.name, mf.sha256(source / WEIGHTS)
    manifest = mf.load(source)
    adapted_state(source, manifest, adapter)
    return manifest.model, manifest.files[mf.BASE].sha256
