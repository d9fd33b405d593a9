"""Running .tflite files in this process, and the tests' own processes for both runtimes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tflite_runtimes import PLAIN_KERNELS, RUNTIMES, RuntimeCrashedError, RuntimeRefusedError, answers
from tflite_samples import convolution, int8_convolution, network_of

from lorac_exporters.tflite.network import Operator, Tensor
from lorac_exporters.tflite.running import Runner
from lorac_exporters.tflite.schema import to_bytes
from lorac_runtime.errors import ArtifactError, ConversionError, DataError

IMAGES = np.random.default_rng(0).normal(size=(5, 7, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one convolution."""
    target = tmp_path_factory.mktemp("models") / "a.tflite"
    target.write_bytes(to_bytes(convolution()))
    return target


@pytest.mark.parametrize("threads", [1, 2])
def test_any_batch_runs_and_the_batches_agree(path: Path, threads: int) -> None:
    runner = Runner(path, threads=threads)
    (all_at_once,) = runner.run(IMAGES)
    one_by_one = [runner.run(IMAGES[i : i + 1])[0] for i in range(5)]
    assert all_at_once.shape == (5, 7, 8, 5)
    np.testing.assert_allclose(np.concatenate(one_by_one), all_at_once, atol=1e-6)


def test_a_path_and_the_bytes_are_the_same_model(path: Path) -> None:
    np.testing.assert_array_equal(Runner(path).run(IMAGES)[0], Runner(path.read_bytes()).run(IMAGES)[0])


def test_results_outlive_the_next_run(path: Path) -> None:
    runner = Runner(path)
    (first,) = runner.run(IMAGES)
    kept = first.copy()
    runner.run(-IMAGES)
    np.testing.assert_array_equal(first, kept)


def test_every_tensor_can_be_seen() -> None:
    x, y, z = (Tensor(n, (1, 4), batch_axis=0) for n in "xyz")
    network = network_of(Operator("NEG", [x], [y]), Operator("EXP", [y], [z]))
    numbers = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    found = Runner(to_bytes(network)).tensors(numbers)
    assert set(found) == {"x", "y", "z"}
    np.testing.assert_array_equal(found["y"], -numbers)
    np.testing.assert_allclose(found["z"], np.exp(-numbers), rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (IMAGES.astype(np.float64), r"float64 \(5, 7, 8, 3\)"),
        (IMAGES[..., :2], r"float32 \(5, 7, 8, 2\)"),
        (IMAGES[0], r"float32 \(7, 8, 3\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(path: Path, images: np.ndarray, given: str) -> None:
    with pytest.raises(DataError, match=rf"is float32 \(-1, 7, 8, 3\), {given} was given"):
        Runner(path).run(images)


def test_another_number_of_inputs_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="has 1 inputs, 2 were given"):
        Runner(path).run(IMAGES, IMAGES)


def test_files_that_cannot_be_loaded_are_artifact_errors(path: Path) -> None:
    with pytest.raises(ArtifactError, match="the model cannot be read"):
        Runner(path.read_bytes()[:900])
    with pytest.raises(ArtifactError, match=r"gone\.tflite cannot be read: No such file"):
        Runner(path.with_name("gone.tflite"))
    network = convolution()
    network.operators[0].version = 99
    with pytest.raises(ArtifactError, match="ai_edge_litert cannot load the model"):
        Runner(to_bytes(network))


def test_a_missing_runtime_is_told_with_the_command_that_installs_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ai_edge_litert", "tflite_runtime"):
        monkeypatch.setitem(sys.modules, f"{name}.interpreter", None)
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConversionError, match=r"pip install 'lorac-deploy\[tflite\]'"):
        Runner(path)


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
def test_both_runtimes_answer_like_the_one_in_this_process(path: Path, runtime: str) -> None:
    (expected,) = Runner(path).run(IMAGES)
    for file in (path, path.read_bytes()):
        (found,) = answers(runtime, file, IMAGES)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("runtime", [*RUNTIMES, *PLAIN_KERNELS])
def test_a_refusal_is_no_crash_and_the_next_file_runs(path: Path, runtime: str) -> None:
    with pytest.raises(RuntimeRefusedError, match=runtime):
        answers(runtime, path, IMAGES[..., :2])
    assert answers(runtime, path, IMAGES)[0].shape == (5, 7, 8, 5)


def test_a_crash_is_told_and_the_next_file_runs(path: Path) -> None:
    """tflite-runtime 2.14.0 does not verify a model that is given as bytes: here its root table lies 2 GiB away."""
    damaged = (2**31 - 16).to_bytes(4, "little") + path.read_bytes()[4:]
    with pytest.raises(RuntimeCrashedError, match="tflite-runtime died with status -"):
        answers("tflite-runtime", damaged, IMAGES)
    assert answers("tflite-runtime", path, IMAGES)[0].shape == (5, 7, 8, 5)


def test_int8_runs_on_integers() -> None:
    images = np.random.default_rng(0).integers(-128, 128, (2, 6, 6, 2)).astype(np.int8)
    (found,) = Runner(to_bytes(int8_convolution())).run(images)
    assert found.dtype == np.int8
    assert found.shape == (2, 6, 6, 4)
