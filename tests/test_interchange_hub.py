"""Snapshots of a model hub on this machine: Hugging Face's own tools read what we write, and we what they keep."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub as hub
import pytest
from interchange_case import Case, in_peft

from lorac_deploy.commands.export import main as export
from lorac_deploy.commands.import_adapter import main as import_
from lorac_deploy.interchange.exporting import ShareConfig, export_folder
from lorac_deploy.interchange.hub import Repository, check_snapshot, find_snapshot, git_hash, local_source
from lorac_exporters.plan import LoraConfig
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.errors import AdapterError


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), "resnet20", LoraConfig(rank=2, blocks=("layer1", "linear")))


def write(case: Case, cache: Path, to: str = "adapter") -> Path:
    return export_folder(case.base, case.adapter, Repository("me/net", cache=cache), ShareConfig(to)).path


def test_hugging_faces_tools_read_a_snapshot(case: Case, tmp_path: Path) -> None:
    snapshot = write(case, tmp_path)
    assert Path(hub.snapshot_download("me/net", cache_dir=tmp_path, local_files_only=True)) == snapshot
    found = hub.scan_cache_dir(tmp_path)
    assert not found.warnings
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == ("me/net", snapshot.name, {"main"})
    assert {file.file_name for file in revision.files} == {"adapter.safetensors", "README.md"}
    card = hub.ModelCard.load(snapshot / "README.md")
    assert card.data.library_name == "lorac-deploy"
    assert card.data.to_dict()["base_sha256"]


def test_peft_loads_a_snapshot_by_its_name(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(case, tmp_path, "peft")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)  # as the environment variable does
    found = in_peft(case.net, "me/net", cache_dir=str(tmp_path))
    assert case.far(found) <= 1e-4


def test_blobs_are_named_as_the_hub_names_them(case: Case, tmp_path: Path) -> None:
    import hashlib

    snapshot = write(case, tmp_path)
    weights, card = snapshot / "adapter.safetensors", snapshot / "README.md"
    assert weights.resolve().name == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert card.resolve().name == git_hash(card.read_bytes())
    assert weights.read_bytes() == case.adapter.read_bytes()


def test_the_same_files_are_the_same_revision_and_others_another(case: Case, tmp_path: Path) -> None:
    first = write(case, tmp_path)
    assert write(case, tmp_path) == first
    second = write(case, tmp_path, "peft")
    assert second != first
    assert find_snapshot(Repository("me/net", cache=tmp_path)) == second
    assert find_snapshot(Repository("me/net", first.name, tmp_path)) == first


@pytest.mark.parametrize("to", ["adapter", "peft"])
def test_from_hand_to_hand(to: str, case: Case, tmp_path: Path) -> None:
    cache, out = str(tmp_path / "cache"), tmp_path / "back.safetensors"
    words = ["--adapter", str(case.adapter), "--to", to, "--hub", "me/net", "--hub-cache", cache]
    rank = ["--rank", "2"] if to == "peft" else []
    assert export([str(case.base), *words]) == 0
    assert import_(["hub:me/net", "--hub-cache", cache, "--base", str(case.base), "--out", str(out), *rank]) == 0
    given, found = load_adapter(case.adapter), load_adapter(out)
    assert given.tensors.keys() == found.tensors.keys()
    assert (out.read_bytes() == case.adapter.read_bytes()) == (to == "adapter")


def test_a_repositorys_folder_will_do(case: Case, tmp_path: Path) -> None:
    snapshot = write(case, tmp_path)
    assert local_source(str(tmp_path / "models--me--net")) == snapshot
    (tmp_path / "models--me--net/refs/main").unlink()
    with pytest.raises(AdapterError, match=f"no revision main.*{snapshot.name}"):
        local_source(str(tmp_path / "models--me--net"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "words"), [(Path.unlink, "blob that is missing"), (cut_off, "altered or cut off")])
def test_half_written_snapshots_are_named_file_by_file(damage, words, case: Case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    snapshot = write(case, tmp_path)
    for name in ("adapter.safetensors", "README.md"):
        damage((snapshot / name).resolve())
    (tmp_path / "models--me--net/blobs/0123.incomplete").touch()
    with pytest.raises(AdapterError, match=rf"README.md .*{words}[\s\S]*adapter.safetensors .*{words}") as caught:
        check_snapshot(snapshot)
    assert "0123.incomplete" in str(caught.value)
    with pytest.raises(AdapterError):
        find_snapshot(Repository("me/net", cache=tmp_path))


def test_what_is_not_there_is_not_fetched(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    words = ["hub:me/none", "--hub-cache", str(tmp_path), "--base", str(case.base), "--out", str(out)]
    assert import_(words) == 1
    assert "download it first" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("words", [["hub:none"], ["x.safetensors", "--hub-cache", "cache"]])
def test_names_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        import_([*words, "--base", "base", "--out", "out"])
    assert caught.value.code == 2
    assert "hub:" in capsys.readouterr().err or words[0] == "hub:none"


def test_an_adapter_of_ours_must_fit_and_stays_as_it_is(case: Case, tmp_path: Path) -> None:
    file = load_adapter(case.adapter)
    tensors = {name: value for name, value in file.tensors.items() if not name.startswith("layer1.0.")}
    (tmp_path / "shared").mkdir()
    save_adapter(tmp_path / "shared/adapter.safetensors", tensors, file.metadata)
    words = [str(tmp_path / "shared"), "--base", str(case.base), "--out", str(tmp_path / "out.safetensors")]
    assert import_(words) == 1
    assert import_([str(case.adapter), *words[1:], "--rank", "1"]) == 1
    assert not (tmp_path / "out.safetensors").exists()
