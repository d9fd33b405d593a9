"""TFLite files written directly from canonical ONNX graphs, without TensorFlow: see docs/tflite.md."""

from __future__ import annotations

from lorac_exporters.tflite.export import TfliteReport, export, ranges_of
from lorac_exporters.tflite_config import TfliteConfig

__all__ = ["TfliteConfig", "TfliteReport", "export", "ranges_of"]
