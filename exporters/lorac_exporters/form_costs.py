"""What a training step spends on an adapted layer, as thin branches and with an updated weight.

The estimate counts the work of the forward pass and of both gradients and weighs it with times measured by
``python -m benchmarks forms``; docs/decisions/0013 says how good it is. It compares the two forms of one layer on a
processor; it does not predict how long a network takes. A fully connected layer counts as a pointwise convolution of
one sample that has a position for each of the batch.
"""

from __future__ import annotations

import dataclasses
import math

from lorac_exporters.choices import Form
from lorac_exporters.gradients.geometry import Geometry
from lorac_runtime.delta import conv_dims
from lorac_runtime.description import Adapter

BLOCK = 16  # channels per group from which engines have their fast kernels for constant weights


@dataclasses.dataclass(frozen=True)
class Work:
    """Amounts of work, or, in `SECONDS`, the time that one of each takes."""

    constant: float = 0.0  # multiply-adds with a constant weight
    narrow: float = 0.0  # the same in groups of less than BLOCK channels
    changing: float = 0.0  # multiply-adds with a weight that is computed, and of matrix products
    copied: float = 0.0  # elements copied for the taps of kernels
    weights: float = 0.0  # elements of weights that are rearranged, and of products summed over samples
    moved: float = 0.0  # elements of inputs and outputs
    calls: float = 0.0  # matrix products, one for each sample and group
    nodes: float = 0.0

    def __add__(self, other: Work) -> Work:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Work(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def seconds(self, each: Work) -> float:
        """The time it takes if each unit takes as long as ``each`` says."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(each), strict=True)
        return float(sum(amount * time for amount, time in pairs))


# Measured 2026-11-21 on an AMD EPYC (Zen 4, AVX-512), one thread, onnxruntime 1.31.1, float32.
SECONDS = Work(
    constant=2.11e-11,
    narrow=7.54e-11,
    changing=2.11e-11,
    copied=4.79e-10,
    weights=6.55e-10,
    moved=2.19e-10,
    calls=2.24e-07,
    nodes=4.68e-06,
)


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A convolution of ``batch`` samples; ``before`` and ``after`` are its numbers of positions."""

    batch: int
    c_in: int
    c_out: int
    groups: int
    taps: int
    before: int
    after: int

    @property
    def weights(self) -> float:
        return self.c_out * self.c_in / self.groups * self.taps

    @property
    def multiplications(self) -> float:
        return self.batch * self.after * self.weights

    @property
    def moved(self) -> float:
        return self.batch * (self.c_in * self.before + self.c_out * self.after)

    def constant(self) -> Work:
        """Forward and the input's gradient, with a weight that does not change."""
        twice = 2 * self.multiplications
        if self.groups > 1 and min(self.c_in, self.c_out) < BLOCK * self.groups:
            return Work(narrow=twice, moved=2 * self.moved)
        return Work(constant=twice, moved=2 * self.moved)

    def changing(self) -> Work:
        """Forward and both gradients, with a weight that is computed."""
        return Work(
            changing=3 * self.multiplications,
            copied=self._copied(),
            weights=4 * self.weights + self._summed(),
            moved=2 * self.moved,
            calls=3 * self.batch * self.groups,
            nodes=1.0 if self.taps == 1 else 3 + self.taps / 2,
        )

    def _copied(self) -> float:
        """By the three passes; a pointwise convolution without stride reads its input in place."""
        if self.taps == 1 and self.before == self.after:
            return 0.0
        return self.batch * self.after * self.taps * (self.c_in + self.c_out + min(self.c_in, self.c_out))

    def _summed(self) -> float:
        """The weight's gradient: products sample by sample, or of all samples laid side by side."""
        aside = self.batch * (self.c_in * self.before * self.taps + self.c_out * self.after)
        return min(aside, self.batch * self.weights) if self.groups == 1 else self.batch * self.weights


def cheaper_form(adapter: Adapter, g: Geometry, batch: int) -> Form:
    """The form whose step takes less time at this batch size, by the estimate; several pairs have one form only."""
    if adapter.pairs > 1:
        return "weight"
    return (
        "branch" if branch_work(adapter, g, batch).seconds(SECONDS) <= _weight_seconds(adapter, g, batch) else "weight"
    )


def _weight_seconds(adapter: Adapter, g: Geometry, batch: int) -> float:
    return weight_work(adapter, g, batch).seconds(SECONDS)


def weight_work(adapter: Adapter, g: Geometry, batch: int) -> Work:
    """W + delta is computed, then used like any weight; delta's two gradients are products as large as delta's."""
    conv = _whole(g, batch)
    return conv.changing() + Work(changing=3 * adapter.rank * conv.weights, weights=4 * conv.weights, nodes=1)


def branch_work(adapter: Adapter, g: Geometry, batch: int) -> Work:
    """The trunk with its constant weight, and two thin convolutions."""
    down, up = _thin(adapter, g, batch)
    return _whole(g, batch).constant() + down.changing() + up.changing() + Work(nodes=1)


def _whole(g: Geometry, batch: int) -> _Conv:
    samples, before, after = _positions(g, batch)
    return _Conv(samples, g.c_in, g.c_out, g.groups, g.taps, before, after)


def _positions(g: Geometry, batch: int) -> tuple[int, int, int]:
    """Samples, and positions that each has before and after the layer."""
    return (1, batch, batch) if g.rank == 0 else (batch, math.prod(g.in_size), g.positions)


def _thin(adapter: Adapter, g: Geometry, batch: int) -> tuple[_Conv, _Conv]:
    """The convolutions that `lorac_exporters.branches` writes: (to few channels, from few)."""
    _, _, k_h, k_w = conv_dims(adapter.weight_shape)
    samples, before, after = _positions(g, batch)
    few = g.groups * adapter.rank
    if adapter.layout == "paper" and g.taps > 1:
        few *= k_h
        down = _Conv(samples, g.c_in, few, g.groups, g.taps, before, after)
        return down, _Conv(samples, few, g.c_out, g.groups, 1, after, after)
    between = after if k_h == 1 else g.in_size[0] * g.out_size[1]
    down = _Conv(samples, g.c_in, few, g.groups, k_w, before, between)
    return down, _Conv(samples, few, g.c_out, g.groups, k_h, between, after)
