"""Changes of any shape as factors: exact where the rank allows it, the best approximation where it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorac_deploy.interchange import Change, fitted
from lorac_deploy.interchange.factorise import matrix
from lorac_deploy.interchange.peft import product, scale
from lorac_deploy.lora import fuse
from lorac_runtime.delta import LAYOUTS, Layout, arrange

sizes = st.integers(1, 5)
rng = np.random.default_rng(0)


@given(st.tuples(sizes, sizes, st.integers(1, 3), st.integers(1, 4)), st.sampled_from(LAYOUTS))
def test_a_matrix_is_what_the_layout_arranges(shape: tuple[int, ...], layout: Layout) -> None:
    delta = rng.normal(size=shape)
    assert (arrange(matrix(delta, layout), shape, layout) == delta).all()


@given(sizes, sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_peft_factors_have_the_rank_that_is_promised(c_out: int, c_in: int, r: int, k_h: int, k_w: int) -> None:
    """By the definition, element for element; as a matrix, of rank r * k_h at most."""
    a, b = rng.normal(size=(r, c_in, k_h, k_w)), rng.normal(size=(c_out, r, 1, 1))
    delta = product(a, b)
    for index in np.ndindex(delta.shape):
        o, i, u, v = index
        assert delta[index] == pytest.approx(sum(b[o, n, 0, 0] * a[n, i, u, v] for n in range(r)))
    assert np.linalg.matrix_rank(matrix(delta, "spatial")) <= r * k_h


def network(groups: int) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(nn.Conv2d(3, 8, 3), body, nn.Flatten(), nn.Linear(12 * 36, 4)).eval()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from(LAYOUTS), st.integers(1, 3))
def test_the_network_computes_what_the_change_makes_of_it(groups: int, layout: Layout, r: int) -> None:
    net = network(groups)
    shape = tuple(net[1].weight.shape)
    factors = rng.normal(size=(shape[0] * 3, 2 * 3)) @ rng.normal(size=(2 * 3, shape[1] * 3))  # r = 2 in mode rk
    delta = arrange(factors, shape, layout)
    expected = net[1].weight.detach().numpy() + delta
    fits = fitted(net, Change({"1.weight": delta}, layout=layout), rank=r)
    error = float(np.linalg.norm(fuse(net)[1].weight.detach().numpy() - expected) / np.linalg.norm(delta))
    exact = r >= 2 or fits[0].rank is None or fits[0].rank >= min(matrix(delta, layout).shape)
    assert fits[0].error == pytest.approx(error, abs=1e-6)
    assert (error < 1e-6) == exact


@pytest.mark.parametrize(
    ("config", "rank", "expected"),
    [
        ({"lora_alpha": 8}, 4, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"conv2": 4}}, 4, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {"conv1": 4}}, 4, 1.0),
        ({"lora_alpha": 8, "alpha_pattern": {"onv1": 4}}, 4, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {r"layer\d\.conv1": 2}}, 4, 0.5),
        ({}, 4, 2.0),
    ],
)
def test_scales_are_peft_s(config: dict[str, object], rank: int, expected: float) -> None:
    assert scale(config, "layer1.conv1", rank) == expected
