"""Optimizers as nodes of a graph: clipping by the global norm, and updates that mean what torch.optim's mean.

Tensors are updated as few packed vectors (see `groups`), since a pass over a vector costs little more than the
overhead of a node. Gradients may be values of the same graph or inputs of a graph of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lorac_exporters.gradients.tape import Tape, dims, sizes
from lorac_exporters.graph_tools import need
from lorac_runtime.manifest import TrainingDefaults

Values = Mapping[str, ir.Value]
_FLOAT, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE


@dataclasses.dataclass(frozen=True)
class Update:
    """A tensor after a step, and the optimizer's state of it by name."""

    parameter: ir.Value
    state: dict[str, ir.Value]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How one kind of optimizer is written.

    ``state`` gives the names of the tensors it keeps for each tensor that it updates. ``scalars(tape, lr, count,
    settings)`` writes what all updates of a step share; ``count`` (int64 scalar) is 1 in the first step.
    ``update(tape, parameter, gradient, state, scalars=..., settings=...)`` updates a tensor of any shape.
    """

    state: Callable[[TrainingDefaults], tuple[str, ...]]
    scalars: Callable[[Tape, ir.Value, ir.Value, TrainingDefaults], dict[str, ir.Value]]
    update: Callable[..., Update]


@dataclasses.dataclass(frozen=True)
class Updates:
    """Everything after a step: tensors by name, state by name and group ("exp_avg.0"), the number of steps taken.

    ``gradient_norm`` is the global norm before clipping.
    """

    parameters: dict[str, ir.Value]
    state: dict[str, ir.Value]
    step: ir.Value
    gradient_norm: ir.Value


def groups(shapes: Mapping[str, tuple[int, ...]], *, large: int = 1 << 18) -> list[list[str]]:
    """Which tensors share a vector: those below ``large`` elements the first one, each other has its own after it.

    >>> groups({"conv": (64, 3), "fc": (512, 1000), "bias": (64,)})
    [['conv', 'bias'], ['fc']]
    """
    small = [name for name, shape in shapes.items() if math.prod(shape) < large]
    alone = [[name] for name, shape in shapes.items() if math.prod(shape) >= large]
    return [small, *alone] if small else alone


def pack(tape: Tape, tensors: Sequence[ir.Value]) -> ir.Value:
    """The tensors flattened and joined in one vector (n,); their shapes must be static. One vector is itself."""
    flat = [_reshaped(tape, _before_reshape(tensor), (math.prod(sizes(tensor)),)) for tensor in tensors]
    if len(flat) == 1:
        return flat[0]
    total = sum(sizes(vector)[0] for vector in flat)
    return tape.op("Concat", *flat, shape=(total,), name="packed", attributes={"axis": 0})


def unpack(tape: Tape, vector: ir.Value, like: Sequence[ir.Value]) -> list[ir.Value]:
    """What `pack` joined: the parts of ``vector`` in the shapes of ``like``."""
    lengths = [math.prod(sizes(value)) for value in like]
    parts: Sequence[ir.Value] = [vector]
    if len(like) > 1:
        parts = tape.multi_op("Split", [vector, tape.ints(*lengths)], [(n,) for n in lengths], name="part")
    return [_reshaped(tape, part, sizes(value)) for part, value in zip(parts, like, strict=True)]


def _before_reshape(value: ir.Value) -> ir.Value:
    """What a value was before it was only reshaped.

    onnxruntime joins two Reshapes in a row into a node that it runs late, and everything before it with it, so that
    the gradients of all layers would be alive at once.
    """
    node = value.producer()
    while node is not None and node.op_type == "Reshape":
        value = need(node.inputs[0])
        node = value.producer()
    return value


def _reshaped(tape: Tape, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    return value if dims(value) == shape else tape.op("Reshape", value, tape.ints(*shape), shape=shape)


def clip_by_norm(tape: Tape, gradients: Sequence[ir.Value], max_norm: float) -> tuple[list[ir.Value], ir.Value]:
    """Gradients scaled to a global norm of at most ``max_norm`` (0: no limit), and the norm they had.

    As torch.nn.utils.clip_grad_norm_: the factor is max_norm / (norm + 1e-6), at most 1.
    """
    squares = [tape.op("ReduceSumSquare", g, shape=(), attributes={"keepdims": 0}) for g in gradients]
    total = squares[0] if len(squares) == 1 else tape.op("Sum", *squares, shape=())
    norm = tape.op("Sqrt", total, shape=(), name="gradient_norm")
    if not max_norm:
        return list(gradients), norm
    ratio = tape.op("Div", max_norm, tape.op("Add", norm, 1e-6, shape=()), shape=())
    within = tape.op("GreaterOrEqual", ratio, 1.0, shape=(), dtype=ir.DataType.BOOL)
    factor = tape.op("Where", within, 1.0, ratio, shape=(), name="clip_factor")  # Min of onnxruntime 1.17 drops NaN
    return [tape.op("Mul", g, factor, like=g, name="clipped") for g in gradients], norm


def _sgd_state(settings: TrainingDefaults) -> tuple[str, ...]:
    return ("momentum",) if settings.momentum else ()


def _sgd_scalars(tape: Tape, lr: ir.Value, count: ir.Value, settings: TrainingDefaults) -> dict[str, ir.Value]:
    if not settings.dampening:
        return {"lr": lr}
    first = tape.op("Equal", count, tape.constant(np.int64(1)), shape=(), dtype=ir.DataType.BOOL)
    damped = tape.op("Where", first, 1.0, 1 - settings.dampening, shape=(), name="damped")
    return {"lr": lr, "damped": damped}  # the first gradient enters the momentum undamped


def sgd(
    tape: Tape, parameter: ir.Value, gradient: ir.Value, state: Values, *, scalars: Values, settings: TrainingDefaults
) -> Update:
    """An update as torch.optim.SGD makes it; ``state``: "momentum", zeros before the first step, if there is any."""
    if settings.weight_decay:
        gradient = tape.op("Add", gradient, _times(tape, parameter, settings.weight_decay), like=parameter)
    new: dict[str, ir.Value] = {}
    if settings.momentum:
        added = _times(tape, gradient, scalars["damped"]) if settings.dampening else gradient
        buffer = tape.op("Add", _times(tape, state["momentum"], settings.momentum), added, like=parameter)
        new["momentum"] = buffer
        ahead = _times(tape, buffer, settings.momentum) if settings.nesterov else None
        gradient = buffer if ahead is None else tape.op("Add", gradient, ahead, like=parameter)
    return Update(tape.op("Sub", parameter, _times(tape, gradient, scalars["lr"]), like=parameter), new)


def _times(tape: Tape, value: ir.Value, factor: ir.Value | float) -> ir.Value:
    return tape.op("Mul", value, factor, like=value)


def _adamw_state(settings: TrainingDefaults) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if settings.amsgrad else ("exp_avg", "exp_avg_sq")


def _adamw_scalars(tape: Tape, lr: ir.Value, count: ir.Value, settings: TrainingDefaults) -> dict[str, ir.Value]:
    """Computed in float64, as PyTorch does: 1 - 0.999 ** count loses four digits in float32.

    The correction of exp_avg_sq is a factor sqrt(1 - beta2 ** count) of ``rate`` and ``eps`` here, which spares the
    division of a vector.
    """
    steps, rate = _cast(tape, count, _DOUBLE), _cast(tape, lr, _DOUBLE)
    unbias1, unbias2 = (_double(tape, "Sub", 1, _double(tape, "Pow", beta, steps)) for beta in settings.betas)
    root = _double(tape, "Sqrt", unbias2)
    found = {
        "rate": _double(tape, "Mul", _double(tape, "Div", rate, unbias1), root),
        "eps": _double(tape, "Mul", root, settings.eps),
    }
    if settings.weight_decay:
        found["kept"] = _double(tape, "Sub", 1, _double(tape, "Mul", rate, settings.weight_decay))
    return {name: _cast(tape, value, _FLOAT) for name, value in found.items()}


def adamw(
    tape: Tape, parameter: ir.Value, gradient: ir.Value, state: Values, *, scalars: Values, settings: TrainingDefaults
) -> Update:
    """An update as torch.optim.AdamW makes it; ``state`` by torch's names, zeros before the first step."""
    mean = _averaged(tape, state["exp_avg"], gradient, settings.betas[0])
    square = _averaged_square(tape, state["exp_avg_sq"], gradient, settings.betas[1])
    new = {"exp_avg": mean, "exp_avg_sq": square}
    if settings.amsgrad:
        square = tape.op("Max", state["max_exp_avg_sq"], square, like=square)
        new["max_exp_avg_sq"] = square
    scale = tape.op("Add", tape.op("Sqrt", square, like=square), scalars["eps"], like=square)
    change = tape.op("Div", _times(tape, mean, scalars["rate"]), scale, like=mean)
    kept = _times(tape, parameter, scalars["kept"]) if settings.weight_decay else parameter
    return Update(tape.op("Sub", kept, change, like=parameter), new)


def _averaged(tape: Tape, old: ir.Value, new: ir.Value, beta: float) -> ir.Value:
    """beta * old + (1 - beta) * new, rounded as torch.lerp rounds: exact at either end."""
    change = tape.op("Sub", new, old, like=old)
    if beta > 0.5:
        return tape.op("Add", old, _times(tape, change, 1 - beta), like=old)
    return tape.op("Sub", new, _times(tape, change, beta), like=old)


def _averaged_square(tape: Tape, old: ir.Value, new: ir.Value, beta: float) -> ir.Value:
    """beta * old + (1 - beta) * new ** 2."""
    square = tape.op("Mul", new, new, like=new)
    return tape.op("Add", _times(tape, old, beta), _times(tape, square, 1 - beta), like=old)


def _cast(tape: Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return tape.op("Cast", value, shape=dims(value), dtype=dtype, attributes={"to": int(dtype)})


def _double(tape: Tape, op_type: str, *inputs: ir.Value | float) -> ir.Value:
    """A scalar in float64; numbers among the inputs become constants."""
    values = [v if isinstance(v, ir.Value) else tape.constant(np.float64(v)) for v in inputs]
    return tape.op(op_type, *values, shape=(), dtype=_DOUBLE)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw_state, _adamw_scalars, adamw),
    "sgd": Optimizer(_sgd_state, _sgd_scalars, sgd),
}


def state_names(settings: TrainingDefaults) -> tuple[str, ...]:
    """What the optimizer keeps for each vector.

    >>> state_names(TrainingDefaults(optimizer="sgd", momentum=0.9))
    ('momentum',)
    """
    return OPTIMIZERS[settings.optimizer].state(settings)


def append_updates(
    tape: Tape,
    members: Sequence[Sequence[str]],
    parameters: Values,
    gradients: Sequence[ir.Value],
    state: Values,
    *,
    lr: ir.Value,
    step: ir.Value,
    settings: TrainingDefaults,
) -> Updates:
    """Append clipping and the update of every tensor.

    ``members`` names the tensors of each group (`groups`), ``gradients`` holds a packed vector for each group,
    ``state`` the vectors of group K as "exp_avg.K" (`state_names`). ``lr`` is a float32 scalar; ``step``, an int64
    scalar, counts the steps taken before, 0 at first. Raises KeyError for a tensor or state that is not given.
    """
    optimizer, names = OPTIMIZERS[settings.optimizer], state_names(settings)
    clipped, norm = clip_by_norm(tape, gradients, settings.clip_norm)
    count = tape.op("Add", step, tape.constant(np.int64(1)), like=step, name="next_step")
    scalars = optimizer.scalars(tape, lr, count, settings)
    done = Updates({}, {}, count, norm)
    for k, (group, gradient) in enumerate(zip(members, clipped, strict=True)):
        before = [parameters[name] for name in group]
        old = {name: state[f"{name}.{k}"] for name in names}
        update = optimizer.update(tape, pack(tape, before), gradient, old, scalars=scalars, settings=settings)
        done.parameters.update(zip(group, unpack(tape, update.parameter, before), strict=True))
        done.state.update({f"{name}.{k}": value for name, value in update.state.items()})
    return done
