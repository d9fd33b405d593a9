"""What other libraries and the hub's tools load: a folder of files with a model card and the hash of each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorac_deploy.interchange.factorise import Fit
from lorac_runtime.files import atomic_write, output_folder

CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Shared:
    """What was written: files by name with their sha256, and how well each layer's change is held."""

    path: Path
    files: dict[str, str]
    fits: tuple[Fit, ...] = ()


@dataclasses.dataclass(frozen=True)
class Folder:
    """Files that belong together, not written yet."""

    files: dict[str, bytes]
    fits: tuple[Fit, ...] = ()


def write_folder(folder: Folder, out: Path) -> Shared:
    """Write the files into ``out``, each whole or not at all; other files there stay. Raises OutputError."""
    output_folder(out)
    for name, content in folder.files.items():
        atomic_write(out / name, content)
    return Shared(out, hashes(folder.files), folder.fits)


def hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    """The sha256 of each, as hexadecimal digits.

    >>> hashes({"a": b"1"})["a"][:8]
    '6b86b273'
    """
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def card(model: str, library: str, words: str, *, rows: Sequence[Sequence[str]], base_hash: str = "") -> bytes:
    """A model card in the convention of Hugging Face: metadata between lines of ``---``, then Markdown.

    The first of ``rows`` is the table's head. ``base_hash`` is the sha256 of the file that the adapter belongs to.
    """
    head = [f"library_name: {library}", "tags:", "- lora", "- lorac-deploy", f"- {model}"]
    head += [f"base_sha256: {base_hash}"] if base_hash else []
    lines = ["---", *head, "---", "", f"# Adapter for {model}", "", words, ""]
    for number, row in enumerate(rows):
        lines += [f"| {' | '.join(row)} |"] + (["|" + "---|" * len(row)] if not number else [])
    return ("\n".join(lines) + "\n").encode()
