"""Reading a .tflite file that a user named."""

from __future__ import annotations

from pathlib import Path

from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.schema import from_bytes
from lorac_exporters.tflite_config import Weights
from lorac_runtime.errors import ArtifactError


def read_network(path: Path) -> Network:
    """The network of a file. Raises ArtifactError if it is missing, damaged or no TFLite."""
    return from_bytes(read_content(path), str(path))


def read_content(path: Path) -> bytes:
    """A file's bytes. Raises ArtifactError if there are none to read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} not found") from err
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read: {err.strerror or err}") from err


def weights_of(network: Network) -> Weights:
    """How a file stores its weights.

    >>> weights_of(Network([], [], [], (), ()))
    'float32'
    """
    constants = network.constants()
    if any(t.dtype == "int8" and t.quantization is not None for t in constants):
        return "int8"
    return "fp16" if any(t.dtype == "float16" for t in constants) else "float32"
