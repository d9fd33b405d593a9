"""Step graphs of models of other kinds: names that clash, tensors without a gradient, large ones, and their sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exporter_graphs import from_text, numbers
from step_files import ADAMW, FROZEN, SGD
from step_networks import graphs_of, prepared
from step_runs import Case, first_state, run, session, starting, step_config

from lorac_exporters.artifact import ArtifactConfig, write_artifact
from lorac_exporters.branches import form_of
from lorac_exporters.gradients.tape import dims
from lorac_exporters.graphs import build_graphs
from lorac_exporters.inject import starting_values
from lorac_exporters.plan import LoraConfig
from lorac_exporters.training_step import (
    TRAIN,
    StepConfig,
    gradient_step,
    optimizer_step,
    prefix_step,
    train_step,
    write,
)
from lorac_runtime.errors import ConversionError
from lorac_runtime.manifest import BASE, InputSpec, Trainable


def test_nothing_is_computed_below_the_lowest_block_that_trains() -> None:
    case = Case(SGD, lora=LoraConfig(rank=2, blocks=("conv4",)))
    graphs = graphs_of("small", case, smooth=True)
    start = starting_values(graphs.plan, graphs.base.values, seed=0)
    found = []
    for make in (prefix_step, train_step):
        initializers = make(graphs, start, step_config(case)).graph.initializers
        weights = (f"conv{i}.weight" for i in range(1, 5))
        found.append({name: len(initializers[name].uses()) for name in weights if name in initializers})
    assert found == [{"conv1.weight": 1, "conv2.weight": 1, "conv3.weight": 1}, {"conv4.weight": 1}]


CLASHING = """
    w = Conv <pads = [1, 1, 1, 1]> (x, stem.weight)  loss = Relu (w)  gradient_norm = Neg (loss)
    g = GlobalAveragePool (gradient_norm)  step = Flatten (g)  y = Gemm <transB = 1> (step, fc.weight, fc.bias)
"""


def test_values_of_a_model_that_have_names_of_the_contract_give_way() -> None:
    model = from_text(CLASHING, weights=numbers(stem_weight=(8, 3, 3, 3), fc_weight=(5, 8), fc_bias=(5,)))
    settings = {"spec": SPEC, "classes": 5, "new_head": False, "method": "full", "lora": LoraConfig()}
    graphs = build_graphs(model, policy="frozen", **settings)
    start = starting_values(graphs.plan, graphs.base.values, seed=0)
    step = session(train_step(graphs, start, step_config(FROZEN)))
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    labels = np.arange(4)
    found = run(step, {"x": images, "labels": labels, "lr": np.float32(0), **first_state(step, start)})
    logits = run(session(graphs.base.model), {"x": images})["y"]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("taken", ["labels", "lr", "step", "weight", "momentum.0", "loss", "gradient_norm"])
def test_a_parameter_that_has_a_name_of_the_contract_is_refused(taken: str) -> None:
    body = CLASHING.replace("stem.weight", "mine").replace(f"{taken} =", "other =").replace(f"({taken}", "(other")
    model = from_text(body, weights=numbers(mine=(8, 3, 3, 3), fc_weight=(5, 8), fc_bias=(5,)))
    settings = {"spec": SPEC, "classes": 5, "new_head": False, "method": "head", "lora": LoraConfig()}
    graphs = build_graphs(model, policy="frozen", **settings)
    graphs.base.model.graph.initializers["mine"].name = taken
    start = starting_values(graphs.plan, graphs.base.values, seed=0)
    with pytest.raises(ConversionError, match=rf"names of the model .*\n  - {taken}"):
        (gradient_step if taken == "weight" else train_step)(graphs, start, step_config(FROZEN))


BODY = """
    a = Conv <pads = [1, 1, 1, 1]> (x, stem.weight)  b = Round (a)  c = Relu (b)  d = Conv (c, mid.weight)
    e = Sign (d)  g = GlobalAveragePool (e)  f = Flatten (g)  y = Gemm <transB = 1> (f, fc.weight, fc.bias)
"""
SHAPES = {"stem_weight": (8, 3, 3, 3), "mid_weight": (8, 8, 3, 3), "fc_weight": (5, 8), "fc_bias": (5,)}
SPEC = InputSpec("x", (3, 8, 8), 1 / 255, (0.5,) * 3, (0.25,) * 3)


def test_operators_without_a_rule_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = from_text(BODY, weights=numbers(**SHAPES))
    with pytest.raises(ConversionError, match=r"(?s)Round '.*Sign '"):
        write_artifact(
            model,
            tmp_path / "artifact",
            name="steps",
            spec=SPEC,
            class_names=tuple("abcde"),
            config=ArtifactConfig(lora=LoraConfig(rank=1), engine="onnxruntime"),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_writer_itself_names_them_before_it_writes(tmp_path: Path) -> None:
    settings = {"spec": SPEC, "classes": 5, "new_head": False, "method": "full", "lora": LoraConfig()}
    graphs = build_graphs(from_text(BODY, weights=numbers(**SHAPES)), policy="frozen", **settings)
    ir.save(graphs.base.model, tmp_path / BASE)
    start = starting_values(graphs.plan, graphs.base.values, seed=0)
    with pytest.raises(ConversionError, match=r"(?s)Round '.*Sign '"):
        write(graphs, tmp_path, start=start, config=StepConfig(SGD, form_of("auto")))
    assert [path.name for path in tmp_path.iterdir()] == [BASE]


@pytest.mark.parametrize("make", [train_step, gradient_step])
def test_tensors_that_no_gradient_reaches_are_named(make) -> None:  # type: ignore[no-untyped-def]
    graphs = graphs_of("small", FROZEN, smooth=True)
    apart = (Trainable("apart", (3,), "weight"), Trainable("aside", (2,), "bias"))
    plan = dataclasses.replace(graphs.plan, trainables=(*graphs.plan.trainables, *apart))
    start = starting(prepared("small", FROZEN, smooth=True), FROZEN)
    with pytest.raises(ConversionError, match=r"(?s)no gradient reaches these tensors.*apart.*aside") as caught:
        make(dataclasses.replace(graphs, plan=plan), start, step_config(FROZEN))
    assert "fc.weight" not in str(caught.value)


def test_large_tensors_have_vectors_of_their_own() -> None:
    plan = graphs_of("small", FROZEN, smooth=True).plan
    large = (Trainable("large", (512, 1024), "weight"), Trainable("larger", (1 << 20,), "weight"))
    graphs = dataclasses.replace(
        graphs_of("small", FROZEN, smooth=True), plan=dataclasses.replace(plan, trainables=(*large, *plan.trainables))
    )
    model = optimizer_step(graphs, step_config(FROZEN))
    shapes = {i.name: dims(i) for i in model.graph.inputs}
    small = sum(int(np.prod(t.shape)) for t in plan.trainables)
    for kind in ("gradient", "momentum"):
        assert [shapes[f"{kind}.{k}"] for k in range(3)] == [(small,), (1 << 19,), (1 << 20,)]
    groups = json.loads(model.metadata_props["lorac.groups"])
    assert groups == [[t.name for t in plan.trainables], ["large"], ["larger"]]


@pytest.mark.slow
def test_the_step_of_a_resnet18_adds_little_to_its_base(tmp_path: Path) -> None:
    case = Case(ADAMW, lora=LoraConfig(rank=4))
    graphs = graphs_of("resnet18", case, smooth=False)
    ir.save(graphs.base.model, tmp_path / BASE)
    start = starting_values(graphs.plan, graphs.base.values, seed=0)
    names = write(graphs, tmp_path, start=start, config=step_config(case))
    sizes = {name: (tmp_path / name).stat().st_size for name in names}
    assert sizes[TRAIN] <= 400_000
    assert sum(sizes.values()) <= 1_000_000
    assert (tmp_path / BASE).stat().st_size > 40_000_000
    onnx.checker.check_model(tmp_path / TRAIN, full_check=True)
