"""Domains: a base and its adapters. Files are compared byte for byte with what `patch.fuse` makes by itself."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from domain_shop import BOTH, Maker, Shop, adapter_of, contents, expected, stocked

from lorac_runtime import domains as ds
from lorac_runtime import manifest as mf
from lorac_runtime.domain_record import Current
from lorac_runtime.errors import ArtifactError, StoreError
from lorac_runtime.switching import fuse_domain, switch


@pytest.fixture
def shop(small: Maker, tmp_path: Path) -> Shop:
    return stocked(small, tmp_path)


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
