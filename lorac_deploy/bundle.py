"""A bundle: the runtime and a training artifact in one zip file that Python runs (PEP 441)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import lorac_runtime
from lorac_runtime import manifest as mf
from lorac_runtime.files import staged
from lorac_runtime.trust import SIGNATURE
from lorac_runtime.unpacking import ARTIFACT

EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in it: equal contents give equal bundles
MAIN = '''"""Fine-tune the artifact in this file on local images; --help lists the options."""

import sys

try:
    from lorac_runtime.bundled import main
except ModuleNotFoundError as err:
    sys.exit(f"error: {err.name} is not installed here; this file needs: pip install numpy safetensors onnxruntime")

sys.exit(main())
'''


def write_bundle(artifact: Path, out: Path) -> int:
    """Write the bundle of an artifact to the file ``out``; returns its size in bytes. Equal artifacts, equal bytes.

    Raises ArtifactError for a damaged artifact, OutputError if the file cannot be written.
    """
    manifest = mf.load(artifact)
    mf.verify_files(artifact, manifest)
    with staged(out) as part:
        with part.open("wb") as stream:
            stream.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(stream, "w") as archive:
                for name, content in _runtime():
                    _add(archive, name, content, zipfile.ZIP_DEFLATED)
                signed = [SIGNATURE] if (artifact / SIGNATURE).is_file() else []
                for name in (mf.FILE_NAME, *signed, *sorted(manifest.files)):
                    _add(archive, f"{ARTIFACT}/{name}", (artifact / name).read_bytes(), zipfile.ZIP_STORED)
        part.chmod(0o755)
    return out.stat().st_size


def _runtime() -> Iterator[tuple[str, bytes]]:
    """The runtime's modules, by their names in the archive."""
    yield "__main__.py", MAIN.encode()
    home = Path(lorac_runtime.__file__).parent
    for path in sorted(home.rglob("*.py")):
        yield f"{home.name}/{path.relative_to(home).as_posix()}", path.read_bytes()


def _add(archive: zipfile.ZipFile, name: str, content: bytes, compression: int) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type, entry.external_attr = compression, 0o644 << 16
    archive.writestr(entry, content)
