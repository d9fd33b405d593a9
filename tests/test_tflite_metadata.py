"""Labels and normalisation in a .tflite file."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from tflite_runtimes import RUNTIMES, answers
from tflite_samples import network_of

from lorac_exporters.tflite.metadata import LABELS, METADATA, MIN_RUNTIME, describe, read
from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.schema import from_bytes, to_bytes
from lorac_runtime.description import InputSpec
from lorac_runtime.errors import ArtifactError, ConversionError

SPEC = InputSpec("image", (3, 6, 8), 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NAMES = ("cat", "dog", "h\u00f6rnchen", "two words")


def classifier(channels: int = 3) -> Network:
    """Global average, then scores of four classes."""
    image = Tensor("image", (1, 6, 8, channels), batch_axis=0)
    mean, scores = Tensor("mean", (1, channels), batch_axis=0), Tensor("scores", (1, 4), batch_axis=0)
    axes = Tensor("axes", (2,), "int32", data=np.array([1, 2], np.int32))
    weight = Tensor("fc.weight", (4, channels), data=np.eye(4, channels, dtype=np.float32))
    return network_of(
        Operator("MEAN", [image, axes], [mean], {"keep_dims": False}),
        Operator("FULLY_CONNECTED", [mean, weight, None], [scores]),
    )


def described(spec: InputSpec = SPEC, names: tuple[str, ...] = NAMES) -> Network:
    """A classifier with metadata, written and read back."""
    network = classifier(spec.shape[0])
    describe(network, spec, names, "pets")
    return from_bytes(to_bytes(network), "the file")


def test_an_app_finds_what_it_needs() -> None:
    found = read(described().metadata[METADATA])
    assert (found.name, found.min_parser_version) == ("pets", "1.0.0")
    assert (found.inputs, found.outputs) == (("image_key",), ("scores_key",))
    assert (found.size, found.color_space, found.labels_file) == ((6, 8), 1, LABELS)


def test_normalising_raw_pixels_as_the_file_says_gives_what_the_model_takes() -> None:
    found = read(described().metadata[METADATA])
    pixels = np.arange(256, dtype=np.float64)[:, None]
    expected = (pixels * SPEC.scale - SPEC.mean) / SPEC.std
    np.testing.assert_allclose((pixels - found.mean) / np.array(found.std), expected, atol=1e-6)


def test_a_file_that_normalises_by_itself_tells_the_app_not_to() -> None:
    raw = InputSpec(SPEC.name, SPEC.shape, SPEC.scale, SPEC.mean, SPEC.std, in_graph=True)
    found = read(described(raw).metadata[METADATA])
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(("channels", "color_space"), [(3, 1), (1, 2), (4, 0)])
def test_the_colour_space_follows_the_channels(channels: int, color_space: int) -> None:
    spec = InputSpec("image", (channels, 6, 8), 1.0, (0.0,) * channels, (1.0,) * channels)
    assert read(described(spec).metadata[METADATA]).color_space == color_space


def test_labels_lie_in_the_archive_a_line_each() -> None:
    network = classifier()
    describe(network, SPEC, NAMES, "pets")
    with zipfile.ZipFile(io.BytesIO(to_bytes(network))) as archive:
        assert archive.namelist() == [LABELS]
        assert archive.read(LABELS).decode().splitlines() == list(NAMES)


def test_without_class_names_there_are_no_labels() -> None:
    network = described(names=())
    assert network.files == {}
    assert read(network.metadata[METADATA]).labels_file == ""


def test_the_first_runtime_that_runs_the_file_is_named_in_16_bytes() -> None:
    assert described().metadata[MIN_RUNTIME] == b"1.6.0" + bytes(11)  # of MEAN


@pytest.mark.parametrize(
    "names", [("a", "b", "", "d"), ("a", "b", " ", "d"), ("a", "b", "c\nd", "e"), ("a", "b\u2028c")]
)
def test_names_that_would_shift_the_lines_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConversionError, match=r"cannot be written to labels\.txt"):
        describe(classifier(), SPEC, names, "pets")


def test_names_that_are_not_as_many_as_the_scores_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"3 class names, but output 'scores' has shape \(1, 4\)"):
        describe(classifier(), SPEC, ("a", "b", "c"), "pets")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_are_not_troubled_by_metadata(runtime: str) -> None:
    network = classifier()
    plain = to_bytes(network)
    describe(network, SPEC, NAMES, "pets")
    images = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype(np.float32)
    (expected,) = answers(runtime, plain, images)
    (found,) = answers(runtime, to_bytes(network), images)
    np.testing.assert_array_equal(found, expected)


def test_damaged_metadata_are_an_artifact_error_or_read() -> None:
    content = described().metadata[METADATA]
    refused = 0
    for place in range(len(content)):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]):
            try:
                read(damaged)
            except ArtifactError as err:
                refused += 1
                assert "the metadata are damaged" in str(err)  # noqa: PT017 - most damage is harmless
    assert refused > 100
