"""The cut between what is frozen and what trains: both parts together are the whole network, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exporter_graphs import from_text, numbers, outputs
from random_networks import random_network
from small_artifacts import LORA, SPEC, export
from step_networks import batches, graphs_of, prepared, step_graph
from step_runs import Case, distances, in_graph, in_pytorch, starting, step_config

from lorac_exporters import training_step as steps
from lorac_exporters.canonical import canonicalize
from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import name_of, remove_unused, to_bytes
from lorac_exporters.memory import peak, saved_activations
from lorac_exporters.plan import LoraConfig
from lorac_exporters.prefix import PREFIX, find_features, keep_rest
from lorac_runtime.engines import Engine, open_engine
from lorac_runtime.errors import ArtifactError, ConversionError, EngineError
from lorac_runtime.manifest import Feature, TrainingDefaults, load, parse
from lorac_runtime.patch import fuse

SGD = TrainingDefaults(optimizer="sgd", momentum=0.9, clip_norm=0.0)
LAST = LoraConfig(rank=2, blocks=("conv4",))
CASES = {
    "head": (Case(SGD, method="head"), ["mean"]),
    "adapters of the last layer": (Case(SGD, lora=LAST), ["silu"]),
    "adapters of two layers": (Case(SGD, lora=LoraConfig(rank=2, blocks=("conv3", "conv4"))), ["tanh_2"]),
    "whole layers": (Case(TrainingDefaults(), method="full", lora=LoraConfig(blocks=("conv4", "fc"))), ["silu"]),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_that_start_from_features_are_those_of_pytorch(name: str) -> None:
    case, _ = CASES[name]
    net = prepared("small", case, smooth=True)
    start, given_ = starting(net, case), batches("small", steps=6)
    found = in_graph(step_graph("small", case, start, smooth=True), start, given_)
    expected = in_pytorch(net, case, given_, torch.float64)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert max(distances(found, expected).values()) <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_the_rest_computes_nothing_of_the_front_and_holds_none_of_its_weights(name: str) -> None:
    case, features = CASES[name]
    graphs = graphs_of("small", case, smooth=True)
    start = starting(prepared("small", case, smooth=True), case)
    front = steps.prefix_step(graphs, start, step_config(case))
    assert front is not None
    assert [v.name for v in front.graph.inputs] == ["input"]
    given_ = [name_of(v) for v in front.graph.outputs]
    assert len(given_) == len(features)
    weights = {n for n, v in front.graph.initializers.items() if n in graphs.base.values and v.shape}
    assert "conv1.weight" in weights
    for make in (steps.train_step, steps.gradient_step, steps.eval_step):
        rest = make(graphs, start, step_config(case)).graph
        assert [v.name for v in rest.inputs if str(v.name).startswith("features.")] == given_
        assert "input" not in [v.name for v in rest.inputs]
        assert not weights & rest.initializers.keys()


def test_nothing_is_cut_off_where_the_stem_trains_or_batches_are_normalised() -> None:
    for case in (Case(SGD), Case(SGD, method="full"), Case(SGD, method="head", policy="batch")):
        graphs = graphs_of("small", case, smooth=True)
        start = starting(prepared("small", case, smooth=True), case)
        assert steps.prefix_step(graphs, start, step_config(case)) is None
        names = [v.name for v in steps.eval_step(graphs, start, step_config(case)).graph.inputs]
        assert "input" in names


STEM = "a = Conv(x, stem.w) b = Relu(a) "
HAND = {
    "one value": (STEM + "c = Mul(b, t) y = Conv(c, late.w)", ["b"]),
    "a frozen convolution beside a branch": (STEM + "p = Conv(b, late.w) q = Mul(b, t) y = Add(p, q)", ["b"]),
    "two operators away is kept": (STEM + "p = Conv(b, late.w) r = Relu(p) q = Mul(b, t) y = Add(r, q)", ["b", "r"]),
    "moved about is not": (
        STEM
        + "p = Transpose<perm = [0, 1, 3, 2]>(b) r = Transpose<perm = [0, 1, 3, 2]>(p) q = Mul(b, t) y = Add(r, q)",
        ["b"],
    ),
    "no second one in a row": (
        STEM + "p = Exp(b) r = Exp(p) q = Mul(b, t) s = Mul(p, t) u = Add(r, s) y = Add(u, q)",
        ["b", "r"],
    ),
    "no convolution in front": ("b = Relu(x) c = Mul(b, t) y = Conv(c, stem.w)", []),
    "not a row for each image": (STEM + "o = Exp(b) p = ReduceSum<keepdims = 0>(o) q = Mul(b, t) y = Mul(q, p)", []),
    "the images too": (STEM + "q = Mul(b, t) s = Mul(x, t) r = ReduceMean<keepdims = 0>(s) y = Mul(q, r)", ["x", "b"]),
}


@pytest.mark.parametrize("name", HAND)
def test_what_is_handed_on_is_what_a_person_would_hand_on(name: str) -> None:
    body, expected = HAND[name]
    weights = numbers(stem_w=(4, 3, 1, 1), late_w=(4, 4, 1, 1))
    model = from_text(body, weights=weights, x="float[batch,3,6,6] x, float[1] t", y="float[batch,4,6,6] y")
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    graph = ir.from_proto(inferred).graph
    found = find_features(graph, [graph.inputs[1]])
    assert list(found) == [f"features.{value}" for value in expected]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5, 6, 7, 10])
def test_front_and_rest_of_any_network_are_the_whole_bit_for_bit(seed: int) -> None:
    network = random_network(seed)
    try:
        base = canonicalize(ir.from_proto(network.model)).model
    except ConversionError:
        base = canonicalize(ir.from_proto(random_network(seed + 100).model)).model
        network = random_network(seed + 100)
    images = np.random.default_rng(seed).standard_normal((1, *network.shape)).astype(np.float32)
    weights = {n: v for n, v in base.graph.initializers.items() if v.shape and len(v.shape) > 1}
    fronts = 0
    for name, value in weights.items():
        assert value.const_value is not None
        whole, front, rest = cut(base, name)
        feed = {"input": images, name: value.const_value.numpy()}
        if front is not None:
            fronts += 1
            features = dict(zip([name_of(v) for v in front.graph.outputs], plain(front, feed), strict=True))
            found = plain(rest, {name: feed[name], **features})
            assert all(np.array_equal(a, b) for a, b in zip(found, plain(whole, feed), strict=True))
    assert fronts or len(weights) < 3


def cut(base: ir.Model, weight: str) -> tuple[ir.Model, ir.Model | None, ir.Model]:
    """(whole, front, rest) where one weight trains."""
    made = []
    for kind in ("whole", "front", "rest"):
        model = base.clone()
        tape = Tape(model.graph)
        changing = tape.input(weight, base.graph.initializers[weight].shape)  # type: ignore[arg-type]
        features = find_features(model.graph, [changing])
        if not features:
            return model, None, model
        if kind == "whole":
            pass
        elif kind == "front":
            model.graph.outputs[:] = [tape.op("Identity", v, like=v) for v in features.values()]
            for name, value in zip(features, model.graph.outputs, strict=True):
                value.name = name
            del model.graph.inputs[1:]
        else:
            keep_rest(tape, features)
        remove_unused(model)
        made.append(model)
    return made[0], made[1], made[2]


def plain(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Node by node, as the graph says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return export(folder, tflite="none", lora=dataclasses.replace(LORA, blocks=("3",))).folder


def engine_of(folder: Path, threads: int = 1, **options: int) -> Engine:
    return open_engine(folder, load(folder), threads=threads, **options)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *SPEC.shape)).astype(np.float32)


def test_features_depend_on_neither_the_batch_nor_the_threads(artifact: Path) -> None:
    x = images(9)
    one, two = engine_of(artifact).prefix, engine_of(artifact, threads=2).prefix
    assert one is not None
    assert two is not None
    alone = [one.features(x[i : i + 1]) for i in range(len(x))]
    for prefix, part in ((one, slice(0, 9)), (two, slice(0, 9)), (one, slice(2, 7)), (two, slice(5, 6))):
        for name, value in prefix.features(x[part]).items():
            assert np.array_equal(value, np.concatenate([found[name] for found in alone[part]]))


def test_steps_on_features_are_those_on_images_also_in_micro_batches(artifact: Path) -> None:
    x, y = images(7), np.arange(7) % 4
    for options in ({}, {"micro_batch": 3}):
        first, second = engine_of(artifact, **options), engine_of(artifact, **options)
        inputs = first.inputs(x)
        assert list(inputs) == [f.name for f in load(artifact).features]
        assert np.array_equal(first.eval_step(inputs, y)[1], second.eval_step(x, y)[1])
        assert [first.train_step(inputs, y, 0.1) for _ in range(3)] == [second.train_step(x, y, 0.1) for _ in range(3)]
        state = second.state()
        assert all(np.array_equal(value, state[name]) for name, value in first.state().items())


def test_a_closed_prefix_opens_again(artifact: Path) -> None:
    prefix = engine_of(artifact).prefix
    assert prefix is not None
    before = prefix.features(images(1))
    prefix.close()
    after = prefix.features(images(1))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_replaced_weights_reach_the_front_and_change_its_key(tmp_path: Path) -> None:
    folder = export(tmp_path / "a", tflite="none", method="head", bn_policy="recalibrate").folder
    engine, x = engine_of(folder), images(6)
    assert engine.prefix is not None
    key, before = engine.prefix.key(), engine.eval_step(x, np.zeros(6, np.int64))[1]
    engine.recalibrate([x[:3], x[3:]])
    after = engine.eval_step(x, np.zeros(6, np.int64))[1]
    assert engine.prefix.key() != key
    assert np.abs(after - before).max() > 1e-3
    fuse(folder, tmp_path / "fused.onnx", engine.state())
    np.testing.assert_allclose(after, outputs(onnx.load(tmp_path / "fused.onnx"), x), atol=1e-5)
    again = engine_of(folder)
    again.load_state(engine.state())
    assert again.prefix is not None
    assert again.prefix.key() == engine.prefix.key()


def test_a_front_that_is_not_the_manifest_s_is_refused(artifact: Path) -> None:
    manifest = load(artifact)
    other = dataclasses.replace(manifest, features=(Feature(manifest.features[0].name, (1, 2, 3)),))
    with pytest.raises(EngineError, match=r"train_step.onnx does not fit its manifest:\n.*features"):
        open_engine(artifact, other, threads=1)
    engine = open_engine(artifact, manifest, threads=1)
    assert engine.prefix is not None
    with pytest.raises(EngineError, match="could not compute features"):
        engine.prefix.features(images(2)[:, :2])
    assert PREFIX in manifest.engines["onnxruntime"].files


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ((Feature("a", (4,)), Feature("a", (4,))), "features: 'a' is named twice"),
        ((Feature("a", (4, 0)),), r"features.a: shape \(4, 0\) must be positive"),
        ((Feature("input", (4,)),), "features: 'input' is the name of the images"),
    ],
)
def test_a_manifest_with_impossible_features_is_refused(
    features: tuple[Feature, ...], said: str, artifact: Path
) -> None:
    with pytest.raises(ArtifactError, match=said):
        parse(dataclasses.replace(load(artifact), features=features).to_json())


def test_features_need_the_file_that_computes_them(artifact: Path) -> None:
    manifest = load(artifact)
    entry = manifest.engines["onnxruntime"]
    without = dataclasses.replace(entry, files=tuple(f for f in entry.files if f != PREFIX))
    with pytest.raises(ArtifactError, match=f"engines.onnxruntime: features need {PREFIX}"):
        parse(dataclasses.replace(manifest, engines={"onnxruntime": without}).to_json())


def test_memory_counts_both_parts(artifact: Path) -> None:
    rest, front = (ir.load(artifact / name) for name in (steps.TRAIN, PREFIX))
    alone, both = peak(rest, 8), peak(rest, 8, front=front)
    size = 4 * int(np.prod(load(artifact).features[0].shape))
    pixels = 4 * int(np.prod(SPEC.shape))
    assert both.weights - alone.weights == sum(4 * int(np.prod(v.shape)) for v in front.graph.initializers.values())  # type: ignore[arg-type]
    assert both.state - alone.state == 8 * pixels
    assert both.session > alone.session
    pieces = peak(rest, 2, front=front, whole=8)
    assert pieces.state - peak(rest, 2).state == 8 * pixels + 6 * size
    assert saved_activations(rest, 8) >= 8 * size
