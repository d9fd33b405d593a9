"""The folder of an artifact: made beside its final place and renamed, so that it is whole or as it was."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorac_runtime import manifest as mf
from lorac_runtime.errors import OutputError


def check_replaceable(out: Path) -> None:
    """Raise OutputError unless ``out`` is absent, an empty folder, or an earlier artifact."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; --out names the folder of the artifact")
    if any(out.iterdir()) and not (out / mf.FILE_NAME).is_file():
        raise OutputError(f"{out} holds something that is not a training artifact; choose another --out")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A fresh folder beside ``out`` that takes its place when the block succeeds."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise OutputError(f"cannot write beside {out}: {err.strerror or err}") from err
    try:
        yield folder
        _take_place(folder, out)
    except OSError as err:
        raise OutputError(f"cannot write {out}: {err.strerror or err}") from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(folder: Path, out: Path) -> None:
    folder.chmod(0o755)
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(old / "artifact")
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)
