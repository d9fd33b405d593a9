"""The canonical form of a network: what base.onnx is, whoever exported the model.

IR version 9 and opset 18; constants folded; functions inlined; no Identity or Dropout; a free batch axis named
"batch", every shape constant; each parameter an initializer of its own in raw bytes; a bias on every convolution
and on the head, which is a Gemm or a 1 x 1 convolution; batch normalisation folded, or Mul + Add.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from lorac_exporters import cleaning
from lorac_exporters.batch_check import check_free_batch
from lorac_exporters.batchnorm import Site, find_batchnorms, fold_batchnorms
from lorac_exporters.graph_tools import (
    array,
    convolutions,
    describe,
    float_array,
    input_at,
    name_of,
    nodes_of,
    remove_unused,
    static_dims,
)
from lorac_exporters.heads import find_head, normalize_head, replace_head
from lorac_exporters.naming import name_computed
from lorac_exporters.shapes import free_batch, settle_shapes
from lorac_exporters.sharing import unshare
from lorac_exporters.support import check_supported
from lorac_runtime.errors import ConversionError, listed
from lorac_runtime.manifest import BatchNorm

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Canonical:
    """A canonical graph and what is known about it.

    ``changes``: what differs from the graph given, a line each. ``batchnorms``: every batch normalisation of the
    original network in graph order, also when folded. ``values``: every float initializer by name. ``added``:
    names of the biases (zeros) that the original did not have.
    """

    model: ir.Model
    changes: tuple[str, ...]
    batchnorms: tuple[BatchNorm, ...]
    values: dict[str, Floats]
    added: frozenset[str]


def canonicalize(model: ir.Model, *, fold: bool = True, head: bool = True) -> Canonical:
    """The canonical form of ``model``, which itself is not changed; the same input gives the same bytes.

    With ``fold=False`` BatchNormalization nodes stay as they are, and their numbers are in ``values``. A batch size
    fixed in the file is freed, and the result compared with the original by running both. With ``head=False`` the
    model need not be a classifier: its output may have any shape that begins with the batch, one score per pixel say,
    and there may be several.

    Raises ConversionError if the model cannot be adapted, naming all that is in the way.
    """
    twin = model.clone()
    changes, given = _clean(twin, head=head)
    fixed_batch = (static_dims(twin.graph.inputs[0]) or (None,))[0]
    changes += [*free_batch(twin), *settle_shapes(twin)]
    changes += [*cleaning.drop_idle_pads(twin), *cleaning.explicit_pads(twin.graph)]
    changes += unshare(twin.graph)
    added, text = _complete(twin, given, head=head)
    changes += text
    sites = find_batchnorms(twin.graph)
    if fold:
        changes += fold_batchnorms(sites)
    changes += _finish(twin)
    _check_canonical(twin, folded=fold, head=head)
    if fixed_batch is not None:
        check_free_batch(model, twin, fixed_batch)
    return _result(twin, changes, sites, added)


def with_new_head(canonical: Canonical, classes: int, *, seed: int) -> Canonical:
    """A copy whose classifier is new, for ``classes`` classes; see `lorac_exporters.heads.replace_head`.

    With one seed, the folded and the unfolded form of a network get the same classifier.

    Raises ValueError if there are fewer than 2 classes.
    """
    model = canonical.model.clone()
    replace_head(model, classes, seed=seed)
    change = f"{find_head(model).weight}: a new classifier for {classes} classes"
    return dataclasses.replace(
        canonical, model=model, changes=(*canonical.changes, change), values=_float_values(model)
    )


def _clean(model: ir.Model, *, head: bool) -> tuple[list[str], frozenset[str]]:
    """Functions, constants and idle nodes; returns the changes, and the names of the model's own initializers."""
    changes = [*cleaning.inline_functions(model), *cleaning.own_initializers(model)]
    check_supported(model, classifier=head)
    changes += cleaning.unmerge_copies(model)
    given = frozenset(model.graph.initializers)
    return [*changes, *cleaning.fold_constants(model), *cleaning.drop_idle_nodes(model)], given


def _complete(model: ir.Model, given: frozenset[str], *, head: bool) -> tuple[list[str], list[str]]:
    """Biases everywhere and a head in canonical form; returns names of added parameters, and the changes."""
    neutral = name_computed(model.graph, given)
    added = cleaning.add_biases(model.graph)
    changes, head_bias = normalize_head(model) if head else ([], [])
    return neutral + added + head_bias, [*(f"{n}: a bias of zeros, added" for n in added), *changes]


def _finish(model: ir.Model) -> list[str]:
    remove_unused(model)
    changes = cleaning.unique_node_names(model.graph)
    settle_shapes(model)
    cleaning.strip(model)
    return changes


def _result(model: ir.Model, changes: list[str], sites: tuple[Site, ...], added: list[str]) -> Canonical:
    records = tuple(site.record for site in sites)
    return Canonical(model, tuple(changes), records, _float_values(model), frozenset(added))


def _float_values(model: ir.Model) -> dict[str, Floats]:
    initializers = model.graph.initializers.items()
    return {name: float_array(value) for name, value in initializers if value.dtype == ir.DataType.FLOAT}


def _check_canonical(model: ir.Model, *, folded: bool, head: bool) -> None:
    """Look at the result: what is promised of the canonical form must hold."""
    graph = model.graph
    problems = [f"{describe(n)} is left" for n in nodes_of(graph, "Identity", "Dropout", "Constant")]
    if folded:
        problems += [f"{describe(n)} is left" for n in nodes_of(graph, "BatchNormalization")]
    for node in convolutions(graph):
        bias = input_at(node, 2)
        if array(bias) is None or bias is None or len(bias.uses()) != 1:
            problems.append(f"{describe(node)} has no bias of its own")
    if head and len(static_dims(graph.outputs[0]) or ()) != 2:
        found = graph.outputs[0].shape
        problems.append(f"output {name_of(graph.outputs[0])!r} has shape {found}, expected (batch, classes)")
    if problems:
        raise ConversionError(listed("the model cannot be brought into canonical form:", problems))
    try:
        onnx.checker.check_model(ir.to_proto(model))
    except onnx.checker.ValidationError as err:
        raise ConversionError(f"the canonical graph is not valid ONNX: {err}") from err
