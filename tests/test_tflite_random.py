"""Random networks: each is right on both runtimes, or refused by the name of a node.

TFLITE_RANDOM_NETWORKS=5000 tries more of them than the usual number.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from random_networks import FOREIGN, RandomNetwork, random_network
from tflite_agreement import Judgement, first_wrong, judge

COUNT = int(os.environ.get("TFLITE_RANDOM_NETWORKS", "560"))
Found = list[tuple[int, RandomNetwork, Judgement]]


def images(seed: int, network: RandomNetwork) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, *network.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def found() -> Found:
    """What became of each network, by its number."""
    networks = [(seed, random_network(seed)) for seed in range(COUNT)]
    return [(seed, net, judge(ir.from_proto(net.model), images(seed, net))) for seed, net in networks]


def test_no_random_network_answers_wrongly_on_any_runtime(found: Found) -> None:
    wrong = [(seed, net, result) for seed, net, result in found if result.wrong]
    text = [f"network {seed}: {result.errors} {result.said}" for seed, _, result in wrong]
    text += [f"{seed}: {first_wrong(ir.from_proto(net.model), images(seed, net))}" for seed, net, _ in wrong[:3]]
    assert not wrong, f"{len(wrong)} of {len(found)} networks:\n" + "\n".join(text)


def test_only_networks_with_something_that_tflite_lacks_are_refused(found: Found) -> None:
    refused = {seed: result.refused for seed, _, result in found if result.refused}
    print(*(f"{count} x {text}" for text, count in Counter(map(reason, refused.values())).most_common()), sep="\n")
    assert refused.keys() == {seed for seed, net, _ in found if FOREIGN in net.kinds}
    assert 0.005 * len(found) < len(refused) < 0.05 * len(found)


def reason(refusal: str) -> str:
    """Without names and numbers."""
    return re.sub(r"[nv]?\d+(_\d+)?", "#", refusal)


def test_refusals_name_the_node_and_say_why(found: Found) -> None:
    for _, _, result in found:
        if result.refused:
            assert re.search(r"- \w+ 'n\d+'.*: \w+", result.refused), result.refused


def test_outputs_of_nearly_all_networks_that_were_written_depend_on_the_image(found: Found) -> None:
    telling = [result for _, _, result in found if not result.refused and not result.idle]
    assert len(telling) >= 0.9 * len(found)


def test_every_kind_of_operator_occurs_among_the_networks_that_were_written(found: Found) -> None:
    kinds = Counter({kind: 0 for _, net, result in found if not result.refused for kind in net.kinds})
    for _, net, result in found:
        if not result.refused:
            kinds.update(net.kinds.keys())
    rare = {kind: count for kind, count in kinds.items() if count < 3}
    assert len(kinds) >= 170
    assert not rare, f"these occur in too few of {len(found)} networks: {rare}"
