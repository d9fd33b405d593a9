"""What a device reads from outside, as targets for fuzzing: each takes the bytes of one file.

A target may return, or raise an error of this project; anything else is a fault.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hand_steps import StepRecipe
from step_artifacts import build_steps
from tiny_network import CLASSES, W

from lorac_runtime import manifest as mf
from lorac_runtime import resume
from lorac_runtime import state as states
from lorac_runtime.adapter import check_adapter, load_adapter
from lorac_runtime.adapting import adapt
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import load_data
from lorac_runtime.engines import open_engine, training_state
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.patch import fuse
from lorac_runtime.report import read_report

CONFIG = FinetuneConfig(epochs=6, lr=0.1, batch_size=32, threads=1)


@dataclasses.dataclass(frozen=True)
class Target:
    """``seed`` is a valid content; ``read`` writes a content where it belongs in its folder, and uses it."""

    seed: bytes
    read: Callable[[bytes], None]

    def fault(self, content: bytes) -> BaseException | None:
        """What goes wrong with a content that should not."""
        try:
            self.read(content)
        except LoracDeployError:
            return None
        except Exception as err:  # noqa: BLE001 - whatever it is
            return err
        return None


def npz() -> bytes:
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    labels = np.arange(12) % CLASSES
    np.savez_compressed(stream, images=rng.integers(0, 256, (12, W, W, 3), np.uint8), labels=labels, ids=np.arange(12))
    return stream.getvalue()


def targets(folder: Path) -> dict[str, Target]:
    """All of them, on an artifact, a run and a state that are made in ``folder``."""
    artifact = build_steps(folder / "artifact", StepRecipe()).folder
    manifest = mf.load(artifact)
    local = folder / "local.npz"
    rng = np.random.default_rng(1)
    labels = np.arange(240) % CLASSES
    pixels = np.clip(rng.normal(80, 30, (240, W, W, 3)) + 50 * labels[:, None, None, None], 0, 255)
    np.savez(local, images=pixels.astype(np.uint8), labels=labels)
    assert adapt(artifact, local, folder / "state", CONFIG).verdict.accepted
    engine = open_engine(artifact, manifest, threads=1)
    state = load_adapter(artifact / mf.ADAPTER).tensors
    return {
        "manifest": _manifest(artifact, folder / "manifest", state),
        "patch table": _patches(artifact, folder / "patches", state),
        "adapter": _adapter(artifact, folder / "adapter.safetensors", manifest),
        "training state": _training_state(engine, folder / "training"),
        "checkpoint": _checkpoint(engine, folder / "run"),
        "npz": _npz(folder / "fuzzed.npz", manifest),
        "generation": _state_file(folder / "state", "generations/0001/generation.json"),
        "state": _state_file(folder / "state", "state.json"),
        "report": _report(folder / "state/generations/0001/report.json", folder / "reports"),
    }


def _manifest(artifact: Path, home: Path, state: dict[str, np.ndarray]) -> Target:
    """The manifest alone, then everything that it says of the files."""
    shutil.copytree(artifact, home)

    def read(content: bytes) -> None:
        (home / mf.FILE_NAME).write_bytes(content)
        found = mf.load(home)
        mf.verify_files(home, found)
        fuse(home, home.parent / "fused.onnx", state)

    return Target((artifact / mf.FILE_NAME).read_bytes(), read)


def _patches(artifact: Path, home: Path, state: dict[str, np.ndarray]) -> Target:
    """Rows of the patch table alone: the rest of the manifest is right."""
    shutil.copytree(artifact, home)
    whole = json.loads((artifact / mf.FILE_NAME).read_text())

    def read(content: bytes) -> None:
        try:
            patches = json.loads(content)
        except (ValueError, RecursionError):
            return
        (home / mf.FILE_NAME).write_text(json.dumps({**whole, "patches": patches}))
        fuse(home, home.parent / "fused.onnx", state)

    return Target(json.dumps(whole["patches"]).encode(), read)


def _adapter(artifact: Path, path: Path, manifest: mf.Manifest) -> Target:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_adapter(manifest, load_adapter(path))

    return Target((artifact / mf.ADAPTER).read_bytes(), read)


def _training_state(engine: object, home: Path) -> Target:
    home.mkdir()
    engine.save(home)  # type: ignore[attr-defined]
    path = home / training_state.FILE_NAME

    def read(content: bytes) -> None:
        path.write_bytes(content)
        engine.restore(home)  # type: ignore[attr-defined]

    return Target(path.read_bytes(), read)


def _checkpoint(engine: object, out: Path) -> Target:
    history = resume.History(1, (1.5,), (1.5,), (0.1,))
    resume.save(out, engine, {"artifact": "a"}, history=history)  # type: ignore[arg-type]
    path = out / resume.FOLDER / "step-1" / resume.FILE_NAME

    def read(content: bytes) -> None:
        path.write_bytes(content)
        resume.load(out, engine, {"artifact": "a"})  # type: ignore[arg-type]

    return Target(path.read_bytes(), read)


def _npz(path: Path, manifest: mf.Manifest) -> Target:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_data(path, manifest.input, manifest.output.classes, manifest.class_names)

    return Target(npz(), read)


def _state_file(state: Path, name: str) -> Target:
    copy = state.with_name("state-" + name.replace("/", "-"))
    shutil.copytree(state, copy, symlinks=True)

    def read(content: bytes) -> None:
        (copy / name).write_bytes(content)
        states.status(copy)
        states.rollback(copy, 0)
        states.rollback(copy, 1)

    return Target((copy / name).read_bytes(), read)


def _report(source: Path, home: Path) -> Target:
    home.mkdir()

    def read(content: bytes) -> None:
        (home / "report.json").write_bytes(content)
        read_report(home)

    return Target(source.read_bytes(), read)
