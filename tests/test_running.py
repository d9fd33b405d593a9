"""Running a graph or a single node with onnxruntime."""

import numpy as np
import pytest
from exporter_graphs import from_text, image, numbers, outputs

from lorac_exporters.running import run, run_node
from lorac_runtime.errors import ConversionError

HEAD = " g = GlobalAveragePool (last) f = Flatten (g) y = Gemm <transB = 1> (f, fc.weight, fc.bias)"
WEIGHTS = numbers(c_weight=(4, 3, 3, 3), fc_weight=(5, 4), fc_bias=(5,))


def test_running_gives_what_onnxruntime_gives() -> None:
    model = from_text("last = Conv (x, c.weight)" + HEAD, weights=WEIGHTS)
    np.testing.assert_array_equal(run(model, image(2, 3, 8, 8)), outputs(model, image(2, 3, 8, 8)))


def test_a_model_that_cannot_run_is_a_conversion_error_with_the_shape() -> None:
    model = from_text("last = Conv (x, c.weight)" + HEAD, weights=WEIGHTS)
    with pytest.raises(ConversionError, match=r"\(2, 4, 8, 8\)"):
        run(model, image(2, 4, 8, 8))


def test_one_node_runs_alone_with_its_attributes() -> None:
    model = from_text("last = Conv <strides = [2, 2]> (x, c.weight)" + HEAD, weights=WEIGHTS)
    found = run_node(model.graph[0], image(1, 3, 8, 8), WEIGHTS["c.weight"])
    windows = np.lib.stride_tricks.sliding_window_view(image(1, 3, 8, 8), (3, 3), (2, 3))[:, :, ::2, ::2]
    np.testing.assert_allclose(
        found, np.einsum("nchwij,ocij->nohw", windows, WEIGHTS["c.weight"]), rtol=1e-4, atol=1e-5
    )
