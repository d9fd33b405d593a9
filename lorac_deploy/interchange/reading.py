"""Reading adapters of every format that is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorac_deploy.interchange.change import Change, Tensors, checked
from lorac_deploy.interchange.loralib import is_loralib, read_loralib
from lorac_deploy.interchange.own_folder import is_own
from lorac_deploy.interchange.peft import is_peft, read_peft
from lorac_deploy.interchange.whole import read_whole
from lorac_runtime.errors import AdapterError

AUTO = "auto"
OWN = "adapter"  # of this project
FORMATS = (AUTO, "peft", "loralib", "lora-c", "safetensors", OWN)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an adapter is and what it does not say itself. Raises ValueError for an unknown format."""

    path: Path
    format: str = AUTO
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")


def read(source: Source, base: Tensors) -> Change:
    """What an adapter of another library changes in the network whose tensors are ``base``.

    Raises AdapterError if it is missing, damaged, of another network, or no change of weights; all problems at once.
    """
    kind = kind_of(source)
    if kind == "peft":
        found = read_peft(source.path, base)
    elif kind in ("loralib", "lora-c"):
        found = read_loralib(source.path, base, alpha=source.alpha)
    else:
        found = read_whole(source.path, base)
    return checked(found, base, str(source.path))


def kind_of(source: Source) -> str:
    """Which of `FORMATS` it is, seen where it is not said.

    Raises AdapterError if it is none, or says its alpha itself.
    """
    if not source.path.exists():
        raise AdapterError(f"{source.path} not found")
    kind = known_format(source.path) if source.format == AUTO else source.format
    if source.alpha is not None and kind not in ("loralib", "lora-c"):
        raise AdapterError(f"{source.path} is of the format {kind}, which says its alpha itself; leave --alpha out")
    return kind


def known_format(path: Path) -> str:
    """The format of what lies at ``path``. Raises AdapterError if it is none of those."""
    if is_peft(path):
        return "peft"
    if is_own(path):
        return OWN
    if path.is_dir():
        raise AdapterError(f"{path} is a folder, and no PEFT adapter: adapter_config.json is missing")
    return "loralib" if is_loralib(path) else "safetensors"
