"""Labels and normalisation in a .tflite file, where apps and code generators look for them.

TFLite's normalisation is in units of the raw pixel, 0 to 255: ``(pixel - mean) / std``. An `InputSpec` scales first:
``(pixel * scale - mean) / std``, which is the same as ``(pixel - mean / scale) / (std / scale)``.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

from lorac_exporters.tflite import schema_metadata
from lorac_exporters.tflite.network import Network, Tensor
from lorac_exporters.tflite.versions import min_runtime_version, settle
from lorac_runtime.description import InputSpec
from lorac_runtime.errors import ArtifactError, ConversionError

METADATA = "TFLITE_METADATA"
MIN_RUNTIME = "min_runtime_version"
LABELS = "labels.txt"
_MIN_RUNTIME_BYTES = 16
_IMAGE = "image, normalised as (pixel - mean) / std; pixels are 0 to 255"
_SIGNAL = "signal, normalised as (value - mean) / std, channels last"
_DAMAGE = (struct.error, IndexError, TypeError, ValueError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Described:
    """What a file's metadata say: ``mean`` and ``std`` in units of the raw pixel, one for each channel.

    ``size`` is (height, width) of the images; ``labels_file`` is empty where no output has labels.
    """

    name: str
    min_parser_version: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    color_space: int
    labels_file: str


def describe(network: Network, spec: InputSpec, class_names: Sequence[str], name: str) -> None:
    """Give a network the metadata of an image classifier, in place; operators get their versions, too.

    With ``spec.in_graph`` the file takes raw pixels, so an app must not normalise: mean 0, std 1. An input of another
    dtype is described like the float one, as the convention has it. ``class_names`` may be empty: no labels.

    Raises ConversionError for class names that cannot stand in a file with a line for each, or that are not as many
    as the first output has classes.
    """
    settle(network)
    if class_names:
        network.files[LABELS] = _labels(network.outputs[0], class_names)
    network.metadata[MIN_RUNTIME] = min_runtime_version(network).encode().ljust(_MIN_RUNTIME_BYTES, b"\0")
    network.metadata[METADATA] = schema_metadata.encoded("ModelMetadata", _model(network, spec, name))


def read(content: bytes) -> Described:
    """What the buffer `METADATA` of a file of this project says. Raises ArtifactError if it cannot be read."""
    try:
        model = schema_metadata.root(content)
        (graph,) = model.inners("SubGraphMetadata", "subgraph_metadata")
        return _described(model, graph)
    except _DAMAGE as err:
        raise ArtifactError(f"the metadata are damaged ({type(err).__name__}: {err})") from err


def _described(model: schema_metadata.Found, graph: schema_metadata.Found) -> Described:
    inputs = graph.inners("TensorMetadata", "input_tensor_metadata")
    outputs = graph.inners("TensorMetadata", "output_tensor_metadata")
    normalization = inputs[0].inners("ProcessUnit", "process_units")[0].inner("NormalizationOptions", "options")
    content = inputs[0].inner("Content", "content")
    image = content.inner("ImageProperties", "content_properties") if content else None
    size = image.inner("ImageSize", "default_size") if image else None
    files = [file for output in outputs for file in output.inners("AssociatedFile", "associated_files")]
    labels = [file.text("name") for file in files if file.byte("type") == schema_metadata.AXIS_LABELS]
    return Described(
        model.text("name"),
        model.text("min_parser_version"),
        tuple(tensor.text("name") for tensor in inputs),
        tuple(tensor.text("name") for tensor in outputs),
        normalization.floats("mean") if normalization else (),
        normalization.floats("std") if normalization else (),
        (size.number("height"), size.number("width")) if size else (0, 0),
        image.byte("color_space") if image else 0,
        labels[0] if labels else "",
    )


def _labels(output: Tensor, class_names: Sequence[str]) -> bytes:
    """One name a line. Readers skip empty lines, which would shift all later names."""
    unfit = [name for name in class_names if not name.strip() or len(name.splitlines()) != 1]
    if unfit:
        raise ConversionError(f"class names {unfit} cannot be written to {LABELS}: empty, or of several lines")
    if not output.shape or output.shape[-1] != len(class_names):
        raise ConversionError(f"{len(class_names)} class names, but output {output.name!r} has shape {output.shape}")
    return "".join(f"{name}\n" for name in class_names).encode()


def _model(network: Network, spec: InputSpec, name: str) -> dict[str, Any]:
    graph = {
        "input_tensor_metadata": [_input(network.input_keys[0], spec), *_plain(network.input_keys[1:])],
        "output_tensor_metadata": [_scores(network), *_plain(network.output_keys[1:])],
    }
    return {
        "name": name,
        "subgraph_metadata": [("SubGraphMetadata", graph)],
        "min_parser_version": schema_metadata.PARSER_VERSION,
    }


def _input(key: str, spec: InputSpec) -> tuple[str, dict[str, Any]]:
    mean, std = ((0.0,) * spec.channels, (1.0,) * spec.channels) if spec.in_graph else _raw_units(spec)
    normalization = ("NormalizationOptions", {"mean": list(mean), "std": list(std)})
    fields = {
        "name": key,
        "description": _IMAGE if spec.is_image else _SIGNAL,
        "content": ("Content", {"content_properties": _image(spec) if spec.is_image else ("FeatureProperties", {})}),
        "process_units": [("ProcessUnit", {"options": normalization})],
    }
    return "TensorMetadata", fields


def _image(spec: InputSpec) -> tuple[str, dict[str, Any]]:
    channels, height, width = spec.shape
    size = ("ImageSize", {"width": width, "height": height})
    color_space = schema_metadata.COLOR_SPACES.get(channels, 0)
    return "ImageProperties", {"color_space": color_space, "default_size": size}


def _raw_units(spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(m / spec.scale) for m in spec.mean), tuple(float(s / spec.scale) for s in spec.std)


def _scores(network: Network) -> tuple[str, dict[str, Any]]:
    fields: dict[str, Any] = {
        "name": network.output_keys[0],
        "description": "a score for each class",
        "content": ("Content", {"content_properties": ("FeatureProperties", {})}),
    }
    if LABELS in network.files:
        labels = {"name": LABELS, "description": "a class name a line", "type": schema_metadata.AXIS_LABELS}
        fields["associated_files"] = [("AssociatedFile", labels)]
    return "TensorMetadata", fields


def _plain(keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    return [("TensorMetadata", {"name": key}) for key in keys]
