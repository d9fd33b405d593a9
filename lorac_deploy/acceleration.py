"""Where training runs: one process on the CPU, or what Hugging Face accelerate gives (docs/cloud.md).

Accelerate is used where it started the process (`accelerate launch`), or where 16-bit arithmetic is asked for. It
brings the device, the number formats and the reductions over processes. Batches are split here, so that all processes
together take the very batches, in the same order, that one process would take.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lorac_deploy.shared_batchnorm import shared_statistics
from lorac_deploy.train_config import Precision
from lorac_runtime.errors import EngineError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")
_MARKS = ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK")  # set by `accelerate launch` and torchrun
_KNOWN = ("NO", "MULTI_GPU", "MULTI_CPU")


class Acceleration:
    """One process on the CPU in float32: PyTorch alone. `Accelerated` is everything else."""

    processes: int = 1
    index: int = 0
    device = torch.device("cpu")
    precision: Precision = "no"

    def placed(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hold ``module`` where training runs; afterwards it is on the CPU."""
        del module
        return contextlib.nullcontext()

    def sharing(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Batch statistics are those of all processes together; afterwards layers are ordinary ones."""
        del module
        return contextlib.nullcontext()

    def optimizing(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``optimizer`` with steps fit for the number format."""
        return optimizer

    def part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of a batch."""
        return images, labels

    def every(self, batches: Iterable[T]) -> Iterator[T]:
        """This process's share of whole batches, on the CPU."""
        return iter(batches)

    def outputs(self, module: nn.Module, images: Tensor) -> Tensor:
        """Outputs of ``module`` in float32."""
        outputs: Tensor = module(images)
        return outputs

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], share: float) -> None:
        """Gradients of the whole batch's mean loss; ``loss`` is the mean over the part, ``share`` of the batch."""
        del parameters, share
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale the gradients down to ``norm`` where they are longer."""
        nn.utils.clip_grad_norm_(parameters, norm)

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes."""
        return values

    def forked_rng(self) -> contextlib.AbstractContextManager[None]:
        """Within the block PyTorch's random state is free to be set; afterwards it is as before."""
        return torch.random.fork_rng(devices=[])

    def seeds(self, *seeds: int) -> list[int]:
        """Seeds of what each process draws for itself."""
        return list(seeds)


class Accelerated(Acceleration):
    """Training through an `accelerate.Accelerator`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.processes, self.index = accelerator.num_processes, accelerator.process_index
        self.device, self.precision = accelerator.device, accelerator.mixed_precision

    @contextlib.contextmanager
    def placed(self, module: nn.Module) -> Iterator[None]:
        """Hold ``module`` on the device; afterwards it is on the CPU."""
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    def sharing(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Batch statistics are those of all processes together; afterwards layers are ordinary ones."""
        return shared_statistics(module) if self.processes > 1 else contextlib.nullcontext()

    def optimizing(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``optimizer`` whose steps scale gradients back under fp16, and skip what overflowed."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare_optimizer(optimizer)
        return prepared

    def part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A consecutive part of the batch, on the device."""
        first, last = (len(labels) * place // self.processes for place in (self.index, self.index + 1))
        return images[first:last].to(self.device), labels[first:last].to(self.device)

    def every(self, batches: Iterable[T]) -> Iterator[T]:
        """Each batch goes to one process, in turn."""
        return itertools.islice(batches, self.index, None, self.processes)

    def outputs(self, module: nn.Module, images: Tensor) -> Tensor:
        """Outputs of ``module``, computed in the number format, given in float32."""
        with self._accelerator.autocast():
            outputs: Tensor = module(images.to(self.device))
        return outputs.float()

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], share: float) -> None:
        """Gradients summed over the processes, in one reduction."""
        self._accelerator.backward(loss * share)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.processes > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            whole: Tensor = self._accelerator.reduce(flat, reduction="sum")
            for gradient, values in zip(gradients, torch.split(whole, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(values.view(gradient.shape))

    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale the gradients, back in their own units, down to ``norm`` where they are longer."""
        self._accelerator.clip_grad_norm_(parameters, norm)

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes."""
        if self.processes == 1:
            return values
        summed: Tensor = self._accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), reduction="sum"
        )
        return tuple(summed.tolist())

    def forked_rng(self) -> contextlib.AbstractContextManager[None]:
        """As `Acceleration.forked_rng`, for the random state of the device too."""
        return torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device])

    def seeds(self, *seeds: int) -> list[int]:
        """The first process draws what a single one would draw, the others something else."""
        return [*seeds, self.index] if self.index else list(seeds)


ALONE = Acceleration()


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    return any(name in os.environ for name in _MARKS)


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks. True where there is one process."""
    return not launched() or bool(_process().is_main_process)


def several() -> bool:
    """Whether this process was started as one of several."""
    return launched() and _process().num_processes > 1


def leave() -> None:
    """At the end of a process that accelerate started: part from the others in good order."""
    if launched() and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def accelerated(precision: Precision = "auto") -> Iterator[Acceleration]:
    """What a training run computes with; `Acceleration.precision` says what ``auto`` came to.

    >>> with accelerated() as acceleration:
    ...     acceleration.processes, acceleration.precision
    (1, 'no')

    Raises EngineError if accelerate is needed and not installed, or was told of a way to train that is not supported;
    ValueError for fp16 without a GPU.
    """
    if not launched() and precision in ("auto", "no"):
        yield ALONE
        return
    try:
        yield Accelerated(_accelerator(precision))
    finally:
        _forget()


def _accelerator(precision: Precision) -> Accelerator:
    library = _library(precision)
    if launched():
        _process()
    try:
        made: Accelerator = library.Accelerator(mixed_precision=None if precision == "auto" else precision)
    except ValueError as err:
        raise ValueError(f"accelerate cannot train with precision {precision!r} here: {err}") from err
    if made.mixed_precision == "fp16" and made.device.type == "cpu":  # accelerate would use float32 in silence
        raise ValueError("precision 'fp16' needs a GPU, and there is none: choose bf16 or no")
    _require_plain(made)
    return made


def _process() -> PartialState:
    """This process among the others; they meet at the first call."""
    library: Any = _library()
    state: PartialState = library.PartialState(cpu=library.utils.parse_flag_from_env("ACCELERATE_USE_CPU"))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise EngineError(
            f"{started} processes were started, but accelerate joins {state.num_processes}: for want of GPUs? Start "
            "one process, or set ACCELERATE_USE_CPU=1 to train with several on the CPU"
        )
    return state


def _library(precision: Precision = "auto") -> Any:
    try:
        import accelerate
    except ImportError as err:
        why = "accelerate launch or torchrun started this process" if launched() else f"precision is {precision!r}"
        raise EngineError(
            f"{why}, which needs Hugging Face accelerate, and that is not installed: "
            "pip install 'lorac-deploy[accelerate]'"
        ) from err
    return accelerate


def _require_plain(accelerator: Accelerator) -> None:
    """Refuse what accelerate was configured for and this trainer would not do."""
    dynamo = accelerator.state.dynamo_plugin.backend.value
    refused = {
        f"the distribution {accelerator.distributed_type.value}": accelerator.distributed_type.value not in _KNOWN,
        f"the precision {accelerator.mixed_precision}": accelerator.mixed_precision not in ("no", "fp16", "bf16"),
        "gradient accumulation": accelerator.gradient_accumulation_steps != 1,
        f"compilation by {dynamo}": dynamo.upper() != "NO",
    }
    if any(refused.values()):
        raise EngineError(
            f"accelerate is configured for {', '.join(what for what, is_so in refused.items() if is_so)}, which "
            "lorac-deploy does not do: launch with --mixed_precision no, fp16 or bf16 on one or several GPUs alone"
        )


def _forget() -> None:
    """Let the next run choose another precision: accelerate keeps its settings for the whole process otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
