"""The mean of what devices made of a network, in the space of its weights, kept by factors of the same rank.

A device's change of a weight is scale * B A. The mean of products is not the product of means: mean(B) mean(A) holds
terms B_i A_j of different devices, and lacks most of the B_i A_i. The mean of the products is itself a product, of the
factors side by side, [w_1 B_1, ..., w_n B_n] [A_1; ...; A_n]; its best approximation of a rank follows from the
singular values of a small matrix between two QR factorisations (Eckart and Young 1936). Where A never trains, mean(B) A
is the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lorac_runtime.fleet.payload import Tensors
from lorac_runtime.manifest import Manifest

Doubles = npt.NDArray[np.float64]
State = Mapping[str, npt.NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two tensors that count as a product: scale * b @ a, ``pairs`` blocks of them (`lorac_runtime.delta`).

    ``alpha`` names the tensor (1,) that holds the scale times ``r``, where it is learned; else the scale is ``scale``.
    """

    a: str
    b: str
    scale: float
    pairs: int = 1
    alpha: str | None = None
    r: int = 1

    def scale_in(self, state: State) -> float:
        """The scale of this pair in a state."""
        return self.scale if self.alpha is None else float(state[self.alpha][0]) / self.r

    def blocks(self, state: State) -> tuple[Doubles, Doubles]:
        """(a, b) as (pairs, rank, columns) and (pairs, rows, rank), float64, without the scale."""
        a, b = (np.asarray(state[name], np.float64) for name in (self.a, self.b))
        return a.reshape(self.pairs, -1, a.shape[1]), b.reshape(self.pairs, -1, b.shape[1])


@dataclasses.dataclass(frozen=True)
class Averaged:
    """The mean ``state``, and how well each pair holds its part: ``errors`` are ||mean - kept|| / ||mean|| by layer."""

    state: Tensors
    errors: dict[str, float]


def pairs_of(manifest: Manifest) -> tuple[Pair, ...]:
    """The products among what an artifact trains: adapters of layers, and skip adapters."""
    found = [Pair(a.lora_a, a.lora_b, a.alpha / a.r, a.pairs, a.lora_alpha, a.r) for a in manifest.adapters]
    names = {t.name for t in manifest.trainables}
    ends = ("skip_a", "skip_b")
    skips = [name.removesuffix(ends[0]) for name in names if name.endswith("." + ends[0])]
    found += [Pair(s + ends[0], s + ends[1], 1.0) for s in sorted(skips) if s + ends[1] in names]
    return tuple(found)


def averaged(manifest: Manifest, states: Sequence[State], weights: Sequence[float], before: State) -> Averaged:
    """The weighted mean of whole states (float32, every tensor that trains, and a frozen ``lora_a``).

    ``before`` is what the devices started from: its ``lora_a`` says how long the new one's rows are, its alpha stays.
    Everything that is not part of a product is averaged as it is.

    >>> from types import SimpleNamespace as Some
    >>> flat = Some(adapters=(), trainables=(Some(name="fc.weight"),))
    >>> averaged(flat, [{"fc.weight": np.zeros(1)}, {"fc.weight": np.ones(1)}], [1, 3], {}).state
    {'fc.weight': array([0.75], dtype=float32)}

    Raises ValueError without states, or if weights are not positive and as many.
    """
    if not states or len(states) != len(weights) or not all(np.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"{len(states)} states and weights {list(weights)}: expected a positive weight for each")
    shares = [float(w) / float(np.sum(np.asarray(weights, np.float64))) for w in weights]
    trained = {t.name for t in manifest.trainables}
    state: Tensors = {}
    errors: dict[str, float] = {}
    for pair in pairs_of(manifest):
        made, errors[pair.a.rpartition(".")[0]] = _paired(pair, states, shares, before, frozen_a=pair.a not in trained)
        state |= made
    for name in (t.name for t in manifest.trainables if t.name not in state):
        state[name] = _mean([np.asarray(s[name], np.float64) for s in states], shares).astype(np.float32)
    return Averaged(state, errors)


def change_norm(manifest: Manifest, state: State, before: State) -> float:
    """How far a state has moved: the norm of all changes of weights together, products counted as products.

    >>> from types import SimpleNamespace as Some
    >>> flat = Some(adapters=(), trainables=(Some(name="fc.weight"),))
    >>> change_norm(flat, {"fc.weight": np.array([3.0, 4.0])}, {"fc.weight": np.zeros(2)})
    5.0
    """
    pairs = pairs_of(manifest)
    held = {name for pair in pairs for name in (pair.a, pair.b, pair.alpha)}
    squares = [_moved(pair, state, before) for pair in pairs]
    for name in (t.name for t in manifest.trainables if t.name not in held):
        squares.append(float(np.sum((np.asarray(state[name], np.float64) - np.asarray(before[name], np.float64)) ** 2)))
    return float(np.sqrt(np.sum(squares)))


def _paired(
    pair: Pair, states: Sequence[State], shares: Sequence[float], before: State, *, frozen_a: bool
) -> tuple[Tensors, float]:
    """The pair's new tensors, and the relative error of keeping its mean by them."""
    scale = pair.scale_in(before) or pair.scale_in(states[0]) or 1.0
    alpha = {} if pair.alpha is None else {pair.alpha: np.array([scale * pair.r], np.float32)}
    parts = [(w * pair.scale_in(s) / scale, *pair.blocks(s)) for w, s in zip(shares, states, strict=True)]
    if frozen_a:
        b = _mean([part[2] for part in parts], [part[0] for part in parts])
        return {pair.b: _flat(b), **alpha}, 0.0
    old = pair.blocks(before)[0]
    blocks = [
        _truncated(np.vstack([a[p] for _, a, _ in parts]), np.hstack([w * b[p] for w, _, b in parts]), old[p])
        for p in range(pair.pairs)
    ]
    size = np.sqrt(sum(block[2] for block in blocks))
    lost = np.sqrt(sum(block[3] for block in blocks))
    tensors = {pair.a: _flat(np.stack([b[0] for b in blocks])), pair.b: _flat(np.stack([b[1] for b in blocks]))}
    return {**tensors, **alpha}, float(lost / size) if size else 0.0


def _truncated(a: Doubles, b: Doubles, old: Doubles) -> tuple[Doubles, Doubles, float, float]:
    """(a, b, squared norm of the product, squared norm of what is lost) with the rank that ``old`` has.

    All of the size is in ``b``: rows of ``a`` are orthogonal and as long as those of ``old`` in the mean. So a
    direction that no device used keeps a row of ``a`` to grow from; shared out evenly, both would be zero for good.
    """
    rank = len(old)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    length = float(np.linalg.norm(old)) / np.sqrt(rank) or 1.0
    made_a = length * vt[:rank] @ q_a.T
    made_b = q_b @ u[:, :rank] * (s[:rank] / length)
    return made_a, made_b, float(np.sum(s**2)), float(np.sum(s[rank:] ** 2))


def _moved(pair: Pair, state: State, before: State) -> float:
    """Squared norm of the change of a product, from the factors side by side."""
    (a, b), (old_a, old_b) = pair.blocks(state), pair.blocks(before)
    squares = 0.0
    for p in range(pair.pairs):
        _, r_b = np.linalg.qr(np.hstack([pair.scale_in(state) * b[p], -pair.scale_in(before) * old_b[p]]))
        _, r_a = np.linalg.qr(np.vstack([a[p], old_a[p]]).T)
        squares += float(np.sum((r_b @ r_a.T) ** 2))
    return squares


def _mean(values: Sequence[Doubles], shares: Sequence[float]) -> Doubles:
    total = np.zeros_like(values[0])
    for value, share in zip(values, shares, strict=True):
        total += share * value
    return total


def _flat(blocks: Doubles) -> npt.NDArray[np.float32]:
    return blocks.reshape(-1, blocks.shape[-1]).astype(np.float32)
