"""What makes a lowered network lean: activations folded into the operator before, superfluous operators removed.

Each pass edits a network in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from lorac_exporters.tflite.linear import join_biases
from lorac_exporters.tflite.network import Network, Operator, Tensor
from lorac_exporters.tflite.reductions import join_squeezes
from lorac_exporters.tflite.sequences import stay_images

_FOLDED = ("RELU", "RELU6", "RELU_N1_TO_1")
# Kinds whose kernels clamp their output. CONCATENATION has the option too, but its kernel refuses it.
_CLAMPING = frozenset(
    {"ADD", "AVERAGE_POOL_2D", "CONV_2D", "DEPTHWISE_CONV_2D", "DIV", "FULLY_CONNECTED", "MAX_POOL_2D", "MUL", "SUB"}
)


def drop_idle(network: Network) -> None:
    """Remove PAD by zeros, RESHAPE to the same shape, TRANSPOSE into the same order.

    A TRANSPOSE or RESHAPE of its own kind's result reads what that one read; equal ones are made once.
    """
    editing, kept = _Editing(network), []
    for operator in network.operators:
        operator.inputs = [None if t is None else editing.instead.get(t, t) for t in operator.inputs]
        if operator.kind in ("TRANSPOSE", "RESHAPE"):
            editing.skip_before(operator)
        same = _unchanged(operator) or editing.made_before(operator)
        if same is None or not editing.replace(operator.outputs[0], same):
            kept.append(operator)
    network.operators = kept
    network.outputs = [editing.instead.get(t, t) for t in network.outputs]


class _Editing:
    """What is known while `drop_idle` goes through the operators: makers of tensors, and what replaces tensors."""

    def __init__(self, network: Network) -> None:
        self.instead: dict[Tensor, Tensor] = {}
        self._makers = {out: op for op in network.operators for out in op.outputs}
        self._ends = set(network.outputs)
        self._known: dict[tuple[Tensor | None, str, tuple[int, ...]], Tensor] = {}

    def skip_before(self, operator: Operator) -> None:
        """Read what the operator before read, if that is of the same kind."""
        before = None if operator.inputs[0] is None else self._makers.get(operator.inputs[0])
        if before is None or before.kind != operator.kind:
            return
        if operator.kind == "TRANSPOSE":
            first, second, permutation = _numbers(before), _numbers(operator), operator.inputs[1]
            joined = np.array([first[i] for i in second], np.int32)
            name = "permutation" if permutation is None else permutation.name
            operator.inputs[1] = Tensor(name, joined.shape, "int32", data=joined)
        operator.inputs[0] = before.inputs[0]

    def made_before(self, operator: Operator) -> Tensor | None:
        """The result of an equal TRANSPOSE or RESHAPE."""
        if operator.kind not in ("TRANSPOSE", "RESHAPE"):
            return None
        same = self._known.setdefault((operator.inputs[0], operator.kind, _numbers(operator)), operator.outputs[0])
        return None if same is operator.outputs[0] else same

    def replace(self, old: Tensor, new: Tensor) -> bool:
        """Let later operators use ``new`` for ``old``; False, and nothing done, where ``old`` must be computed.

        An output keeps its name, so only a tensor that can give its own name away may replace it.
        """
        if old in self._ends:
            if new in self._ends or new not in self._makers:
                return False
            new.name = old.name
            self._ends.add(new)
        self.instead[old] = new
        return True


def _unchanged(operator: Operator) -> Tensor | None:
    """The input of an operator that passes it on; else None."""
    given = operator.inputs[0] if operator.inputs else None
    if given is None or operator.kind not in ("TRANSPOSE", "RESHAPE", "PAD", "PADV2", "MIRROR_PAD"):
        return None
    numbers, made = _numbers(operator), operator.outputs[0]
    if operator.kind == "TRANSPOSE":
        idle = numbers == tuple(range(len(numbers)))
    elif operator.kind == "RESHAPE":
        idle = given.signature == made.signature
    else:
        idle = not any(numbers)
    return given if idle else None


def _numbers(operator: Operator) -> tuple[int, ...]:
    """The constant second input: a permutation, a shape, or widths. -1 is never a size, so computed ones are alone."""
    second = operator.inputs[1]
    if second is None or second.data is None:
        return (-1, id(operator))
    return tuple(int(number) for number in second.data.reshape(-1))


def remove_dead(network: Network) -> None:
    """Remove operators whose results nothing reads."""
    wanted, kept = set(network.outputs), []
    for operator in reversed(network.operators):
        if not wanted.isdisjoint(operator.outputs):
            kept.append(operator)
            wanted.update(t for t in operator.inputs if t is not None)
    network.operators = kept[::-1]


def fold_activations(network: Network) -> None:
    """RELU, RELU6 and RELU_N1_TO_1 become an option of the operator before, if nothing else reads what it makes.

    The operator then makes the activation's tensor, under its name.
    """
    uses = Counter(t for op in network.operators for t in op.inputs if t is not None)
    uses.update(network.outputs)
    makers: dict[Tensor, Operator] = {}
    kept = []
    for operator in network.operators:
        given = operator.inputs[0] if operator.inputs else None
        before = makers.get(given) if given is not None and uses[given] == 1 else None
        if operator.kind in _FOLDED and before is not None and _can_clamp(before):
            before.options["fused_activation_function"] = operator.kind
            before.outputs, operator = operator.outputs, before
        else:
            kept.append(operator)
        makers.update(dict.fromkeys(operator.outputs, operator))
    network.operators = kept


def _can_clamp(operator: Operator) -> bool:
    """Whether the operator's kernel has an activation, and none is chosen yet."""
    return operator.kind in _CLAMPING and operator.options.get("fused_activation_function", "NONE") == "NONE"


def name_outputs(network: Network) -> None:
    """Each output's tensor has the output's name, also where the order of axes had to change for it."""
    named = {tensor.name: tensor for tensor in network.tensors()}
    for key, tensor in zip(network.output_keys, network.outputs, strict=True):
        if tensor.name == key or tensor in network.inputs or network.outputs.count(tensor) > 1:
            continue
        if key in named:
            named[key].name = tensor.name
        tensor.name = key


PASSES: tuple[Callable[[Network], None], ...] = (
    stay_images,
    drop_idle,
    remove_dead,
    join_squeezes,
    join_biases,
    fold_activations,
    name_outputs,
)
