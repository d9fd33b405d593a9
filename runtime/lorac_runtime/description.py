"""What a training artifact is described by: the dataclasses behind manifest.json."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal, cast

from lorac_runtime.delta import Layout

BnPolicy = Literal["frozen", "batch", "recalibrate"]
BN_POLICIES: tuple[BnPolicy, ...] = ("frozen", "batch", "recalibrate")
OPTIMIZERS = ("adamw", "sgd")
LOSSES = ("cross_entropy", "mse", "binary_cross_entropy", "entropy")
ROLES = ("lora_a", "lora_b", "alpha", "weight", "bias", "bn_weight", "bn_bias")
TFLITE_WEIGHTS = ("float32", "fp16", "int8")
BASE, BASE_TFLITE = "base.onnx", "base.tflite"
ITEM_SIZES = {"float32": 4, "float16": 2, "int8": 1, "int32": 4}  # bytes of a stored number, by dtype of a patch


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What the model takes. ``mean`` and ``std`` are per channel, in units of ``pixel * scale``.

    ``shape`` is (channels, height, width). With ``in_graph`` the file takes raw uint8 images, NHWC, and does
    ``(pixel * scale - mean) / std`` itself; otherwise it takes float32 NCHW, already normalised.
    """

    name: str
    shape: tuple[int, int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_graph: bool = False


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """The logits: (batch, classes) float32."""

    name: str
    classes: int


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of one convolution. ``r`` is the nominal rank, ``rank`` the inner dimension of B A.

    The factor is ``alpha / r``; where ``lora_alpha`` names a tensor (1,), alpha is learned and read from it.
    """

    layer: str
    weight: str
    lora_a: str
    lora_b: str
    weight_shape: tuple[int, ...]
    groups: int
    r: int
    rank: int
    alpha: float
    layout: str
    lora_alpha: str | None = None

    @property
    def arrangement(self) -> Layout:
        """The layout, typed."""
        return cast(Layout, self.layout)


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A tensor that a training step changes (float32); ``role`` is one of `ROLES`."""

    name: str
    shape: tuple[int, ...]
    role: str


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch normalisation of the original network. Its tensors lie in batchnorm.safetensors by these names.

    ``folded_into`` names the convolution weight and bias that absorbed it in base.onnx, or the two tensors
    (scale, shift), each (1, C, 1, 1), of the Mul + Add that replaced it (``affine``).
    ``positions`` is height * width of its input, for PyTorch's unbiased running variance.
    """

    name: str
    weight: str
    bias: str
    running_mean: str
    running_var: str
    eps: float
    momentum: float
    positions: int
    folded_into: tuple[str, str]
    affine: bool = False


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
    app gives and gets (float32, uint8 or int8), the shapes as stored: (1, height, width, channels), (1, classes).
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


@dataclasses.dataclass(frozen=True)
class TrainingDefaults:
    """Defaults of the device's fine-tuning, chosen so that no tuning is needed (docs/decisions).

    ``lr`` is the peak of a linear warm-up over ``warmup`` (fraction of all steps) followed by a cosine decay
    to zero; gradients are clipped to the norm ``clip_norm`` inside the optimizer graph (0: no limit).

    ``optimizer`` is one of `OPTIMIZERS`, ``loss`` one of `LOSSES`. Of the other fields, named and meant as in
    torch.optim, ``momentum``, ``dampening`` and ``nesterov`` are sgd's, ``betas``, ``eps`` and ``amsgrad`` adamw's.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_size: int = 32
    epochs: int = 10
    warmup: float = 0.3
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


@dataclasses.dataclass(frozen=True)
class EngineEntry:
    """The files that one engine reads, and the version of the producer that wrote them."""

    files: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole artifact; see docs/artifact.md. ``coordinates`` says whether adapters add to folded weights.

    ``tflite`` describes base.tflite, where the artifact has one.
    """

    schema_version: int
    model: str
    method: str
    bn_policy: str
    coordinates: str
    input: InputSpec
    output: OutputSpec
    class_names: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    trainables: tuple[Trainable, ...]
    batchnorms: tuple[BatchNorm, ...]
    training: TrainingDefaults
    files: dict[str, FileEntry]
    patches: tuple[Patch, ...]
    tolerances: dict[str, float]
    engines: dict[str, EngineEntry]
    model_parameters: int
    versions: dict[str, str]
    tflite: TfliteEntry | None = None

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)

    def to_json(self) -> str:
        """The manifest as text: sorted keys, no time stamps, so equal artifacts give equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"
