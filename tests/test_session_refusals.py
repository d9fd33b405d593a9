"""Divergence, starts that do not fit, output folders that would do harm: no result and a clear reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artifacts import Tiny, build
from finetune_runs import (
    contents,
    write_data,
)
from safetensors.numpy import load_file, save_file
from tiny_network import Recipe

from lorac_runtime.adapter import load_adapter
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import AdapterError, ArtifactError, DivergenceError, OutputError
from lorac_runtime.session import finetune
from lorac_runtime.training import Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "local.npz")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Without clipping, so that runs repeat to the last bit (see the engine's tests)."""
    return build(tmp_path_factory.mktemp("artifact") / "a", Recipe(clip_norm=0.0))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_divergence_leaves_no_result_and_the_last_good_checkpoint(data: Path, out: Path, tmp_path: Path) -> None:
    tiny = build(tmp_path / "a", Recipe(optimizer="sgd", clip_norm=0.0))
    config = FinetuneConfig(epochs=3, lr=1e38, warmup=0.99)
    with pytest.raises(DivergenceError, match=r"No result was written. Begin anew \(--restart\) .* --lr 3e\+37"):
        finetune(tiny.folder, data, out, config)
    assert not [p for p in out.iterdir() if p.name != "checkpoint"]


def test_divergence_in_the_last_step_is_seen_in_the_weights(data: Path, out: Path, tmp_path: Path) -> None:
    """One step per epoch: its loss is that of the good start. The weights, or what they give, betray it."""
    tiny = build(tmp_path / "a", Recipe(optimizer="sgd", clip_norm=0.0))
    for lr, message in ((1e39, "weights are not finite after step 1"), (1e30, "the loss is nan after the last step")):
        config = FinetuneConfig(epochs=1, lr=lr, batch_size=100, warmup=1.0, val_fraction=0.0, restart=True)
        with pytest.raises(DivergenceError, match=message):
            finetune(tiny.folder, data, out, config)
        assert not [p for p in out.iterdir() if p.name != "checkpoint"]


def test_a_start_that_is_not_sound_is_refused(tiny: Tiny, data: Path, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    save_file({k: np.full_like(v, 1e30) for k, v in tiny.start.items()}, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="before any training"):
        finetune(tiny.folder, data, out, adapter=path)


def test_a_loss_that_rises_and_a_model_that_gets_worse_are_pointed_out(
    tiny: Tiny, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = finetune(tiny.folder, data, tmp_path / "good", FinetuneConfig(epochs=30, lr=0.02))
    assert good.accuracy_after == 1.0
    assert not caplog.records
    start = tmp_path / "good" / "adapter.safetensors"
    finetune(tiny.folder, data, tmp_path / "bad", FinetuneConfig(epochs=4, lr=0.05, warmup=1.0), adapter=start)
    assert "the loss rose from" in caplog.text
    assert "the model got worse, from 100.0 to" in caplog.text


def test_an_adapter_of_another_model_is_refused_with_all_mismatches(
    tiny: Tiny, data: Path, out: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny.folder / "adapter.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:2].copy()
    del tensors["conv2.lora_a"]
    metadata = load_adapter(tiny.folder / "adapter.safetensors").metadata
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata | {"model": "other"})
    with pytest.raises(AdapterError) as caught:
        finetune(tiny.folder, data, out, adapter=tmp_path / "x.safetensors")
    for part in ("model", "fc.weight has shape (2, 8)", "conv2.lora_a is missing"):
        assert part in str(caught.value)
    assert list(out.iterdir()) == []


def test_places_that_would_harm_an_input_are_refused(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    for inside in (tiny.folder, tiny.folder / "sub" / ".." / "out"):
        with pytest.raises(OutputError, match="lies in the training artifact"):
            finetune(tiny.folder, data, inside)
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(OutputError, match="lies in the folder of images"):
        finetune(tiny.folder, images, images / "out")
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes((tiny.folder / "adapter.safetensors").read_bytes())
    with pytest.raises(OutputError, match="would overwrite the adapter"):
        finetune(tiny.folder, data, tmp_path, adapter=adapter)
    assert not (tiny.folder / "out").exists()


def test_another_artifact_is_no_output_folder(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", Recipe())
    before = contents(other.folder)
    with pytest.raises(OutputError, match="is a training artifact itself"):
        finetune(tiny.folder, data, other.folder)
    assert contents(other.folder) == before


def test_what_is_not_of_this_program_stays_in_the_output_folder(tiny: Tiny, data: Path, out: Path) -> None:
    kept = {"checkpoint/notes.txt": b"mine", "photo.part": b"mine", "sub/epoch-1/x": b"mine"}
    leftovers = {".fused.onnx.123.part": b"partial", "checkpoint/step-9/state": b"old"}
    for name, content in (kept | leftovers).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    finetune(tiny.folder, data, out, FinetuneConfig(epochs=1))
    found = contents(out)
    assert {name: found[name] for name in kept} == kept
    assert found.keys() == {*kept, "adapter.safetensors", "fused.onnx", "report.json"}


def test_a_full_disk_is_noticed_before_any_work(
    tiny: Tiny, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"has 0 MB of free space, a run needs up to 0 MB|free space"):
        finetune(tiny.folder, data, out)
    usage.free = 1_000_000
    assert finetune(tiny.folder, data, out, FinetuneConfig(epochs=1)).losses


def test_the_space_asked_for_covers_what_a_run_holds(tiny: Tiny, data: Path, out: Path) -> None:
    """Largest sum of file sizes ever seen in the output folder, looked at after each step."""
    from lorac_runtime.outputs import space_needed

    sizes = [0]

    def look(progress: Progress) -> None:
        sizes.append(sum(len(content) for content in contents(out).values()))

    finetune(tiny.folder, data, out, FinetuneConfig(epochs=3), on_progress=look)
    one_checkpoint, results = max(sizes), sum(len(c) for c in contents(out).values())
    assert one_checkpoint + results < space_needed(tiny.manifest) < 10 * (one_checkpoint + results)
