"""What a gradient rule is given, and what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape
from lorac_exporters.graph_tools import input_at, need


@dataclasses.dataclass(frozen=True)
class Site:
    """A node of the forward graph whose gradient is to be written.

    ``grads`` holds, for each output, the gradient of the loss with respect to it, None where the loss does not
    depend on it. ``needs`` says for each input whether its gradient is wanted.
    """

    node: ir.Node
    grads: tuple[ir.Value | None, ...]
    needs: tuple[bool, ...]

    @property
    def grad(self) -> ir.Value:
        """The gradient with respect to the first output."""
        return need(self.grads[0])

    @property
    def x(self) -> ir.Value:
        """The first input."""
        return need(self.node.inputs[0])

    @property
    def y(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    def input(self, index: int) -> ir.Value | None:
        """An input, None where it is absent or left out at the end."""
        return input_at(self.node, index)

    def wants(self, index: int) -> bool:
        """Whether the gradient of an input is wanted."""
        return index < len(self.needs) and self.needs[index]


@dataclasses.dataclass(frozen=True)
class Phased:
    """A gradient of the shape of ``like`` whose positions are kept apart by their remainder modulo the strides.

    ``phases`` maps the remainder of each spatial axis to (batch, c, ceil(size / stride), ...); absent ones are zero.
    """

    strides: tuple[int, ...]
    phases: dict[tuple[int, ...], ir.Value]
    like: ir.Value


Gradient = ir.Value | Phased

# Writes the gradients of a node's inputs onto the tape: one for each input, None where none is wanted.
# Raises ConversionError for a form of the operator that has no rule.
Rule = Callable[[Tape, Site], Sequence[Gradient | None]]
