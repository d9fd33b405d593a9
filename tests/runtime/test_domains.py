"""Domains: a base and its adapters. Files are compared byte for byte with what `patch.fuse` makes by itself."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tflite import with_tflite

from lorac_runtime import domains as ds
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter, to_manifest_coordinates
from lorac_runtime.domain_record import RECORD, Current
from lorac_runtime.errors import AdapterError, ArtifactError, OutputError, StoreError
from lorac_runtime.patch import batchnorm_tensors, fuse
from lorac_runtime.switching import fuse_domain, switch

Small = Any
Maker = Callable[..., Small]
BOTH = ("onnx", "tflite")


def metadata(manifest: mf.Manifest, **changes: str) -> dict[str, str]:
    known = {"model": manifest.model, "method": manifest.method, "bn_policy": manifest.bn_policy}
    known |= {"layout": manifest.adapters[0].layout, "r": "2", "rank_mode": "rk", "alpha": "5"}
    return known | {"coordinates": manifest.coordinates, "base_sha256": manifest.files[mf.BASE].sha256, **changes}


def adapter_of(artifact: Small, seed: int, path: Path, **changes: str) -> Path:
    """An adapter file that fits: other numbers for each seed."""
    rng = np.random.default_rng(seed)
    moved = {n: (v + rng.normal(scale=0.1, size=v.shape)).astype(np.float32) for n, v in artifact.state.items()}
    moved = {n: np.abs(v) if n.endswith("running_var") else v for n, v in moved.items()}
    save_adapter(path, moved, metadata(artifact.manifest, **changes))
    return path


def expected(artifact: Small, adapter: Path, base: str = mf.BASE) -> bytes:
    """The fused file, made without any store."""
    file, norms = load_adapter(adapter), batchnorm_tensors(artifact.folder, artifact.manifest)
    target = adapter.with_suffix(".expected")
    fuse(artifact.folder, target, to_manifest_coordinates(artifact.manifest, norms, file), base=base)
    return target.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@dataclasses.dataclass(frozen=True)
class Shop:
    """A store with the domains day and night, and their adapter files."""

    artifact: Small
    store: ds.Store
    adapters: dict[str, Path]
    out: Path

    def fused(self, name: str, base: str = mf.BASE) -> bytes:
        if name == ds.BASE_DOMAIN:
            return bytes((self.artifact.folder / base).read_bytes())
        return expected(self.artifact, self.adapters[name], base)


@pytest.fixture
def shop(small: Maker, tmp_path: Path) -> Shop:
    artifact = with_tflite(small(), "float32")
    store = ds.create(tmp_path / "store", artifact.folder)
    adapters = {name: adapter_of(artifact, n, tmp_path / f"{name}.st") for n, name in enumerate(("day", "night"))}
    for name, path in adapters.items():
        ds.add(store, name, path)
    return Shop(artifact, store, adapters, tmp_path / "app")


def test_domains_are_listed_with_their_size_and_the_one_in_use(shop: Shop) -> None:
    store, _ = switch(shop.store, "night", shop.out)
    found = {d.name: d for d in ds.domains(ds.open_store(store.folder))}
    assert list(found) == ["base", "day", "night"]
    assert [d.current for d in found.values()] == [False, False, True]
    for name in ("day", "night"):
        stored = store.folder / "domains" / f"{name}.safetensors"
        assert stored.read_bytes() == shop.adapters[name].read_bytes()
        assert found[name].nbytes == stored.stat().st_size
        assert found[name].parameters == shop.artifact.manifest.trained_parameters
        assert (found[name].method, found[name].problem, found[name].outdated) == ("lora-c", "", False)
    assert found["base"] == ds.Domain("base", 0, "", 0, current=False)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_switching_there_and_back_gives_the_same_bytes(small: Maker, tmp_path: Path, policy: str) -> None:
    artifact, out = small(policy=policy), tmp_path / "app"
    store = ds.create(tmp_path / "store", artifact.folder)
    adapters = {name: adapter_of(artifact, n, tmp_path / f"{name}.st") for n, name in enumerate("ab")}
    seen = []
    for name in adapters:
        ds.add(store, name, adapters[name])
    for name in "aba":
        store, made = switch(store, name, out)
        assert [file.name for file in made] == ["fused.onnx"]
        assert store.record.current == Current(name, ds.adapter_hash(store, name), str(out), ("onnx",), complete=True)
        assert contents(out).keys() == {"fused.onnx"}
        seen.append((out / "fused.onnx").read_bytes())
        assert seen[-1] == expected(artifact, adapters[name])
    assert seen[0] == seen[2] != seen[1]
    store, _ = switch(store, "base", out)
    assert (out / "fused.onnx").read_bytes() == (artifact.folder / mf.BASE).read_bytes()
    assert [d.current for d in ds.domains(store)] == [True, False, False]


def test_both_formats_change_together_and_one_that_is_not_asked_for_goes(shop: Shop) -> None:
    for name in ("day", "base", "night"):
        store, _ = switch(shop.store, name, shop.out, BOTH)
        assert (shop.out / "fused.onnx").read_bytes() == shop.fused(name)
        assert (shop.out / "fused.tflite").read_bytes() == shop.fused(name, mf.BASE_TFLITE)
    switch(store, "day", shop.out, ("tflite",))
    assert contents(shop.out) == {"fused.tflite": shop.fused("day", mf.BASE_TFLITE)}


def test_fusing_a_domain_leaves_the_one_in_use(shop: Shop, tmp_path: Path) -> None:
    store, _ = switch(shop.store, "day", shop.out)
    fuse_domain(store, "night", tmp_path / "other", BOTH)
    assert contents(tmp_path / "other").keys() == {"fused.onnx", "fused.tflite"}
    assert (tmp_path / "other" / "fused.onnx").read_bytes() == shop.fused("night")
    assert ds.open_store(store.folder).record == store.record
    assert (shop.out / "fused.onnx").read_bytes() == shop.fused("day")
    with pytest.raises(StoreError, match="holds the files of the domain in use, day"):
        fuse_domain(store, "night", shop.out)


def test_an_adapter_in_unfolded_coordinates_is_converted(shop: Shop, tmp_path: Path) -> None:
    path = adapter_of(shop.artifact, 5, tmp_path / "cloud.st", coordinates="unfolded", base_sha256="")
    ds.add(shop.store, "cloud", path)
    switch(shop.store, "cloud", shop.out)
    folded = adapter_of(shop.artifact, 5, tmp_path / "same.st")
    assert (shop.out / "fused.onnx").read_bytes() == expected(shop.artifact, path) != expected(shop.artifact, folded)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "x.", "ü", "n" * 65, "a\0", "a\n", "C:x"]
)
def test_names_that_could_leave_the_folder_are_refused(shop: Shop, name: str) -> None:
    before = contents(shop.store.folder)
    with pytest.raises(ValueError, match="cannot be the name of a domain"):
        ds.add(shop.store, name, shop.adapters["day"])
    with pytest.raises(StoreError, match="has no domain"):
        switch(shop.store, name, shop.out)
    assert contents(shop.store.folder) == before
    assert not shop.out.exists()


@pytest.mark.parametrize("name", ["a", "camera-1", "Camera_2", "2026.11", "n" * 64, "x.safetensors"])
def test_other_names_are_kept_as_they_are(shop: Shop, name: str) -> None:
    ds.add(shop.store, name, shop.adapters["day"])
    switch(shop.store, name, shop.out)
    assert name in [d.name for d in ds.domains(ds.open_store(shop.store.folder))]


def test_a_name_is_given_once_in_whatever_case(shop: Shop) -> None:
    for name, reason in {"day": "is taken by the domain day", "DAY": "case", "Base": "without any adapter"}.items():
        with pytest.raises(StoreError, match=reason):
            ds.add(shop.store, name, shop.adapters["night"])
        with pytest.raises(StoreError, match=reason) if name != "day" else _fine():
            ds.add(shop.store, name, shop.adapters["night"], replace=True)
    assert (shop.store.folder / "domains" / "day.safetensors").read_bytes() == shop.adapters["night"].read_bytes()


class _fine:  # noqa: N801 - stands where a context manager function would
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_replacing_the_domain_in_use_makes_it_outdated(shop: Shop) -> None:
    store, _ = switch(shop.store, "day", shop.out)
    assert ds.add(store, "day", shop.adapters["night"], replace=True).outdated
    assert [d.outdated for d in ds.domains(store)] == [False, True, False]
    store, _ = switch(store, "day", shop.out)
    assert not any(d.outdated for d in ds.domains(store))
    assert (shop.out / "fused.onnx").read_bytes() == shop.fused("night")


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


def test_deleting_asks_for_force_where_the_domain_is_in_use(shop: Shop) -> None:
    store, _ = switch(shop.store, "night", shop.out)
    ds.delete(store, "day")
    with pytest.raises(StoreError, match="night is in use"):
        ds.delete(store, "night")
    with pytest.raises(StoreError, match="has no domain 'day'; there are base, night"):
        ds.delete(store, "day")
    with pytest.raises(StoreError, match="it has no file, and stays"):
        ds.delete(store, "base", force=True)
    ds.delete(store, "night", force=True)
    store = ds.open_store(store.folder)
    assert store.record.current is None
    assert [d.name for d in ds.domains(store)] == ["base"]
    assert (shop.out / "fused.onnx").read_bytes() == shop.fused("night")


def test_a_store_belongs_to_one_base_and_may_be_told_where_it_lies(shop: Shop, small: Maker, tmp_path: Path) -> None:
    store, _ = switch(shop.store, "day", shop.out)
    place = tmp_path / "elsewhere" / "artifact"
    shutil.copytree(shop.artifact.folder, place)
    shutil.move(shop.artifact.folder, tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"not found.*create --artifact"):
        ds.open_store(store.folder)
    ds.create(store.folder, place)
    moved = ds.open_store(store.folder)
    assert moved.record.current == store.record.current
    assert len(ds.domains(moved)) == 3
    other = dataclasses.replace(moved.manifest.files[mf.BASE], sha256="1" * 64)
    manifest = dataclasses.replace(moved.manifest, files=moved.manifest.files | {mf.BASE: other})
    (place / mf.FILE_NAME).write_text(manifest.to_json())
    for opened in (lambda: ds.open_store(store.folder), lambda: ds.create(store.folder, place)):
        with pytest.raises(StoreError, match="belongs to another base"):
            opened()


def test_a_store_and_its_artifact_may_be_moved_together(shop: Shop, tmp_path: Path) -> None:
    home = tmp_path / "new"
    home.mkdir()
    for name in ("store", "artifact"):
        shutil.move(tmp_path / name, home / name)
    assert len(ds.domains(ds.open_store(home / "store"))) == 3


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
