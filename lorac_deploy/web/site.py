"""Writing the page: the static files of this package, an artifact's own files, and onnxruntime-web."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorac_deploy.web import engine_files
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import save_adapter
from lorac_runtime.config import FORMATS
from lorac_runtime.errors import ArtifactError, OutputError, listed
from lorac_runtime.external_data import require_own_data
from lorac_runtime.files import atomic_write, output_folder
from lorac_runtime.job import start_of
from lorac_runtime.patch import check_base

ENGINE = "onnxruntime"
DESCRIPTION = "site.json"
FORMAT = "lorac-site"
CHANNELS = (1, 3, 4)


@dataclasses.dataclass(frozen=True)
class Site:
    """What was written: bytes of the whole folder, and of what a browser loads before and for training."""

    folder: Path
    nbytes: int
    engine_nbytes: int
    artifact_nbytes: int


def unsupported(manifest: mf.Manifest) -> list[str]:
    """What a page cannot do of an artifact, a line each; nothing where it can be adapted in a browser."""
    problems = []
    if ENGINE not in manifest.engines:
        problems.append(f"it has no files for the engine {ENGINE}: export it with --engine {ENGINE}")
    if not manifest.input.is_image:
        problems.append(f"it takes signals of shape {manifest.input.shape}; the page has images only")
    elif manifest.input.channels not in CHANNELS:
        problems.append(f"its images have {manifest.input.channels} channels; browsers have 1, 3 or 4")
    if manifest.task is not None:
        problems.append(f"its task is {manifest.task.kind}; the page labels images with classes")
    if not manifest.trainables:
        problems.append(f"nothing trains (method {manifest.method})")
    if manifest.bn_policy != "frozen":
        problems.append(f"the batch normalisation policy is {manifest.bn_policy}; export it with --bn frozen")
    elif manifest.live_batchnorm:
        problems.append(f"the method {manifest.method} trains batch normalisations, which the page cannot fold again")
    if not manifest.needs_labels:
        problems.append(f"the loss {manifest.training.loss} is for images without labels; the page labels them")
    return problems


def write_site(
    artifact: Path, out: Path, *, to: Sequence[str] = ("onnx",), webgpu: bool = False, engine: Path | None = None
) -> Site:
    """Write the page for the artifact in ``artifact`` to the folder ``out``; an older page there is replaced.

    ``to``: formats of the fused file that it offers. ``webgpu`` adds the build of onnxruntime-web for graphics
    processors; ``engine`` is a folder with that package (else see `engine_files.found`).

    Raises ArtifactError for an artifact that is damaged or that the page cannot adapt (saying all that is in the way),
    EngineError without onnxruntime-web, OutputError if ``out`` cannot be written or holds anything else.
    """
    manifest = mf.load(artifact)
    problems = unsupported(manifest)
    if problems:
        raise ArtifactError(listed(f"{artifact} cannot be adapted in a browser:", problems))
    for name in to:
        check_base(artifact, manifest, FORMATS[name])
    mf.verify_files(artifact, manifest)
    require_own_data(artifact, manifest)
    _require_place(artifact, out)
    builds = ("wasm", "webgpu") if webgpu else ("wasm",)
    dist = engine_files.found(engine)
    output_folder(out)
    _clear(out)
    _write_engine(dist, out / "ort", builds)
    _write_artifact(artifact, out / "artifact", manifest, to)
    for path, content in _static():
        output_folder((out / path).parent)
        atomic_write(out / path, content)
    atomic_write(out / DESCRIPTION, _described(out, to, builds))
    return Site(out, _size(out), _size(out / "ort"), _size(out / "artifact"))


def _require_place(artifact: Path, out: Path) -> None:
    if out.resolve().is_relative_to(artifact.resolve()):
        raise OutputError(f"{out} lies in the training artifact {artifact}, which is never modified")
    if (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir()) and not _is_site(out)):
        raise OutputError(f"{out} holds something else than a page of this command; choose another --out")


def _is_site(out: Path) -> bool:
    try:
        found: Any = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _clear(out: Path) -> None:
    """Remove the parts of an older page; its description stays until the last, so that it is known again."""
    for name in ("artifact", "ort", "js"):
        shutil.rmtree(out / name, ignore_errors=True)


def _write_engine(dist: Path, folder: Path, builds: Sequence[str]) -> None:
    output_folder(folder)
    for build in builds:
        for name in engine_files.BUILDS[build]:
            atomic_write(folder / name, (dist / name).read_bytes())


def _write_artifact(artifact: Path, folder: Path, manifest: mf.Manifest, to: Sequence[str]) -> None:
    """The files that the page reads; the adapter in the coordinates that the graphs train in."""
    output_folder(folder)
    graphs = [name for name in manifest.engines[ENGINE].files if name.endswith(".onnx")]
    for name in dict.fromkeys([mf.FILE_NAME, mf.BASE, *(FORMATS[f] for f in to), *graphs]):
        atomic_write(folder / name, (artifact / name).read_bytes())
    tensors, metadata = start_of(artifact, manifest)
    save_adapter(folder / mf.ADAPTER, tensors, metadata)


def _static() -> Iterator[tuple[str, bytes]]:
    home = Path(str(importlib.resources.files("lorac_deploy.web") / "static"))
    for path in sorted(p for p in home.rglob("*") if p.is_file()):
        yield path.relative_to(home).as_posix(), path.read_bytes()


def _described(out: Path, to: Sequence[str], builds: Sequence[str]) -> bytes:
    """What the page has to know of itself: its files with hashes, the engine, the formats it offers."""
    files = {p.name: {"sha256": mf.sha256(p), "nbytes": p.stat().st_size} for p in sorted((out / "artifact").iterdir())}
    version = importlib.metadata.version("lorac-deploy")
    described = {
        "format": FORMAT,
        "producer": f"lorac-deploy web {version}, {engine_files.PACKAGE} {engine_files.VERSION}",
        "onnxruntime_web": engine_files.VERSION,
        "engines": list(builds),
        "formats": list(to),
        "files": files,
    }
    return (json.dumps(described, indent=1, sort_keys=True) + "\n").encode()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
