"""PyTorch modules as raw ONNX graphs: names and numbers of the state dict survive."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exporter_graphs import assert_same, cnn, image, in_torch, outputs
from torch import nn

from lorac_exporters import torch_graph
from lorac_exporters.graph_tools import array
from lorac_exporters.torch_graph import export_graph
from lorac_runtime.errors import ConversionError


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, ir.Model]:
    net = cnn()
    return net, export_graph(net, (3, 16, 16))


def test_every_tensor_of_the_state_dict_is_there_with_its_numbers(exported) -> None:
    net, model = exported
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 13
    for name, tensor in state.items():
        np.testing.assert_array_equal(array(model.graph.initializers[name]), tensor.numpy())


def test_the_graph_computes_what_pytorch_does_for_any_batch(exported) -> None:
    net, model = exported
    for batch in (1, 3):
        x = image(batch, 3, 16, 16)
        assert_same(outputs(model, x), in_torch(net, x))


def test_input_and_output_take_the_names_that_are_asked_for() -> None:
    model = export_graph(nn.Conv2d(1, 2, 3), (1, 5, 5), input_name="pixels", output_name="maps")
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["pixels", "maps"]
    assert model.opset_imports[""] == 18


def test_a_module_in_training_mode_is_exported_for_evaluation_and_left_alone() -> None:
    net = cnn().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = export_graph(net, (3, 16, 16))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = image(4, 3, 16, 16)
    assert_same(outputs(model, x), in_torch(net, x))


def test_tensors_that_the_forward_pass_does_not_use_may_be_missing() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(1, 2, 1), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    assert set(export_graph(Idle(), (1, 4, 4)).graph.initializers) == {"used.weight", "used.bias"}


def test_all_differences_from_the_state_dict_are_listed() -> None:
    net = cnn()
    with torch_graph._quiet():
        program, model = torch_graph._trace(net, (3, 16, 16), "input", "logits")
    net = copy.deepcopy(net)  # the exported graph reads the memory of the module it was made from
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1
        net[9].bias[1] += 2
    del model.graph.initializers["4.running_var"]
    with pytest.raises(ConversionError) as caught:
        torch_graph._check_values(model, net, program)
    assert str(caught.value).splitlines()[1:] == [
        "  - 0.weight differs by up to 1",
        "  - 4.running_var is missing",
        "  - 9.bias differs by up to 2",
    ]


def test_an_export_with_altered_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exporter does that folds batch normalisation under the old weight names."""
    real = torch_graph._trace

    def folding(module: nn.Module, *rest: object) -> object:
        other = copy.deepcopy(module)
        with torch.no_grad():
            other[0].weight *= 2
        return real(other, *rest)

    monkeypatch.setattr(torch_graph, "_trace", folding)
    with pytest.raises(ConversionError, match=r"0\.weight differs by up to"):
        export_graph(cnn(), (3, 16, 16))


def test_control_flow_on_data_is_refused_with_the_module_and_the_shape() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ConversionError, match=r"Branching cannot be exported .* \(batch, 3, 4, 4\)"):
        export_graph(Branching(), (3, 4, 4))


def test_an_input_of_the_wrong_size_is_refused_and_not_a_traceback() -> None:
    with pytest.raises(ConversionError, match=r"\(batch, 4, 16, 16\)"):
        export_graph(cnn(), (4, 16, 16))


def test_a_module_with_two_outputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x - 1

    with pytest.raises(ConversionError, match="2 outputs"):
        export_graph(Two(), (3, 4, 4))


def test_exporting_twice_gives_the_same_names() -> None:
    first, second = (export_graph(cnn(), (3, 16, 16)) for _ in range(2))
    assert [n.name for n in first.graph] == [n.name for n in second.graph]
    assert list(first.graph.initializers) == list(second.graph.initializers)


class IntoSlices(nn.Module):
    """Writes into slices in place, as GhostNet does: the first ``kept`` of 8 channels, and the rows of the middle."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.conv, self.other, self.kept = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, kept, 1), kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 6, 6) -> (N, kept, 6, 6)."""
        whole = torch.tanh(self.conv(x))
        part = whole[:, : self.kept]
        part += self.other(x)
        whole[:, :, 2:4] *= 3.0
        return whole[:, : self.kept]


@pytest.mark.parametrize("kept", [8, 7])
def test_what_is_written_into_a_slice_is_joined_of_its_parts(kept: int) -> None:
    torch.manual_seed(0)
    net = IntoSlices(kept).eval()
    model, x = export_graph(net, (3, 6, 6)), image(3, 3, 6, 6)
    assert "ScatterND" not in {node.op_type for node in model.graph}
    assert_same(outputs(model, x), in_torch(net, x))


class ChannelsLast(nn.Module):
    """Pools a map whose channels lie last in memory, as ConvNeXt does behind a normalisation of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 8)."""
        return self.pool(self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).flatten(1)


def test_global_average_pooling_is_a_mean_however_its_input_lies_in_memory() -> None:
    torch.manual_seed(0)
    net = ChannelsLast().eval()
    model, x = export_graph(net, (3, 6, 6)), image(3, 3, 6, 6)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("ReduceMean") == 1
    assert "Gather" not in kinds
    assert_same(outputs(model, x), in_torch(net, x))
