"""The canonical form: equal values for every way of exporting, and what is promised of its structure."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exporter_graphs import (
    assert_same,
    cnn,
    from_text,
    image,
    in_torch,
    legacy_export,
    numbers,
    outputs,
    randomize,
)
from torch import nn

from lorac_deploy._torchvision import models
from lorac_exporters.canonical import Canonical, canonicalize
from lorac_exporters.graph_tools import convolutions, input_at, nodes_of, static_dims, to_bytes
from lorac_exporters.heads import find_head
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.errors import ConversionError

HEAD = "g = GlobalAveragePool (last) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"

NETWORKS = [
    "squeezenet1_1",
    pytest.param("mobilenet_v3_small", marks=pytest.mark.slow),
    pytest.param("resnet18", marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", marks=[pytest.mark.slow, pytest.mark.long]),
    pytest.param("resnet50", marks=[pytest.mark.slow, pytest.mark.long]),
    pytest.param("densenet121", marks=[pytest.mark.slow, pytest.mark.long]),
]


def vgg() -> nn.Module:
    """Convolutions with biases and BN, max pooling, a classifier of two linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))


def bottlenecks() -> nn.Module:
    """ResNet-50's blocks, one per stage, four groups."""
    return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=16)


def one_dimensional() -> nn.Module:
    """A net for signals: (batch, 3, 64)."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, dilation=2, groups=4),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def check(net: nn.Module, shape: tuple[int, ...]) -> Canonical:
    """Canonical forms with and without folding compute what PyTorch does, for two batch sizes."""
    torch.manual_seed(0)
    exported = export_graph(randomize(net), shape)
    folded, kept = canonicalize(exported), canonicalize(exported, fold=False)
    for batch in (1, 3):
        x = image(batch, *shape)
        expected = in_torch(net, x)
        assert_same(outputs(folded.model, x), expected)
        assert_same(outputs(kept.model, x), expected)
    assert folded.batchnorms == kept.batchnorms
    assert_promises(folded)
    return folded


def assert_promises(canonical: Canonical) -> None:
    """What the docstring of `lorac_exporters.canonical` says, looked up in the serialized file."""
    proto = ir.to_proto(canonical.model)
    graph = proto.graph
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (9, [("", 18)])
    assert not proto.functions
    forbidden = {"BatchNormalization", "Identity", "Dropout", "Constant", "Shape", "CastLike", "Expand"}
    assert not forbidden & {node.op_type for node in graph.node}
    names = [node.name for node in graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not any(v.doc_string for v in (proto, graph, *graph.node, *graph.initializer, *graph.value_info))
    assert not any(v.metadata_props for v in (graph, *graph.node, *graph.value_info, *graph.initializer))
    for tensor in graph.initializer:
        assert tensor.raw_data
        assert not tensor.float_data
        assert not tensor.external_data
    (image_input,), (result,) = graph.input, graph.output
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in (image_input, result)] == ["batch", "batch"]
    assert_own_parameters(canonical)


def assert_own_parameters(canonical: Canonical) -> None:
    floats = {t.name: t for t in ir.to_proto(canonical.model).graph.initializer if t.data_type == 1}
    assert floats.keys() == canonical.values.keys()
    for name, tensor in floats.items():
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), canonical.values[name])
    for node in convolutions(canonical.model.graph):
        assert [len(value.uses()) for value in node.inputs[1:]] == [1, 1]
    head = find_head(canonical.model)
    assert canonical.values[head.bias].shape == (head.classes,)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_keep_their_function(name: str) -> None:
    net = models.get_model(name, weights=None, num_classes=10)
    canonical = check(net, (3, 64, 64) if name.startswith("squeeze") else (3, 32, 32))
    own = {n for n, _ in net.named_parameters()}
    assert canonical.added.isdisjoint(own)
    untouched = [n for n in own if n.endswith("fc.weight") or (n.startswith("classifier") and n.endswith("weight"))]
    for weight in untouched:
        np.testing.assert_array_equal(canonical.values[weight], net.state_dict()[weight].numpy())
    kept_names = {n for n in own if n in canonical.values}
    assert {n for n, p in net.named_parameters() if p.ndim > 1} <= kept_names


@pytest.mark.parametrize("build", [vgg, bottlenecks, one_dimensional, cnn])
def test_small_networks_keep_their_function(build) -> None:
    check(build(), (3, 64) if build is one_dimensional else (3, 32, 32))


def test_densely_connected_bn_becomes_mul_and_add() -> None:
    net = models.DenseNet(4, (2, 2), 8, num_classes=10)
    canonical = check(net, (3, 32, 32))
    assert [bn.name for bn in canonical.batchnorms if bn.affine] == [
        "features.denseblock1.denselayer1.norm1",
        "features.denseblock1.denselayer2.norm1",
        "features.transition1.norm",
        "features.denseblock2.denselayer1.norm1",
        "features.denseblock2.denselayer2.norm1",
        "features.norm5",
    ]


def test_biases_are_named_after_their_layers_and_those_that_were_added_are_known() -> None:
    canonical = check(cnn(), (3, 16, 16))
    assert {"0.bias", "3.bias", "9.bias"} <= canonical.values.keys()
    assert canonical.added == {"0.bias"}


def test_a_bn_without_affine_parameters_gets_names_and_folds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.Linear(180, 4))
    canonical = check(net, (3, 8, 8))
    (record,) = canonical.batchnorms
    assert (record.name, record.weight, record.bias) == ("1", "1.weight", "1.bias")
    assert canonical.added == {"1.weight", "1.bias"}


LEGACY = {
    "BN folded by the exporter": {},
    "BN kept, equal tensors merged": {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False},
    "opset 11, initializers as inputs": {"opset_version": 11, "keep_initializers_as_inputs": True},
    "opset 7": {"opset_version": 7},
    "opset 9, BN kept": {"opset_version": 9, "training": torch.onnx.TrainingMode.PRESERVE},
    "opset 12": {"opset_version": 12},
    "opset 13, free batch": {"opset_version": 13, "dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]},
}


class Viewing(nn.Module):
    """Flattens by ``view(x.size(0), -1)``: Shape, Gather, Unsqueeze, Concat in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = cnn()[:8], nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.fc(y.view(y.size(0), -1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", LEGACY.values(), ids=LEGACY)
def test_files_of_the_old_exporter_keep_their_function(options, batch: int, tmp_path) -> None:
    from lorac_exporters.onnx_file import read_graph

    net = Viewing()
    path = tmp_path / "user.onnx"
    onnx.save(legacy_export(net, (batch, 3, 16, 16), **options), path)
    canonical = canonicalize(read_graph(path))
    assert_promises(canonical)
    for size in (1, 5):
        assert_same(outputs(canonical.model, image(size, 3, 16, 16)), in_torch(net, image(size, 3, 16, 16)))
    freed = [text for text in canonical.changes if "batch was fixed" in text]
    assert bool(freed) == ("dynamic_axes" not in options)
    reshape = nodes_of(canonical.model.graph, "Reshape", "Flatten")[0]
    assert reshape.op_type == "Flatten" or input_at(reshape, 1).const_value.numpy().tolist() == [-1, 8]


def test_tensors_that_the_old_exporter_merged_are_separate_again_under_their_own_names() -> None:
    net = Viewing()
    twins = [net.body[1], net.body[4]]
    twins[1].load_state_dict(twins[0].state_dict())  # equal values: merged into one
    net.body[0].bias = nn.Parameter(net.body[3].bias.detach().clone())
    options = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False, "opset_version": 18}
    proto = legacy_export(net, (2, 3, 16, 16), **options)
    assert "body.4.running_var" not in {t.name for t in proto.graph.initializer}
    kept = canonicalize(ir.from_proto(proto), fold=False)
    assert [bn.name for bn in kept.batchnorms] == ["body.1", "body.4"]
    expected = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert kept.values.keys() >= expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(kept.values[name], value.numpy())
    assert_same(outputs(kept.model, image(3, 3, 16, 16)), in_torch(net, image(3, 3, 16, 16)))


def test_the_argument_is_not_changed() -> None:
    model = ir.from_proto(legacy_export(Viewing(), (2, 3, 16, 16), opset_version=18))
    before = to_bytes(model)
    canonicalize(model)
    assert to_bytes(model) == before


def test_the_same_input_gives_the_same_bytes_and_a_canonical_graph_is_left_as_it_is() -> None:
    model = ir.from_proto(legacy_export(Viewing(), (2, 3, 16, 16), opset_version=18))
    first, second = canonicalize(model), canonicalize(model)
    assert to_bytes(first.model) == to_bytes(second.model)
    again = canonicalize(ir.from_proto(onnx.load_from_string(to_bytes(first.model))))
    assert again.changes == ()
    assert to_bytes(again.model) == to_bytes(first.model)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(root) -> None:
    program = (
        "import hashlib; from exporter_graphs import cnn; from lorac_exporters.torch_graph import export_graph; "
        "from lorac_exporters.canonical import canonicalize; from lorac_exporters.graph_tools import to_bytes; "
        "import torch; torch.manual_seed(0); "
        "print(hashlib.sha256(to_bytes(canonicalize(export_graph(cnn(), (3, 16, 16))).model)).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root / "tests"), "PATH": ""},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(digests[0]) > 64
    assert digests[0] == digests[1]


def test_metadata_that_apps_read_stays_and_the_exporters_goes() -> None:
    model = export_graph(cnn(), (3, 16, 16))
    model.metadata_props["names"] = "cat,dog"
    model.doc_string = "made on a Tuesday"
    proto = ir.to_proto(canonicalize(model).model)
    assert {p.key: p.value for p in proto.metadata_props} == {"names": "cat,dog"}
    assert (proto.doc_string, proto.producer_name) == ("", "lorac-deploy")


def test_changes_say_what_differs_from_the_file() -> None:
    changes = "\n".join(canonicalize(ir.from_proto(legacy_export(Viewing(), (1, 3, 16, 16), opset_version=18))).changes)
    for text in ("batch was fixed to 1", "input 1 is the constant [-1, 8]", "1 nodes computed constants"):
        assert text in changes


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_is_written_out(mode: str) -> None:
    weights = numbers(c_weight=(6, 3, 3, 2), fc_weight=(5, 6), fc_bias=(5,))
    body = f'a = Conv <auto_pad = "{mode}", strides = [2, 1]> (x, c.weight) '
    body += f'last = MaxPool <auto_pad = "{mode}", kernel_shape = [2, 3], strides = [2, 2]> (a) '
    model = from_text(body + HEAD, weights=weights, x="float[batch,3,11,10] x")
    canonical = canonicalize(model)
    assert not any("auto_pad" in node.attributes for node in canonical.model.graph)
    assert_same(outputs(canonical.model, image(2, 3, 11, 10)), outputs(model, image(2, 3, 11, 10)))


def test_every_value_of_the_result_has_a_shape_with_a_named_batch() -> None:
    canonical = check(cnn(), (3, 16, 16))
    for node in canonical.model.graph:
        dims = node.outputs[0].shape
        assert str(dims[0]) == "batch"
        assert all(isinstance(d, int) for d in dims[1:])
    x = image(2, 3, 16, 16)
    first = canonical.model.clone()
    first.graph.outputs[:] = [first.graph[0].outputs[0]]
    assert outputs(first, x).shape[1:] == static_dims(first.graph[0].outputs[0])[1:]


def test_an_output_that_is_no_row_of_logits_is_refused() -> None:
    weights = numbers(c_weight=(5, 3, 1, 1))
    model = from_text("y = Conv (x, c.weight)", weights=weights, y="float[batch,5,8,8] y")
    with pytest.raises(ConversionError, match=r"expected \(batch, classes\)"):
        canonicalize(model)


def test_a_dense_output_needs_no_classifier_where_none_is_asked_for() -> None:
    model = from_text("y = Conv (x, w)", weights=numbers(w=(5, 3, 3, 3)), y="float[batch,5,6,6] y")
    canonical = canonicalize(model, head=False)
    assert static_dims(canonical.model.graph.outputs[0]) == (None, 5, 6, 6)
    assert_same(outputs(canonical.model, image(2, 3, 8, 8)), outputs(model, image(2, 3, 8, 8)))
