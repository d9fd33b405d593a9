"""The geometry of a convolution: what its attributes and shapes say, in numbers."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from lorac_exporters.gradients.tape import sizes
from lorac_exporters.graph_tools import describe, int_attribute, ints_attribute, need, text_attribute
from lorac_runtime.errors import ConversionError

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A Conv node with weight (c_out, c_in/groups, *kernel); all tuples have one entry per spatial axis."""

    c_in: int
    c_out: int
    groups: int
    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begins: Sizes
    ends: Sizes
    in_size: Sizes
    out_size: Sizes

    @classmethod
    def of(cls, node: ir.Node) -> Geometry:
        """Read it off a node whose shapes are known. Raises ConversionError for automatic padding."""
        if text_attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            raise ConversionError(f"{describe(node)} pads automatically; make the graph canonical first")
        x, weight, y = need(node.inputs[0]), need(node.inputs[1]), node.outputs[0]
        c_out, per_group, *kernel = sizes(weight)
        rank = len(kernel)
        pads = ints_attribute(node, "pads", (0,) * (2 * rank))
        groups = int_attribute(node, "group", 1)
        return cls(
            c_in=per_group * groups,
            c_out=c_out,
            groups=groups,
            kernel=tuple(kernel),
            strides=ints_attribute(node, "strides", (1,) * rank),
            dilations=ints_attribute(node, "dilations", (1,) * rank),
            begins=pads[:rank],
            ends=pads[rank:],
            in_size=sizes(x, 2),
            out_size=sizes(y, 2),
        )

    @classmethod
    def without_axes(cls, c_in: int, c_out: int) -> Geometry:
        """A fully connected layer: one tap, and no axis to move it along.

        >>> Geometry.without_axes(8, 4).rank, Geometry.without_axes(8, 4).taps
        (0, 1)
        """
        return cls(c_in, c_out, 1, (), (), (), (), (), (), ())

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def reach(self) -> Sizes:
        """How far the last tap lies from the first: dilation * (kernel - 1)."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Number of output positions of one sample."""
        return math.prod(self.out_size)

    @property
    def strided(self) -> bool:
        """Whether any stride is larger than one."""
        return max(self.strides, default=1) > 1

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at every position: 1 x 1, no stride, no padding."""
        return self.taps == 1 and not self.strided and not any(self.begins + self.ends)

    @property
    def unread(self) -> Sizes:
        """Positions at the end of the padded input that no window reaches, because the stride leaves them over."""
        padded = (
            n + b + e - r - 1 for n, b, e, r in zip(self.in_size, self.begins, self.ends, self.reach, strict=True)
        )
        return tuple(length % stride for length, stride in zip(padded, self.strides, strict=True))
