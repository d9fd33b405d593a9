"""A Python that sees only some of the installed packages, as a device would."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def run_isolated(
    arguments: Sequence[object], packages: Path, *names: str, path: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Run Python with numpy, safetensors, the installed packages ``names`` and what lies in ``packages``, no more.

    ``path`` are further folders to import from. Started in ``packages``.
    """
    packages.mkdir(exist_ok=True)
    for name in ("numpy", "numpy.libs", "safetensors", *names):
        source = Path(sysconfig.get_path("purelib")) / name
        if source.exists() and not (packages / name).exists():
            (packages / name).symlink_to(source)
    return subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, *path)))},
        cwd=packages,
    )
