"""Gradients of Gemm and MatMul against PyTorch's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradient_cases import check, gradients, graph_of, normal
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorac_exporters.graph_tools import nodes_of
from lorac_runtime.errors import ConversionError


def affine(alpha: float, beta: float, turn_a: int, turn_b: int) -> Callable[..., torch.Tensor]:
    def reference(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        product = alpha * ((x.T if turn_a else x) @ (w.T if turn_b else w))
        return product if c is None else product + beta * c

    return reference


@pytest.mark.parametrize("turn_a", [0, 1])
@pytest.mark.parametrize("turn_b", [0, 1])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, -2.0)], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("c", [(4,), (1, 4), (3, 1), (3, 4), (1,), (1, 1), (), None], ids=str)
def test_the_gradients_of_gemm_are_pytorchs(
    turn_a: int, turn_b: int, scales: tuple[float, float], c: tuple[int, ...] | None
) -> None:
    alpha, beta = scales
    inputs = {"x": normal(*((5, 3) if turn_a else (3, 5))), "w": normal(*((4, 5) if turn_b else (5, 4)), seed=1)}
    if c is not None:
        inputs["c"] = normal(*c, seed=2)
    attributes = f"alpha = {alpha}, beta = {beta}, transA = {turn_a}, transB = {turn_b}"
    body = f"y = Gemm <{attributes}> ({', '.join(inputs)})"
    # a transposed x, and a c with a row for each sample, have no free batch
    batch = not turn_a and c not in ((3, 1), (3, 4))
    check(body, inputs, affine(alpha, beta, turn_a, turn_b), batch=batch)


@pytest.mark.parametrize("wrt", [["x"], ["w"], ["c"], ["x", "c"]], ids=str)
def test_a_part_of_the_gradients_of_a_classifier_is_what_it_is_among_all(wrt: list[str]) -> None:
    inputs = {"x": normal(3, 5), "w": normal(4, 5, seed=1), "c": normal(4, seed=2)}
    fixed = [name for name in ("w", "c") if name not in wrt]
    check("y = Gemm <transB = 1> (x, w, c)", inputs, affine(1.0, 1.0, 0, 1), wrt=wrt, fixed=fixed)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((3, 5), (5, 4)),
        ((1, 5), (5, 1)),
        ((2, 3, 5), (5, 4)),
        ((2, 3, 2, 5), (5, 4)),
        ((2, 3, 5), (2, 5, 4)),
        ((2, 3, 5), (1, 5, 4)),
        ((1, 3, 5), (2, 5, 4)),
        ((3, 5), (2, 5, 4)),
        ((2, 1, 3, 5), (4, 5, 2)),
        ((2, 4, 3, 5), (4, 5, 2)),
        ((4, 3, 5), (2, 1, 5, 2)),
        ((4, 3, 5), (2, 4, 5, 2)),
        ((1, 1, 3, 5), (5, 2)),
        ((1, 3, 5), (1, 1, 5, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fixed", [True, False], ids=["frozen", "trained"])
def test_the_gradients_of_matmul_are_pytorchs(x: tuple[int, ...], w: tuple[int, ...], fixed: bool) -> None:
    inputs = {"x": normal(*x), "w": normal(*w, seed=1)}
    reference: Callable[..., torch.Tensor] = lambda x, w: x @ w  # noqa: E731
    wrt, constants = (["x"], ["w"]) if fixed else (["x", "w"], [])
    check("y = MatMul (x, w)", inputs, reference, wrt=wrt, fixed=constants, batch=False)


@pytest.mark.parametrize(
    ("x", "w"), [((2, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((2, 6, 3, 5), (6, 5, 4)), ((2, 6, 3, 5), (1, 5, 4))], ids=str
)
def test_the_batch_of_a_matmul_may_be_free(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    check("y = MatMul (x, w)", {"x": normal(*x), "w": normal(*w, seed=1)}, lambda x, w: x @ w)


def test_a_matrix_that_multiplies_the_batch_from_the_left_gets_its_gradient() -> None:
    inputs = {"x": normal(4, 5), "w": normal(3, 2, 4, seed=1)}
    check("y = MatMul (w, x)", inputs, lambda x, w: w @ x, batch=False)


def test_the_product_of_a_value_with_itself_gets_both_gradients() -> None:
    check("y = MatMul (x, x)", {"x": normal(4, 4)}, lambda x: x @ x, batch=False)


def test_gradients_of_matrices_need_no_transposes() -> None:
    for body, w in (("y = Gemm <transB = 1> (x, w)", (4, 5)), ("y = MatMul (x, w)", (5, 4))):
        inputs = {"x": normal(3, 5), "w": normal(*w, seed=1)}
        model = graph_of(body, inputs)
        gradients(model, inputs, ["x", "w"], normal(3, 4))
        assert nodes_of(model.graph, "Transpose") == []


@pytest.mark.parametrize(("x", "w"), [((5,), (5, 4)), ((3, 5), (5,)), ((5,), (5,))], ids=str)
def test_a_vector_as_operand_is_refused_by_name(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    inputs = {"x": normal(*x), "w": normal(*w, seed=1)}
    shape = np.matmul(inputs["x"], inputs["w"]).shape
    with pytest.raises(ConversionError, match=r"MatMul .* multiplies a vector"):
        gradients(graph_of("y = MatMul (x, w)", inputs, batch=False), inputs, ["x"], normal(*shape))


@st.composite
def operands(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows, inner, columns = (draw(st.integers(1, 4)) for _ in range(3))
    whole = draw(st.lists(st.integers(1, 3), max_size=3))
    kept = [draw(st.integers(0, len(whole))) for _ in range(2)]
    assume(0 in kept or not whole)
    leads = [[1 if draw(st.booleans()) else d for d in whole[skip:]] for skip in kept]
    return (*leads[0], rows, inner), (*leads[1], inner, columns)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes=operands())
def test_the_gradients_of_matmul_follow_any_broadcasting(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    inputs = {"x": normal(*shapes[0]), "w": normal(*shapes[1], seed=1)}
    check("y = MatMul (x, w)", inputs, lambda x, w: x @ w, batch=False, differences=False)
