"""From a canonical ONNX graph to a .tflite file: lower, store the weights as asked, describe, write."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from lorac_exporters.preprocessing import add_preprocessing
from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.network import Network, Quantization
from lorac_runtime.manifest import InputSpec

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Weights = Literal["float32", "fp16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "fp16", "int8")
