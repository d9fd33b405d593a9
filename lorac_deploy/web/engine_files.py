"""The files of onnxruntime-web that a page needs: from a folder, from the cache, or by npm, and always checked.

One version is pinned, because the page is tested with that one; what comes from anywhere has to have its hashes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lorac_runtime.errors import EngineError, listed
from lorac_runtime.files import output_folder
from lorac_runtime.manifest import sha256

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
PINNED = f"{PACKAGE}@{VERSION}"
BUILDS: dict[str, dict[str, str]] = {  # what a page computes with -> file -> sha256
    "wasm": {
        "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
        "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
        "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
    "webgpu": {
        "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
        "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
        "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    },
}
FILES = {name: digest for build in BUILDS.values() for name, digest in build.items()}


def found(folder: Path | None = None) -> Path:
    """The folder that holds `FILES`: ``folder`` (the npm package, or its dist), else the cache, filled by npm if empty.

    Raises EngineError where a file is missing or another version's, and where there is no npm to fetch them.
    """
    if folder is not None:
        dist = folder / "dist" if (folder / "dist").is_dir() else folder
        _require(dist)
        return dist
    cached = cache()
    if not all((cached / name).is_file() for name in FILES):
        fetch(cached)
    _require(cached)
    return cached


def cache() -> Path:
    """Where fetched files are kept for the next time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lorac-deploy" / f"{PACKAGE}-{VERSION}"


def fetch(target: Path) -> None:
    """Let npm fetch the package (33 MB) and put `FILES` into ``target``.

    Raises EngineError if there is no npm, if it fails, or if what it fetched is not the pinned release.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise EngineError(
            f"the page needs {PINNED}, which npm fetches, and there is no npm here. Install Node.js (npm comes with "
            f"it), or run `npm pack {PINNED}` on another machine, unpack the file and give its folder: "
            "--onnxruntime-web package/"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PINNED, "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise EngineError(f"`npm pack {PINNED}` failed: {(done.stderr or done.stdout).strip()[-500:]}")
        _unpack(archives[0], Path(folder))
        _require(Path(folder))
        output_folder(target)
        for name in FILES:
            shutil.copyfile(Path(folder) / name, target / name)


def _unpack(archive: Path, folder: Path) -> None:
    """The files that are needed, by their plain names, whatever else is in the archive."""
    with tarfile.open(archive) as tar:
        for name in FILES:
            try:
                member = tar.extractfile(f"package/dist/{name}")
            except KeyError:
                member = None
            if member is not None:
                with (folder / name).open("wb") as stream:
                    shutil.copyfileobj(member, stream)


def _require(dist: Path) -> None:
    problems = [f"{name} {problem}" for name, digest in FILES.items() if (problem := _problem(dist / name, digest))]
    if problems:
        advice = f"the page is tested with {PINNED} only: npm install {PINNED}, and give node_modules/{PACKAGE}"
        raise EngineError(listed(f"{dist} does not hold the files of {PINNED} ({advice}):", problems))


def _problem(path: Path, digest: str) -> str:
    if not path.is_file():
        return "is missing"
    return "" if sha256(path) == digest else "is of another version, or was altered"


if __name__ == "__main__":  # `make web-env`
    fetch(Path(sys.argv[1]))
