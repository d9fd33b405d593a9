"""The mean of adapters is that of their changes of the weights: against dense float64 sums."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorac_deploy.fleet.averaging import averaged, change_norm
from lorac_deploy.interchange.factorise import matrix
from lorac_runtime.delta import adapter_shapes, conv_dims, delta
from lorac_runtime.manifest import Adapter, Trainable

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Adapters of one layer on several clients, and whether ``lora_a`` trains."""

    adapter: Adapter
    states: tuple[dict[str, Array], ...]
    weights: tuple[float, ...]
    before: dict[str, Array]
    frozen_a: bool

    @property
    def manifest(self) -> Any:
        """As much of a manifest as averaging reads."""
        names = [self.adapter.lora_b, "fc.weight"]
        names += [] if self.frozen_a else [self.adapter.lora_a]
        names += [] if self.adapter.lora_alpha is None else [self.adapter.lora_alpha]
        trainables = tuple(Trainable(n, self.before[n].shape, "lora_b") for n in names)
        return SimpleNamespace(adapters=(self.adapter,), trainables=trainables)

    def dense(self, state: dict[str, Array]) -> Array:
        """scale * arrange(b @ a) in float64."""
        a = self.adapter
        alpha = a.alpha if a.lora_alpha is None else float(state[a.lora_alpha][0])
        factors = state[a.lora_a].astype(np.float64), state[a.lora_b].astype(np.float64)
        return delta(*factors, a.weight_shape, alpha / a.r, a.arrangement, pairs=a.pairs)

    def mean(self) -> Array:
        """The weighted mean of what the clients' adapters change."""
        return np.average([self.dense(s) for s in self.states], axis=0, weights=self.weights)


@st.composite
def cases(draw: st.DrawFn, *, frozen_a: bool | None = None) -> Case:
    kernel = draw(st.sampled_from([(), (3,), (1, 1), (3, 3), (2, 3)]))
    shape = (draw(st.integers(2, 6)), draw(st.integers(1, 5)), *kernel)
    c_out, c_in, k_h, k_w = conv_dims(shape)
    pairs = draw(st.sampled_from([1, c_out]))
    rank = draw(st.integers(1, min(c_out // pairs * k_h, c_in * k_w)))
    learned = draw(st.booleans())
    adapter = Adapter(
        "l", "l.weight", "l.lora_a", "l.lora_b", shape, 1, 2, rank, 3.0, draw(st.sampled_from(["spatial", "paper"])),
        "l.lora_alpha" if learned else None, pairs,
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    frozen = draw(st.booleans()) if frozen_a is None else frozen_a
    shape_a, shape_b = adapter_shapes(shape, rank, pairs)
    start = rng.normal(size=shape_a).astype(np.float32)

    def state() -> dict[str, Array]:
        a = start if frozen else rng.normal(size=shape_a).astype(np.float32)
        found = {"l.lora_a": a, "l.lora_b": rng.normal(size=shape_b), "fc.weight": rng.normal(size=(2, 3))}
        found |= {"l.lora_alpha": rng.uniform(0.5, 4, 1)} if learned else {}
        return {name: value.astype(np.float32) for name, value in found.items()}

    count = draw(st.integers(1, 5))
    weights = tuple(float(w) for w in rng.uniform(0.1, 9, count))
    return Case(adapter, tuple(state() for _ in range(count)), weights, {**state(), "l.lora_a": start}, frozen)


def best(case: Case) -> tuple[Array, float]:
    """The best approximation of the mean by factors of the adapter's rank, pair by pair, and its relative error."""
    target = matrix(case.mean(), case.adapter.layout)
    kept = []
    for block in target.reshape(case.adapter.pairs, -1, target.shape[1]):
        u, s, vt = np.linalg.svd(block, full_matrices=False)
        rank = case.adapter.rank
        kept.append((u[:, :rank] * s[:rank]) @ vt[:rank])
    near = np.concatenate(kept)
    return near, float(np.linalg.norm(target - near) / np.linalg.norm(target))


@settings(max_examples=60, deadline=None)
@given(cases(frozen_a=False))
def test_the_mean_is_the_best_of_its_rank_and_its_error_is_told(case: Case) -> None:
    found = averaged(case.manifest, case.states, case.weights, case.before)
    near, error = best(case)
    kept = matrix(case.dense({**case.before, **found.state}), case.adapter.layout)
    scale = np.linalg.norm(matrix(case.mean(), case.adapter.layout))
    assert np.linalg.norm(kept - near) <= 1e-5 * scale + 1e-4 * abs(error) * scale
    assert found.errors["l"] == pytest.approx(error, abs=1e-6)
    heads = np.average([s["fc.weight"] for s in case.states], axis=0, weights=case.weights)
    np.testing.assert_allclose(found.state["fc.weight"], heads, rtol=1e-5, atol=1e-6)
    assert {n: v.shape for n, v in found.state.items()} == {n: case.before[n].shape for n in found.state}


@settings(max_examples=30, deadline=None)
@given(cases(frozen_a=True))
def test_with_lora_a_frozen_the_mean_is_exact_and_lora_a_does_not_travel(case: Case) -> None:
    found = averaged(case.manifest, case.states, case.weights, case.before)
    assert "l.lora_a" not in found.state
    assert found.errors == {"l": 0.0}
    kept = case.dense({**case.before, **found.state})
    np.testing.assert_allclose(kept, case.mean(), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_how_far_a_client_moved_is_the_norm_of_the_change_of_its_weights(case: Case) -> None:
    state = case.states[0]
    heads = state["fc.weight"].astype(np.float64) - case.before["fc.weight"]
    expected = np.sqrt(np.sum((case.dense(state) - case.dense(case.before)) ** 2) + np.sum(heads**2))
    assert change_norm(case.manifest, state, case.before) == pytest.approx(expected, rel=1e-6)


def two_clients() -> Case:
    """Two clients that changed the weight by the same 2 x 2 matrix, written in factors of opposite sign."""
    adapter = Adapter("l", "l.weight", "l.lora_a", "l.lora_b", (2, 2), 1, 1, 1, 1.0, "spatial")
    one = {"l.lora_a": np.array([[1.0, 2.0]], np.float32), "l.lora_b": np.array([[3.0], [4.0]], np.float32)}
    head = {"fc.weight": np.zeros((2, 3), np.float32)}
    other = {name: -value for name, value in one.items()}
    return Case(adapter, (one | head, other | head), (1.0, 1.0), one | head, False)


def test_averaging_a_and_b_apart_is_wrong_where_the_mean_of_changes_is_right() -> None:
    case = two_clients()
    change = np.array([[3.0, 6.0], [4.0, 8.0]])
    apart = np.mean([s["l.lora_b"] for s in case.states], axis=0) @ np.mean(
        [s["l.lora_a"] for s in case.states], axis=0
    )
    assert np.linalg.norm(apart - change) == pytest.approx(np.linalg.norm(change))  # nothing is left of it
    found = averaged(case.manifest, case.states, case.weights, case.before)
    np.testing.assert_allclose(case.dense(found.state), change, rtol=1e-6)
    assert found.errors["l"] == pytest.approx(0, abs=1e-7)


def test_directions_that_nobody_used_can_still_train_afterwards() -> None:
    adapter = Adapter("l", "l.weight", "l.lora_a", "l.lora_b", (6, 6), 1, 3, 3, 3.0, "spatial")
    rng = np.random.default_rng(0)
    start = {"l.lora_a": rng.normal(size=(3, 6)), "l.lora_b": np.zeros((6, 3)), "fc.weight": np.zeros((2, 3))}
    before = {name: value.astype(np.float32) for name, value in start.items()}
    case = Case(adapter, (before, before), (1.0, 2.0), before, False)
    found = averaged(case.manifest, case.states, case.weights, before).state
    assert not found["l.lora_b"].any()
    lengths = np.linalg.norm(found["l.lora_a"], axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(before["l.lora_a"]) / np.sqrt(3), rtol=1e-5)


def test_skip_adapters_are_products_too() -> None:
    names = ("3.skip_a", "3.skip_b")
    manifest: Any = SimpleNamespace(adapters=(), trainables=tuple(Trainable(n, (), "weight") for n in names))
    rng = np.random.default_rng(0)
    states = [{names[0]: rng.normal(size=(1, 4)), names[1]: rng.normal(size=(3, 1))} for _ in range(2)]
    found = averaged(manifest, states, [1, 1], states[0])
    mean = np.mean([s[names[1]] @ s[names[0]] for s in states], axis=0)
    u, s, vt = np.linalg.svd(mean)
    np.testing.assert_allclose(
        found.state[names[1]] @ found.state[names[0]], s[0] * np.outer(u[:, 0], vt[0]), atol=1e-6
    )
    assert found.errors["3"] == pytest.approx(s[1] / np.linalg.norm(s))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, float("nan")]])
def test_weights_must_be_positive_and_as_many_as_states(weights: list[float]) -> None:
    case = two_clients()
    with pytest.raises(ValueError, match="positive weight"):
        averaged(case.manifest, case.states, weights, case.before)
