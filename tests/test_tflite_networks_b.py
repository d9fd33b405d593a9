"""TFLite files of known networks against PyTorch on both runtimes; see `tflite_networks.check`. The other half."""

from __future__ import annotations

import pytest
from tflite_networks import cases, check


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(1))
def test_a_tflite_file_computes_what_pytorch_does_with_the_operators_expected(name: str) -> None:
    check(name)
