"""Updates written as ONNX nodes against torch.optim with the same numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from optimizer_graphs import CLOSE, LR, SHAPES, Arrays, Ours, normal

from lorac_exporters.gradients.optimizers import OPTIMIZERS, state_names
from lorac_runtime import manifest as mf
from lorac_runtime.manifest import TrainingDefaults
from lorac_runtime.manifest_checks import training_problems


class Torchs:
    """torch.optim with the same settings, float32, one tensor at a time."""

    def __init__(self, settings: TrainingDefaults, start: Arrays) -> None:
        self.tensors = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in start.items()}
        self.clip = settings.clip_norm
        self.optimizer = optimizer_of(settings, list(self.tensors.values()))

    def step(self, gradients: Arrays, lr: float = LR) -> float:
        for name, tensor in self.tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        norm = torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), self.clip or math.inf, foreach=False)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return float(norm)

    def state(self, name: str) -> Arrays:
        key = "momentum_buffer" if name == "momentum" else name
        return {n: self.optimizer.state[t][key].numpy() for n, t in self.tensors.items()}


def optimizer_of(settings: TrainingDefaults, tensors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    s = settings
    common = {"lr": LR, "weight_decay": s.weight_decay, "foreach": False}
    if s.optimizer == "adamw":
        return torch.optim.AdamW(tensors, betas=s.betas, eps=s.eps, amsgrad=s.amsgrad, **common)
    return torch.optim.SGD(tensors, momentum=s.momentum, dampening=s.dampening, nesterov=s.nesterov, **common)


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    return {n: np.asarray(scale * normal(*s, seed=seed + i), np.float32) for i, (n, s) in enumerate(SHAPES.items())}


def assert_same_steps(settings: TrainingDefaults, steps: int, *, size: float = 1.0, slack: int = 1) -> None:
    """Tensors and state after every step; ``size`` is that of the gradients, which alternates by tens.

    ``slack`` widens the tolerance, for settings so extreme that roundings are not averaged out.
    """
    assert training_problems(settings) == []
    ours, start = Ours(settings), arrays(100, LR)  # as small as the updates: their errors are not lost in rounding
    ours.values.update(start)
    torchs = Torchs(settings, start)
    for step in range(steps):
        gradients, before = arrays(step, size * 10.0 ** (step % 2)), dict(ours.values)
        assert ours.step(gradients) == pytest.approx(torchs.step(gradients), rel=CLOSE)
        for name, tensor in torchs.tensors.items():
            assert_near(
                ours.values[name],
                tensor.detach().numpy(),
                tensor.detach().numpy() - before[name],
                slack * min(steps, 3),
            )
        for kind in state_names(settings):
            expected = torchs.state(kind)
            for name, found in ours.state(kind).items():
                assert_near(found, expected[name], expected[name], slack * min(steps, 3))
    assert ours.values["step"] == steps


def assert_near(found: np.ndarray, expected: np.ndarray, scale: np.ndarray, times: int) -> None:
    """Within `CLOSE` of ``scale`` and one rounding of the values themselves; their roundings add up over steps."""
    assert found.shape == expected.shape
    allowed = CLOSE * np.abs(scale).max() + float(np.spacing(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed * times)


def sgd_settings() -> Iterator[TrainingDefaults]:
    for decay, clip in itertools.product((0.0, 0.1), (0.0, 1.0)):
        base = TrainingDefaults(optimizer="sgd", weight_decay=decay, clip_norm=clip)
        yield base
        for momentum, dampening in itertools.product((0.5, 0.9), (0.0, 0.3)):
            yield dataclasses.replace(base, momentum=momentum, dampening=dampening)
        yield dataclasses.replace(base, momentum=0.9, nesterov=True)


def adamw_settings() -> Iterator[TrainingDefaults]:
    betas = ((0.9, 0.999), (0.3, 0.95), (0.0, 0.0), (0.5, 0.5))
    for decay, clip, amsgrad, pair in itertools.product((0.0, 0.1), (0.0, 1.0), (False, True), betas):
        yield TrainingDefaults(weight_decay=decay, clip_norm=clip, amsgrad=amsgrad, betas=pair, eps=1e-8)
    yield TrainingDefaults(eps=0.1)
    yield TrainingDefaults(eps=0.0)


def label(s: TrainingDefaults) -> str:
    default = TrainingDefaults()
    return " ".join(
        f"{f.name}={getattr(s, f.name)}"
        for f in dataclasses.fields(s)
        if getattr(s, f.name) != getattr(default, f.name)
    )


ALL = [*sgd_settings(), *adamw_settings()]


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_one_step_is_that_of_torch_optim(settings: TrainingDefaults) -> None:
    assert_same_steps(settings, 1)


@pytest.mark.parametrize("settings", ALL, ids=label)
def test_ten_steps_are_those_of_torch_optim(settings: TrainingDefaults) -> None:
    assert_same_steps(settings, 10)


@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-9, 1),
    decay=st.floats(0, 1),
    amsgrad=st.booleans(),
    exponent=st.integers(-4, 3),
)
@trials(max_examples=25, deadline=None, derandomize=True)
def test_adamw_agrees_for_any_settings_and_sizes_of_gradients(
    beta1: float, beta2: float, eps: float, decay: float, amsgrad: bool, exponent: int
) -> None:
    s = TrainingDefaults(betas=(beta1, beta2), eps=eps, weight_decay=decay, amsgrad=amsgrad, clip_norm=0.0)
    assert_same_steps(s, 3, size=10.0**exponent, slack=4)


@given(momentum=st.floats(0.01, 1), dampening=st.floats(-1, 1), decay=st.floats(0, 1), clip=st.floats(0.01, 100))
@trials(max_examples=25, deadline=None, derandomize=True)
def test_sgd_agrees_for_any_settings(momentum: float, dampening: float, decay: float, clip: float) -> None:
    s = TrainingDefaults(optimizer="sgd", momentum=momentum, dampening=dampening, weight_decay=decay, clip_norm=clip)
    assert_same_steps(s, 3)


@pytest.mark.parametrize("name", ["weight_decay", "clip_norm", "betas", "eps", "amsgrad"])
def test_every_setting_of_adamw_changes_the_second_step(name: str) -> None:
    other = {"weight_decay": 0.1, "clip_norm": 0.0, "betas": (0.8, 0.99), "eps": 0.1, "amsgrad": True}[name]
    assert_changes(TrainingDefaults(betas=(0.9, 0.9)), name, other)


@pytest.mark.parametrize("name", ["weight_decay", "clip_norm", "momentum", "dampening", "nesterov"])
def test_every_setting_of_sgd_changes_the_second_step(name: str) -> None:
    other = {"weight_decay": 0.1, "clip_norm": 0.0, "momentum": 0.8, "dampening": 0.5, "nesterov": True}[name]
    assert_changes(TrainingDefaults(optimizer="sgd", momentum=0.9), name, other)


def assert_changes(settings: TrainingDefaults, name: str, other: object) -> None:
    results = []
    for s in (settings, dataclasses.replace(settings, **{name: other})):  # type: ignore[arg-type]
        ours = Ours(s)
        ours.values.update(arrays(100))
        for size in (1.0, 0.003):  # a gradient that shrinks: amsgrad remembers the larger one
            ours.step(arrays(3, size))
        results.append(ours.values["fc"])
    assert np.abs(results[0] - results[1]).max() > 1e-5


def test_the_first_gradient_enters_the_momentum_undamped_and_the_second_damped() -> None:
    settings = TrainingDefaults(optimizer="sgd", momentum=0.5, dampening=0.75, clip_norm=0.0)
    ours = Ours(settings)
    ours.values.update(arrays(100))
    ours.step(arrays(0))
    np.testing.assert_array_equal(ours.values["momentum.1"], arrays(0)["fc"].ravel())
    ours.step(arrays(50))
    expected = 0.5 * arrays(0)["fc"] + 0.25 * arrays(50)["fc"]
    np.testing.assert_allclose(ours.values["momentum.1"], expected.ravel(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("taken", [0, 1, 9, 99, 999, 9999, 1_000_000])
def test_the_bias_corrections_hold_after_any_number_of_steps(taken: int) -> None:
    settings = TrainingDefaults(clip_norm=0.0, eps=1e-3)
    ours, start, gradients = Ours(settings), arrays(100, LR), arrays(0)
    torchs = Torchs(settings, start)
    torchs.step(gradients)
    for tensor in torchs.tensors.values():
        torchs.optimizer.state[tensor]["step"].fill_(taken)
    moments = {kind: torchs.state(kind) for kind in ("exp_avg", "exp_avg_sq")}
    middle = {n: t.detach().numpy().copy() for n, t in torchs.tensors.items()}
    ours.values.update(middle)
    for kind, k in itertools.product(moments, range(2)):
        ours.values[f"{kind}.{k}"] = np.concatenate([moments[kind][n].ravel() for n in ours.members[k]])
    ours.values["step"] = np.array(taken)
    ours.step(gradients)
    torchs.step(gradients)
    for name, tensor in torchs.tensors.items():
        expected = tensor.detach().numpy()
        assert_near(ours.values[name], expected, expected - middle[name], 1)
    assert ours.values["step"] == taken + 1


def test_the_learning_rate_is_that_of_each_step() -> None:
    settings = TrainingDefaults(weight_decay=0.1)
    ours, start = Ours(settings), arrays(100)
    ours.values.update(start)
    ours.step(arrays(0), lr=0.0)
    for name, array in start.items():
        np.testing.assert_array_equal(ours.values[name], array)
    assert np.abs(ours.state("exp_avg")["fc"]).max() > 0


def test_an_optimizer_for_every_name_that_settings_may_have() -> None:
    assert set(OPTIMIZERS) == set(mf.OPTIMIZERS)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (TrainingDefaults(), ("exp_avg", "exp_avg_sq")),
        (TrainingDefaults(amsgrad=True), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        (TrainingDefaults(optimizer="sgd"), ()),
        (TrainingDefaults(optimizer="sgd", momentum=0.9), ("momentum",)),
    ],
)
def test_state_is_named_as_torch_names_it(settings: TrainingDefaults, names: tuple[str, ...]) -> None:
    assert state_names(settings) == names
    assert set(Ours(settings).values) - {"step"} == {f"{name}.{k}" for name in names for k in (0, 1)}
