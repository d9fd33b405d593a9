"""Accuracies on corrupted real images, against figures measured elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cifar10
from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import Dataset
from lorac_deploy.models import ModelSpec, build, load_weights
from lorac_deploy.trainer import evaluate

# Accuracy (%) of the pretrained ResNet-20 on the first 1,000 official CIFAR-10 test images, severities 1 to 5,
# measured independently. JPEG and contrast have no randomness; one draw of noise moves accuracy by a point or two.
ANCHORS = {
    "gaussian_noise": ([73.5, 50.4, 34.1, 27.1, 24.3], 3.5),
    "jpeg_compression": ([82.3, 77.5, 76.0, 72.4, 69.1], 0.5),
    "contrast": ([91.7, 85.9, 79.6, 62.8, 27.0], 0.5),
}


@pytest.mark.realdata
@pytest.mark.slow
def test_a_real_network_suffers_as_measured_elsewhere(realdata: Path) -> None:
    net = build(ModelSpec("resnet20", 10))
    load_weights(net, realdata / "weights" / "resnet20_cifar10_akamaster.safetensors")
    images, labels = (part[-1000:] for part in cifar10.images(realdata))
    for name, (expected, tolerance) in ANCHORS.items():
        found = []
        for severity in range(1, 6):
            data = Dataset(corrupt(images, name, severity), labels, cifar10.NAMES)
            found.append(100 * evaluate(net, data, cifar10.INPUT)[1])
        assert found == pytest.approx(expected, abs=tolerance), name
