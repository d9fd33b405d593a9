"""Batches and progress. The loop itself is compared with a hand-written one in tests/test_session.py."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorac_runtime.data import LocalData
from lorac_runtime.manifest import InputSpec
from lorac_runtime.training import Progress, Samples

SPEC = InputSpec("x", (1, 1, 1), 2.0, (1.0,), (1.0,))


def made(count: int, batch_size: int, merge_single: bool) -> Samples:
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Samples(LocalData(images, np.arange(count)), np.arange(count), SPEC, batch_size, merge_single)


@given(st.integers(1, 60), st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_batches_hold_every_sample_once(count: int, batch_size: int, merge_single: bool, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(count)
    batches = made(count, batch_size, merge_single).batches(order)
    assert np.concatenate(batches).tolist() == order.tolist()
    assert {len(b) for b in batches[:-1]} <= {batch_size}
    if merge_single and batch_size > 1 and count > 1:
        assert 2 <= len(batches[-1]) <= batch_size + 1
    else:
        assert 1 <= len(batches[-1]) <= batch_size + merge_single


def test_a_batch_is_preprocessed_beside_its_labels() -> None:
    samples = made(5, 2, merge_single=False)
    images, labels = samples.images(np.array([3, 1])), samples.labels(np.array([3, 1]))
    assert images.ravel().tolist() == [5.0, 1.0]
    assert labels.tolist() == [3, 1]


def test_progress_knows_what_is_left() -> None:
    shown = [Progress(1 + s // 3, 2, s + 1, 6, 0.5, 1e-3, 2.0 * (s + 1)) for s in range(6)]
    assert [p.epoch_done for p in shown] == [False, False, True, False, False, True]
    assert [p.eta for p in shown] == [10.0, 8.0, 6.0, 4.0, 2.0, 0.0]
