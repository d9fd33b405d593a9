"""Runs with a cache of features: the same bytes as without one, however much of it is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import StopError, stop_at
from small_artifacts import LORA, NAMES, SPEC, export, network

from lorac_runtime.cache import PIECE, CacheReport, row_bytes
from lorac_runtime.cache_file import CacheFile, space
from lorac_runtime.cli import main
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines.prefix import Prefix
from lorac_runtime.errors import BusyError, CacheError, DataError, OutputError
from lorac_runtime.manifest import load
from lorac_runtime.report import FinetuneReport, read_report
from lorac_runtime.session import finetune

IMAGES, EPOCHS = 30, 3
HELD = 6  # a fifth, by class
LOOKUPS = (IMAGES - HELD) * EPOCHS + 2 * HELD
LARGE = 10**7
CONFIG = FinetuneConfig(epochs=EPOCHS, batch_size=7, lr=0.01, threads=1)
KINDS = {
    "head": {"method": "head"},
    "last": {"lora": dataclasses.replace(LORA, blocks=("3",))},
    "full": {"method": "full", "lora": dataclasses.replace(LORA, blocks=("3", "7"))},
    "recalibrate": {"method": "head", "bn_policy": "recalibrate"},
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: export(folder / name, tflite="none", **fields).folder for name, fields in KINDS.items()}


def write_data(path: Path, *, seed: int = 0, **more: np.ndarray) -> Path:
    images = np.random.default_rng(seed).integers(0, 256, (IMAGES, 10, 10, 3), dtype=np.uint8)
    arrays = {"images": images, "labels": np.arange(IMAGES) % len(NAMES)} | more
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


def results(out: Path) -> tuple[bytes, bytes]:
    return (out / "adapter.safetensors").read_bytes(), (out / "fused.onnx").read_bytes()


def cache_of(report: FinetuneReport) -> CacheReport:
    assert report.cache is not None
    return report.cache


def run(artifact: Path, data: Path, out: Path, config: FinetuneConfig = CONFIG, **changes: object) -> CacheReport:
    return cache_of(finetune(artifact, data, out, dataclasses.replace(config, cache=LARGE, **changes)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"threads": 2, "batch_size": 4}, {"micro_batch": 3}, {"batch_size": 2 * PIECE}]
)
def test_a_cache_changes_no_bit_of_the_results(
    kind: str, settings: dict[str, int], artifacts: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, **settings)
    plain = finetune(artifacts[kind], data, tmp_path / "plain", config)
    found = run(artifacts[kind], data, tmp_path / "cached", config)
    assert results(tmp_path / "cached") == results(tmp_path / "plain")
    assert plain.cache is None
    uncached = HELD if kind == "recalibrate" else 0  # before statistics are estimated, features are other ones
    assert (found.misses, found.hits) == (IMAGES, LOOKUPS - uncached - IMAGES)
    assert (found.stored, found.samples) == (IMAGES, IMAGES)


@pytest.mark.parametrize(("room", "batch"), [(1, 7), (11, 2 * PIECE), (IMAGES - 1, 7)])
def test_a_cache_too_small_for_all_keeps_the_first_and_changes_no_bit(
    room: int, batch: int, artifacts: dict[str, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(CONFIG, batch_size=batch)
    finetune(artifacts["last"], data, tmp_path / "plain", config)
    row = row_bytes(load(artifacts["last"]).features, fp16=False)
    budget = space(room, row)
    with caplog.at_level(logging.INFO):
        report = finetune(
            artifacts["last"], data, tmp_path / "cached", dataclasses.replace(config, cache=budget, micro_batch=None)
        )
    assert results(tmp_path / "cached") == results(tmp_path / "plain")
    assert cache_of(report).stored == room
    files = [path.stat().st_size for path in (tmp_path / "cached" / "cache").iterdir()]
    assert sum(files) == cache_of(report).nbytes <= budget
    needed = -(-space(IMAGES, row) // 1000)
    assert f"room for {room} of {IMAGES} samples; --cache {needed}KB holds all" in caplog.text


def test_a_disk_that_cannot_be_read_any_more_changes_no_bit(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(artifacts["last"], data, tmp_path / "plain", CONFIG)
    whole, calls = CacheFile._gathered, itertools.count()

    def failing(file: CacheFile, places: list[int]) -> object:
        if next(calls) >= 8:  # all samples are kept by then, and the session of the front is closed
            raise OSError(5, "Input/output error")
        return whole(file, places)

    monkeypatch.setattr(CacheFile, "_gathered", failing)
    report = run(artifacts["last"], data, tmp_path / "cached")
    assert report.stored == 0 < report.hits
    assert results(tmp_path / "cached") == results(tmp_path / "plain")


def test_a_stopped_run_goes_on_with_what_its_cache_holds(
    artifacts: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    finetune(artifacts["last"], data, tmp_path / "plain", CONFIG)
    cached = dataclasses.replace(CONFIG, cache=LARGE)
    with pytest.raises(StopError):
        finetune(artifacts["last"], data, tmp_path / "out", cached, on_progress=stop_at(6))
    found = cache_of(finetune(artifacts["last"], data, tmp_path / "out", cached))
    assert (found.misses, found.hits) == (0, (IMAGES - HELD) * (EPOCHS - 1) + HELD)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


KILLED = """
import sys
from pathlib import Path
from lorac_runtime.session import FinetuneConfig, finetune
artifact, data, out = map(Path, sys.argv[1:])
config = FinetuneConfig(epochs=100000, batch_size=7, lr=0.01, threads=1, cache=10**7, seed=0)
finetune(artifact, data, out, config, on_progress=lambda p: print(p.step, flush=True))
"""


def test_a_killed_process_leaves_a_cache_that_serves(artifacts: dict[str, Path], data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *map(str, (artifacts["head"], data, tmp_path / "out"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(6):
            process.stdout.readline()
        with pytest.raises(BusyError, match="in use by another process"):
            run(artifacts["head"], data, tmp_path / "out", restart=True)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    finetune(artifacts["head"], data, tmp_path / "plain", CONFIG)
    found = run(artifacts["head"], data, tmp_path / "out", restart=True)
    assert found.misses == 0
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_a_later_run_on_the_same_data_computes_no_feature(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(artifacts["last"], data, tmp_path / "out")
    computed: list[int] = []
    features = Prefix.features

    def counted(self: Prefix, images: np.ndarray) -> dict[str, np.ndarray]:
        computed.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Prefix, "features", counted)
    found = run(artifacts["last"], data, tmp_path / "out", seed=3, batch_size=5, restart=True)
    assert computed == [1]  # one sample is compared, to see that this machine computes the same
    assert (found.misses, found.hits) == (0, LOOKUPS)
    plain = dataclasses.replace(CONFIG, seed=3, batch_size=5)
    finetune(artifacts["last"], data, tmp_path / "plain", plain)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_only_samples_that_changed_are_computed_again(artifacts: dict[str, Path], tmp_path: Path) -> None:
    first = write_data(tmp_path / "first.npz")
    with np.load(first) as file:
        images = file["images"].copy()
    images[[4, 17]] += 1
    second = write_data(tmp_path / "second.npz", images=images)
    run(artifacts["last"], first, tmp_path / "out")
    found = run(artifacts["last"], second, tmp_path / "out", restart=True)
    assert (found.misses, found.stored) == (2, IMAGES)
    finetune(artifacts["last"], second, tmp_path / "plain", CONFIG)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_ids_find_samples_that_moved(artifacts: dict[str, Path], tmp_path: Path) -> None:
    ids = np.array([f"photo-{i}" for i in range(IMAGES)])
    first = write_data(tmp_path / "first.npz", ids=ids)
    order = np.random.default_rng(1).permutation(IMAGES)
    with np.load(first) as file:
        moved = {name: file[name][order] for name in ("images", "labels", "ids")}
    second, renamed = tmp_path / "second.npz", tmp_path / "renamed.npz"
    np.savez(second, **moved)
    np.savez(renamed, **moved | {"ids": np.array([f"other-{i}" for i in range(IMAGES)])})
    run(artifacts["last"], first, tmp_path / "out")
    assert run(artifacts["last"], second, tmp_path / "out", restart=True).misses == 0
    assert run(artifacts["last"], renamed, tmp_path / "out", restart=True).misses == IMAGES


def test_ids_that_repeat_are_refused_by_name(artifacts: dict[str, Path], tmp_path: Path) -> None:
    doubled = write_data(tmp_path / "a.npz", ids=np.arange(IMAGES) // 2)
    with pytest.raises(DataError, match=r"ids of .* repeat: 0, 1, 2, 3, 4 and 10 more"):
        run(artifacts["last"], doubled, tmp_path / "out")
    few = write_data(tmp_path / "b.npz", ids=np.arange(3))
    with pytest.raises(DataError, match="3 ids but 30 samples"):
        run(artifacts["last"], few, tmp_path / "out")
    floats = write_data(tmp_path / "c.npz", ids=np.arange(IMAGES) / 2)
    with pytest.raises(DataError, match=r"float64.*expected integers or strings"):
        run(artifacts["last"], floats, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_another_frozen_part_starts_empty(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    net = network()
    torch.nn.init.normal_(net[0].weight)
    other = export(tmp_path / "other", net, tflite="none", **KINDS["last"]).folder
    run(artifacts["last"], data, tmp_path / "out")
    with caplog.at_level(logging.INFO):
        assert run(other, data, tmp_path / "out", restart=True).misses == IMAGES
    assert "it starts empty" in caplog.text
    finetune(other, data, tmp_path / "plain", CONFIG)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_another_preparation_of_images_starts_empty(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataclasses.replace(SPEC, mean=(0.1, 0.2, 0.3))
    other = export(tmp_path / "other", spec=spec, tflite="none", **KINDS["last"]).folder
    run(artifacts["last"], data, tmp_path / "out")
    with caplog.at_level(logging.INFO):
        assert run(other, data, tmp_path / "out", restart=True).misses == IMAGES
    assert "is of another model" in caplog.text  # told by its key, not only by comparing a sample


def test_features_of_another_machine_are_told_from_ours(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = Prefix.features

    def other_rounding(self: Prefix, images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.nextafter(v, np.float32(9)) for name, v in features(self, images).items()}

    with monkeypatch.context() as patched:
        patched.setattr(Prefix, "features", other_rounding)
        run(artifacts["last"], data, tmp_path / "out")
    assert run(artifacts["last"], data, tmp_path / "out", restart=True).misses == IMAGES
    finetune(artifacts["last"], data, tmp_path / "plain", CONFIG)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_half_precision_halves_the_space_and_does_not_depend_on_the_cache(
    artifacts: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, cache=LARGE, cache_fp16=True)
    whole = run(artifacts["last"], data, tmp_path / "whole", config)
    row = row_bytes(load(artifacts["last"]).features, fp16=True)
    small = dataclasses.replace(config, cache=space(9, row))
    finetune(artifacts["last"], data, tmp_path / "small", small)
    assert results(tmp_path / "small") == results(tmp_path / "whole")
    full = run(artifacts["last"], data, tmp_path / "full")
    assert row * 2 == row_bytes(load(artifacts["last"]).features, fp16=False)
    assert whole.nbytes < 0.6 * full.nbytes
    assert results(tmp_path / "whole") != results(tmp_path / "full")
    losses = [read_report(tmp_path / name) for name in ("whole", "full")]
    np.testing.assert_allclose(*[report.losses for report in losses if report], rtol=5e-3)
    with pytest.raises(OutputError, match="cache_fp16"):  # another run: its result is another one
        run(artifacts["last"], data, tmp_path / "whole")


def test_the_size_of_the_cache_is_no_part_of_a_run(artifacts: dict[str, Path], data: Path, tmp_path: Path) -> None:
    first = run(artifacts["last"], data, tmp_path / "out")
    assert cache_of(finetune(artifacts["last"], data, tmp_path / "out", CONFIG)) == first  # finished already


def test_a_cache_that_holds_nothing_is_refused_with_figures(
    artifacts: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    row = row_bytes(load(artifacts["last"]).features, fp16=False)
    config = dataclasses.replace(CONFIG, cache=space(1, row) - 1)
    said = f"of a sample take {row:,} bytes. --cache {-(-space(IMAGES, row) // 1000)}KB holds all {IMAGES} samples"
    with pytest.raises(CacheError, match=said):
        finetune(artifacts["last"], data, tmp_path / "out", config)
    with pytest.raises(ValueError, match="give the cache a size"):
        FinetuneConfig(cache_fp16=True)


def test_what_cannot_have_a_cache_is_refused_in_clear_words(data: Path, tmp_path: Path) -> None:
    cached = dataclasses.replace(CONFIG, cache=LARGE)
    stem = export(tmp_path / "stem", tflite="none").folder
    with pytest.raises(CacheError, match=r"no frozen front .*\(0.weight trains.*--blocks rear, --method head"):
        finetune(stem, data, tmp_path / "out", cached)
    batch = export(tmp_path / "batch", tflite="none", method="head", bn_policy="batch").folder
    with pytest.raises(CacheError, match="BN policy 'batch'"):
        finetune(batch, data, tmp_path / "out", cached)
    both = export(tmp_path / "both", tflite="none", method="head", engine="both").folder
    training = dataclasses.replace(cached, engine="onnxruntime-training")
    with pytest.raises(CacheError, match="onnxruntime-training has no cache"):
        finetune(both, data, tmp_path / "out", training)
    assert run(both, data, tmp_path / "out").misses == IMAGES


def test_the_command_line_takes_sizes_and_shows_the_hit_rate(
    artifacts: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(artifacts["last"]), "--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "2"]
    assert main([*command, "--batch-size", "8", "--threads", "1", "--cache", "1MiB"]) == 0
    lookups = 2 * (IMAGES - HELD) + 2 * HELD
    shown = capsys.readouterr().out
    assert f"cache     {1 - IMAGES / lookups:.1%} of {lookups} look-ups answered; 30 of 30 samples in" in shown
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cache"]["budget"] == 1 << 20
    with pytest.raises(SystemExit) as ended:
        main([*command, "--cache", "64 potatoes"])
    assert ended.value.code == 2
    assert "'64 potatoes' is not a size; write it like 256MB" in capsys.readouterr().err
