"""Signals from training to certificate, through the commands, and the files that come of them."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporter_graphs import legacy_export
from finetune_runs import run_onnx
from signal_networks import CLASSES, SHAPES, artifact, network, signals, spec_of, write_data
from tflite_runtimes import RUNTIMES, answers

from lorac_deploy import certificate
from lorac_deploy.checkpoint import load_checkpoint
from lorac_deploy.commands import certify, export_training_artifact, train
from lorac_deploy.data import load_dataset
from lorac_deploy.export import OnnxSource
from lorac_deploy.export import export_training_artifact as export
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.tflite.answers import TfliteAnswers
from lorac_exporters.tflite.metadata import METADATA, read
from lorac_exporters.tflite.reading import read_network
from lorac_exporters.verify import verify
from lorac_runtime import manifest as mf
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.data import preprocess
from lorac_runtime.errors import ConversionError, DataError
from lorac_runtime.session import finetune

QUICK = ("--epochs", "3", "--threads", "1", "--class-names", ",".join(CLASSES))
Make = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """As where matplotlib is not installed: drawing takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("data")
    return functools.cache(lambda name: write_data(folder / f"{name}.npz", name, 72))


@pytest.fixture(scope="module")
def base(data: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A trained network; the samples' axes say which, no option does."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("base") / name
        assert train.main(["--data", str(data(name)), "--out", str(folder), *QUICK]) == 0
        return folder

    return make


@pytest.mark.parametrize("name", ["mlp", "cnn1d"])
def test_training_takes_its_statistics_from_the_signals(base: Make, data: Make, name: str) -> None:
    made, samples = load_checkpoint(base(name)), np.load(data(name))["samples"].astype(np.float64)
    axes = (0, 2) if samples.ndim == 3 else None
    assert (made.spec.name, made.input.shape, made.input.dtype, made.input.scale) == (name, SHAPES[name], "float32", 1)
    np.testing.assert_allclose(made.input.mean, np.atleast_1d(samples.mean(axes)), rtol=1e-6)
    np.testing.assert_allclose(made.input.std, np.atleast_1d(samples.std(axes)), rtol=1e-6)
    assert made.class_names == CLASSES


@pytest.mark.parametrize(
    ("name", "method"), [("mlp", "full"), ("mlp", "lora-c"), ("cnn1d", "full"), ("cnn1d", "lora-c")]
)
def test_the_whole_way_ends_in_files_that_agree(base: Make, data: Make, tmp_path: Path, name: str, method: str) -> None:
    options = ("--checkpoint", str(base(name)), "--method", method, "--out", str(tmp_path / "a"))
    assert export_training_artifact.main(options) == 0
    config = FinetuneConfig(epochs=4, threads=1, to=("onnx", "tflite"))
    report = finetune(tmp_path / "a", data(name), tmp_path / "out", config)
    assert report.epoch_losses[-1] < report.epoch_losses[0]
    for kind in ("onnx", "tflite"):
        found = verify(tmp_path / f"a/base.{kind}", tmp_path / f"out/fused.{kind}")
        assert {check.verdict for check in found.checks} == {"pass"}, found
    options = ("--fused", str(tmp_path / "out"), "--checkpoint", str(base(name)), "--data", str(data(name)))
    assert certify.main([str(tmp_path / "a"), *options]) == 0


def test_a_certificate_tells_other_signals_and_other_numbers(plain: Make, data: Make, tmp_path: Path) -> None:
    made, samples = plain("mlp"), np.load(data("mlp"))["samples"]
    assert certify.main([str(made), "--data", str(data("cnn1d"))]) == 1
    assert certify.main([str(made), "--data", str(data("mlp"))]) == 0
    manifest, content = mf.load(made), bytearray((made / mf.BASE_TFLITE).read_bytes())
    patch = next(p for p in manifest.patches if (p.file, p.tensor) == (mf.BASE_TFLITE, "fc3.bias"))
    content[patch.offset + 3] ^= 0x80  # the sign of a bias
    (tmp_path / "fused.tflite").write_bytes(content)
    shutil.copy(made / mf.BASE, tmp_path / "fused.onnx")
    assert not certificate.certify(made, samples, fused=tmp_path).certificate.ok


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts that train the head; read only."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda name: artifact(folder / name, name, method="head").folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", SHAPES)
def test_base_tflite_takes_channels_last_and_answers_as_base_onnx(plain: Make, name: str, runtime: str) -> None:
    samples = preprocess(signals(name, 7)[0], spec_of(name))
    expected = run_onnx(plain(name) / mf.BASE, samples)
    (found,) = answers(runtime, plain(name) / mf.BASE_TFLITE, np.ascontiguousarray(np.moveaxis(samples, 1, -1)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    described = mf.load(plain(name)).tflite
    assert described is not None
    assert described.input_shape == ((1, 20) if len(SHAPES[name]) == 1 else (1, 40, 2))


@pytest.mark.parametrize("weights", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["mlp", "cnn1d"])
def test_smaller_weights_answer_nearly_alike(tmp_path: Path, name: str, weights: str) -> None:
    samples = signals(name, 48)[0]
    artifact(tmp_path / "a", name, method="head", tflite=weights, calibration=samples if weights == "int8" else None)
    path = tmp_path / "a/base.tflite"
    (found,) = TfliteAnswers(path, read_network(path), spec_of(name))(samples).values()
    expected = run_onnx(tmp_path / "a/base.onnx", preprocess(samples, spec_of(name)))
    assert np.abs(found - expected).max() <= {"fp16": 5e-3, "int8": 0.1}[weights] * np.abs(expected).max()


def test_int8_ranges_come_from_signals_of_this_shape_and_type_only(tmp_path: Path) -> None:
    for wrong in (np.zeros((4, 20)), np.zeros((4, 2, 40), np.float32)):
        with pytest.raises(ConversionError, match=r"calibration samples are .* expected float32 \(N, 20\)"):
            artifact(tmp_path / "a", "mlp", method="head", tflite="int8", calibration=wrong)


@pytest.mark.parametrize("name", ["mlp", "cnn1d"])
def test_metadata_tell_an_app_how_to_normalise_a_signal(plain: Make, name: str) -> None:
    found, spec = read(read_network(plain(name) / mf.BASE_TFLITE).metadata[METADATA]), spec_of(name)
    np.testing.assert_allclose(found.mean, spec.mean, rtol=1e-6)
    np.testing.assert_allclose(found.std, spec.std, rtol=1e-6)
    assert (found.size, found.color_space) == ((0, 0), 0)  # no image


def own_file(folder: Path, name: str) -> Path:
    """As somebody else's exporter writes it, with a free batch."""
    model = legacy_export(network(name), (1, *SHAPES[name]), input_names=["x"], dynamic_axes={"x": {0: "n"}})
    onnx.save(model, folder / "own.onnx")
    return folder / "own.onnx"


@pytest.mark.parametrize("name", SHAPES)
def test_any_onnx_file_of_signals_is_adapted_and_told_by_its_axes(tmp_path: Path, data: Make, name: str) -> None:
    spec = spec_of(name)
    source = OnnxSource(own_file(tmp_path, name), spec.mean, spec.std, class_names=CLASSES)
    export(source, tmp_path / "a", config=ArtifactConfig(method="full"))
    found = mf.load(tmp_path / "a").input
    assert (found.shape, found.dtype, found.scale) == (SHAPES[name], "float32", 1.0)
    finetune(tmp_path / "a", data(name), tmp_path / "out", FinetuneConfig(epochs=1, threads=1))
    samples = preprocess(signals(name, 5)[0], spec)
    base, own = (run_onnx(tmp_path / file, samples, "x") for file in ("a/base.onnx", "own.onnx"))
    np.testing.assert_allclose(base, own, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mean", "std", "text"),
    [
        ("mlp", (0.0,) * 20, (1.0,) * 20, "takes features, but mean has 20 values"),
        ("cnn1d", (0.0,), (1.0,), "takes 2 channels, but mean has 1 values"),
        ("mlp", (0.0,), (0.0,), "scale and std positive"),
    ],
)
def test_means_and_deviations_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, mean: tuple[float, ...], std: tuple[float, ...], text: str
) -> None:
    with pytest.raises(ConversionError, match=text):
        export(OnnxSource(own_file(tmp_path, name), mean, std), tmp_path / "a")


def test_signals_are_not_normalised_inside_of_the_graph(base: Make, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="only raw uint8 images are normalised inside of the graph"):
        export(base("mlp"), tmp_path / "a", input_uint8=True)


REFUSED = {
    "augmentation": (["--augment", "crop"], "augment is 'crop', which moves images about"),
    "a size": (["--size", "32"], "holds signals"),
    "channels": (["--channels", "1"], "holds signals"),
    "a network of images": (["--model", "resnet20"], "resnet20 takes samples of shape (channels, height, width)"),
    "a network of other signals": (["--model", "cnn1d"], "for these there is mlp"),
    "statistics of images": (["--normalize", "cifar10"], "signals have their own statistics"),
    "a stem of images": (["--cifar-stem"], "mlp has no CIFAR stem to swap in (it takes no images)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_images_are_refused(
    name: str, data: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, text = REFUSED[name]
    try:
        status = train.main(["--data", str(data("mlp")), "--out", str(tmp_path / "out"), *options])
    except SystemExit as err:
        status = int(str(err.code))
    assert status in (1, 2)
    assert text in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_network_is_not_trained_on_data_of_another_kind(
    base: Make, data: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (data("cnn1d"), "digits"):
        assert train.main(
            ["--base", str(base("mlp")), "--data", str(wrong), "--out", str(tmp_path / "out"), "--new-head"]
        )
        assert "the network takes (20,)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"samples": np.ones((2, 3)), "images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds images and samples"),
        ({"samples": np.ones((2, 3), np.int64)}, "are int64, expected float16, float32 or float64"),
        ({"samples": np.array([[1.0, np.nan], [1, 2]])}, "1 are NaN"),
        ({"samples": np.ones(2)}, r"have shape \(2,\), expected \(N, features\) or \(N, channels, length\)"),
        ({"samples": np.ones((2, 0))}, r"have shape \(2, 0\), expected"),
        ({"samples": np.ones((3, 4))}, "3 samples and labels of shape"),
    ],
)
def test_files_of_signals_that_cannot_be_used_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], text: str
) -> None:
    np.savez(tmp_path / "d.npz", labels=np.array([0, 1]), **arrays)
    with pytest.raises(DataError, match=text):
        load_dataset(tmp_path / "d.npz")
