"""Controls of the latency benchmark: they compute what the fused file does, and are no drop-ins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_artifacts import export
from torch.nn import functional

from lorac_deploy.bench import controls
from lorac_exporters.dropin import compare_files
from lorac_exporters.graph_tools import convolutions, save, to_bytes
from lorac_exporters.onnx_file import read_graph
from lorac_exporters.running import run
from lorac_runtime import manifest as mf
from lorac_runtime.adapter import load_adapter
from lorac_runtime.errors import ConversionError
from lorac_runtime.patch import fuse

IMAGES = np.random.default_rng(3).standard_normal((5, 3, 10, 10), dtype=np.float32)
State = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose adapters and head have moved, fused.onnx beside its base."""
    out = tmp_path_factory.mktemp("controls") / "artifact"
    export(out)
    fuse(out, out / "fused.onnx", moved(out))
    return out


def moved(folder: Path) -> State:
    rng, start = np.random.default_rng(1), load_adapter(folder / mf.ADAPTER).tensors
    return {k: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for k, v in sorted(start.items())}


@pytest.fixture
def base(folder: Path) -> ir.Model:
    return read_graph(folder / mf.BASE)


@pytest.fixture
def fused(folder: Path) -> ir.Model:
    return read_graph(folder / "fused.onnx")


@pytest.fixture
def answer(fused: ir.Model) -> np.ndarray:
    return run(fused, IMAGES)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_fusing_changed_the_answers(base: ir.Model, answer: np.ndarray) -> None:
    assert np.abs(run(base, IMAGES) - answer).max() > 0.05


def test_unmerged_adapters_answer_like_the_fused_file(folder: Path, base: ir.Model, answer: np.ndarray) -> None:
    before = to_bytes(base)
    close(run(controls.unmerged(base, mf.load(folder), moved(folder)), IMAGES), answer)
    assert to_bytes(base) == before


def test_adapters_as_inputs_are_inputs_and_answer_alike(folder: Path, base: ir.Model, answer: np.ndarray) -> None:
    import onnxruntime

    manifest = mf.load(folder)
    model = controls.unmerged(base, manifest, moved(folder))
    names = [name for a in manifest.adapters for name in (a.lora_a, a.lora_b)]
    fed = controls.with_inputs(model, names)
    assert list(fed) == names
    assert not set(names) & set(model.graph.initializers)
    session = onnxruntime.InferenceSession(to_bytes(model))
    close(session.run(None, {"input": IMAGES, **fed})[0], answer)
    without = {name: np.zeros_like(value) for name, value in fed.items()}
    assert np.abs(session.run(None, {"input": IMAGES, **without})[0] - answer).max() > 0.05


def test_a_branch_as_wide_as_the_change_answers_like_the_fused_file(
    base: ir.Model, fused: ir.Model, folder: Path, answer: np.ndarray
) -> None:
    ranks = dict.fromkeys(controls.branch_ranks(base, mf.load(folder)), 99)
    model = controls.branches(fused, base, ranks)
    close(run(model, IMAGES), answer)
    assert len(convolutions(model.graph)) == len(convolutions(base.graph)) + 2 * len(ranks)


def test_a_branch_has_the_nominal_rank_of_the_adapter(base: ir.Model, fused: ir.Model, folder: Path) -> None:
    (adapter,) = mf.load(folder).adapters
    assert controls.branch_ranks(base, mf.load(folder)) == {adapter.weight: adapter.r}
    model = controls.branches(fused, base, controls.branch_ranks(base, mf.load(folder)))
    down = model.graph.initializers[f"{adapter.weight}.branch_down"]
    assert list(down.shape or ()) == [adapter.r, *adapter.weight_shape[1:]]


def test_without_adapters_every_convolution_but_the_first_has_a_branch(base: ir.Model) -> None:
    names = [str(n.inputs[1].name) for n in convolutions(base.graph)]
    assert controls.branch_ranks(base, None) == dict.fromkeys(names[1:], controls.ADAPTER_RANK)


def test_a_network_without_such_convolutions_takes_no_branch(base: ir.Model, fused: ir.Model) -> None:
    with pytest.raises(ConversionError, match="no convolution takes a branch"):
        controls.branches(fused, base, {"nowhere.weight": 4})


@pytest.mark.parametrize("fault", ["extra node", "unfolded branch"])
def test_a_planted_fault_answers_alike_and_fails_the_structural_check(
    fault: str, folder: Path, base: ir.Model, fused: ir.Model, answer: np.ndarray, tmp_path: Path
) -> None:
    if fault == "extra node":
        planted, more = controls.extra_node(fused), 1
    else:
        (name,) = controls.branch_ranks(base, mf.load(folder))
        planted, more = controls.unfolded_branch(fused, base, {name: 1}), 3
    close(run(planted, IMAGES), answer)
    save(planted, tmp_path / "planted.onnx")
    report = compare_files(folder / mf.BASE, tmp_path / "planted.onnx")
    assert not report.ok
    nodes = len(list(base.graph))
    detail = next(check.detail for check in report.checks if check.name == "operators")
    assert detail == f"base has {nodes} nodes, fused has {nodes + more}"


def test_an_extra_node_is_one_that_onnxruntime_keeps(fused: ir.Model, tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(to_bytes(controls.extra_node(fused)), options)
    assert "Pow" in {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}


def test_an_artifact_without_adapters_has_nothing_unmerged(folder: Path, base: ir.Model, tmp_path: Path) -> None:
    export(tmp_path / "full", method="full")
    with pytest.raises(ConversionError, match=r"net \(full\) has no adapters"):
        controls.unmerged(base, mf.load(tmp_path / "full"), {})


@pytest.mark.parametrize(("groups", "rank"), [(1, 3), (2, 2), (4, 1)])
def test_the_channels_that_a_change_needs_are_its_rank_though_it_was_rounded(groups: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((groups, rank, 18)), rng.standard_normal((groups, 8 // groups, rank))
    change = (0.01 * up @ down).reshape(8, 2, 3, 3)
    weight = rng.standard_normal(change.shape).astype(np.float32)
    rounded = (weight + change).astype(np.float32) - weight
    assert np.linalg.matrix_rank((rounded - change).reshape(8, -1)) == 8, "rounding has full rank"
    assert controls.exact_rank(rounded, groups) == rank


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_two_thin_convolutions_of_full_rank_are_the_whole_one(
    groups: int, shape: tuple[int, int, int, int], stride: int, seed: int
) -> None:
    torch.manual_seed(seed)
    c_out, c_in, *kernel = shape
    weight, x = torch.randn(groups * c_out, c_in, *kernel), torch.randn(2, groups * c_in, 6, 5)
    down, up = controls.factors(weight.numpy(), groups, 99)
    hidden = functional.conv2d(x, torch.from_numpy(down), stride=stride, padding=1, groups=groups)
    found = functional.conv2d(hidden, torch.from_numpy(up), groups=groups)
    expected = functional.conv2d(x, weight, stride=stride, padding=1, groups=groups)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_low_rank_holds_the_most_of_a_change() -> None:
    change = np.random.default_rng(0).standard_normal((8, 5, 3, 3)).astype(np.float32)
    down, up = controls.factors(change, 1, 3)
    left = change.reshape(8, -1) - up.reshape(8, -1) @ down.reshape(3, -1)
    singular = np.linalg.svd(change.reshape(8, -1), compute_uv=False)
    assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-5)
