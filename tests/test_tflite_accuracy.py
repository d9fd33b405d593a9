"""Accuracy on real CIFAR-10 images: a pretrained ResNet-20 in float32, fp16 and int8 on both runtimes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from shared_export import export_graph
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, answers

from benchmarks import cifar10
from lorac_deploy.models import ModelSpec, build, load_weights
from lorac_exporters.canonical import canonicalize
from lorac_exporters.tflite.calibrate import ranges
from lorac_exporters.tflite.half import to_half
from lorac_exporters.tflite.lower import lower
from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.quantize import quantize
from lorac_exporters.tflite.schema import to_bytes

CALIBRATION = 200  # training images
POINT = 0.01
WEIGHTS = cifar10.DATA / "weights" / "resnet20_cifar10_akamaster.safetensors"

pytestmark = pytest.mark.realdata


def normalised(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) pixels as the network takes them."""
    spec = cifar10.INPUT
    return ((images * np.float32(spec.scale) - np.float32(spec.mean)) / np.float32(spec.std)).astype(np.float32)


@functools.cache
def resnet20() -> torch.nn.Module:
    module = build(ModelSpec(name="resnet20", classes=10))
    load_weights(module, WEIGHTS)
    return module.eval()


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibration images, test images, test labels."""
    (local, _), (test, labels) = cifar10.local_and_test(CALIBRATION, seed=0)
    return normalised(local), normalised(test), labels


@functools.cache
def files() -> dict[str, bytes]:
    """The .tflite file of each kind of weights."""
    model = canonicalize(export_graph(resnet20(), cifar10.INPUT.shape)).model
    networks: dict[str, Network] = {weights: lower(model) for weights in ("float32", "fp16", "int8")}
    to_half(networks["fp16"])
    report = quantize(networks["int8"], ranges(networks["int8"], data()[0], batch=50))
    assert report.float_operators == ()
    return {weights: to_bytes(network) for weights, network in networks.items()}


@functools.cache
def torch_logits() -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = resnet20()(torch.from_numpy(data()[1].transpose(0, 3, 1, 2).copy())).numpy()
    return logits


@functools.cache
def logits(weights: str, runtime: str) -> np.ndarray:
    return answers(runtime, files()[weights], data()[1])[0]


def accuracy(found: np.ndarray) -> float:
    """Share of test images that get their label."""
    return float(np.mean(found.argmax(1) == data()[2]))


def test_the_network_is_the_one_that_it_is_said_to_be() -> None:
    assert accuracy(torch_logits()) == pytest.approx(0.915, abs=0.002)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float32_is_pytorch(runtime: str) -> None:
    largest = np.abs(torch_logits()).max()
    assert np.abs(logits("float32", runtime) - torch_logits()).max() <= 1e-5 * max(1, largest)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_fp16_has_the_accuracy_of_float32_at_half_the_size(runtime: str) -> None:
    assert accuracy(logits("fp16", runtime)) >= accuracy(torch_logits()) - 0.1 * POINT
    assert len(files()["fp16"]) < 0.53 * len(files()["float32"])


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
def test_int8_is_within_one_point_of_float32_at_a_third_of_the_size(runtime: str) -> None:
    found = logits("int8", runtime)
    assert accuracy(found) >= accuracy(torch_logits()) - POINT
    assert np.mean(found.argmax(1) == torch_logits().argmax(1)) > 0.98
    assert len(files()["int8"]) < 0.3 * len(files()["float32"])


def test_both_runtimes_give_the_same_int8_answers_but_for_rounding() -> None:
    first, *others = (logits("int8", runtime) for runtime in [*RUNTIMES, *PLAIN_KERNELS])
    for other in others:
        assert np.mean(other.argmax(1) == first.argmax(1)) > 0.98
