"""Adapted convolutions against the index formula of the update, written out here once more."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorac_deploy.lora_layers import (
    LayerAdapter,
    LoraConv1d,
    LoraConv2d,
    LoraLayer,
    LoraLinear,
    Plain,
    adapt,
    merge,
    release,
)
from lorac_runtime.delta import LAYOUTS, Layout, adapter_rank

TOLERANCE = 1e-12  # float64
# PyTorch remarks that 'same' may copy its input where the kernel is even; no concern of the adapter's.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def update(layer: LoraLayer, scale: float | Tensor) -> Tensor:
    """Element by element: each names the row of B and the column of A that it is made of."""
    shape = {2: (*layer.weight.shape, 1, 1), 3: (*layer.weight.shape[:2], 1, layer.weight.shape[-1])}.get(
        layer.weight.ndim, tuple(layer.weight.shape)
    )
    c_out, c_in, k_h, k_w = shape
    o, i, u, v = np.indices(shape)
    if layer.adapter.layout == "spatial":
        rows, columns = o * k_h + u, i * k_w + v
    else:
        n = (i * k_h + u) * k_w + v
        rows, columns = o * k_h + n // (c_in * k_w), n % (c_in * k_w)
    pair = torch.from_numpy(o // (c_out // layer.adapter.pairs))  # whose rows of A belong to the channel
    own = layer.lora_a.reshape(layer.adapter.pairs, layer.adapter.rank, -1)[pair, :, torch.from_numpy(columns)]
    products = layer.lora_b[torch.from_numpy(rows)] * own
    return (scale * products.sum(-1)).reshape(layer.weight.shape)


def explicit(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer by PyTorch's own class, with a weight given from outside."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    base = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    return base._conv_forward(layer, x, weight, layer.bias)


def touched(conv: Plain, layout: Layout = "spatial", *, r: int = 2, learnable: bool = False, pairs: int = 1) -> Any:
    """An adapter whose ``lora_b`` is no longer zero."""
    rank = adapter_rank(r, tuple(conv.weight.shape), "rk")
    settings_ = LayerAdapter(r=r, rank=rank, alpha=3.0, layout=layout, learnable_alpha=learnable, pairs=pairs)
    make: Any = {nn.Conv1d: LoraConv1d.from_conv, nn.Conv2d: LoraConv2d.from_conv, nn.Linear: LoraLinear.from_linear}
    layer = make[type(conv)](conv, settings_, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.lora_b.normal_(generator=torch.Generator().manual_seed(2))
    return layer


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv1d | nn.Conv2d, Tensor]:
    """A float64 convolution of any kind that takes an adapter, and an input for it."""
    dims = draw(st.sampled_from([1, 2]))
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=dims, max_size=dims)))
    same = draw(st.booleans())
    kind: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
    torch.manual_seed(0)
    conv = kind(
        groups * draw(small),
        groups * draw(small),
        kernel,
        stride=1 if same else draw(small),
        padding="same" if same else draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    return conv, torch.randn(2, conv.in_channels, *[11, 12][:dims], dtype=torch.float64)


@settings(max_examples=40)
@given(case=convolutions(), layout=st.sampled_from(LAYOUTS), kernel_wise=st.booleans())
def test_forward_and_the_fused_convolution_equal_the_written_out_formula(
    case: tuple[nn.Conv2d, Tensor], layout: Layout, kernel_wise: bool
) -> None:
    conv, x = case
    layer = touched(conv, layout, pairs=conv.out_channels if kernel_wise else 1)
    expected = explicit(conv, x, conv.weight + update(layer, 1.5))
    fused = layer.to_conv()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(fused(x), layer(x))
    assert type(fused) is type(conv)
    assert not torch.equal(conv(x), layer(x))


@pytest.mark.parametrize("pairs", [1, 2, 6])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_an_adapted_linear_layer_equals_the_written_out_formula(pairs: int, shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(8, 6, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    layer = touched(linear, pairs=pairs, learnable=True)
    expected = explicit(linear, x, linear.weight + update(layer, layer.lora_alpha / 2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=TOLERANCE)
    parameters = [layer.lora_a, layer.lora_b, layer.lora_alpha]
    found, wanted = (torch.autograd.grad(y.square().sum(), parameters) for y in (layer(x), expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), layer(x))
    assert sorted(layer.state_dict()) == ["bias", "lora_a", "lora_alpha", "lora_b", "weight"]
    assert "in_features=8, out_features=6, bias=True, r=2" in repr(layer)


@given(case=convolutions())
@settings(max_examples=20)
def test_a_fresh_adapter_changes_no_bit_of_the_output(case: tuple[nn.Conv2d, Tensor]) -> None:
    conv, x = case
    expected = conv(x)
    assert torch.equal(adapt(conv, LayerAdapter(2, 1, 4.0, "spatial"))(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 4, (3, 5), stride=2, groups=2, dtype=torch.float64),
        nn.Conv2d(4, 4, 3, groups=4, bias=False, dtype=torch.float64),
        nn.Conv2d(3, 5, 1, dtype=torch.float64),
        nn.Conv1d(4, 6, 3, padding=1, dtype=torch.float64),
    ],
    ids=["grouped", "depthwise", "pointwise", "1-D"],
)
def test_gradients_of_the_factors_are_autograds_of_the_written_out_formula(conv: nn.Conv2d, layout: Layout) -> None:
    layer = touched(conv, layout, learnable=True)
    x = torch.randn(2, conv.in_channels, *[9, 8][: conv.weight.ndim - 2], dtype=torch.float64)
    target = torch.randn_like(layer(x))
    parameters = [layer.lora_a, layer.lora_b, layer.lora_alpha]
    expected = torch.autograd.grad(
        (explicit(conv, x, conv.weight + update(layer, layer.lora_alpha / 2)) * target).sum(), parameters
    )
    found = torch.autograd.grad((layer(x) * target).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_a_learned_alpha_is_that_of_the_weight_times_the_delta_over_alpha() -> None:
    layer = touched(nn.Conv2d(4, 6, 3, dtype=torch.float64), learnable=True)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = (layer.weight.grad * layer.weight_delta()).sum() / layer.lora_alpha
    torch.testing.assert_close(layer.lora_alpha.grad, expected.detach())
    assert layer.lora_alpha.grad.abs().item() > 0
    assert layer.lora_alpha.shape == (1,)


def test_the_two_layouts_are_the_same_map_only_while_lora_b_is_zero() -> None:
    conv = nn.Conv2d(4, 4, 3)
    assert not torch.allclose(touched(conv, "paper").weight_delta(), touched(conv, "spatial").weight_delta())
    pointwise = nn.Conv2d(4, 4, 1)
    assert torch.equal(touched(pointwise, "paper").weight_delta(), touched(pointwise, "spatial").weight_delta())


def test_the_scale_is_alpha_over_nominal_r_also_where_the_rank_is_r_times_k() -> None:
    layer = touched(nn.Conv2d(8, 8, 3), r=2)
    assert (layer.adapter.rank, layer.scale) == (6, 1.5)


def test_train_and_eval_touch_no_tensor() -> None:
    layer = touched(nn.Conv2d(4, 4, 3), learnable=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(2):
        layer.eval().train()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_base_keys_stay_and_only_lora_keys_are_added() -> None:
    conv = nn.Conv2d(4, 4, 3)
    base = set(conv.state_dict())
    assert set(touched(conv).state_dict()) == base | {"lora_a", "lora_b"}
    assert set(touched(conv, learnable=True).state_dict()) == base | {"lora_a", "lora_b", "lora_alpha"}


def test_lora_b_starts_at_zero_and_lora_a_uniform_within_kaimings_bound() -> None:
    conv = nn.Conv2d(64, 64, (5, 3))
    layer = LoraConv2d.from_conv(conv, LayerAdapter(16, 48, 1.0, "spatial"), generator=torch.Generator())
    again = LoraConv2d.from_conv(conv, LayerAdapter(16, 48, 1.0, "spatial"), generator=torch.Generator())
    bound = 1 / math.sqrt(64 * 3)
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(layer.lora_a, again.lora_a)  # the generator decides
    assert torch.equal(layer.lora_b, torch.zeros(64 * 5, 48))


def test_from_conv_shares_the_parameters_and_leaves_the_convolution_alone() -> None:
    conv = nn.Conv2d(4, 4, 3)
    layer = touched(conv)
    assert type(conv) is nn.Conv2d
    assert layer.weight is conv.weight
    assert "lora_a" not in conv.state_dict()


def test_to_conv_leaves_the_layer_alone() -> None:
    layer = touched(nn.Conv2d(4, 4, 3))
    weight = layer.weight.clone()
    layer.to_conv().weight.data.zero_()
    assert torch.equal(layer.weight, weight)
    assert isinstance(layer, LoraConv2d)


def test_adapting_in_place_keeps_the_object_its_hooks_and_their_handles() -> None:
    conv, calls = nn.Conv2d(4, 4, 3), []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    layer = adapt(conv, LayerAdapter(1, 3, 2.0, "spatial"))
    assert layer is conv  # type: ignore[comparison-overlap]
    layer(torch.zeros(1, 4, 3, 3))
    handle.remove()
    layer(torch.zeros(1, 4, 3, 3))
    assert calls == [1]


def test_release_gives_back_the_plain_convolution_and_merge_keeps_the_update() -> None:
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    adapted = touched(conv)(x)
    released, merged = release(touched(conv)), merge(touched(copy.deepcopy(conv)))
    assert vars(released).keys() == vars(merged).keys() == vars(nn.Conv2d(4, 4, 3)).keys()
    assert all(torch.equal(value, before[name]) for name, value in released.state_dict().items())
    assert torch.equal(merged(x), adapted)


def test_a_pickled_copied_and_converted_layer_computes_the_same() -> None:
    layer, x = touched(nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), learnable=True), torch.randn(1, 4, 6, 6)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (torch.load(stream, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()).float(), layer(x))


@pytest.mark.parametrize("learnable", [False, True])
def test_torch_export_gives_the_same_output_with_and_without_the_adapter(learnable: bool) -> None:
    layer, x = touched(nn.Conv2d(4, 4, 3, padding=1), learnable=learnable).eval(), torch.randn(2, 4, 6, 6)
    for module in (layer, layer.to_conv()):
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), layer(x))
        assert any("lora_a" in name for name in program.state_dict) == isinstance(module, LoraLayer)


class OwnConv(nn.Conv2d):
    """A subclass, whose own forward an adapter would replace."""


@pytest.mark.parametrize("conv", [OwnConv(4, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Conv3d(4, 4, 3)])
def test_other_convolutions_are_refused(conv: Any) -> None:
    with pytest.raises(TypeError, match=f"only plain nn.Conv1d, nn.Conv2d and nn.Linear.*{type(conv).__name__}"):
        adapt(conv, LayerAdapter(1, 1, 2.0, "spatial"))


def test_the_constructor_says_how_a_layer_is_made() -> None:
    with pytest.raises(TypeError, match=r"LoraConv2d\.from_conv\(conv"):
        LoraConv2d(4, 4, 3)
    with pytest.raises(TypeError, match=r"LoraLinear\.from_linear\(linear"):
        LoraLinear(4, 4)


def test_settings_and_rank_are_printed() -> None:
    assert "kernel_size=(3, 3), stride=(1, 1), r=2, rank=6, alpha=3, layout=paper" in repr(
        touched(nn.Conv2d(4, 4, 3), "paper")
    )
