"""Proof by running that a batch fixed in a file may be any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.graph_tools import static_dims
from lorac_exporters.running import run
from lorac_runtime.errors import ConversionError

Floats = npt.NDArray[np.float32]

TOLERANCE = 1e-3  # of the largest output; folding batch normalisation costs about 1e-5


def check_free_batch(original: ir.Model, freed: ir.Model, batch: int) -> None:
    """Compare ``freed``, run on two batches at once, with ``original`` run on one after the other.

    Raises ConversionError if they disagree: then the batch size was built into the model.
    """
    dims = static_dims(freed.graph.inputs[0]) or ()
    shape = (2 * batch, *(dim or 1 for dim in dims[1:]))
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = np.concatenate([run(original, images[:batch]), run(original, images[batch:])])
    found = run(freed, images)
    if found.shape == expected.shape:
        difference = float(np.abs(found - expected).max())
        if difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            return
        verdict = f"results differ by {difference:.3g}"
    else:
        verdict = f"it gives outputs of shape {found.shape}, expected {expected.shape}"
    raise ConversionError(
        f"the model was made for batches of {batch}, and freeing the batch axis changes what it computes "
        f"({verdict}); export it with a dynamic batch axis"
    )
