"""What distributions and all that they require take on disk, as the environment that runs this sees it.

``python -I footprint_probe.py REQUIREMENT...`` prints JSON: releases with the bytes of the files that pip's RECORD
names, and requirements that nothing here meets. A distribution installed editable counts with the files of its
packages in the checkout. pip, setuptools and wheel are left out: a device has them or does without.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

try:
    from packaging.requirements import Requirement
except ImportError:  # environments of `venv` have pip's copy at least
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

TOOLS = ("pip", "setuptools", "wheel")
NO_EXTRA = ("",)


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it.

    >>> normalised("Ruamel.Yaml__x")
    'ruamel-yaml-x'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: Iterable[str]) -> tuple[dict[str, Distribution], list[str]]:
    """(installed distributions by normalised name: the roots and all that they require here, what is not installed)."""
    found: dict[str, Distribution] = {}
    missing: list[str] = []
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = normalised(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen or name in TOOLS:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(wanted.name)
        except PackageNotFoundError:
            missing.append(str(wanted))
            continue
        waiting += _required(found[name], extras)
    return found, missing


def _required(found: Distribution, extras: frozenset[str]) -> Iterator[Any]:
    for text in found.requires or ():
        required = Requirement(text)
        here = required.marker
        if here is None or any(here.evaluate({"extra": extra}) for extra in (*NO_EXTRA, *extras)):
            yield required


def installed_bytes(found: Distribution) -> int:
    """Bytes of a distribution's files on disk."""
    paths = {Path(str(file.locate())) for file in found.files or ()}
    source = _editable(found)
    if source is not None:
        paths |= set(_package_files(source))
    return sum(path.stat().st_size for path in paths if path.is_file())


def _editable(found: Distribution) -> Path | None:
    """The folder that a distribution is installed from, where it is only pointed to."""
    said = json.loads(found.read_text("direct_url.json") or "{}")
    if not said.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlparse(said["url"]).path))


def _package_files(source: Path) -> Iterator[Path]:
    """Files of the packages in a source folder, and what this Python has compiled of them."""
    tops = [init.parent for init in source.glob("*/__init__.py")]
    for file in (file for top in tops for file in top.rglob("*") if "__pycache__" not in file.parts):
        yield file
        if file.suffix == ".py":
            yield Path(importlib.util.cache_from_source(str(file)))


def main(roots: list[str]) -> int:
    """Print the answer."""
    found, missing = closure(roots)
    releases = {f"{name}=={one.version.split('+')[0]}": installed_bytes(one) for name, one in sorted(found.items())}
    print(json.dumps({"releases": releases, "missing": missing}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
