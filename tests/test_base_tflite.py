"""base.tflite of an artifact: the network of base.onnx, and fusing into it gives what a fresh export gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_artifacts import SPEC, export, network
from torch import nn

from lorac_deploy.file_export import export_file
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.tflite import TfliteConfig
from lorac_exporters.tflite.running import Runner
from lorac_exporters.tflite_config import Weights as TfliteWeights
from lorac_exporters.verify import random_inputs, run_onnx
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.errors import ConversionError
from lorac_runtime.patch import fuse


class Outer(nn.Module):
    """Something that trains and that TFLite cannot do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(x)


IMAGES = np.random.default_rng(0).integers(0, 256, (16, 10, 10, 3), dtype=np.uint8)


@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_base_tflite_is_the_same_network_under_every_policy(tmp_path: Path, policy: mf.BnPolicy) -> None:
    report = export(tmp_path / "artifact", bn_policy=policy)
    manifest = mf.load(tmp_path / "artifact")
    assert manifest.tflite == mf.TfliteEntry("float32", "float32", "float32", (1, 10, 10, 3), (1, 4))
    assert report.tflite is not None
    assert report.tflite.nbytes == manifest.files[mf.BASE_TFLITE].nbytes
    images = random_inputs(SPEC, 3, seed=0)
    expected = run_onnx(tmp_path / "artifact" / mf.BASE, images)
    (found,) = Runner(tmp_path / "artifact" / mf.BASE_TFLITE).run(images.transpose(0, 2, 3, 1).copy())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    by_file = [{p.tensor: p.shape for p in manifest.patches if p.file == f} for f in (mf.BASE, mf.BASE_TFLITE)]
    assert by_file[0] == by_file[1] != {}


def test_int8_has_patches_of_every_bias_whose_weight_changes(tmp_path: Path) -> None:
    export(tmp_path / "artifact", tflite="int8", calibration=IMAGES)
    manifest = mf.load(tmp_path / "artifact")
    assert manifest.tflite is not None
    assert manifest.tflite.weights == "int8"
    for file in (mf.BASE, mf.BASE_TFLITE):
        names = [p.tensor for p in manifest.patches if p.file == file]
        assert sorted(names) == [f"{layer}.{part}" for layer in (0, 3, 7) for part in ("bias", "weight")]
    quantized = {p.tensor: p for p in manifest.patches if p.file == mf.BASE_TFLITE}
    for name, patch in quantized.items():
        assert patch.quantization is not None
        assert quantized[str(patch.quantization.partner)].quantization.partner == name
        assert patch.dtype == ("int8" if name.endswith("weight") else "int32")


def test_where_tflite_cannot_do_the_model_there_is_none_and_the_reason(tmp_path: Path) -> None:
    report = export(tmp_path / "artifact", network(activation=Outer()))
    assert report.tflite is None
    assert "Erf" in report.no_tflite
    assert mf.load(tmp_path / "artifact").tflite is None
    assert not (tmp_path / "artifact" / mf.BASE_TFLITE).exists()
    assert {p.file for p in report.manifest.patches} == {mf.BASE}
    with pytest.raises(ConversionError, match="Erf"):
        export(tmp_path / "other", network(activation=Outer()), tflite="float32")
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_base_tflite_may_be_left_out(tmp_path: Path) -> None:
    report = export(tmp_path / "artifact", tflite="none")
    assert (report.tflite, report.no_tflite) == (None, "not asked for")
    assert mf.BASE_TFLITE not in report.manifest.files


def test_a_weight_that_trains_but_cannot_be_patched_is_refused(tmp_path: Path) -> None:
    """The affine form of a batch normalisation is no layer that int8 could follow."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(8, 4)).eval()
    export(tmp_path / "fits", net, bn_policy="recalibrate", tflite="fp16")
    with pytest.raises(ConversionError) as error:
        export(tmp_path / "artifact", net, bn_policy="recalibrate", tflite="int8", calibration=IMAGES)
    assert "2.weight" in str(error.value)
    assert not (tmp_path / "artifact").exists()


def test_an_unknown_form_of_base_tflite_is_refused() -> None:
    with pytest.raises(ValueError, match="tflite 'int4' is not one of auto, float32, fp16, int8, none"):
        ArtifactConfig(tflite="int4")  # type: ignore[arg-type]


def test_int8_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="int8 weights need calibration images"):
        export(tmp_path / "artifact", tflite="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8"])
@pytest.mark.parametrize("policy", mf.BN_POLICIES)
def test_fusing_by_byte_ranges_gives_the_bytes_of_a_fresh_export(
    tmp_path: Path, policy: mf.BnPolicy, weights: TfliteWeights
) -> None:
    folder = tmp_path / "artifact"
    export(folder, bn_policy=policy, tflite=weights, calibration=IMAGES if weights == "int8" else None)
    file = load_adapter(folder / mf.ADAPTER)
    rng = np.random.default_rng(0)
    state = {k: (v + 0.1 * rng.uniform(size=v.shape)).astype(np.float32) for k, v in file.tensors.items()}
    save_adapter(tmp_path / "trained.safetensors", state, file.metadata)
    fuse(folder, tmp_path / "fused.tflite", state, base=mf.BASE_TFLITE)
    export_file(
        folder,
        tmp_path / "fresh.tflite",
        to="tflite",
        adapter=tmp_path / "trained.safetensors",
        config=TfliteConfig(weights),
    )
    fused = (tmp_path / "fused.tflite").read_bytes()
    assert fused == (tmp_path / "fresh.tflite").read_bytes()
    assert fused != (folder / mf.BASE_TFLITE).read_bytes()
