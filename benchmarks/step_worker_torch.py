"""Worker: the same training in PyTorch. Options: ``network``, a file with the network, and ``compile``.

The network is folded like base.onnx, starts from the artifact's own tensors, and trains those that the artifact
trains, with AdamW (foreach) and clipping. It is in evaluation mode: a folded network differs by dropout alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.step_protocol import CLIP, LR, Epochs, Job, Prepared, Run, serve

Forward = Callable[[Tensor], Tensor]


def prepare(job: Job) -> Prepared:
    """A step of AdamW."""
    torch.set_num_threads(job.threads)
    with contextlib.suppress(RuntimeError):  # it can be set once, before the first parallel work
        torch.set_num_interop_threads(1)
    network = loaded(job)
    images, labels = (torch.from_numpy(value) for value in job.load_batch())
    forward, facts = compiled(network, images, labels) if job.options["compile"] else (network, {})
    start = [p.detach().clone() for p in trained(network)]
    step = stepper(network, forward, optimizer_of(network))
    return Prepared(
        lambda: step(images, labels, LR),
        functools.partial(_epochs, job, network, forward, start),
        functools.partial(saved_bytes, network, images, labels),
        facts,
    )


def loaded(job: Job) -> nn.Module:
    """The network at the artifact's start."""
    network: nn.Module = torch.load(job.options["network"], weights_only=False)
    return network


def trained(network: nn.Module) -> list[nn.Parameter]:
    """What trains."""
    return [p for p in network.parameters() if p.requires_grad]


def optimizer_of(network: nn.Module, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW(trained(network), lr=LR, weight_decay=weight_decay, foreach=True)


def stepper(
    network: nn.Module, forward: Forward, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor, float], float]:
    """A training step; it returns the loss before it."""
    parameters = trained(network)

    def step(images: Tensor, labels: Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(forward(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step


def compiled(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Forward, dict[str, float]]:
    """The network by torch.compile in its default mode, and the seconds that this took.

    ``first_use`` are those of the first compilation of the process, of a single layer: it imports the compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"torch.compile needs a C++ compiler, and there is no {compiler} on the path")
    first = _first_use()
    forward: Forward = torch.compile(network)
    parameters = trained(network)

    def once() -> float:
        started = time.perf_counter()
        torch.autograd.grad(functional.cross_entropy(forward(images), labels), parameters)
        return time.perf_counter() - started

    seconds = once()
    return forward, {"compile": max(0.0, seconds - once()), "first_use": first}


@functools.lru_cache(maxsize=1)
def _first_use() -> float:
    started = time.perf_counter()
    layer: Forward = torch.compile(nn.Linear(4, 4))
    layer(torch.zeros(2, 4)).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


def saved_bytes(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once; parameters and the batch are not counted."""
    known = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), images, labels)}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = functional.cross_entropy(network(images), labels)
    total = sum(t.untyped_storage().nbytes() for address, t in found.items() if address not in known)
    del loss
    return total


def _epochs(job: Job, network: nn.Module, forward: Forward, start: list[Tensor], run: Run) -> Epochs:
    """From the artifact's start, with the network that is compiled already."""
    with torch.no_grad():
        for parameter, value in zip(trained(network), start, strict=True):
            parameter.copy_(value)
    # Imported here: what it needs of this project is no part of a PyTorch process's memory.
    module = importlib.import_module("benchmarks.step_torch_epochs")
    found: Epochs = module.epochs(job, network, forward, run)
    return found


def main() -> int:
    """Compile into a folder of this process, so that every compilation is a first one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        return serve(prepare)


if __name__ == "__main__":
    sys.exit(main())
