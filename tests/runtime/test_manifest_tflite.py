"""What manifest.json says of base.tflite, and every contradiction it can hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from fake_tflite import edited, tflite_patch, with_tflite

from lorac_runtime import manifest as mf
from lorac_runtime.errors import ArtifactError

Small = Any
Maker = Callable[..., Small]


def problems(manifest: mf.Manifest) -> list[str]:
    """What reading it complains of, a line each."""
    with pytest.raises(ArtifactError) as caught:
        mf.parse(manifest.to_json())
    return str(caught.value).split("\n  - ")[1:]


@pytest.mark.parametrize("weights", mf.TFLITE_WEIGHTS)
def test_what_is_written_is_read_back(small: Maker, weights: str) -> None:
    artifact = with_tflite(small(), weights)
    assert mf.load(artifact.folder) == artifact.manifest
    mf.verify_files(artifact.folder, artifact.manifest)


def test_a_manifest_from_before_tflite_is_read(small: Maker) -> None:
    manifest = small().manifest
    tree = json.loads(manifest.to_json())
    del tree["tflite"]
    for patch in tree["patches"]:
        del patch["view"], patch["quantization"]
    assert mf.parse(json.dumps(tree)) == manifest


# tensor, other fields of its row, what is said of it
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dtype": ("conv2.weight", {"dtype": "int4"}, "144 bytes of int4 do not hold shape"),
    "size for dtype": ("conv2.bias", {"nbytes": 6}, "6 bytes of int32 do not hold shape (6,)"),
    "shape of base.onnx": ("fc.weight", {"shape": (6, 5)}, "has the shape (5, 6) there, (6, 5) in base.tflite"),
    "view of another size": ("fc.weight", {"view": (5, 2, 2)}, "view (5, 2, 2) is not another shape for"),
    "negative view": ("fc.weight", {"view": (-5, -2, 3)}, "view (-5, -2, 3) is not another shape for"),
    "order of the view": ("fc.weight", {"permute": (0, 1)}, "permute (0, 1) is not an order of the 3 axes"),
    "outside": ("conv2.weight", {"offset": 10**6}, "bytes 1000000..1000144 lie outside base.tflite"),
    "before the file": ("conv2.weight", {"offset": -1}, "bytes -1..143 lie outside base.tflite"),
    "scales outside": ("conv2.weight", {"scales": mf.ByteRange(10**6, 24)}, "scales at bytes 1000000..1000024 lie"),
    "number of scales": ("conv2.weight", {"scales": mf.ByteRange(9, 20)}, "20 bytes of scales are neither one for"),
    "axis": ("conv2.weight", {"axis": 4}, "quantization.axis 4 is not among the 4 axes"),
    "negative axis": ("conv2.weight", {"axis": -1}, "quantization.axis -1 is not among the 4 axes"),
    "input scale": ("conv2.bias", {"input_scale": 0.0}, "input_scale must be positive and finite, got 0.0"),
    "no quantization": ("conv2.bias", {"quantization": None}, "int32 needs a quantization"),
    "quantized float": (
        "norm.bias",
        {"quantization": mf.Quantized(1, mf.ByteRange(0, 4), None, 1.0)},
        "float32 has no",
    ),
    "no partner": ("conv2.bias", {"partner": None}, "a quantized bias needs its weight"),
    "unknown partner": ("conv2.weight", {"partner": "conv9.bias"}, "its bias conv9.bias has no entry of dtype int32"),
    "partner of its own kind": ("conv2.weight", {"partner": "fc.weight"}, "fc.weight has no entry of dtype int32"),
    "float partner": ("conv2.weight", {"partner": "norm.bias"}, "norm.bias has no entry of dtype int32"),
    "other partner": ("conv3.weight", {"partner": "conv2.bias"}, "conv2.bias has another partner or input_scale"),
    "other input scale": ("fc.weight", {"input_scale": 0.5}, "fc.bias has another partner or input_scale"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_contradicts_itself_or_another_is_named(small: Maker, case: str) -> None:
    tensor, changes, message = ROWS[case]
    artifact = with_tflite(small(), "int8")
    found = problems(edited(artifact, tensor, **changes).manifest)
    assert any(line.startswith(f"patches.{tensor}: ") and message in line for line in found), found


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_an_input_scale_that_is_not_finite_is_not_a_number(small: Maker, value: str) -> None:
    artifact = edited(with_tflite(small(), "int8"), "conv2.bias", input_scale=0.123456)
    with pytest.raises(ArtifactError, match="input_scale: expected a finite number"):
        mf.parse(artifact.manifest.to_json().replace("0.123456", value))


@pytest.mark.parametrize("what", ["numbers", "scales", "scales in numbers"])
def test_ranges_that_overlap_are_named_with_both_tensors(small: Maker, what: str) -> None:
    artifact = with_tflite(small(), "int8")
    other = tflite_patch(artifact, "conv1.bias")
    assert other.quantization is not None
    scales = mf.ByteRange(other.quantization.scales.end - 1, 24)
    changes: dict[str, dict[str, Any]] = {
        "numbers": {"offset": other.content.end - 1},
        "scales": {"scales": scales},
        "scales in numbers": {"scales": mf.ByteRange(other.offset + 3, 24)},
    }
    found = problems(edited(artifact, "conv3.weight", **changes[what]).manifest)
    assert any({"patches.conv1.bias", "patches.conv3.weight"} <= set(line.replace(":", "").split()) for line in found)
    assert all("overlap" in line for line in found)


def test_a_range_within_another_and_one_after_both_are_named(small: Maker) -> None:
    manifest = small().manifest
    first = manifest.patches[0]
    moved = {"conv1.bias": first.offset + 4, "conv2.bias": first.offset + 40}
    patches = tuple(
        dataclasses.replace(p, offset=moved[p.tensor]) if p.tensor in moved else p for p in manifest.patches
    )
    found = problems(dataclasses.replace(manifest, patches=patches))
    assert [line.split(":")[0] for line in found] == ["patches.conv1.bias", "patches.conv2.bias"]
    assert all("overlap patches.conv1.weight" in line for line in found)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16", "nbytes": 48}, {"view": (4, 9, 3)}, {"quantization": True}, {"dtype": "int32"}]
)
def test_base_onnx_holds_plain_float32_only(small: Maker, changes: dict[str, Any]) -> None:
    artifact = small()
    patch = artifact.entry("conv1.weight")
    if "quantization" in changes:
        changes = {"quantization": mf.Quantized(0, mf.ByteRange(0, 4), None, 1.0)}
    if changes.get("dtype") == "float16":
        changes["nbytes"] = 2 * math.prod(patch.shape)
    patches = tuple(dataclasses.replace(p, **changes) if p is patch else p for p in artifact.manifest.patches)
    found = problems(dataclasses.replace(artifact.manifest, patches=patches))
    assert any("base.onnx holds float32 in a tensor's own shape" in line for line in found)


@pytest.mark.parametrize("lost", ["conv2.weight", "conv2.bias"])
def test_every_tensor_of_base_tflite_needs_its_numbers_in_base_onnx(small: Maker, lost: str) -> None:
    artifact = with_tflite(small(), "int8")
    patches = tuple(p for p in artifact.manifest.patches if (p.file, p.tensor) != (mf.BASE, lost))
    found = problems(dataclasses.replace(artifact.manifest, patches=patches))
    assert any(line.startswith(f"patches.{lost}: its float32 numbers are read from base.onnx") for line in found)


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights": "int4"}, "tflite.weights: 'int4' is not one of float32, fp16, int8"),
    "input dtype": ({"input_dtype": "float16"}, "tflite.input_dtype: 'float16' is not one of float32, uint8, int8"),
    "output dtype": ({"output_dtype": "int64"}, "tflite.output_dtype: 'int64' is not one of float32, uint8, int8"),
    "input shape": ({"input_shape": (1, 3, 6, 5)}, "tflite.input_shape: (1, 3, 6, 5), expected (1, 6, 5, 3)"),
    "batch": ({"output_shape": (2, 5)}, "tflite.output_shape: (2, 5), expected (1, 5)"),
    "other weights": ({"weights": "fp16"}, "patches.conv2.weight: int8, but tflite.weights is fp16"),
    "plain weights": ({"weights": "float32"}, "patches.conv2.bias: int32, but tflite.weights is float32"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_description_that_does_not_fit_is_named(small: Maker, case: str) -> None:
    changes, message = ENTRIES[case]
    manifest = with_tflite(small(), "int8").manifest
    found = problems(dataclasses.replace(manifest, tflite=dataclasses.replace(manifest.tflite, **changes)))
    assert message in found


def test_entries_without_description_and_description_without_file_are_named(small: Maker) -> None:
    manifest = with_tflite(small(), "float32").manifest
    found = problems(dataclasses.replace(manifest, tflite=None))
    assert found == ["tflite: nothing is said about base.tflite, which has patch entries"]
    files = {name: entry for name, entry in manifest.files.items() if name != mf.BASE_TFLITE}
    assert "tflite: base.tflite is not in files" in problems(dataclasses.replace(manifest, files=files))


def test_a_weight_without_bias_needs_no_partner(small: Maker) -> None:
    artifact = edited(with_tflite(small(), "int8"), "conv2.weight", partner=None)
    patches = tuple(p for p in artifact.manifest.patches if (p.file, p.tensor) != (mf.BASE_TFLITE, "conv2.bias"))
    manifest = dataclasses.replace(artifact.manifest, patches=patches)
    assert mf.parse(manifest.to_json()) == manifest
