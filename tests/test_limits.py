"""Limits of a run: its memory, computed and measured; its time; what a full disk does."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_artifacts import NAMES, SPEC, export

from lorac_exporters import memory_needs
from lorac_exporters.memory_needs import IMAGES
from lorac_exporters.memory_plan import plan_memory
from lorac_runtime import session
from lorac_runtime.cli import main
from lorac_runtime.config import FinetuneConfig, seconds
from lorac_runtime.engines import Engine
from lorac_runtime.errors import LimitError
from lorac_runtime.limits import MARGIN, memory_need, pieces_within
from lorac_runtime.manifest import Manifest, MemoryNeed, load
from lorac_runtime.session import finetune

MB = 10**6


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("artifact") / "a").folder


@pytest.fixture
def described(artifact: Path) -> Callable[..., Manifest]:
    """A manifest of which only the memory matters."""
    return lambda *needs: dataclasses.replace(load(artifact), memory=needs, features=())


def need(images: int, megabytes: float, *, parts: bool) -> MemoryNeed:
    return MemoryNeed(images, int(megabytes * MB), parts)


WHOLE = [need(n, 100 + 10 * n, parts=False) for n in (1, 8, 64)]
PARTS = [need(n, 110 + 10 * n, parts=True) for n in (1, 8, 64)]


@pytest.mark.parametrize(
    ("budget", "asked", "expected"),
    [(463, None, None), (461, None, 8), (210, None, 8), (208, None, 1), (133, None, 1), (463, 8, 8), (210, 8, 8)],
)
def test_the_largest_pieces_that_fit_are_chosen(
    described: Callable[..., Manifest], budget: int, asked: int | None, expected: int | None
) -> None:
    """A batch of 32 is between 8 and 64 images: 420 MB by the line through them, and a tenth."""
    manifest = described(*WHOLE, *PARTS)
    assert pieces_within(manifest, budget * MB, batch=32, data=0, asked=asked) == expected


def test_local_data_are_part_of_it(described: Callable[..., Manifest]) -> None:
    manifest = described(*WHOLE, *PARTS)
    assert pieces_within(manifest, 462 * MB, batch=32, data=MB, asked=None) == 8
    with pytest.raises(LimitError, match="training takes 182 MB at least, of which 50 MB are local data"):
        pieces_within(manifest, 181 * MB, batch=32, data=50 * MB, asked=None)
    with pytest.raises(LimitError, match="209 MB at least"):
        pieces_within(manifest, 208 * MB, batch=32, data=0, asked=8)


def test_what_an_artifact_does_not_say_is_not_guessed(described: Callable[..., Manifest]) -> None:
    with pytest.raises(LimitError, match="does not say how much memory training takes"):
        pieces_within(described(), 10**12, batch=32, data=0, asked=None)


def test_the_manifest_says_what_the_plan_computes(artifact: Path) -> None:
    manifest = load(artifact)
    assert [n.images for n in manifest.memory if not n.parts] == list(IMAGES)
    for batch in (1, 8, 64):
        now = plan_memory(artifact, 10**12, batch=batch).fits[0]
        assert now.choice is None
        assert memory_need(manifest, batch, None) == now.peak.total


def test_a_graph_of_unknown_size_is_exported_and_says_what_that_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise ValueError("the size of 'odd' is not known")

    monkeypatch.setattr(memory_needs, "peaks", unknown)
    assert load(export(tmp_path / "a").folder).memory == ()
    assert "devices refuse --memory: the size of 'odd' is not known" in caplog.text


def local(path: Path, count: int = 60) -> Path:
    rng = np.random.default_rng(0)
    shape = (count, *SPEC.shape[1:], SPEC.shape[0])
    np.savez(path, images=rng.integers(0, 256, shape, np.uint8), labels=np.arange(count) % len(NAMES))
    return path


PEAK = "import sys\nfrom lorac_runtime.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_a_run_stays_within_what_it_was_allowed(artifact: Path, tmp_path: Path) -> None:
    """In a process of its own; the figure is the system's."""
    data = local(tmp_path / "local.npz")
    manifest = load(artifact)
    with np.load(data) as file:
        nbytes = file["images"].nbytes
    budget = math.ceil(MARGIN * memory_need(manifest, 32, 4)) + nbytes
    words = [artifact, "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--batch-size", 32, "--threads", 1]
    command = [sys.executable, "-c", PEAK, *map(str, words), "--memory", str(budget), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_memory_bytes"] < budget


def test_what_cannot_fit_is_refused_before_anything_is_done(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = local(tmp_path / "local.npz")
    words = [str(artifact), "--data", str(data), "--out", str(tmp_path / "out"), "--memory", "20MB"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "--memory allows 20 MB" in error
    assert "lorac-deploy plan" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_the_run_computes_in_the_pieces_that_were_chosen(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that says it needs more than it does; 4 images at once are what fits."""
    data, config = local(tmp_path / "local.npz"), FinetuneConfig(epochs=1, batch_size=32, threads=1)
    shutil.copytree(artifact, tmp_path / "a")
    manifest = dataclasses.replace(load(artifact), memory=(*WHOLE, need(4, 150, parts=True), need(8, 190, parts=True)))
    (tmp_path / "a/manifest.json").write_text(manifest.to_json())
    plain = finetune(artifact, data, tmp_path / "plain", dataclasses.replace(config, micro_batch=4))
    opened: list[int | None] = []
    real = session.open_engine

    def watched(*arguments: Any, micro_batch: int | None, **more: Any) -> Engine:
        opened.append(micro_batch)
        return real(*arguments, micro_batch=micro_batch, **more)

    monkeypatch.setattr(session, "open_engine", watched)
    limited = finetune(tmp_path / "a", data, tmp_path / "limited", dataclasses.replace(config, memory=170 * MB))
    assert opened == [4]
    assert limited.losses == plain.losses


@pytest.mark.parametrize("text", ["", "0", "ten", "-3s", "3d", "1e3", "nan", "9" * 40])
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        seconds(text)
