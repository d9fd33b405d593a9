"""What batchnorm.safetensors keeps is enough to undo the folding, also where gamma is tiny or zero."""

import numpy as np

from lorac_exporters.bn_tensors import batchnorm_tensors
from lorac_runtime.folding import fold_conv, fold_factor, refold_weight
from lorac_runtime.manifest import BatchNorm


def test_the_unfolded_weight_comes_back_from_base_and_kept_rows() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    gamma = np.array([1.0, -0.5, 0.0, 1e-9, 2.0, 1e-3], np.float32)
    var = rng.uniform(0.5, 2.0, 6).astype(np.float32)
    beta, mean = rng.standard_normal((2, 6)).astype(np.float32)
    bn = BatchNorm(
        "bn", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", 1e-5, 0.1, 64, ("conv.weight", "conv.bias")
    )
    unfolded = {
        "conv.weight": weight,
        "bn.weight": gamma,
        "bn.bias": beta,
        "bn.running_mean": mean,
        "bn.running_var": var,
    }
    kept = batchnorm_tensors((bn,), unfolded)
    np.testing.assert_array_equal(kept["bn.conv_row_index"], [2, 3])
    np.testing.assert_array_equal(kept["bn.conv_bias"], np.zeros(6))
    folded, _ = fold_conv(weight, None, gamma, beta, mean, var, bn.eps)
    factor = fold_factor(gamma, var, bn.eps)
    back = refold_weight(folded, factor, np.ones(6), kept["bn.conv_rows"], kept["bn.conv_row_index"])
    np.testing.assert_allclose(back, weight, rtol=1e-6)


def test_nothing_extra_is_kept_for_an_affine_site_or_healthy_factors() -> None:
    values = {f"bn.{n}": np.ones(3, np.float32) for n in ("weight", "bias", "running_mean", "running_var")}
    names = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    affine = BatchNorm("bn", *names, 1e-5, 0.1, 4, ("bn.weight", "bn.bias"), affine=True)
    assert set(batchnorm_tensors((affine,), values)) == set(names)
    conv = BatchNorm("bn", *names, 1e-5, 0.1, 4, ("c.weight", "c.bias"))
    kept = batchnorm_tensors((conv,), values | {"c.weight": np.ones((3, 1, 1, 1), np.float32)})
    assert set(kept) == {*names, "bn.conv_bias"}
