"""Whole epochs in PyTorch: the order of images, the batches and the schedule of this project's training loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step_protocol import Epochs, Job, Run
from benchmarks.step_worker_torch import Forward, optimizer_of, stepper
from lorac_runtime.manifest import InputSpec, load
from lorac_runtime.schedule import one_cycle

TEST_BATCH = 128


class Images:
    """Raw images and labels of a file, prepared batch by batch."""

    def __init__(self, path: str, spec: InputSpec) -> None:
        with np.load(path) as arrays:
            self.pixels, self.labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        self._mean, self._std = (torch.tensor(value).reshape(-1, 1, 1) for value in (spec.mean, spec.std))
        self._scale = spec.scale

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images as the network takes them, and their labels."""
        images = self.pixels[index].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.mul_(self._scale).sub_(self._mean).div_(self._std), self.labels[index]


def epochs(job: Job, network: nn.Module, forward: Forward, run: Run) -> Epochs:
    """With a fresh optimizer; ``forward`` is the network, perhaps compiled."""
    manifest = load(Path(job.artifact))
    found, data = Epochs(), Images(run.data, manifest.input)
    step = stepper(network, forward, optimizer_of(network, manifest.training.weight_decay))
    judge = functools.partial(accuracy, network, Images(run.test or run.data, manifest.input))
    for epoch in range(run.epochs):
        started = time.perf_counter()
        losses = _epoch(step, data, run, epoch)
        if found.add(run, time.perf_counter() - started, losses, judge):
            break
    return found


def _epoch(step: Callable[[Tensor, Tensor, float], float], data: Images, run: Run, epoch: int) -> list[float]:
    order = torch.from_numpy(np.random.default_rng([run.seed, epoch]).permutation(len(data)))
    batches = torch.split(order, run.batch_size)
    total, first = run.epochs * len(batches), epoch * len(batches)
    rates = [one_cycle(first + i, total, peak=run.lr, warmup=run.warmup) for i in range(len(batches))]
    return [step(*data.batch(index), rate) for index, rate in zip(batches, rates, strict=True)]


def accuracy(network: nn.Module, test: Images) -> float:
    """The share of images that are classified rightly."""
    right = 0
    with torch.no_grad():
        for index in torch.split(torch.arange(len(test)), TEST_BATCH):
            images, labels = test.batch(index)
            right += int((network(images).argmax(1) == labels).sum())
    return right / len(test)
