"""Freeing a fixed batch is proved by running."""

import pytest
from exporter_graphs import constants, from_text, image, numbers, outputs

from lorac_exporters.batch_check import check_free_batch
from lorac_exporters.canonical import canonicalize
from lorac_runtime.errors import ConversionError

HEAD = " g = GlobalAveragePool (last) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
WEIGHTS = numbers(c_weight=(4, 3, 3, 3), fc_weight=(5, 4), fc_bias=(5,))
FIXED = {"x": "float[2,3,8,8] x", "y": "float[2,5] y"}


def test_a_model_whose_batch_was_only_fixed_is_accepted() -> None:
    model = from_text("last = Conv (x, c.weight)" + HEAD, weights=WEIGHTS, **FIXED)
    freed = canonicalize(model).model
    assert outputs(freed, image(5, 3, 8, 8)).shape == (5, 5)


def test_a_model_that_mixes_the_samples_of_its_batch_is_refused() -> None:
    body = "m = ReduceMean (x, zero) d = Sub (x, m) last = Conv (d, c.weight)" + HEAD
    model = from_text(body, weights=WEIGHTS | constants(zero=[0]), **FIXED)
    with pytest.raises(ConversionError, match="batches of 2, and freeing the batch axis changes what it computes"):
        canonicalize(model)


def test_outputs_of_another_shape_are_refused() -> None:
    model = from_text("last = Conv (x, c.weight)" + HEAD, weights=WEIGHTS, **FIXED)
    other = from_text("y = ReduceMean <keepdims = 0> (x, axes)", weights=constants(axes=[2, 3]), y="float[batch,3] y")
    with pytest.raises(ConversionError, match=r"shape \(4, 3\), expected \(4, 5\)"):
        check_free_batch(model, other, 2)
