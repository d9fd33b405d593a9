"""Worker: onnxsim's own training loop (`compile_training_loop`) on the forward graph of an artifact.

It is given what it cannot make: the network with its adapters (its own `inject_lora` takes 1x1 convolutions only),
at opset 17, for one batch size, with the loss written in operators that it differentiates. Its Adam has neither
clipping nor weight decay. Option ``session``: ``own`` is its loop as it comes (onnxruntime's graph optimizations
off), ``optimized`` the same step graph with them on. The number of threads is set in both, which it has no option for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim  # type: ignore[import-not-found]  # lives in an environment of its own
from onnx import TensorProto, helper, numpy_helper, shape_inference
from safetensors.numpy import load_file

from benchmarks.step_protocol import LR, Images, Job, Labels, Prepared, Step, serve

FORWARD, LOSS, TARGET = "eval_step.onnx", "loss", "one_hot"
OPSET = 17  # the only one that onnxsim's step graphs are written for
ADAPTER = "adapter.safetensors"


def forward_graph(artifact: Path, batch: int) -> tuple[onnx.ModelProto, list[str]]:
    """(network with loss for batches of this size, names of what trains: its initializers)."""
    model = onnx.load(artifact / FORWARD)
    graph = model.graph
    tensors = load_file(artifact / ADAPTER)
    images = next(i for i in graph.input if i.name not in tensors and i.name != "labels")
    trained = [i.name for i in graph.input if i.name in tensors]
    logits = next(o for o in graph.output if o.name != LOSS)
    classes = logits.type.tensor_type.shape.dim[1].dim_value
    _fix_batch(images, batch)
    del graph.input[:], graph.value_info[:]
    graph.input.extend([images, helper.make_tensor_value_info(TARGET, TensorProto.FLOAT, [batch, classes])])
    graph.initializer.extend(numpy_helper.from_array(tensors[name], name) for name in trained)
    _replace_loss(graph, logits.name, batch)
    model = _lowered(_without_unused(model))
    return _flattened_by_reshape(shape_inference.infer_shapes(model)), trained


def _fix_batch(value: onnx.ValueInfoProto, batch: int) -> None:
    first = value.type.tensor_type.shape.dim[0]
    first.Clear()
    first.dim_value = batch


def _replace_loss(graph: onnx.GraphProto, logits: str, batch: int) -> None:
    """Mean cross-entropy against one-hot rows, instead of an operator that onnxsim does not differentiate."""
    node = helper.make_node
    share = numpy_helper.from_array(np.array(-1 / batch, np.float32), "minus_share")
    graph.initializer.append(share)
    (old,) = (n for n in graph.node if LOSS in n.output)
    old.output[list(old.output).index(LOSS)] = "unused_loss"
    graph.node.extend(
        [
            node("Softmax", [logits], ["probabilities"], axis=-1),
            node("Log", ["probabilities"], ["log_probabilities"]),
            node("Mul", ["log_probabilities", TARGET], ["chosen"]),
            node("ReduceSum", ["chosen"], ["sum_chosen"], keepdims=0),
            node("Mul", ["sum_chosen", "minus_share"], [LOSS]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, []))


def _without_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without nodes and initializers that the loss does not depend on."""
    needed, kept = {LOSS}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    nodes, values = [*reversed(kept)], [t for t in model.graph.initializer if t.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(values)
    return model


def _lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Written for `OPSET`: of the operators that onnxsim differentiates, the axes of ReduceMean were attributes then.

    onnx's own converter gives up at Pad, though what a graph of ours uses of it is the same in both.
    """
    axes = {
        t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer if t.data_type == TensorProto.INT64
    }
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and len(node.input) > 1:
            kept = [a for a in node.attribute if a.name == "keepdims"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("axes", axes[node.input.pop()])])
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    return model


def _flattened_by_reshape(model: onnx.ModelProto) -> onnx.ModelProto:
    """Flatten as Reshape, which onnxsim differentiates."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    for node in [n for n in model.graph.node if n.op_type == "Flatten"]:
        target = numpy_helper.from_array(np.array(shapes[node.output[0]], np.int64), f"{node.output[0]}.shape")
        model.graph.initializer.append(target)
        node.CopyFrom(helper.make_node("Reshape", [node.input[0], target.name], node.output))
    return model


def limit_threads(threads: int) -> None:
    """Give every session that onnxsim makes from now on so many threads that do not spin."""
    make: Callable[[], Any] = onnxruntime.SessionOptions

    def limited() -> Any:
        options = make()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    onnxruntime.SessionOptions = limited


def prepare(job: Job) -> Prepared:
    """A step of its loop on the batch."""
    limit_threads(job.threads)
    images, labels = job.load_batch()
    model, trained = forward_graph(Path(job.artifact), len(images))
    feeds = {model.graph.input[0].name: images, TARGET: one_hot(labels, _width(model))}
    loop = onnxsim.compile_training_loop(model, LOSS, trained, optimizer="adam")
    if job.options["session"] == "own":
        return Prepared(functools.partial(loop, feeds, LR))
    return Prepared(optimized_step(loop, feeds))


def _width(model: onnx.ModelProto) -> int:
    return int(model.graph.input[1].type.tensor_type.shape.dim[1].dim_value)


def one_hot(labels: Labels, classes: int) -> Images:
    """Rows of zeros with a one at the label."""
    return np.eye(classes, dtype=np.float32)[labels]


def optimized_step(loop: Any, feeds: dict[str, Images]) -> Step:
    """Its step graph in a session with onnxruntime's optimizations, its state carried over without copies."""
    graph, state = loop.step_graph, {k: onnxsim.backend.as_ort_value(v) for k, v in loop.initial_state.items()}
    session = onnxruntime.InferenceSession(
        graph.model.SerializeToString(), onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"]
    )
    fixed = {k: onnxsim.backend.as_ort_value(v) for k, v in {**feeds, "lr": np.array(LR, np.float32)}.items()}
    names, done = [*graph.state.values(), graph.loss_name], 0

    def step() -> float:
        nonlocal done
        corrections = onnxsim.qat_graph.adam_bias_corrections(done)
        done += 1
        scalars = {k: onnxsim.backend.as_ort_value(np.array(v, np.float32)) for k, v in corrections.items()}
        found = dict(zip(names, session.run_with_ort_values(names, {**fixed, **scalars, **state}), strict=True))
        state.update({name: found[after] for name, after in graph.state.items()})
        return float(found[graph.loss_name].numpy())

    return step


if __name__ == "__main__":
    sys.exit(serve(prepare))
