"""Loss graphs that do not fit a network: everything that is wrong is named at once, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from lorac_exporters.loss_graph import read_loss_graph, targets_of
from lorac_exporters.task_config import TaskConfig
from lorac_runtime.errors import ConversionError
from lorac_runtime.tasks import Output, Target

OUTPUTS = (Output("score", (1, 4, 4)), Output("box", (4, 4, 4)))


def saved(folder: Path, inputs: str, body: str, output: str = "float loss") -> Path:
    text = f'<ir_version: 9, opset_import: ["": 18, "own": 1]> g ({inputs}) => ({output}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), folder / "loss.onnx")
    return folder / "loss.onnx"


def test_what_a_loss_wants_beside_the_outputs_are_its_targets(tmp_path: Path) -> None:
    inputs = "float[n,1,4,4] score, float[n,1,4,4] present, int64[n] kind"
    body = "d = Sub(score, present) e = Abs(d) loss = ReduceMean <keepdims = 0> (e)"
    found = read_loss_graph(saved(tmp_path, inputs, body), OUTPUTS)
    assert targets_of(found, OUTPUTS) == (Target("present", "float32", (1, 4, 4)), Target("kind", "int64", ()))


def test_sizes_that_the_graph_leaves_open_are_those_of_the_network(tmp_path: Path) -> None:
    body = "loss = ReduceMean <keepdims = 0> (score)"
    found = read_loss_graph(saved(tmp_path, "float[n,c,h,w] score", body), OUTPUTS)
    assert [str(d) for d in found.graph.inputs[0].shape] == ["batch", "1", "4", "4"]


BAD: dict[str, tuple[str, str, str, list[str]]] = {
    "interface": (
        "float[n,2,4,4] score, float16[n,4,4,4] box, double[n,3] present, float[n,m] lines, float[n] images",
        "other = ReduceMean <keepdims = 0> (score)",
        "float other",
        [
            "its outputs are other, expected one that is called loss",
            "input 'score' has shape [n,2,4,4], the network's output (batch, 1, 4, 4)",
            "input 'box' is float16, the network's output is float32",
            "input 'present' is double, expected int64 or float32",
            "input 'lines' has shape [n,m], expected the batch and then numbers",
            "input 'images' has a name that is taken",
        ],
    ),
    "strangers": (
        "float[n,1,4,4] scores, float[n,1,4,4] conv_weight",
        "loss = ReduceMean <keepdims = 0> (scores)",
        "float loss",
        [
            "no input is called like an output of the network (score, box); its inputs are scores, conv_weight",
            "input 'conv_weight' has a name that is taken",
        ],
    ),
    "operators": (
        "float[n,1,4,4] score, float[n,4,4,4] box",
        "a = Round(score) b = Det(box) c = Abs(b) d = Abs(a) "
        "e = ReduceSum <keepdims = 0> (c) f = ReduceSum <keepdims = 0> (d) loss = Add(e, f)",
        "float loss",
        ["Round has no gradient", "Det has no gradient"],
    ),
    "foreign": (
        "float[n,1,4,4] score",
        "a = own.Magic(score) loss = ReduceMean <keepdims = 0> (a)",
        "float loss",
        ["operator of own, expected ONNX's own operators only"],
    ),
    "vector": (
        "float[n,1,4,4] score",
        "axes = Constant <value = int64[3] {1, 2, 3}> () loss = ReduceMean <keepdims = 0> (score, axes)",
        "float[n] loss",
        ["expected a float32 scalar: reduce it"],
    ),
    "independent": (
        "float[n,1,4,4] score, float[n,2] present",
        "loss = ReduceMean <keepdims = 0> (present)",
        "float loss",
        ["loss does not depend on any output of the network"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_everything_that_does_not_fit_is_named_together(tmp_path: Path, case: str) -> None:
    inputs, body, output, texts = BAD[case]
    with pytest.raises(ConversionError) as caught:
        read_loss_graph(saved(tmp_path, inputs, body, output), OUTPUTS, reserved=("conv_weight",))
    for text in texts:
        assert text in str(caught.value)
    assert str(caught.value).count("\n  - ") == len(texts)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "loss.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ConversionError, match=r"loss\.onnx is not an ONNX model"):
        read_loss_graph(tmp_path / "loss.onnx", OUTPUTS)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "custom"}, "a loss graph goes with 'custom'"),
        ({"kind": "segmentation", "loss_graph": Path("loss.onnx")}, "a loss graph goes with 'custom'"),
        ({"kind": "regression", "ignore_index": 3}, "only segmentation has labels to ignore"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TaskConfig(**fields)  # type: ignore[arg-type]
