"""The delta with torch: the same numbers as with numpy, its formulas, gradients, and the thin form of `spatial`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.delta import LAYOUTS, adapter_shapes, arrange, delta

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def factors(shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random lora_a and lora_b in float64."""
    generator = torch.Generator().manual_seed(rank)
    shape_a, shape_b = adapter_shapes(shape, rank)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(shape_a, **make), torch.randn(shape_b, **make)  # type: ignore[call-overload]


def paper_by_formula(a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """With n = (i * k_h + u) * k_w + v: row o * k_h + n // (c_in * k_w) of b, column n mod (c_in * k_w) of a."""
    _, c_in, k_h, k_w = shape
    result = torch.empty(shape, dtype=a.dtype)
    for o, i, u, v in np.ndindex(*shape):
        n = (i * k_h + u) * k_w + v
        result[o, i, u, v] = b[o * k_h + n // (c_in * k_w)] @ a[:, n % (c_in * k_w)]
    return result


def spatial_by_einsum(a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """einsum('oha,aiw->oihw')."""
    c_out, c_in, k_h, k_w = shape
    return torch.einsum("oha,aiw->oihw", b.reshape(c_out, k_h, -1), a.reshape(-1, c_in, k_w))


FORMULAS = {"paper": paper_by_formula, "spatial": spatial_by_einsum}


@given(shape=SHAPES, rank=st.integers(1, 4), layout=st.sampled_from(LAYOUTS))
def test_torch_numpy_and_the_formula_agree(shape: tuple[int, ...], rank: int, layout: str) -> None:
    a, b = factors(shape, rank)
    found = delta(a, b, shape, 0.5, layout)  # type: ignore[arg-type]
    torch.testing.assert_close(found, 0.5 * FORMULAS[layout](a, b, shape), rtol=1e-12, atol=1e-12)
    with_numpy = delta(a.numpy(), b.numpy(), shape, 0.5, layout)  # type: ignore[arg-type]
    np.testing.assert_allclose(with_numpy, found.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_learned_scale_and_both_factors_get_their_gradients(layout: str) -> None:
    shape = (3, 2, 2, 3)
    a, b = (x.requires_grad_() for x in factors(shape, 2))
    alpha = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: delta(*x[:2], shape, x[2] / 2, layout), (a, b, alpha))  # type: ignore[call-overload]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("padding", [0, (1, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3), (1, 4), (4, 1)])
def test_a_convolution_with_the_spatial_delta_is_two_thin_convolutions(
    kernel: tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    stride: int | tuple[int, int],
    groups: int,
) -> None:
    k_h, k_w = kernel
    c_in, rank = 3, 5  # channels per group
    shape = (4, c_in, k_h, k_w)
    a, b = factors(shape, rank)
    x = torch.randn(2, c_in * groups, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.conv2d(x, delta(a, b, shape, 1.0, "spatial"), None, stride, padding, dilation, groups)

    (s_h, s_w), (p_h, p_w), (d_h, d_w) = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    down = a.reshape(rank, c_in, 1, k_w).repeat(groups, 1, 1, 1)
    up = b.reshape(4, k_h, rank).transpose(1, 2).unsqueeze(3)  # (c_out, rank, k_h, 1)
    middle = torch.nn.functional.conv2d(x, down, None, (1, s_w), (0, p_w), (1, d_w), groups)
    assert middle.shape[1] == rank * groups
    thin = torch.nn.functional.conv2d(middle, up, None, (s_h, 1), (p_h, 0), (d_h, 1), groups)
    torch.testing.assert_close(whole, thin, rtol=1e-10, atol=1e-10)


def test_the_paper_layout_is_the_published_reshape() -> None:
    a, b = factors((4, 3, 3, 3), 2)
    assert torch.equal(arrange(b @ a, (4, 3, 3, 3), "paper"), (b @ a).view(4, 3, 3, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_dimensional_kernels_agree_with_numpy(layout: str) -> None:
    a, b = factors((4, 3, 5), 2)
    found = delta(a, b, (4, 3, 5), 2.0, layout)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.numpy(), delta(a.numpy(), b.numpy(), (4, 3, 5), 2.0, layout), rtol=1e-12)  # type: ignore[arg-type]
