"""The PyTorch networks of the fine-tuning benchmarks compute what this project's own do; and rounds are fair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_case import SIZE, three_stages
from torch import nn

from benchmarks import step_rounds as sr
from benchmarks.finetune_cases import Effort
from benchmarks.finetune_steps import Measured, rounds
from benchmarks.step_process import WorkerError
from benchmarks.step_torch_networks import standalone, use_branches
from benchmarks.step_worker_torch import compiled
from lorac_deploy.folding import fold_batchnorm
from lorac_deploy.lora import LoraConfig, attach, select_trainable
from lorac_deploy.lora_layers import LoraConv2d


def test_a_network_compiled_without_a_compiler_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler"):
        compiled(nn.Linear(3, 2), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("lora-c", LoraConfig(rank_mode="r")),
        ("skip", LoraConfig()),
        ("blocks", LoraConfig(blocks=("rear",))),
        ("full", LoraConfig()),
        ("head", LoraConfig()),
    ],
)
def test_a_standalone_network_computes_and_trains_the_same_with_torch_alone(
    method: str, lora: LoraConfig, tmp_path: Path
) -> None:
    network = fold_batchnorm(three_stages())
    select_trainable(network, method, lora, bn_policy="frozen", input_shape=(3, SIZE, SIZE))
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    alone = standalone(network)
    torch.save(alone, tmp_path / "alone.pt")
    assert b"lorac_deploy" not in (tmp_path / "alone.pt").read_bytes()
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    torch.testing.assert_close(alone(x), network(x), atol=0, rtol=0)
    assert {name for name, p in alone.named_parameters() if p.requires_grad} == trained.keys()


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        ((6, 8), {"kernel_size": 3, "padding": 1}),
        ((6, 8), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        ((6, 8), {"kernel_size": 1, "stride": 2}),
        ((6, 9), {"kernel_size": (1, 3), "stride": (2, 3), "padding": (0, 2), "groups": 3}),
        ((12, 12), {"kernel_size": 5, "padding": 2, "groups": 4, "bias": False}),
    ],
)
def test_pytorch_branches_compute_what_weight_space_does(channels: tuple[int, int], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, channels[0], 1), nn.Conv2d(*channels, **settings), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 11, 11)
    net(x)
    attach(net, LoraConfig(rank=2, rank_mode="r", small_layers="adapter"))
    layer = net[1]
    assert isinstance(layer, LoraConv2d)
    nn.init.normal_(layer.lora_b)
    wanted = net(x)
    use_branches(net)
    assert type(net[1]).__name__ == "ThinConv2d"
    torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(standalone(net)(x), wanted, atol=1e-4, rtol=1e-4)


def test_a_layout_without_thin_branches_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    attach(net, LoraConfig(rank=1, layout="paper"))
    with pytest.raises(ValueError, match="1 has no thin form here"):
        use_branches(net)


def recorder(log: list[str], name: str) -> Callable[[], list[float]]:
    def turn() -> list[float]:
        log.append(name)
        return [float(len(log))]

    return turn


def test_everyone_has_one_turn_a_round_and_the_order_varies() -> None:
    log: list[str] = []
    seconds = sr.interleaved({name: recorder(log, name) for name in "abc"}, 12)
    made = ["".join(log[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in made)
    assert [order[0] for order in made] == ["a", "b", "c"] * 4
    assert len(set(made)) > 3
    assert seconds["b"] == [[3 * i + order.index("b") + 1.0] for i, order in enumerate(made)]


class _Scripted:
    """A session that answers with numbers, or ends after some turns."""

    def __init__(self, seconds: float, turns: int = 99) -> None:
        self._seconds, self._left = seconds, turns

    def ask(self, what: str, *, count: int) -> dict[str, Any]:
        self._left -= 1
        if self._left < 0:
            raise WorkerError("ended")
        return {"seconds": [self._seconds] * count}


def test_rounds_fill_the_time_and_a_competitor_that_ends_is_dropped_from_then_on() -> None:
    measured = Measured()
    measured.sessions = {"a": _Scripted(1.0), "b": _Scripted(2.0, turns=2)}  # type: ignore[dict-item]
    measured.typical = {"a": 1.0, "b": 2.0}
    assert rounds(measured, Effort(30.0, 2, 9, steps=1)) == 4  # a round costs 2 * (1 + 2) seconds and two pauses
    assert measured.seconds == {"a": [[1.0]] * 4}
    assert measured.refused == {"b": "ended"}


def test_ratios_are_of_the_same_rounds_only() -> None:
    assert sr.ratio([[4.0], [9.0], [2.0]], [[2.0], [3.0], [4.0]]) == sr.Ratio(1.0, 4 / 3, 2.0)
    with pytest.raises(ValueError, match="zip"):
        sr.ratio([[1.0]], [[1.0], [2.0]])


def test_the_ninetieth_percentile_is_a_step_that_was_measured() -> None:
    assert sr.summary([[float(i) for i in range(1, 11)]]) == sr.Summary(1.0, 5.5, 9.0, 10)
