"""Byte ranges of initializers, found without an ONNX library."""

import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorac_exporters.patch_table import initializer_offsets, patch_table
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import Patch


def save(path, tensors, *, nodes=()) -> None:
    graph = onnx.helper.make_graph(list(nodes), "g", [], [], list(tensors), doc_string="unrelated text")
    path.write_bytes(onnx.helper.make_model(graph, producer_name="p").SerializeToString())


def raw(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return onnx.numpy_helper.from_array(values, name)


@given(shapes=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=5), noise=st.text(max_size=20))
def test_the_bytes_at_each_offset_are_the_tensors_numbers(tmp_path_factory, shapes, noise) -> None:
    path = tmp_path_factory.mktemp("offsets") / "m.onnx"
    tensors = [raw(f"{noise}{i}.weight", *shape) for i, shape in enumerate(shapes)]
    node = onnx.helper.make_node("Constant", [], ["c"], value=raw("inside", 3), doc_string=noise)
    save(path, tensors, nodes=[node])
    offsets, content = initializer_offsets(path), path.read_bytes()
    assert list(offsets) == [t.name for t in tensors]
    for tensor in onnx.load(path).graph.initializer:
        offset, nbytes = offsets[tensor.name]
        found = np.frombuffer(content[offset : offset + nbytes], np.float32)
        np.testing.assert_array_equal(found, onnx.numpy_helper.to_array(tensor).ravel())


def test_writing_at_an_offset_changes_that_tensor_and_no_other(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [raw("a", 2, 3), raw("b", 4), raw("c", 5)])
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    (patch,) = patch_table(path, "base.onnx", {"b": (4,)})
    content = bytearray(path.read_bytes())
    content[patch.offset : patch.offset + patch.nbytes] = np.float32([1, 2, 3, 4]).tobytes()
    path.write_bytes(content)
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    np.testing.assert_array_equal(after.pop("b"), [1, 2, 3, 4])
    assert all(np.array_equal(after[name], before[name]) for name in ("a", "c"))


def test_entries_follow_the_manifest(tmp_path) -> None:
    save(tmp_path / "m.onnx", [raw("a", 2, 3), raw("b", 4)])
    table = patch_table(tmp_path / "m.onnx", "base.onnx", {"b": (4,), "a": (2, 3)})
    assert [(p.tensor, p.file, p.nbytes, p.dtype, p.shape) for p in table] == [
        ("b", "base.onnx", 16, "float32", (4,)),
        ("a", "base.onnx", 24, "float32", (2, 3)),
    ]
    assert all(isinstance(p, Patch) and p.permute is None for p in table)


def test_all_missing_and_ill_sized_tensors_are_named(tmp_path) -> None:
    save(tmp_path / "m.onnx", [raw("a", 2, 3)])
    with pytest.raises(ConversionError) as caught:
        patch_table(tmp_path / "m.onnx", "base.onnx", {"a": (7,), "b": (1,), "c": (2,)})
    assert str(caught.value).splitlines()[1:] == [
        "  - a has 24 bytes, expected 28 for shape (7,)",
        "  - b is missing",
        "  - c is missing",
    ]


def test_floats_stored_one_by_one_or_elsewhere_are_refused_and_integers_are_not(tmp_path) -> None:
    listed = onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, (2,), [1.0, 2.0])
    whole = onnx.helper.make_tensor("whole", onnx.TensorProto.INT64, (2,), [1, 2])
    outside = onnx.TensorProto(name="outside", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    outside.external_data.add(key="location", value="weights.bin")
    save(tmp_path / "m.onnx", [raw("a", 3), listed, whole, outside])
    with pytest.raises(ConversionError) as caught:
        initializer_offsets(tmp_path / "m.onnx")
    assert str(caught.value).splitlines()[1:] == [
        "  - listed is not stored as raw bytes",
        "  - outside lies in another file",
    ]


@pytest.mark.parametrize("content", [b"", b"hello world", b"\xff" * 40, b"\x08\x09"])
def test_files_that_are_no_models_are_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ConversionError, match="not an ONNX model, or was cut short"):
        initializer_offsets(tmp_path / "m.onnx")


def test_every_cut_short_file_is_refused_or_lacks_tensors(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [raw("a", 2), raw("b", 2)])
    content = path.read_bytes()
    end_of_graph = initializer_offsets(path)["b"][0]
    for length in range(1, end_of_graph):
        path.write_bytes(content[:length])
        with pytest.raises(ConversionError):
            patch_table(path, "base.onnx", {"a": (2,), "b": (2,)})


def test_a_missing_file_is_refused(tmp_path) -> None:
    with pytest.raises(ConversionError, match=r"none\.onnx cannot be read"):
        initializer_offsets(tmp_path / "none.onnx")


def test_a_file_of_45_megabytes_is_walked_and_not_read(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    save(path, [raw(f"layer{i}.weight", 512, 512, 3, 3) for i in range(5)] + [raw(f"b{i}", 512) for i in range(60)])
    assert path.stat().st_size > 45e6
    tracemalloc.start()
    assert len(initializer_offsets(path)) == 65
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
