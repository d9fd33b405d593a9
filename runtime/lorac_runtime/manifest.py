"""manifest.json: what a training artifact holds, and the check that it holds it.

An artifact is a folder. The manifest names every file with its sha256, every tensor that may change and the
byte range where it lies in the base file (the patch table), the input's preprocessing, and the defaults of
training. Reading collects every mismatch and reports them together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, cast

from lorac_runtime.delta import LAYOUTS, Layout, adapter_shapes
from lorac_runtime.errors import ArtifactError, listed
from lorac_runtime.schema import decode

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
BASE = "base.onnx"
BATCHNORM = "batchnorm.safetensors"
ADAPTER = "adapter.safetensors"
MAX_BYTES = 64 << 20  # no manifest of a CNN comes near; a larger one is not read

BnPolicy = Literal["frozen", "batch", "recalibrate"]
BN_POLICIES: tuple[BnPolicy, ...] = ("frozen", "batch", "recalibrate")
ROLES = ("lora_a", "lora_b", "alpha", "weight", "bias", "bn_weight", "bn_bias")


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
class Patch:
    """Where a tensor's bytes lie in a base file; ``permute`` gives the axes to apply before writing."""

    tensor: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    permute: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its size in bytes and the sha256 of its content."""

    sha256: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class TrainingDefaults:
    """Defaults of the device's fine-tuning, chosen so that no tuning is needed (docs/decisions).

    ``lr`` is the peak of a linear warm-up over ``warmup`` (fraction of all steps) followed by a cosine decay
    to zero; gradients are clipped to the norm ``clip_norm`` inside the optimizer graph.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_size: int = 32
    epochs: int = 10
    warmup: float = 0.3
    loss: str = "cross_entropy"


@dataclasses.dataclass(frozen=True)
class EngineEntry:
    """The files that one engine reads, and the version of the producer that wrote them."""

    files: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole artifact; see docs/artifact.md. ``coordinates`` says whether adapters add to folded weights."""

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

    @property
    def trained_parameters(self) -> int:
        """Number of trainable elements."""
        return sum(math.prod(t.shape) for t in self.trainables)

    def to_json(self) -> str:
        """The manifest as text: sorted keys, no time stamps, so equal artifacts give equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def parse(text: str, where: str = FILE_NAME) -> Manifest:
    """Read a manifest from JSON text.

    Raises ArtifactError naming every mismatch at once.
    """
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as err:  # ValueError: also an integer of thousands of digits
        raise ArtifactError(f"{where} is not valid JSON ({err}); export the artifact again.") from err
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where} has schema_version {version!r}, this runtime reads {SCHEMA_VERSION}: "
            "export the artifact again with the matching lorac-deploy."
        )
    problems: list[str] = []
    manifest = decode(Manifest, raw, "", problems)
    if not problems:
        problems = _contradictions(manifest)
    if problems:
        raise ArtifactError(listed(f"{where} does not describe a training artifact:", problems))
    return cast(Manifest, manifest)


def load(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``; the files it names are checked by `verify_files`.

    Raises ArtifactError.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a manifest")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found: {folder} is not a training artifact folder") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path} cannot be read: {err}") from err
    return parse(text, str(path))


def sha256(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest, names: tuple[str, ...] | None = None) -> None:
    """Check size and sha256 of the named files (all by default) against the manifest.

    Raises ArtifactError listing every missing or altered file.
    """
    problems = []
    for name in manifest.files if names is None else names:
        problem = _file_problem(folder / name, manifest.files[name])
        problems += [f"{name} {problem}"] if problem else []
    if problems:
        raise ArtifactError(
            listed(f"{folder} is damaged or mixed from two exports; copy or export it again:", problems)
        )


def _file_problem(path: Path, entry: FileEntry) -> str:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != entry.nbytes:
            return f"has {path.stat().st_size} bytes, expected {entry.nbytes}"
        if sha256(path) != entry.sha256:
            return "was altered: its sha256 is not the one in the manifest"
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    return ""


def _contradictions(m: Manifest) -> list[str]:
    """What a well-typed manifest can still get wrong."""
    shapes = {t.name: t.shape for t in m.trainables}
    problems = [f"files.{name}: names must stay inside the folder" for name in m.files if not _is_plain(name)]
    if BASE not in m.files:
        problems.append(f"files: {BASE} is missing")
    for engine, entry in m.engines.items():
        problems += [f"engines.{engine}: {f} is not in files" for f in entry.files if f not in m.files]
    for name, choice, allowed in _choices(m):
        if choice not in allowed:
            problems.append(f"{name}: {choice!r} is not one of {', '.join(allowed)}")
    for adapter in m.adapters:
        problems += _adapter_problems(adapter, shapes)
    for patch in m.patches:
        problems += _patch_problems(patch, m.files)
    channels = m.input.shape[0]
    if len(m.input.mean) != channels or len(m.input.std) != channels:
        problems.append(f"input: mean and std need {channels} values each (one per channel)")
    elif not all(s > 0 for s in m.input.std):
        problems.append("input.std: must be positive")
    if any(d < 1 for d in m.input.shape):
        problems.append(f"input.shape: {m.input.shape} must be positive")
    if len(m.class_names) != m.output.classes:
        problems.append(f"class_names: {len(m.class_names)} names for {m.output.classes} classes")
    return problems


def _choices(m: Manifest) -> list[tuple[str, str, tuple[str, ...]]]:
    roles = [(f"trainables.{t.name}.role", t.role, ROLES) for t in m.trainables]
    return [
        ("bn_policy", m.bn_policy, BN_POLICIES),
        ("coordinates", m.coordinates, ("folded", "unfolded")),
        *roles,
    ]


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _adapter_problems(a: Adapter, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    where = f"adapters.{a.layer}"
    if a.layout not in LAYOUTS:
        return [f"{where}.layout: {a.layout!r} is not one of {', '.join(LAYOUTS)}"]
    if len(a.weight_shape) not in (3, 4) or min(a.weight_shape) < 1 or a.r < 1 or a.rank < 1:
        return [f"{where}: weight_shape, r and rank must be positive"]
    shape_a, shape_b = adapter_shapes(a.weight_shape, a.rank)
    problems = []
    for name, shape in ((a.lora_a, shape_a), (a.lora_b, shape_b)):
        if name in shapes and shapes[name] != shape:
            problems.append(f"{where}: {name} has shape {shapes[name]}, expected {shape}")
    return problems


def _patch_problems(p: Patch, files: dict[str, FileEntry]) -> list[str]:
    where = f"patches.{p.tensor}"
    if p.file not in files:
        return [f"{where}: {p.file} is not in files"]
    if p.dtype != "float32" or any(d < 1 for d in p.shape) or p.nbytes != 4 * math.prod(p.shape):
        return [f"{where}: {p.nbytes} bytes of {p.dtype} do not hold shape {p.shape}"]
    if p.permute is not None and sorted(p.permute) != list(range(len(p.shape))):
        return [f"{where}: permute {p.permute} is not an order of the {len(p.shape)} axes"]
    if p.offset < 0 or p.offset + p.nbytes > files[p.file].nbytes:
        return [f"{where}: bytes {p.offset}..{p.offset + p.nbytes} lie outside {p.file}"]
    return []
