"""The cross-format certificate of an artifact: PyTorch, ONNX and TFLite, base and fused, on the same real images."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from lorac_deploy.adapter_files import attach_adapter
from lorac_deploy.batches import batch_count
from lorac_deploy.checkpoint import WEIGHTS, Checkpoint, load_checkpoint
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import fuse
from lorac_deploy.structure import tensor_name
from lorac_exporters import dropin
from lorac_exporters.certificate import Answers, Array, Certificate, Images, Pair, Tolerance, compare
from lorac_exporters.running import REFUSALS
from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.reading import read_network, weights_of
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import check_adapter, load_adapter
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ArtifactError, CheckpointError, listed
from lorac_runtime.manifest import InputSpec, Manifest
from lorac_runtime.tasks import require_classifier

FUSED, FUSED_TFLITE = "fused.onnx", "fused.tflite"
BATCH = 64
PACKAGES = ("lorac-deploy", "torch", "onnxruntime-training-cpu", "onnxruntime", "ai-edge-litert", "tflite-runtime")


@dataclasses.dataclass(frozen=True)
class Model:
    """One file or network: what it answers, how it stores weights, and the sha256 of its file."""

    answers: Answers
    weights: str
    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Certified:
    """The certificate, and what it is about."""

    certificate: Certificate
    models: dict[str, dict[str, str]]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.certificate.to_dict(), "models": self.models, "versions": self.versions}


def certify(
    artifact: Path,
    images: Images,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    fused: Path | None = None,
    checkpoint: Path | None = None,
    tolerance: float | None = None,
    agreement: float | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Certified:
    """Compare all that there is of a network on raw ``images`` uint8 (n, height, width, channels), or signals (n, ...).

    ``artifact`` holds base.onnx and base.tflite, ``fused`` what the device made of them: fused.onnx, fused.tflite and
    adapter.safetensors. ``checkpoint`` is the PyTorch network that the artifact was made from; the adapter is merged
    into it for the fused row. ``tolerance`` and ``agreement`` replace those of every pair (`Tolerance`). With
    ``labels`` there are accuracies too.

    Raises ArtifactError, AdapterError, CheckpointError or ConversionError for files that cannot be used or do not
    belong together, and where there is nothing to compare.
    """
    manifest = mf.load(artifact)
    require_classifier(artifact, manifest.task, "a certificate compares classes", "use `lorac-deploy verify`")
    groups = {"base": _base_models(artifact, manifest)}
    if fused is not None:
        groups["fused"] = _fused_models(fused, manifest)
    if checkpoint is not None:
        for group, found in groups.items():
            adapter = None if group == "base" or fused is None else fused / mf.ADAPTER
            groups[group] = {"PyTorch": _torch_model(checkpoint, manifest, adapter), **found}
    models = {f"{kind} {group}": model for group, found in groups.items() for kind, model in found.items()}
    pairs = [pair for group, found in groups.items() for pair in _pairs(group, found, manifest, tolerance, agreement)]
    certificate = compare(
        {name: model.answers for name, model in models.items()}, pairs, batches(images, labels), on_batch=on_images
    )
    facts = {name: {"file": m.file, "sha256": m.sha256, "weights": m.weights} for name, m in models.items()}
    return Certified(certificate, facts, _versions())


def batches(
    images: Images, labels: npt.NDArray[np.int64] | None
) -> Iterator[tuple[Images, npt.NDArray[np.int64] | None]]:
    """All images in order, at most `BATCH` at once, with their labels."""
    for indices in np.array_split(np.arange(len(images)), batch_count(len(images), BATCH) or 1):
        yield images[indices], None if labels is None else labels[indices]


def _pairs(
    group: str, found: Mapping[str, Model], manifest: Manifest, tolerance: float | None, agreement: float | None
) -> list[Pair]:
    """Every two models of a group. Raises ArtifactError if there is only one."""
    if len(found) < 2:
        raise ArtifactError(
            f"of the {group} network there is only {', '.join(found) or 'nothing'}, so nothing can be compared: name "
            "the PyTorch network with --checkpoint, or export the artifact again so that it holds base.tflite"
        )
    pairs = []
    for one, other in itertools.combinations(found, 2):
        wanted = Tolerance.of((found[one].weights, found[other].weights), manifest.tolerances["logits"])
        given = {n: v for n, v in (("relative", tolerance), ("agreement", agreement)) if v is not None}
        pairs.append(Pair(f"{one} {group}", f"{other} {group}", dataclasses.replace(wanted, **given)))
    return pairs


def _base_models(artifact: Path, manifest: Manifest) -> dict[str, Model]:
    names = [name for name in (mf.BASE, mf.BASE_TFLITE) if name in manifest.files]
    mf.verify_files(artifact, manifest, tuple(names))
    return _file_models([artifact / name for name in names], manifest)


def _fused_models(folder: Path, manifest: Manifest) -> dict[str, Model]:
    paths = [folder / name for name in (FUSED, FUSED_TFLITE) if (folder / name).is_file()]
    if not paths:
        raise ArtifactError(f"{folder} holds neither {FUSED} nor {FUSED_TFLITE}; name the folder that a device wrote")
    return _file_models(paths, manifest)


def _file_models(paths: Sequence[Path], manifest: Manifest) -> dict[str, Model]:
    kinds = {"onnx": ("ONNX", _onnx_model), "tflite": ("TFLite", _tflite_model)}
    found = {}
    for path in paths:
        kind, make = kinds[dropin.file_format(path)]
        found[kind] = make(path, manifest.input)
    return found


def _onnx_model(path: Path, spec: InputSpec) -> Model:
    dropin.read_model(path)  # tells in plain words what is wrong with a file that is not ONNX
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except REFUSALS as err:
        raise ArtifactError(f"{path} is refused by onnxruntime: {err}") from err
    (image,) = (value.name for value in session.get_inputs())
    names = [value.name for value in session.get_outputs()]

    def answers(images: Images) -> dict[str, Array]:
        return dict(zip(names, session.run(names, {image: preprocess(images, spec)}), strict=True))

    return Model(answers, "float32", str(path), mf.sha256(path))


def _tflite_model(path: Path, spec: InputSpec) -> Model:
    network = read_network(path)
    return Model(TfliteAnswers(path, network, spec), weights_of(network), str(path), mf.sha256(path))


def _matching(folder: Path, manifest: Manifest) -> Checkpoint:
    """The checkpoint. Raises CheckpointError if the artifact was made from another kind of network."""
    checkpoint = load_checkpoint(folder)
    given, wanted = checkpoint.input, manifest.input
    problems = [
        f"{name}: {getattr(given, name)}, the artifact has {getattr(wanted, name)}"
        for name in ("shape", "dtype", "scale", "mean", "std")
        if getattr(given, name) != getattr(wanted, name)
    ]
    if len(checkpoint.class_names) != manifest.output.classes:
        problems.append(f"{len(checkpoint.class_names)} classes, the artifact has {manifest.output.classes}")
    if problems:
        raise CheckpointError(listed(f"{folder} is not what the artifact was made from:", problems))
    return checkpoint


def _torch_model(folder: Path, manifest: Manifest, adapter: Path | None) -> Model:
    """The PyTorch network, with the adapter merged into it if there is one."""
    checkpoint = _matching(folder, manifest)
    module: nn.Module = checkpoint.module
    if adapter is not None:
        file = load_adapter(adapter)
        check_adapter(manifest, file)
        if set(file.tensors) & _biases_of_folding(module):
            module = fold_batchnorm(module)  # only a folded network has them
        report = attach_adapter(adapter, module, input_shape=checkpoint.input.shape)
        module = module.eval() if report.modules else fuse(module)
    spec = dataclasses.replace(checkpoint.input, in_graph=False)

    def answers(images: Images) -> dict[str, Array]:
        with torch.inference_mode():
            logits = module(torch.from_numpy(preprocess(images, spec)))
        return {manifest.output.name: logits.numpy()}

    return Model(answers, "float32", str(folder), mf.sha256(folder / WEIGHTS))


def _biases_of_folding(module: nn.Module) -> set[str]:
    """Names of biases that convolutions do not have, but get where batch normalisation is folded into them."""
    layers = module.named_modules()
    return {tensor_name(name, "bias") for name, layer in layers if getattr(layer, "bias", "none here") is None}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
