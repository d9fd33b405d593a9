"""The file of a cache: what it keeps within its budget, and that nothing damaged or foreign is ever given back."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_runtime import cache_file
from lorac_runtime.cache import size_for
from lorac_runtime.cache_file import INDEX, ROWS, CacheFile, Sample, capacity, space
from lorac_runtime.config import size_in_bytes
from lorac_runtime.errors import CacheError, OutputError

ROW, KEY = 24, bytes(range(32))
HEADER, RECORD = 60, 40
SAMPLES = [(bytes([i]) * 16, bytes([i + 1]) * 16) for i in range(8)]


def row_of(index: int) -> bytes:
    return bytes(np.random.default_rng(index).integers(0, 256, ROW, dtype=np.uint8))


@contextmanager
def opened(folder: Path, **changes: object) -> Iterator[CacheFile]:
    arguments = {"key": KEY, "row": ROW, "budget": 10_000, "wanted": SAMPLES} | changes
    with closing(CacheFile(folder / "cache", **arguments)) as file:  # type: ignore[arg-type]
        yield file


def filled(folder: Path, count: int = len(SAMPLES)) -> None:
    with opened(folder) as file:
        assert all(file.write(SAMPLES[i], row_of(i)) for i in range(count))


def rows_in(file: CacheFile, samples: list[Sample] = SAMPLES) -> dict[Sample, bytes]:
    found, rows = file.read(samples)
    return {samples[i]: bytes(row) for i, row in zip(found, rows, strict=True)}


def kept(folder: Path, **changes: object) -> dict[Sample, bytes]:
    with opened(folder, **changes) as file:
        return rows_in(file)


def all_of(indices: range | list[int]) -> dict[Sample, bytes]:
    return {SAMPLES[i]: row_of(i) for i in indices}


def test_what_was_written_is_read_again_also_after_reopening(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    assert kept(tmp_path) == all_of(range(5))
    assert (tmp_path / "cache" / INDEX).stat().st_size == HEADER + 5 * RECORD
    assert (tmp_path / "cache" / ROWS).stat().st_size == 5 * ROW


@given(samples=st.integers(0, 10**6), row=st.integers(1, 10**7))
def test_space_and_capacity_undo_each_other(samples: int, row: int) -> None:
    assert capacity(space(samples, row), row) == samples
    assert capacity(space(samples, row) - 1, row) == max(0, samples - 1)
    assert capacity(size_in_bytes(size_for(samples, row)), row) >= samples


@settings(max_examples=40)
@given(
    rooms=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    writes=st.lists(st.lists(st.integers(0, 7), max_size=8), min_size=4, max_size=4),
    wanted=st.lists(st.sets(st.integers(0, 7)), min_size=4, max_size=4),
)
def test_the_budget_holds_whatever_is_written_and_opened_again(
    rooms: list[int], writes: list[list[int]], wanted: list[set[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    expected: set[int] = set()
    for room, ahead, needed in zip(rooms, writes, wanted, strict=False):
        budget = space(room, ROW)
        with opened(folder, budget=budget, wanted=[SAMPLES[i] for i in needed]) as file:
            found = rows_in(file)
            assert found.keys() <= {SAMPLES[i] for i in expected & needed}
            assert all(found[s] == row_of(SAMPLES.index(s)) for s in found)
            for i in ahead:
                fits = SAMPLES[i] in file or len(file) < room
                assert file.write(SAMPLES[i], row_of(i)) is fits
            assert rows_in(file) == all_of(sorted(SAMPLES.index(s) for s in file))
            assert len(file) <= room
            expected = {SAMPLES.index(s) for s in file}
            files = sum(path.stat().st_size for path in (folder / "cache").iterdir())
            assert files == file.nbytes <= max(budget, HEADER)


def test_the_first_that_come_stay(tmp_path: Path) -> None:
    with opened(tmp_path, budget=space(3, ROW)) as file:
        assert [file.write(sample, row_of(i)) for i, sample in enumerate(SAMPLES)] == [True] * 3 + [False] * 5
        assert rows_in(file) == all_of(range(3))


def test_samples_that_are_no_longer_wanted_make_room(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path, budget=space(8, ROW), wanted=SAMPLES[4:]) as file:
        assert len(file) == 4
        new = (bytes(16), bytes(16))
        assert file.write(new, row_of(99))
        assert rows_in(file, [new]) == {new: row_of(99)}
    assert kept(tmp_path) == all_of(range(1, 8))  # rows that nothing took the place of are there again


@pytest.mark.parametrize("change", [{"key": bytes(32)}, {"row": ROW + 1}])
def test_another_key_or_size_starts_empty(
    change: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    with caplog.at_level(logging.INFO):
        assert kept(tmp_path, **change) == {}
    assert "it starts empty" in caplog.text
    assert kept(tmp_path) == {}


@pytest.mark.parametrize("file", [INDEX, ROWS])
def test_a_flipped_bit_anywhere_gives_no_wrong_row(file: str, tmp_path: Path) -> None:
    filled(tmp_path, 3)
    path = tmp_path / "cache" / file
    content, other = path.read_bytes(), {n: (tmp_path / "cache" / n).read_bytes() for n in (INDEX, ROWS)}
    rng = np.random.default_rng(0)
    for place in {0, len(content) - 1, *rng.integers(0, len(content), 40).tolist()}:
        for name, whole in other.items():
            (tmp_path / "cache" / name).write_bytes(whole)
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = kept(tmp_path)
        assert found.items() < all_of(range(3)).items()
        assert len(found) >= (2 if file == ROWS or place >= HEADER else 0)


@pytest.mark.parametrize("file", [INDEX, ROWS])
@pytest.mark.parametrize("length", [0, 1, 59, 60, 61, 99, 100, 101])
def test_a_truncated_file_gives_what_is_whole(file: str, length: int, tmp_path: Path) -> None:
    filled(tmp_path, 6)
    path = tmp_path / "cache" / file
    path.write_bytes(path.read_bytes()[:length])
    whole = max(0, (length - HEADER) // RECORD) if file == INDEX else length // ROW
    assert kept(tmp_path) == all_of(range(whole))
    with opened(tmp_path) as again:  # and it can be filled again
        assert all(again.write(SAMPLES[i], row_of(i)) for i in range(6))
    assert kept(tmp_path) == all_of(range(6))


def test_rows_that_vanish_under_an_open_cache_are_misses(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as file:
        (tmp_path / "cache" / ROWS).write_bytes(b"")
        assert rows_in(file) == {}
        assert file.write(SAMPLES[0], row_of(0))
        assert rows_in(file) == all_of([0])


def test_what_was_cut_off_is_not_read_as_zeros_when_the_file_grows_again(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        assert all(file.write(SAMPLES[i], row_of(i)) for i in range(7))
        assert len(rows_in(file)) == 7
        with (tmp_path / "cache" / ROWS).open("rb+") as stream:
            stream.truncate(2 * ROW + 1)
        assert rows_in(file, SAMPLES[:1]) == all_of([0])
        assert [file.write(SAMPLES[i], row_of(i)) for i in (7, 6)] == [True, True]
        assert rows_in(file) == all_of([0, 1, 7, 6])


@pytest.mark.parametrize("content", [b"", b"PK\3\4 something else", bytes(5000), b"lorac-cache-1\n\0\0" + bytes(500)])
def test_files_of_something_else_are_discarded(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in (INDEX, ROWS):
        (tmp_path / "cache" / name).write_bytes(content)
    assert kept(tmp_path) == {}
    filled(tmp_path, 2)
    assert kept(tmp_path) == all_of(range(2))


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"gold")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ROWS).symlink_to(treasure)
    with pytest.raises(OutputError, match="is a link"):
        kept(tmp_path)
    assert treasure.read_bytes() == b"gold"


def test_a_folder_where_the_file_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache" / INDEX).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot hold a cache"):
        kept(tmp_path)


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(CacheError, match="used by another run"):
        kept(tmp_path)
    assert kept(tmp_path) == {}


def test_a_full_disk_stops_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = cache_file._write

    def full(stream: object, offset: int, content: bytes) -> None:
        if offset >= 2 * ROW:
            raise OSError(28, "No space left on device")
        write(stream, offset, content)  # type: ignore[arg-type]

    with opened(tmp_path) as file:
        monkeypatch.setattr(cache_file, "_write", full)
        # records lie behind row 2 of the features too: the first one fails
        assert not file.write(SAMPLES[0], row_of(0))
        assert not file.write(SAMPLES[1], row_of(1))
        assert rows_in(file) == {}
    assert caplog.text.count("No space left on device") == 1


def test_a_disk_that_cannot_be_read_costs_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    filled(tmp_path, 3)
    with opened(tmp_path) as file:
        with monkeypatch.context() as patched:
            patched.setattr(CacheFile, "_gathered", broken)
            assert rows_in(file) == {}
        assert caplog.text.count("cannot be read (Input/output error)") == 1
        assert rows_in(file) == {}
        assert not file.write(SAMPLES[0], row_of(0))


def test_a_row_of_another_length_is_a_mistake(tmp_path: Path) -> None:
    with opened(tmp_path) as file, pytest.raises(ValueError, match="23 bytes where all have 24"):
        file.write(SAMPLES[0], row_of(0)[:-1])


def test_a_record_whose_row_was_never_written_is_found_out(tmp_path: Path) -> None:
    filled(tmp_path, 2)  # as after a power cut that kept the record and lost the row
    path = tmp_path / "cache" / ROWS
    path.write_bytes(path.read_bytes()[:ROW] + bytes(ROW))
    assert zlib.crc32(bytes(ROW)) != zlib.crc32(row_of(1))
    assert kept(tmp_path) == all_of([0])
