"""Files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorac_runtime.errors import OutputError
from lorac_runtime.files import atomic_write, atomic_write_at, output_folder, staged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pieces_are_written_one_after_the_other(tmp_path: Path) -> None:
    big = bytes(range(256)) * 10_000
    atomic_write(tmp_path / "a", [b"head", memoryview(big), b"", b"tail"])
    assert (tmp_path / "a").read_bytes() == b"head" + big + b"tail"
    assert names(tmp_path) == ["a"]


def test_an_existing_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old and longer")
    with target.open("rb") as reader:
        atomic_write(target, b"new")
        assert reader.read() == b"old and longer"  # the old file still exists for who has it open
    assert target.read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="needs pwrite")
@pytest.mark.parametrize("damage", ["another byte", "shorter", "longer"])
def test_a_disk_that_gives_other_bytes_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def flush(handle: int) -> None:
        if damage == "shorter":
            os.ftruncate(handle, 4)
        else:
            os.pwrite(handle, b"X", 2 if damage == "another byte" else 5)

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OutputError, match="reading it back"):
        atomic_write(tmp_path / "a", [b"fir", b"st"])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_links_in_the_place_of_temporary_files_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = output_folder(tmp_path / "out")
    for name in (".probe", f".a.{os.getpid()}.part"):
        (folder / name).symlink_to(victim)
    atomic_write(output_folder(folder) / "a", b"new")
    assert victim.read_bytes() == b"precious"
    assert names(folder) == ["a"]


def test_what_a_killed_process_left_of_a_proof_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".probe").write_bytes(b"")
    output_folder(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["missing/a", "file/a", "folder"])
def test_a_target_that_cannot_be_written_is_named_with_advice(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"cannot write .*: .+\. .+\.$") as caught:
        atomic_write(tmp_path / where, b"new")
    assert str(tmp_path / where) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="may write to"):
            atomic_write(tmp_path / "a", b"new")
        with pytest.raises(OutputError, match="may write to"):
            output_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
def test_a_disk_that_fills_up_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    program = """
        import resource, sys
        from pathlib import Path
        from lorac_runtime.errors import OutputError
        from lorac_runtime.files import atomic_write
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            atomic_write(Path(sys.argv[1]), bytes(5000))
        except OutputError as err:
            print(err)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write" in result.stdout
    assert "no file of that size" in result.stdout
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_writer_leaves_the_old_file_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def write_and_stop() -> None:
        with staged(tmp_path / "a") as part:
            part.write_bytes(b"half of the")
            raise error

    with pytest.raises(error):
        write_and_stop()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_staged_file_appears_only_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as part:
        part.write_bytes(b"whole")
        assert part.parent == tmp_path
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_an_output_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert output_folder(tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OutputError, match=f"cannot write {folder}"):
            output_folder(folder)


def test_pieces_may_come_in_any_order_from_an_iterator(tmp_path: Path) -> None:
    big = bytes(range(256)) * 10_000
    pieces = [(4, big), (0, b"head"), (4 + len(big), b""), (4 + len(big), b"tail")]
    atomic_write_at(tmp_path / "a", iter(pieces), nbytes=8 + len(big))
    assert (tmp_path / "a").read_bytes() == b"head" + big + b"tail"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "pieces", [[(0, b"ab"), (3, b"d")], [(0, b"abc"), (2, b"cd")], [(0, b"abc")], [(0, b"abcde")], [(1, b"bcd")], []]
)
def test_pieces_that_leave_bytes_out_or_write_them_twice_are_refused(
    tmp_path: Path, pieces: list[tuple[int, bytes]]
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match="are not each of its 4 bytes once"):
        atomic_write_at(tmp_path / "a", pieces, nbytes=4)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_iterator_that_fails_half_way_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    def pieces() -> Iterator[tuple[int, bytes]]:
        yield 0, b"half"
        raise ArithmeticError("of the values")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ArithmeticError):
        atomic_write_at(tmp_path / "a", pieces(), nbytes=8)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]
