"""Damaged, hostile and foreign .tflite files: always an ArtifactError with clear words, and soon."""

from __future__ import annotations

import contextlib
import time
import tracemalloc

import numpy as np
import pytest
import tflite
from tflite_files import hostile_names, many_graphs, set_field
from tflite_samples import FULL, METADATA, convolution, int8_convolution, network_of

from lorac_exporters.tflite.network import Operator, Tensor
from lorac_exporters.tflite.schema import from_bytes, to_bytes
from lorac_runtime.errors import ArtifactError

CONTENT = to_bytes(FULL)
END = len(to_bytes(convolution(description="a test", metadata=METADATA)))  # of the tables; the files follow


def test_a_file_cut_anywhere_in_its_tables_is_refused() -> None:
    for length in range(END):
        with pytest.raises(ArtifactError, match=r"^a\.tflite "):
            from_bytes(CONTENT[:length], "a.tflite")


@pytest.mark.parametrize("change", [0xFF, 0x01])
def test_a_changed_byte_is_refused_or_read_but_nothing_else(change: int) -> None:
    refused = 0
    for place in range(len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[place] ^= change
        try:
            from_bytes(bytes(damaged), "a.tflite")
        except ArtifactError:
            refused += 1
    assert refused > 200


def test_noise_is_refused_in_no_time() -> None:
    rng = np.random.default_rng(3)
    begun = time.perf_counter()
    for _ in range(300):
        noisy = np.frombuffer(CONTENT, np.uint8).copy()
        place = rng.integers(8, END, 12)
        noisy[place] = rng.integers(0, 256, 12)
        with contextlib.suppress(ArtifactError):
            from_bytes(noisy.tobytes(), "a.tflite")
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b"PK\3\4" + b"\0" * 50, CONTENT[4:]])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError, match="does not begin like a"):
        from_bytes(content, "a.tflite")


def refusal(content: bytes | bytearray) -> str:
    """What reading says."""
    with pytest.raises(ArtifactError) as caught:
        from_bytes(bytes(content), "a.tflite")
    return str(caught.value)


def test_what_this_package_does_not_handle_is_refused_by_name() -> None:
    cases = {
        "custom operator": (lambda m: m.OperatorCodes(0), [(0, "b", 32), (3, "<i", 32)]),
        "operator LSTM is unknown": (lambda m: m.OperatorCodes(0), [(0, "b", 16), (3, "<i", 16)]),
        "999 is no BuiltinOperator": (lambda m: m.OperatorCodes(0), [(3, "<i", 999)]),
        "version 4 of the schema": (lambda m: m, [(0, "<I", 4)]),
        "is INT4, expected one of": (lambda m: m.Subgraphs(0).Tensors(2), [(1, "b", 17)]),
        "is int64 .* but has 16 bytes": (lambda m: m.Subgraphs(0).Tensors(2), [(1, "b", 4)]),
        "is damaged": (lambda m: m.Subgraphs(0).Tensors(2), [(2, "<I", 77)]),
        "the options of another": (lambda m: m.Subgraphs(0).Operators(0), [(3, "B", 11)]),
    }
    for message, (chosen, fields) in cases.items():
        content = bytearray(to_bytes(int8_convolution()))
        for slot, form, value in fields:
            set_field(content, chosen(tflite.Model.GetRootAs(content)), slot, form, value)
        with pytest.raises(ArtifactError, match=message):
            from_bytes(bytes(content), "a.tflite")
    assert "it has 2 sub-graphs, expected one" in refusal(many_graphs(convolution(), 2))
    assert "it has 0 sub-graphs, expected one" in refusal(many_graphs(convolution(), 0))


def test_operators_in_a_circle_are_refused() -> None:
    x, y, z = (Tensor(n, (2,)) for n in "xyz")
    content = bytearray(to_bytes(network_of(Operator("RELU", [x], [y]), Operator("RELU", [y], [z]))))
    first = tflite.Model.GetRootAs(content).Subgraphs(0).Operators(0)
    start = first._tab.Vector(first._tab.Offset(6))
    content[start : start + 4] = (2).to_bytes(4, "little")
    assert "reads what is not there yet" in refusal(content)
    content[start : start + 4] = (9).to_bytes(4, "little")
    assert "is damaged" in refusal(content)
    content[start : start + 4] = b"\xfe\xff\xff\xff"
    assert "no tensor -2" in refusal(content)


def test_absurd_counts_and_names_neither_hang_nor_fill_the_memory() -> None:
    tracemalloc.start()
    begun = time.perf_counter()
    message = refusal(many_graphs(convolution(), 30_000))
    assert "30000 subgraphs" in message
    assert "a name of 20000000 letters" in refusal(hostile_names(20_000_000))
    assert time.perf_counter() - begun < 5
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()


def test_a_damaged_archive_is_refused() -> None:
    damaged = bytearray(CONTENT)
    damaged[CONTENT.index(b"cat\ndog\n")] ^= 0x20
    assert "files appended to it cannot be read" in refusal(damaged)
