"""Writing and reading .tflite files: round trips, alignment, determinism, and what is refused."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tflite
import torch
from tflite_files import set_field
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers
from tflite_samples import FILES, FULL, METADATA, busy_options, convolution, int8_convolution, network_of

from lorac_exporters.tflite.network import Network, Operator, Quantization, Tensor
from lorac_exporters.tflite.schema import ALIGNMENT, buffer_ranges, from_bytes, save, to_bytes
from lorac_exporters.tflite.schema_options import KINDS
from lorac_runtime.errors import ArtifactError

SAMPLES = {"float": convolution(), "with everything": FULL, "int8": int8_convolution()}


def same(first: Network, second: Network) -> None:
    """Assert that two networks agree in everything; options of ``first`` may leave out idle fields."""
    for name in ("input_keys", "output_keys", "description", "metadata", "files"):
        assert getattr(first, name) == getattr(second, name), name
    olds, news = first.tensors(), second.tensors()
    assert [t.name for t in olds] == [t.name for t in news]
    for old, new in zip(olds, news, strict=True):
        same_tensor(old, new)
    for a, b in zip(first.operators, second.operators, strict=True):
        assert a.kind == b.kind
        assert {f.name: f.idle for f in KINDS[a.kind].fields} | a.options == b.options
        for side in ("inputs", "outputs"):
            assert [t and t.name for t in getattr(a, side)] == [t and t.name for t in getattr(b, side)]


def same_tensor(old: Tensor, new: Tensor) -> None:
    """Assert that two tensors agree but for their source."""
    assert (old.shape, old.dtype, old.batch_axis) == (new.shape, new.dtype, new.batch_axis)
    assert (old.data is None) == (new.data is None)
    assert (old.quantization is None) == (new.quantization is None)
    if old.data is not None and new.data is not None:
        assert old.data.dtype == new.data.dtype
        np.testing.assert_array_equal(old.data, new.data)
    if old.quantization is not None and new.quantization is not None:
        np.testing.assert_array_equal(old.quantization.scale, new.quantization.scale)
        np.testing.assert_array_equal(old.quantization.zero_point, new.quantization.zero_point)
        assert old.quantization.axis == new.quantization.axis


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_written_is_read_back(sample: str) -> None:
    content = to_bytes(SAMPLES[sample])
    found = from_bytes(content, "the file")
    same(SAMPLES[sample], found)
    assert to_bytes(found) == content


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_operator_keeps_its_options(kind: str) -> None:
    x, y = Tensor("x", (2, 3)), Tensor("y", (2, 3))
    network = network_of(Operator(kind, [x, None], [y], busy_options(kind), version=4))
    found = from_bytes(to_bytes(network), "the file")
    same(network, found)
    assert found.operators[0].version == 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0)])
def test_constants_of_every_dtype_and_rank_are_kept(dtype: str, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    x, y = Tensor("x", (2,)), Tensor("y", (2,))
    constant = Tensor("c", shape, dtype, data=numbers)  # type: ignore[arg-type]
    found = from_bytes(to_bytes(network_of(Operator("ADD", [x, constant], [y]))), "the file")
    same_tensor(constant, found.tensors()[1])


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
def test_runtimes_understand_what_is_written(runtime: str) -> None:
    network = convolution(stride=(3, 2), metadata=METADATA, files=FILES)
    images = np.random.default_rng(1).normal(size=(4, 7, 8, 3)).astype(np.float32)
    weight, bias = (torch.from_numpy(t.data) for t in network.constants())
    padded = torch.nn.functional.pad(torch.from_numpy(images).permute(0, 3, 1, 2), (0, 1, 1, 1))
    expected = torch.conv2d(padded, weight.permute(0, 3, 1, 2), bias, (3, 2)).relu().permute(0, 2, 3, 1)
    (found,) = answers(runtime, to_bytes(network), images)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_runtime_names_the_signature_as_the_network_does(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    save(FULL, tmp_path / "a.tflite")
    interpreter = Interpreter(str(tmp_path / "a.tflite"))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["image_key"], "outputs": ["scores_key"]}}
    assert interpreter.get_input_details()[0]["shape_signature"].tolist() == [-1, 7, 8, 3]


@pytest.mark.parametrize("sample", SAMPLES)
def test_ranges_hold_the_numbers_and_are_aligned(sample: str) -> None:
    network, content = SAMPLES[sample], to_bytes(SAMPLES[sample])
    ranges = buffer_ranges(content)
    assert list(ranges) == [t.name for t in network.constants()]
    for tensor in network.constants():
        place = ranges[tensor.name]
        assert place.data.offset % ALIGNMENT == 0
        assert cut(content, place.data) == tensor.data.tobytes()
        assert place.shared_with == ()
        if tensor.quantization is None:
            assert place.scales is None
        else:
            assert cut(content, place.scales) == tensor.quantization.scale.tobytes()


def cut(content: bytes, place: object) -> bytes:
    """The bytes of a range."""
    return content[place.offset : place.offset + place.nbytes]  # type: ignore[attr-defined]


def test_all_buffers_of_a_file_are_aligned_and_the_first_is_empty() -> None:
    content = to_bytes(FULL)
    model = tflite.Model.GetRootAs(content)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    assert buffers[0].DataIsNone()
    assert len(buffers) == 1 + 2 + len(METADATA)
    for buffer in buffers[1:]:
        assert buffer._tab.Vector(buffer._tab.Offset(4)) % ALIGNMENT == 0
    assert tflite.Model.ModelBufferHasIdentifier(content, 0)


def test_a_buffer_that_two_tensors_use_is_detected() -> None:
    x, y = Tensor("x", (1, 4)), Tensor("y", (1, 4))
    constants = [Tensor(n, (4,), data=np.arange(4, dtype=np.float32) + i) for i, n in enumerate("abc")]
    network = network_of(Operator("ADD", [x, *constants], [y]))
    content = bytearray(to_bytes(network))
    tensors = [tflite.Model.GetRootAs(content).Subgraphs(0).Tensors(i) for i in range(4)]
    set_field(content, tensors[3], 2, "<I", tensors[1].Buffer())
    ranges = buffer_ranges(bytes(content))
    assert {name: found.shared_with for name, found in ranges.items()} == {"a": ("c",), "b": (), "c": ("a",)}


def test_constants_of_one_name_have_no_ranges() -> None:
    x, y = Tensor("x", (4,)), Tensor("y", (4,))
    constants = [Tensor(n, (4,), data=np.zeros(4, np.float32)) for n in ("first", "other")]
    content = to_bytes(network_of(Operator("ADD", [x, *constants], [y])))
    with pytest.raises(ArtifactError, match="several constants of the same name"):
        buffer_ranges(content.replace(b"other", b"first"))


PRINT_DIGEST = """
import hashlib, sys
sys.path.insert(0, "tests")
from tflite_samples import FULL
from lorac_exporters.tflite.schema import to_bytes
print(hashlib.sha256(to_bytes(FULL)).hexdigest())
"""


def test_the_bytes_are_the_same_in_another_process(root: Path) -> None:
    command = [sys.executable, "-c", PRINT_DIGEST]
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == hashlib.sha256(to_bytes(FULL)).hexdigest()


def test_appended_files_open_with_any_zip_reader_and_carry_no_time(tmp_path: Path) -> None:
    size = save(FULL, tmp_path / "a.tflite")
    assert size == (tmp_path / "a.tflite").stat().st_size
    with zipfile.ZipFile(tmp_path / "a.tflite") as archive:
        assert {n: archive.read(n) for n in archive.namelist()} == FILES
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    # some readers take offsets as they are: they must count from the start of the whole file
    content = (tmp_path / "a.tflite").read_bytes()
    (directory,) = struct.unpack_from("<I", content, len(content) - 22 + 16)
    (header,) = struct.unpack_from("<I", content, directory + 42)
    assert content[directory : directory + 4] == b"PK\1\2"
    assert content[header : header + 4] == b"PK\3\4"
    assert header == len(to_bytes(convolution(description="a test", metadata=METADATA)))


def test_operator_codes_stand_once_for_each_version_with_both_numbers() -> None:
    tensors = [Tensor(f"t{i}", (2, 2)) for i in range(5)]
    kinds = [("RELU", 1), ("GELU", 1), ("RELU", 2), ("RELU", 1)]
    operators = [Operator(k, [tensors[i]], [tensors[i + 1]], version=v) for i, (k, v) in enumerate(kinds)]
    model = tflite.Model.GetRootAs(to_bytes(network_of(*operators)))
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    found = [(c.BuiltinCode(), c.DeprecatedBuiltinCode(), c.Version()) for c in codes]
    assert found == [(19, 19, 1), (150, 127, 1), (19, 19, 2)]


def test_a_model_of_45_mb_is_written_with_one_copy_of_its_numbers() -> None:
    rng = np.random.default_rng(0)
    tensors, operators = [Tensor("x", (1, 512), batch_axis=0)], []
    for i in range(43):
        weight = Tensor(f"w{i}", (512, 512), data=rng.random((512, 512), np.float32))
        tensors.append(Tensor(f"y{i}", (1, 512), batch_axis=0))
        operators.append(Operator("FULLY_CONNECTED", [tensors[-2], weight, None], [tensors[-1]]))
    network = network_of(*operators)
    tracemalloc.start()
    content = to_bytes(network)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(content) > 45_000_000
    assert peak < 2.1 * len(content)  # while it is built, and the bytes that are returned


BROKEN = {
    "unknown operator": (Operator("WARP", [], []), "operator WARP is unknown"),
    "unknown option": (Operator("ADD", [], [], {"stride": 1}), "unknown options stride; AddOptions has fused"),
    "no options at all": (Operator("RELU", [], [], {"alpha": 1.0}), "this operator has none"),
    "unknown name": (Operator("CONV_2D", [], [], {"padding": "FULL"}), "'FULL' is no Padding; expected one of SAME"),
    "a number for a name": (Operator("CONV_2D", [], [], {"padding": 0}), "0 is no Padding"),
    "text for a number": (Operator("CONV_2D", [], [], {"stride_w": "2"}), "stride_w is '2', expected int"),
    "truth for a number": (Operator("CONV_2D", [], [], {"stride_w": True}), "stride_w is True, expected int"),
    "a list for a tuple": (Operator("SQUEEZE", [], [], {"squeeze_dims": [1]}), "squeeze_dims"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unsound_operator_is_a_value_error(case: str) -> None:
    operator, message = BROKEN[case]
    operator.inputs, operator.outputs = [Tensor("x", (1,))], [Tensor("y", (1,))]
    with pytest.raises(ValueError, match=message):
        to_bytes(network_of(operator))


def test_unsound_networks_are_value_errors() -> None:
    x, y, z = (Tensor(n, (2,)) for n in "xyz")
    with pytest.raises(ValueError, match="RELU reads y before"):
        to_bytes(Network([Operator("RELU", [y], [z])], [x], [z], ("x",), ("z",)))
    with pytest.raises(ValueError, match="no operator makes the output y"):
        to_bytes(Network([Operator("RELU", [x], [z])], [x], [y], ("x",), ("y",)))
    with pytest.raises(ValueError, match="several tensors are called x"):
        to_bytes(network_of(Operator("RELU", [x], [Tensor("x", (2,))])))
    with pytest.raises(ValueError, match=r"c is float32 \(2,\), its numbers are float64 \(2,\)"):
        to_bytes(network_of(Operator("ADD", [x, Tensor("c", (2,), data=np.zeros(2))], [y])))
    with pytest.raises(ValueError, match="its batch axis cannot be 1"):
        to_bytes(network_of(Operator("RELU", [x], [Tensor("y", (2,), batch_axis=1)])))
    uneven = Quantization(np.ones(1, np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="zero points"):
        to_bytes(network_of(Operator("RELU", [x], [Tensor("y", (2,), quantization=uneven)])))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["pretrainedResnet", "pretrainedResnet_large_float", "pretrainedResnet_quant"])
def test_foreign_files_written_anew_answer_the_same(realdata: Path, name: str) -> None:
    content = (realdata / f"mlperf_tiny/{name}.tflite").read_bytes()
    again = to_bytes(from_bytes(content, name))
    same(from_bytes(content, name), from_bytes(again, name))
    quantized = name.endswith("quant")
    images = np.random.default_rng(0).integers(0, 127, (2, 32, 32, 3)).astype(np.int8 if quantized else np.float32)
    for runtime in RUNTIMES:
        np.testing.assert_array_equal(answers(runtime, again, images)[0], answers(runtime, content, images)[0])
