"""Where tensors lie in files, and in which form: the dataclasses of the patch table and of the artifact's files."""

from __future__ import annotations

import dataclasses

TFLITE_WEIGHTS = ("float32", "fp16", "int8")
ITEM_SIZES = {"float32": 4, "float16": 2, "int8": 1, "int32": 4}  # bytes of a stored number, by dtype of a patch


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """A stretch of a file."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True)
class Quantized:
    """How an int8 weight or an int32 bias is stored; the formulas are those of `lorac_runtime.quantization`.

    ``axis`` is the axis of output channels in the tensor's own shape, ``scales`` the place of its float32 scales: one
    for each output channel, or one for the whole tensor. ``partner`` names the bias of a weight and the weight of a
    bias, because new numbers of one change the scales of both; None for a weight of a layer without bias.
    ``input_scale`` is the scale of the layer's input activation, kept from calibration. All zero points are 0.
    """

    axis: int
    scales: ByteRange
    partner: str | None
    input_scale: float


@dataclasses.dataclass(frozen=True)
class Patch:
    """Where a tensor's bytes lie in a base file, and in which form.

    The file holds ``value.reshape(view or shape).transpose(permute).astype(dtype)``, with ``quantization`` the integers
    that this stands for. ``dtype`` is one of `ITEM_SIZES`; base.onnx holds float32 only.
    """

    tensor: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    permute: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    quantization: Quantized | None = None

    @property
    def content(self) -> ByteRange:
        """Where the numbers lie, scales not among them."""
        return ByteRange(self.offset, self.nbytes)


@dataclasses.dataclass(frozen=True)
class TfliteEntry:
    """What base.tflite is. ``weights`` is one of `TFLITE_WEIGHTS`; ``input_dtype`` and ``output_dtype`` are what an
    app gives and gets (float32, uint8 or int8), the shapes as stored: (1, height, width, channels), (1, length,
    channels) or (1, features), and (1, classes).
    """

    weights: str
    input_dtype: str
    output_dtype: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its size in bytes and the sha256 of its content."""

    sha256: str
    nbytes: int
