"""What a training artifact is described by: the dataclasses behind manifest.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Container, Iterable
from typing import Literal, cast

from lorac_runtime.additions import Additions
from lorac_runtime.delta import Layout
from lorac_runtime.places import FileEntry, Patch, TfliteEntry
from lorac_runtime.tasks import CLASSIFICATION, Task
from lorac_runtime.training_defaults import LOSSES as LOSSES
from lorac_runtime.training_defaults import OPTIMIZERS as OPTIMIZERS
from lorac_runtime.training_defaults import TrainingDefaults as TrainingDefaults

BnPolicy = Literal["frozen", "batch", "recalibrate"]
BN_POLICIES: tuple[BnPolicy, ...] = ("frozen", "batch", "recalibrate")
ROLES = ("lora_a", "lora_b", "alpha", "weight", "bias", "bn_weight", "bn_bias", "partial")
INPUT_DTYPES = ("uint8", "float32")  # images, signals
BASE, BASE_TFLITE = "base.onnx", "base.tflite"


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What the model takes. ``mean`` and ``std`` are per channel, in units of ``value * scale``.

    ``dtype`` is one of `INPUT_DTYPES`: "uint8" images, ``shape`` (channels, height, width); or "float32" signals,
    ``shape`` (channels, length), or (features,), which have one mean and one std for all of them. With ``in_graph`` the
    file takes raw uint8 images, NHWC, and does ``(pixel * scale - mean) / std`` itself; otherwise it takes float32,
    channels first, already normalised.

    >>> spectra = InputSpec("input", (256,), scale=1.0, mean=(0.5,), std=(2.0,), dtype="float32")
    >>> spectra.is_image, spectra.key, spectra.channels, spectra.raw_shape
    (False, 'samples', 1, (256,))
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_graph: bool = False
    dtype: str = "uint8"

    @property
    def is_image(self) -> bool:
        """Whether it takes images; otherwise signals."""
        return self.dtype == "uint8"

    @property
    def key(self) -> str:
        """What such data are called, in an ``.npz`` file and in messages."""
        return "images" if self.is_image else "samples"

    @property
    def channels(self) -> int:
        """How many values ``mean`` and ``std`` have."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of one raw sample: (height, width, channels) of an image, ``shape`` of a signal."""
        return self.channels_last if self.is_image else self.shape

    @property
    def channels_last(self) -> tuple[int, ...]:
        """``shape`` with the channels behind the positions, as TFLite has it."""
        return (*self.shape[1:], *self.shape[:1])


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """The first output, float32: logits (batch, classes), or scores (batch, classes, height, width) of segmentation.

    ``classes`` is 0 where it is no score of classes (see `lorac_runtime.tasks`).
    """

    name: str
    classes: int


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of one layer. ``r`` is the nominal rank, ``rank`` the inner dimension of B A.

    The factor is ``alpha / r``; where ``lora_alpha`` names a tensor (1,), alpha is learned and read from it.
    ``pairs``: how many pairs of factors share the output channels; `lorac_runtime.delta` has the shapes.
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
    pairs: int = 1

    @property
    def arrangement(self) -> Layout:
        """The layout, typed."""
        return cast(Layout, self.layout)


@dataclasses.dataclass(frozen=True)
class Partial:
    """A layer of which only some input channels train: ``tensor`` takes the place of ``weight[:, channels]``.

    ``weight_shape`` is (c_out, c_in/groups, k...), the tensor's (c_out, len(channels), k...). ``channels`` are in
    ascending order; with groups they are counted within each group, and are the same for all.
    """

    layer: str
    weight: str
    tensor: str
    weight_shape: tuple[int, ...]
    groups: int
    channels: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of ``tensor``."""
        return (self.weight_shape[0], len(self.channels), *self.weight_shape[2:])


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A tensor that a training step changes (float32); ``role`` is one of `ROLES`."""

    name: str
    shape: tuple[int, ...]
    role: str


@dataclasses.dataclass(frozen=True)
class Feature:
    """A value that the frozen front of the network hands to the rest: float32 (batch, *shape)."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch normalisation of the original network. Its tensors lie in batchnorm.safetensors by these names.

    ``folded_into`` names the convolution weight and bias that absorbed it in base.onnx, or the two tensors
    (scale, shift), each (1, C, 1, 1), or (1, C) behind a fully connected layer, of the Mul + Add
    that replaced it (``affine``). ``positions`` is the number of values of a channel in one sample of its input, for
    PyTorch's unbiased running variance.
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
class EngineEntry:
    """The files that one engine reads, and the version of the producer that wrote them."""

    files: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """``nbytes`` of memory are the most that a process takes which trains with the engine onnxruntime, ``images`` at
    once.

    ``parts``: the batch is computed in pieces of so many images; else they are the batch. Local data are not counted,
    and of a frozen front only the features of these images.
    """

    images: int
    nbytes: int
    parts: bool


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole artifact; see docs/artifact.md. ``coordinates`` says whether adapters add to folded weights.

    ``memory`` is computed for some numbers of images, in ascending order; () where nothing trains, and in artifacts of
    older exports. ``tflite`` describes base.tflite, where the artifact has one. ``features`` are what prefix_step.onnx
    computes and step graphs take instead of images; () where nothing frozen lies in front of what trains. ``task`` says
    what the network does; None is classification.
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
    partials: tuple[Partial, ...] = ()
    additions: Additions | None = None
    features: tuple[Feature, ...] = ()
    memory: tuple[MemoryNeed, ...] = ()
    task: Task | None = None

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)

    @property
    def live_batchnorm(self) -> bool:
        """Whether batch normalisations are layers of the graph that trains; otherwise they are folded there too."""
        return self.coordinates == "unfolded"

    @property
    def needs_labels(self) -> bool:
        """Whether the loss compares outputs with labels; the entropy of the outputs does without."""
        return self.training.loss != "entropy"

    @property
    def kind(self) -> str:
        """The task, one of `lorac_runtime.tasks.TASKS`."""
        return CLASSIFICATION if self.task is None else self.task.kind

    @property
    def moving_statistics(self) -> bool:
        """Whether a training step uses the statistics of its batch and moves the running ones."""
        return self.bn_policy == "batch"

    @property
    def carries_statistics(self) -> bool:
        """Whether statistics may end as other ones than the base's, so that adapters carry them."""
        return self.bn_policy != "frozen"

    @property
    def refolded(self) -> tuple[BatchNorm, ...]:
        """The batch normalisations that fusing folds anew; what they are folded into is in the patch table."""
        if self.carries_statistics:
            return self.batchnorms
        changing = {t.name for t in self.trainables} | {a.weight for a in self.adapters}
        changing |= {p.weight for p in self.partials}
        return touched(self.batchnorms, changing) if self.live_batchnorm else ()

    def to_json(self) -> str:
        """The manifest as text: sorted keys, no time stamps, so equal artifacts give equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def touched(batchnorms: Iterable[BatchNorm], changing: Container[str]) -> tuple[BatchNorm, ...]:
    """Those whose scale or shift, or whose convolution's weight or bias, is among the names ``changing``.

    >>> bn = BatchNorm("bn", "bn.weight", "bn.bias", "m", "v", 1e-5, 0.1, 4, ("conv.weight", "conv.bias"))
    >>> len(touched([bn], {"bn.bias"})), len(touched([bn], {"fc.weight"}))
    (1, 0)
    """
    return tuple(bn for bn in batchnorms if any(n in changing for n in (bn.weight, bn.bias, *bn.folded_into)))
