"""The drop-in report of pairs of .tflite files, with one promise broken at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hand_tflite import activation, floats, integers, named, patch, scales, write

from lorac_exporters.checks import BYTES_CHECK, DropinReport
from lorac_exporters.tflite import dropin
from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ArtifactError

Edit = Callable[[Network], None]


def verdicts(report: DropinReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def failed(report: DropinReport) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "fail"}


def compared(folder: Path, make: Callable[[int], Network], edit: Edit = lambda network: None) -> DropinReport:
    """A base and another network of other weights, edited, without a patch table."""
    base, fused = write(make(0), folder / "base.tflite"), make(1)
    edit(fused)
    return dropin.compare_files(base, write(fused, folder / "fused.tflite"))


def patched(base: Path, fused: Path, changes: dict[int, bytes]) -> Path:
    """A copy of ``base`` with other bytes at these offsets."""
    content = bytearray(base.read_bytes())
    for offset, replacement in changes.items():
        content[offset : offset + len(replacement)] = replacement
    fused.write_bytes(content)
    return fused


@pytest.mark.parametrize("make", [floats, integers])
def test_other_weights_alone_make_a_drop_in(tmp_path: Path, make: Callable[[int], Network]) -> None:
    report = compared(tmp_path, make)
    assert report.ok, report
    assert {name for name, verdict in verdicts(report).items() if verdict != "pass"} == {BYTES_CHECK}


def test_with_the_patch_table_every_byte_is_accounted_for(tmp_path: Path) -> None:
    base = write(floats(), tmp_path / "base.tflite")
    entry = patch(base, "conv.weight")
    fused = patched(base, tmp_path / "fused.tflite", {entry.offset: np.array([1.5, -2.5], np.float32).tobytes()})
    report = dropin.compare_files(base, fused, [entry])
    assert set(verdicts(report).values()) == {"pass"}
    assert "8 of its 540 bytes changed" in report.checks[-1].detail


def test_scales_of_patched_weights_may_change_and_no_others(tmp_path: Path) -> None:
    base = write(integers(), tmp_path / "base.tflite")
    table = [patch(base, name, quantized=True) for name in ("conv.weight", "conv.bias")]
    new = np.linspace(0.02, 0.03, 5, dtype=np.float32).tobytes()
    places = [entry.quantization.scales.offset for entry in table if entry.quantization]
    fused = patched(base, tmp_path / "fused.tflite", {table[0].offset: b"\1\2\3", places[0]: new, places[1]: new})
    report = dropin.compare_files(base, fused, table)
    assert report.ok, report
    assert "scales of 2 constants differ" in next(c.detail for c in report.checks if c.name == "quantization")
    assert failed(dropin.compare_files(base, fused, table[:1])) == {"quantization", BYTES_CHECK}
    without_scales = [dataclasses.replace(entry, quantization=None) for entry in table]
    assert failed(dropin.compare_files(base, fused, without_scales)) == {"quantization", BYTES_CHECK}


def test_every_single_flipped_bit_outside_the_patch_table_fails(tmp_path: Path) -> None:
    base = write(floats(), tmp_path / "base.tflite")
    table = [patch(base, name) for name in ("conv.weight", "conv.bias", "fc.weight", "fc.bias")]
    content = base.read_bytes()
    inside = {i for entry in table for i in range(entry.offset, entry.offset + entry.nbytes)}
    unreadable = passed = 0
    for place in range(0, len(content), 3):
        fused = patched(base, tmp_path / "fused.tflite", {place: bytes([content[place] ^ (1 << place % 8)])})
        try:
            report = dropin.compare_files(base, fused, table)
        except ArtifactError:
            unreadable += 1
            assert place not in inside
            continue
        assert report.ok == (place in inside), place
        assert (BYTES_CHECK in failed(report)) == (place not in inside)
        passed += report.ok
    assert passed > 100
    assert unreadable > 20


def swap_operator(network: Network) -> None:
    network.operators[1].kind = "SUM"


def other_version(network: Network) -> None:
    network.operators[0].version = 2


def other_padding(network: Network) -> None:
    network.operators[0].options["padding"] = "SAME"


def other_activation(network: Network) -> None:
    network.operators[0].options["fused_activation_function"] = "RELU6"


def renamed_weight(network: Network) -> None:
    named(network, "conv.weight").name = "conv.weights"


def renamed_activation(network: Network) -> None:
    named(network, "hidden").name = "between"


def fixed_batch(network: Network) -> None:
    named(network, "hidden").batch_axis = None


def other_dtype(network: Network) -> None:
    tensor = named(network, "fc.bias")
    assert tensor.data is not None
    tensor.dtype, tensor.data = "float16", tensor.data.astype(np.float16)


def other_key(network: Network) -> None:
    network.output_keys = ("scores",)


def crossed_operands(network: Network) -> None:
    operands = network.operators[2].inputs
    operands[2] = None


def other_axes(network: Network) -> None:
    named(network, "axes").data = np.array([2, 1], np.int32)


def other_labels(network: Network) -> None:
    network.files["labels.txt"] = b"dog\ncat\ncow\nhen\n"


def other_metadata(network: Network) -> None:
    network.metadata["min_runtime_version"] = b"1.6.0"


def other_description(network: Network) -> None:
    network.description = "a network put together by HAND"


def added_file(network: Network) -> None:
    network.files["more.txt"] = b"more"


FLOAT_BREACHES: dict[str, tuple[Edit, set[str]]] = {
    "another operator": (swap_operator, {"operators"}),
    "another version": (other_version, {"operators"}),
    "another padding": (other_padding, {"options"}),
    "another activation": (other_activation, {"options"}),
    "a renamed weight": (renamed_weight, {"tensors"}),
    "a renamed activation": (renamed_activation, {"tensors"}),
    "a fixed batch": (fixed_batch, {"tensors"}),
    "another dtype": (other_dtype, {"tensors"}),
    "another key in the signature": (other_key, {"signature"}),
    "an operand left out": (crossed_operands, {"edges", "tensors"}),
    "other axes": (other_axes, {"steering numbers"}),
    "other labels": (other_labels, {"metadata"}),
    "other metadata": (other_metadata, {"metadata"}),
    "another description": (other_description, {"metadata"}),
    "another file appended": (added_file, {"metadata"}),
}


@pytest.mark.parametrize("breach", FLOAT_BREACHES)
def test_each_broken_promise_is_caught_by_the_check_that_names_it(tmp_path: Path, breach: str) -> None:
    edit, expected = FLOAT_BREACHES[breach]
    report = compared(tmp_path, floats, edit)
    assert failed(report) - {"file size"} == expected
    assert not report.ok


def two_convolutions(seed: int) -> Network:
    """Two convolutions of the same shape that read the same image; their sum is the output."""
    network = floats(seed)
    image, first = network.inputs[0], network.operators[0]
    rng = np.random.default_rng(seed + 9)
    weights = [Tensor(n, (5, 3, 3, 3), data=rng.standard_normal((5, 3, 3, 3)).astype(np.float32)) for n in ("w1", "w2")]
    hidden = [Tensor(n, (1, 4, 4, 5), batch_axis=0) for n in ("h1", "h2")]
    summed = Tensor("logits", (1, 4, 4, 5), batch_axis=0)
    bias = first.inputs[2]
    network.operators = [
        *(
            Operator("CONV_2D", [image, w, bias], [h], dict(first.options))
            for w, h in zip(weights, hidden, strict=True)
        ),
        Operator("SUB", list(hidden), [summed]),
    ]
    network.outputs = [summed]
    return network


def test_exchanged_operands_are_other_edges(tmp_path: Path) -> None:
    report = compared(tmp_path, two_convolutions, lambda network: network.operators[2].inputs.reverse())
    assert failed(report) == {"edges"}


def test_exchanged_weights_of_the_same_shape_are_other_tensors(tmp_path: Path) -> None:
    def exchange(network: Network) -> None:
        a, b = network.operators[:2]
        a.inputs[1], b.inputs[1] = b.inputs[1], a.inputs[1]

    assert failed(compared(tmp_path, two_convolutions, exchange)) == {"tensors"}


def zero_point_of_an_activation(network: Network) -> None:
    named(network, "logits").quantization = activation(0.1, 6)


def scale_of_an_activation(network: Network) -> None:
    named(network, "logits").quantization = activation(0.11, 5)


def zero_point_of_a_weight(network: Network) -> None:
    quantization = named(network, "conv.weight").quantization
    assert quantization is not None
    quantization.zero_point[2] = 1


def axis_of_a_weight(network: Network) -> None:
    weight = named(network, "conv.weight")
    assert weight.quantization is not None
    weight.quantization = dataclasses.replace(weight.quantization, axis=3)


def one_scale_for_all(network: Network) -> None:
    named(network, "conv.weight").quantization = scales(0.02)


def no_quantization(network: Network) -> None:
    named(network, "conv.bias").quantization = None


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (zero_point_of_an_activation, "logits: zero point 5 -> 6"),
        (scale_of_an_activation, "logits: scale 0.1 -> 0.11"),
        (zero_point_of_a_weight, "conv.weight: zero point 0 ... (5) -> 0 ... (5)"),
        (one_scale_for_all, "5 scales -> 1"),
        (no_quantization, "conv.bias: quantized in one file only"),
    ],
)
def test_quantization_that_fusing_may_not_change(tmp_path: Path, edit: Edit, text: str) -> None:
    report = compared(tmp_path, integers, edit)
    assert "quantization" in failed(report)
    assert failed(report) <= {"quantization", "file size", "steering numbers"}
    assert text in next(c.detail for c in report.checks if c.name == "quantization")


def test_another_axis_of_the_scales_is_found(tmp_path: Path) -> None:
    def square(seed: int) -> Network:
        network = integers(seed)
        weight = named(network, "conv.weight")
        assert weight.data is not None
        weight.data = np.repeat(weight.data, 2, axis=3)[..., :5]
        weight.shape, network.inputs[0].shape = (5, 3, 3, 5), (1, 6, 6, 5)
        return network

    report = compared(tmp_path, square, axis_of_a_weight)
    assert failed(report) - {"file size"} == {"quantization"}
    assert "axis 0 -> 3" in next(c.detail for c in report.checks if c.name == "quantization")


def shared(path: Path, one: str, other: str) -> Path:
    """Let two tensors of a file point to the same buffer, as writers that merge equal constants do."""
    import tflite

    content = bytearray(path.read_bytes())
    graph = tflite.Model.GetRootAs(content).Subgraphs(0)
    tables = {graph.Tensors(i).Name().decode(): graph.Tensors(i)._tab for i in range(graph.TensorsLength())}
    places = [tables[name].Pos + tables[name].Offset(8) for name in (one, other)]  # 8: the field `buffer`
    content[places[1] : places[1] + 4] = content[places[0] : places[0] + 4]
    path.write_bytes(content)
    return path


def test_buffers_that_two_tensors_share_are_named(tmp_path: Path) -> None:
    base = write(two_convolutions(0), tmp_path / "base.tflite")
    apart = dropin.compare_files(base, write(two_convolutions(1), tmp_path / "fused.tflite"))
    assert verdicts(apart)["shared buffers"] == "pass"
    joined = shared(write(two_convolutions(1), tmp_path / "fused.tflite"), "w1", "w2")
    report = dropin.compare_files(base, joined)
    assert failed(report) == {"shared buffers"}
    assert "fused w1 and w2" in next(c.detail for c in report.checks if c.name == "shared buffers")


def test_a_patch_of_a_shared_buffer_is_no_drop_in(tmp_path: Path) -> None:
    base = shared(write(two_convolutions(0), tmp_path / "base.tflite"), "w1", "w2")
    entry = patch(base, "w1")
    fused = patched(base, tmp_path / "fused.tflite", {entry.offset: b"\0\0\0\0"})
    assert dropin.compare_files(base, fused).ok
    report = dropin.compare_files(base, fused, [entry])
    assert failed(report) == {"shared buffers"}
    assert "changes the others too: w1 and w2" in next(c.detail for c in report.checks if c.name == "shared buffers")


def test_a_file_that_grew_is_named_by_its_size(tmp_path: Path) -> None:
    base = write(floats(), tmp_path / "base.tflite")
    network = floats()
    network.files.clear()
    plain = write(network, tmp_path / "plain.tflite")
    (tmp_path / "grown.tflite").write_bytes(plain.read_bytes() + bytes(16))
    report = dropin.compare_files(plain, tmp_path / "grown.tflite", [patch(plain, "conv.weight")])
    assert failed(report) == {"file size", BYTES_CHECK}
    assert failed(dropin.compare_files(base, plain)) == {"metadata", "file size"}


def test_damaged_and_missing_files_are_refused_with_their_name(tmp_path: Path) -> None:
    content = to_bytes(floats())
    base = tmp_path / "base.tflite"
    base.write_bytes(content)
    for name, other in {"empty": b"", "cut": content[:700], "text": b"TFL3" * 100, "zeros": bytes(999)}.items():
        (tmp_path / f"{name}.tflite").write_bytes(other)
        with pytest.raises(ArtifactError, match=rf"{name}\.tflite"):
            dropin.compare_files(base, tmp_path / f"{name}.tflite")
    with pytest.raises(ArtifactError, match=r"gone\.tflite not found"):
        dropin.compare_files(base, tmp_path / "gone.tflite")
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        dropin.compare_files(base, tmp_path)
