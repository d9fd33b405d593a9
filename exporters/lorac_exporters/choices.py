"""What a user may choose by name. Nothing heavy is imported here, so that a command's help need not wait for it."""

from __future__ import annotations

from typing import Literal

from lorac_exporters.tflite_config import WEIGHTS

Form = Literal["branch", "weight"]
FormChoice = Literal["auto", "branch", "weight"]
EngineChoice = Literal["auto", "onnxruntime", "onnxruntime-training", "both"]
TfliteChoice = Literal["auto", "float32", "fp16", "int8", "none"]

FORMS: tuple[Form, ...] = ("branch", "weight")
FORM_CHOICES: tuple[FormChoice, ...] = ("auto", *FORMS)
ENGINE_CHOICES: tuple[EngineChoice, ...] = ("auto", "onnxruntime", "onnxruntime-training", "both")
TFLITE_CHOICES: tuple[TfliteChoice, ...] = ("auto", *WEIGHTS, "none")
