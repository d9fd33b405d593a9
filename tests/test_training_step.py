"""The files of the engine `onnxruntime`: their contract, and that several routes through them give one answer."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from step_files import BATCH, CASES, Make, Written, images_or_features, one_group, statistics, stored, write_small
from step_networks import batches, step_graph
from step_runs import (
    carried_over,
    distances,
    first_state,
    in_graph,
    in_pytorch,
    relative,
    run,
    session,
    step_config,
    whole_session,
)

from lorac_exporters.external import WEIGHTS
from lorac_exporters.gradients.optimizers import state_names
from lorac_exporters.gradients.tape import dims
from lorac_exporters.graph_tools import name_of, nodes_of, to_bytes
from lorac_exporters.prefix import PREFIX
from lorac_exporters.training_step import EVAL, GRADIENT, OPTIMIZER, TRAIN, eval_step, prefix_step, train_step
from lorac_runtime.manifest import BASE


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def make(name: str) -> Written:
        return write_small(CASES[name], tmp_path_factory.mktemp("steps"))

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_train_step_takes_and_gives_what_the_contract_says(written: Make, name: str) -> None:
    made = written(name)
    inputs, outputs = made.signature(TRAIN)
    state = {k: v for kind in state_names(made.case.training) for k, v in one_group(made, kind).items()}
    moving = {**made.trained, **statistics(made), **state, "step": ()}
    labels = {} if name == "entropy" else {"labels": ("batch",)}
    assert inputs == {**images_or_features(made), **labels, "lr": (), **moving}
    assert outputs == {"loss", "gradient_norm", *(f"{tensor}.next" for tensor in moving)}
    assert bool(statistics(made)) == (made.case.policy == "batch")


@pytest.mark.parametrize("name", ["sgd", "sgd without momentum", "amsgrad", "frozen factors"])
def test_micro_batches_have_a_graph_for_gradients_and_one_for_the_update(written: Make, name: str) -> None:
    made = written(name)
    gradient = one_group(made, "gradient")
    inputs, outputs = made.signature(GRADIENT)
    assert inputs == {"input": ("batch", 3, 12, 12), "labels": ("batch",), "weight": (), **made.trained, **gradient}
    assert outputs == {"loss", *(f"{tensor}.next" for tensor in gradient)}
    state = {k: v for kind in state_names(made.case.training) for k, v in one_group(made, kind).items()}
    inputs, outputs = made.signature(OPTIMIZER)
    moving = {**made.trained, **state, "step": ()}
    assert inputs == {**gradient, **moving, "lr": ()}
    assert outputs == {"gradient_norm", *(f"{tensor}.next" for tensor in moving)}


@pytest.mark.parametrize("name", ["sgd", "adamw, batch", "entropy"])
def test_an_eval_step_gives_loss_and_logits(written: Make, name: str) -> None:
    made = written(name)
    labels = {} if name == "entropy" else {"labels": ("batch",)}
    inputs, outputs = made.signature(EVAL)
    assert inputs == {"input": ("batch", 3, 12, 12), **labels, **made.trained, **statistics(made)}
    assert outputs == {"loss", "logits"}


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_is_named_and_nothing_else_is_there(written: Make, name: str) -> None:
    made = written(name)
    expected = {TRAIN, EVAL, OPTIMIZER, *((WEIGHTS,) if made.case.policy == "batch" else (GRADIENT,))}
    expected |= {PREFIX} if name == "head" else set()
    assert set(made.names) == expected
    assert {path.name for path in made.folder.iterdir()} == {BASE, *expected}


@pytest.mark.parametrize("name", CASES)
def test_files_are_plain_onnx_of_ir_version_9_and_opset_18(written: Make, name: str) -> None:
    made = written(name)
    for file in (n for n in made.names if n.endswith(".onnx")):
        onnx.checker.check_model(made.folder / file, full_check=True)
        model = onnx.load(made.folder / file, load_external_data=False)
        assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (9, [("", 18)])
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions


@pytest.mark.parametrize("name", ["sgd", "amsgrad", "full"])
def test_metadata_say_the_optimizer_and_which_tensors_share_a_vector(written: Make, name: str) -> None:
    made = written(name)
    for file in (TRAIN, GRADIENT, OPTIMIZER):
        found = session(made.folder / file).get_modelmeta().custom_metadata_map
        assert json.loads(found["lorac.groups"]) == [list(made.trained)]
        assert found["lorac.optimizer"] == made.case.training.optimizer


@pytest.mark.parametrize("name", CASES)
def test_frozen_weights_lie_outside_and_adapters_that_do_not_train_inside(written: Make, name: str) -> None:
    made = written(name)
    for file in (n for n in made.names if n.endswith(".onnx")):
        outside, inside = stored(made.folder / file)
        for tensor, (location, content) in outside.items():
            assert content == made.graphs.trained.values[tensor].tobytes()
            same = np.array_equal(made.graphs.base.values.get(tensor), made.graphs.trained.values[tensor])
            assert location == (BASE if same else WEIGHTS), tensor
        frozen = {k for k, v in made.graphs.trained.values.items() if v.ndim and k not in made.start}
        reads_frozen = (file == PREFIX) if PREFIX in made.names else (file != OPTIMIZER)
        assert outside.keys() == (frozen if reads_frozen else set())
        fixed = {n: int(np.prod(shape)) for n, shape in made.graphs.plan.fixed.items()}
        assert {k: v for k, v in inside.items() if v > 16} == (fixed if file != OPTIMIZER else {})


def test_weights_bin_holds_once_what_base_onnx_does_not_hold(written: Make) -> None:
    made = written("adamw, batch")
    found = [stored(made.folder / file)[0] for file in (TRAIN, EVAL)]
    apart = {n: len(content) for files in found for n, (location, content) in files.items() if location == WEIGHTS}
    assert {"conv2.weight", "bn1.bias"} <= apart.keys()
    assert (made.folder / WEIGHTS).stat().st_size == sum(apart.values())


@pytest.mark.parametrize("name", CASES)
def test_every_value_has_the_shape_that_the_graph_says(written: Make, name: str) -> None:
    made = written(name)
    model = train_step(made.graphs, made.start, step_config(made.case))
    values = {name_of(o): o for node in model.graph for o in node.outputs}
    carried = first_state(session(model), made.start)
    model.graph.outputs[:] = values.values()
    images, labels, lr = batches("small")[0]
    whole = whole_session(model, made.graphs, made.start, step_config(made.case))
    found = run(whole, {"input": images, "labels": labels, "lr": np.float32(lr), **carried})
    assert len(found) > (20 if name == "head" else 40)
    for value_name, value in found.items():
        known = dims(values[value_name])
        assert len(known) == value.ndim, value_name
        for axis, size in zip(known, value.shape, strict=True):
            assert axis == size or axis is None or (axis == "batch" and size == len(images)), value_name


@pytest.mark.parametrize("name", ["sgd", "adamw, batch", "learned alpha", "frozen factors", "entropy"])
def test_the_eval_step_is_pytorchs_network_with_its_adapter(written: Make, name: str) -> None:
    made = written(name)
    images, labels, _ = batches("small")[0]
    found = run(session(made.folder / EVAL), {"input": images, "labels": labels, **made.start})
    with torch.no_grad():
        logits = made.net.eval()(torch.from_numpy(images))
    made.net.train()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    if name == "entropy":
        loss = torch.distributions.Categorical(logits=logits).entropy().mean()
    np.testing.assert_allclose(found["logits"], logits.numpy(), atol=1e-5)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    base = run(session(made.folder / BASE), {"input": images})["logits"]
    assert np.abs(found["logits"] - base).max() > 1e-3


def test_the_loss_entropy_is_stepped_as_in_pytorch(written: Make) -> None:
    made = written("entropy")
    given = batches("small", steps=3, lr=0.1)
    found = in_graph(session(made.folder / TRAIN), made.start, given)
    expected = in_pytorch(made.net, made.case, given, torch.float64)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert max(distances(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 13])
def test_one_file_serves_batches_of_any_size(written: Make, size: int) -> None:
    made = written("sgd")
    given = batches("small", size=size + 2, steps=1)  # the last batch of a run is smaller by two
    assert len(given[0][1]) == size
    found = in_graph(session(made.folder / TRAIN), made.start, given)
    expected = in_pytorch(made.net, made.case, given, torch.float64)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert max(distances(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("name", ["sgd", "sgd without momentum", "amsgrad", "full"])
def test_two_micro_batches_and_an_update_are_one_train_step(written: Make, name: str) -> None:
    made = written(name)
    ((images, labels, lr),) = batches("small", size=9, steps=1)
    step, part, update = (session(made.folder / file) for file in (TRAIN, GRADIENT, OPTIMIZER))
    state = first_state(step, made.start)
    whole = run(step, {"input": images, "labels": labels, "lr": np.float32(lr), **state})
    gradient, losses = first_state(part, {}), []
    for piece, share in ((slice(0, 3), 3 / 7), (slice(3, 7), 4 / 7)):
        feed = {"input": images[piece], "labels": labels[piece], "weight": np.float32(share), **made.start, **gradient}
        found = run(part, feed)
        losses.append(share * found["loss"])
        gradient = carried_over(found)
    updated = run(update, {"lr": np.float32(lr), **state, **gradient})
    assert sum(losses) == pytest.approx(whole["loss"], rel=1e-6)
    assert updated["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)
    assert updated["step.next"] == whole["step.next"] == 1
    for tensor in carried_over(whole):
        assert relative(updated[f"{tensor}.next"], whole[f"{tensor}.next"]) <= 1e-5, tensor


def test_the_norm_is_that_before_clipping(written: Make) -> None:
    made = written("sgd without momentum")
    ((images, labels, _),) = batches("small", steps=1)
    step = session(made.folder / TRAIN)
    feed = {"input": images, "labels": labels, "lr": np.float32(1), **first_state(step, made.start)}
    found = run(step, feed)
    moved = [found[f"{name}.next"] - made.start[name] for name in made.trained]
    assert np.sqrt(sum((m.astype(float) ** 2).sum() for m in moved)) == pytest.approx(0.25, rel=1e-4)
    expected = in_pytorch(made.net, made.case, [(images, labels, 1.0)], torch.float64)
    assert found["gradient_norm"] == pytest.approx(expected.norms[0], rel=1e-5)
    assert found["gradient_norm"] > 0.5


def test_nothing_is_computed_below_the_head_where_it_alone_trains(written: Make) -> None:
    made = written("head")
    made_by = (prefix_step, train_step, eval_step)
    front, train, evaluate = (make(made.graphs, made.start, step_config(made.case)).graph for make in made_by)
    assert [len(nodes_of(graph, "Conv")) for graph in (front, train, evaluate)] == [4, 0, 0]
    assert [len(nodes_of(graph, "Tanh")) for graph in (front, train, evaluate)] == [3, 0, 0]
    # forward to the logits, a matrix product for the gradient of fc.weight, the loss and the update
    assert len(train) <= len(evaluate) + 30


def test_the_gradient_of_the_images_is_never_computed(written: Make) -> None:
    made = written("full")
    inputs = train_step(made.graphs, made.start, step_config(made.case)).graph.inputs
    uses = {value.name: len(value.uses()) for value in inputs}
    assert uses["conv1.weight"] == 2  # the forward pass and the update
    assert uses["conv2.weight"] >= 3  # and the gradient of its input


@pytest.mark.parametrize("name", ["sgd", "adamw, batch"])
def test_two_exports_give_the_same_bytes(written: Make, name: str, tmp_path: Path) -> None:
    made = written(name)
    again = write_small(made.case, tmp_path)
    assert again.names == made.names
    for file in made.names:
        assert (made.folder / file).read_bytes() == (again.folder / file).read_bytes(), file


def test_writing_leaves_the_graphs_as_they_were(written: Make, tmp_path: Path) -> None:
    graphs = written("adamw, batch").graphs
    before = to_bytes(graphs.base.model), to_bytes(graphs.original.model)
    write_small(BATCH, tmp_path)
    assert (to_bytes(graphs.base.model), to_bytes(graphs.original.model)) == before


def test_steps_from_the_files_are_those_of_the_graph_in_memory(written: Make) -> None:
    made = written("adamw, batch")
    given = batches("small", steps=3)
    files = in_graph(session(made.folder / TRAIN), made.start, given)
    memory = in_graph(step_graph("small", made.case, made.start, smooth=True), made.start, given)
    assert files.losses == memory.losses
    assert all(np.array_equal(files.tensors[n], memory.tensors[n]) for n in memory.tensors)
