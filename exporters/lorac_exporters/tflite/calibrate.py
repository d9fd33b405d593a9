"""Which range each activation of a network takes on real images: what int8 needs to know, and what it cuts off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lorac_exporters.tflite.network import Array, Network, Tensor
from lorac_exporters.tflite.quantize_rules import FIXED
from lorac_exporters.tflite.running import Runner
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ConversionError

FEWEST = 10  # images; fewer say too little about what activations can be
BATCH = 16
Progress = Callable[[int, int], None]


def ranges(
    network: Network,
    images: Array,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Smallest and largest number of each activation of a float32 network, over ``images`` (N, H, W, C).

    ``images`` are as the file takes them, ``batch`` of them run at once; ``progress`` is told (done, all).

    Raises ConversionError if they are fewer than 10, or of another shape or dtype, or not finite.
    """
    check_images(network, images)
    runner = Runner(to_bytes(network))
    wanted = [t.name for t in activations(network)]
    found: dict[str, tuple[float, float]] = {}
    for done, tensors in _batches(runner, images, batch):
        for name in wanted:
            found[name] = _widened(found.get(name), tensors[name])
        if progress is not None:
            progress(done, len(images))
    return found


def saturation(network: Network, images: Array, *, batch: int = BATCH) -> dict[str, float]:
    """Share of each int8 activation's numbers that lie at the ends of its range, over ``images``; in order.

    A share above what the calibration images give says that these images, or newly fused weights, need a wider range.
    The end at the zero point does not count: activations behind a RELU lie there by right. Nor do outputs of SOFTMAX
    and the like, whose range is given by their formula.

    Raises ConversionError as `ranges` does, and for a network without int8 activations.
    """
    check_images(network, images, fewest=1)
    bounded = {out for operator in network.operators if operator.kind in FIXED for out in operator.outputs}
    wanted = [t for t in network.tensors() if t.dtype == "int8" and t.data is None and t not in bounded]
    if not wanted:
        raise ConversionError("the network has no int8 activations, so nothing in it can be cut off")
    runner = Runner(to_bytes(network))
    cut, total = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    for _, tensors in _batches(runner, images, batch):
        for tensor in wanted:
            cut[tensor] += _at_the_ends(tensors[tensor.name], tensor)
            total[tensor] += tensors[tensor.name].size
    return {tensor.name: cut[tensor] / total[tensor] for tensor in wanted}


def activations(network: Network) -> list[Tensor]:
    """The float32 tensors that are computed or given, in order."""
    return [t for t in network.tensors() if t.dtype == "float32" and t.data is None]


def check_images(network: Network, images: Array, *, fewest: int = FEWEST) -> None:
    """Raises ConversionError unless ``images`` can go into the network's one input."""
    if len(network.inputs) != 1:
        names = ", ".join(t.name for t in network.inputs)
        raise ConversionError(
            f"calibration needs a network with one input, this one has {len(network.inputs)}: {names}"
        )
    given = network.inputs[0]
    expected = f"{given.dtype} ({', '.join(['N', *map(str, given.shape[1:])])})"
    if images.dtype.name != given.dtype or images.shape[1:] != given.shape[1:] or images.ndim != len(given.shape):
        raise ConversionError(f"calibration images are {images.dtype} {images.shape}, expected {expected}")
    if len(images) < fewest:
        raise ConversionError(f"{len(images)} calibration images are too few: give at least {fewest}, better 200")
    if images.dtype.kind == "f" and not np.all(np.isfinite(images)):
        raise ConversionError("calibration images hold numbers that are not finite (NaN or infinity)")


def _batches(runner: Runner, images: Array, batch: int) -> Iterator[tuple[int, Mapping[str, Array]]]:
    """(images done so far, all tensors by name) for each batch."""
    for start in range(0, len(images), batch):
        yield min(start + batch, len(images)), runner.tensors(images[start : start + batch])


def _widened(old: tuple[float, float] | None, numbers: Array) -> tuple[float, float]:
    low, high = float(np.min(numbers)), float(np.max(numbers))
    return (low, high) if old is None else (min(low, old[0]), max(high, old[1]))


def _at_the_ends(numbers: Array, tensor: Tensor) -> int:
    zero = None if tensor.quantization is None else int(tensor.quantization.zero_point[0])
    return sum(int(np.count_nonzero(numbers == end)) for end in (-128, 127) if end != zero)
