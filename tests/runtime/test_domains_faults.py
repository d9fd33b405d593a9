"""Domains: what does not fit or was damaged changes nothing, and the power may be cut at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from domain_shop import BOTH, Maker, Shop, Small, adapter_of, contents, expected, stocked

from lorac_runtime import domains as ds
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.domain_record import RECORD
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError, StoreError
from lorac_runtime.switching import switch


@pytest.fixture
def shop(small: Maker, tmp_path: Path) -> Shop:
    return stocked(small, tmp_path)


def _truncated(path: Path, artifact: Small) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _missing(path: Path, artifact: Small) -> None:
    path.unlink()


def _other_shape(path: Path, artifact: Small) -> None:
    file = load_adapter(path)
    save_adapter(path, file.tensors | {"fc.bias": np.zeros(6, np.float32)}, file.metadata)


def _other_base(path: Path, artifact: Small) -> None:
    file = load_adapter(path)
    save_adapter(path, file.tensors, file.metadata | {"base_sha256": "0" * 64})


def _nameless(path: Path, artifact: Small) -> None:
    save_adapter(path, load_adapter(path).tensors, {})


def _infinite(path: Path, artifact: Small) -> None:
    file = load_adapter(path)
    save_adapter(path, file.tensors | {"fc.bias": np.full(5, np.inf, np.float32)}, file.metadata)


@pytest.mark.parametrize("spoil", [_truncated, _missing, _other_shape, _other_base, _nameless, _infinite])
def test_an_adapter_that_does_not_fit_never_enters_the_store(
    shop: Shop, tmp_path: Path, spoil: Callable[[Path, Small], None]
) -> None:
    path = adapter_of(shop.artifact, 9, tmp_path / "bad.st")
    spoil(path, shop.artifact)
    before = contents(shop.store.folder)
    for name, replace in (("new", False), ("day", True)):
        with pytest.raises(AdapterError):
            ds.add(shop.store, name, path, replace=replace)
    assert contents(shop.store.folder) == before


def test_a_domain_that_was_damaged_says_so_and_disturbs_no_other(shop: Shop) -> None:
    _truncated(shop.store.folder / "domains" / "day.safetensors", shop.artifact)
    (shop.store.folder / "domains" / "notes.txt").write_text("mine")
    found = {d.name: d.problem for d in ds.domains(shop.store)}
    assert "not a whole safetensors file" in found["day"]
    assert found.keys() == {"base", "day", "night"}
    switch(shop.store, "night", shop.out)
    before = contents(shop.out)
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        switch(shop.store, "day", shop.out)
    assert contents(shop.out) == before
    ds.delete(shop.store, "day")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', "{}", "null"])
def test_a_damaged_record_is_told_and_made_anew_without_losing_a_domain(shop: Shop, text: str) -> None:
    (shop.store.folder / RECORD).write_text(text)
    with pytest.raises(StoreError, match="the domains are kept"):
        ds.open_store(shop.store.folder)
    (shop.store.folder / RECORD).unlink()
    ds.create(shop.store.folder, shop.artifact.folder)
    assert len(ds.domains(ds.open_store(shop.store.folder))) == 3


def test_a_record_of_another_version_is_refused(shop: Shop) -> None:
    record = json.loads((shop.store.folder / RECORD).read_text())
    (shop.store.folder / RECORD).write_text(json.dumps(record | {"schema_version": 2}))
    with pytest.raises(StoreError, match="schema_version: 2, this program reads 1"):
        ds.open_store(shop.store.folder)


def test_folders_that_would_be_harmed_are_refused(shop: Shop, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text("{}")
    folders = {
        shop.artifact.folder: "the training artifact",
        shop.artifact.folder / "x": "the training artifact",
        shop.store.folder / "domains" / "x": "the adapters of the store",
        run: "the output of a fine-tuning run",
    }
    before = contents(tmp_path)
    for folder, reason in folders.items():
        with pytest.raises(OutputError, match=reason):
            switch(shop.store, "day", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        switch(shop.store, "day", tmp_path / "file")
    with pytest.raises(OutputError, match="lies in the training artifact"):
        ds.create(shop.artifact.folder / "store", shop.artifact.folder)
    for formats in ((), ("onnx", "onnx"), ("onnx", "coreml")):
        with pytest.raises(ValueError, match="expected one or more of onnx, tflite"):
            switch(shop.store, "day", shop.out, formats)
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before


def test_a_format_that_the_artifact_lacks_and_a_damaged_base_change_nothing(small: Maker, tmp_path: Path) -> None:
    artifact, out = small(), tmp_path / "app"
    store = ds.create(tmp_path / "store", artifact.folder)
    ds.add(store, "day", adapter_of(artifact, 0, tmp_path / "day.st"))
    store, _ = switch(store, "day", out)
    before = contents(out) | contents(store.folder)
    with pytest.raises(ArtifactError, match=r"has no base\.tflite"):
        switch(store, "day", out, BOTH)
    (artifact.folder / mf.BASE).write_bytes(b"x" * artifact.manifest.files[mf.BASE].nbytes)
    for name in ("day", "base"):
        with pytest.raises(ArtifactError, match="was altered"):
            switch(store, name, out)
    assert contents(out) | contents(store.folder) == before


CUT = """
import os, shutil, sys
from pathlib import Path
from lorac_runtime import domains as ds
from lorac_runtime.switching import switch

os.fsync = lambda handle: None  # it takes most of the time
before, snapshots, folder, adapter, out = map(Path, sys.argv[1:])

def scenario(left):
    def moment():
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)

    def watched(call):
        def run(*args, **kwargs):
            moment()
            try:
                return call(*args, **kwargs)
            finally:
                moment()
        return run

    for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree")):
        setattr(owner, name, watched(getattr(owner, name)))
    store = ds.open_store(folder)
    ds.add(store, "dusk", adapter)
    switch(store, "dusk", out, ("onnx", "tflite"))

count, status = 0, 1
while status:
    count += 1
    for place in (folder, out):
        shutil.rmtree(place)
        shutil.copytree(before / place.name, place)
    child = os.fork()
    if not child:
        scenario(count)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    for place in (folder, out):
        shutil.copytree(place, snapshots / str(count) / place.name)
"""


def test_the_power_may_be_cut_at_any_moment(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process dies before and after each change of the file system; what it leaves can be used, and is mended."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    dusk = adapter_of(shop.artifact, 7, tmp_path / "dusk.st")
    switch(shop.store, "day", shop.out, BOTH)
    wanted = {
        name: {f"fused.{f}": expected(shop.artifact, path, f"base.{f}") for f in BOTH}
        for name, path in {"day": shop.adapters["day"], "dusk": dusk}.items()
    }
    before, snapshots = tmp_path / "before", tmp_path / "snapshots"
    for folder in (shop.store.folder, shop.out):
        shutil.copytree(folder, before / folder.name)
    command = [sys.executable, "-c", CUT, before, snapshots, shop.store.folder, dusk, shop.out]
    subprocess.run(list(map(str, command)), check=True)
    torn = 0
    for snapshot in snapshots.iterdir():
        for folder in (shop.store.folder, shop.out):
            shutil.rmtree(folder)
            shutil.copytree(snapshot / folder.name, folder)
        torn += _left_by_a_cut(shop, wanted)
        store = ds.open_store(shop.store.folder)
        ds.add(store, "dusk", dusk, replace=True)
        switch(store, "dusk", shop.out, BOTH)
        assert contents(shop.out) == wanted["dusk"]
        left = sorted(p.name for p in (store.folder / "domains").iterdir())
        assert left == [f"{name}.safetensors" for name in ("day", "dusk", "night")]
    assert len(list(snapshots.iterdir())) > 30
    assert torn, "no cut fell between two renames: the test looks at the wrong moments"


def _left_by_a_cut(shop: Shop, wanted: dict[str, dict[str, bytes]]) -> bool:
    """Check what a cut left; whether the files are of two domains, which the record must admit."""
    store = ds.open_store(shop.store.folder)
    assert not any(d.problem for d in ds.domains(store))
    current, found = store.record.current, contents(shop.out)
    assert current is not None
    files = {name: found[name] for name in ("fused.onnx", "fused.tflite")}
    assert all(content in (wanted["day"][name], wanted["dusk"][name]) for name, content in files.items())
    assert not current.complete or files == wanted[current.name]
    return files not in (wanted["day"], wanted["dusk"])
