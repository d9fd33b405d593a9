"""From a file of another library to adapter.safetensors, checked by what the network answers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac_deploy.adapter_files import attach_adapter, save_module_adapter
from lorac_deploy.checkpoint import Checkpoint, load_checkpoint
from lorac_deploy.interchange.change import Change
from lorac_deploy.interchange.factorise import Fit, Kind, fitted, tensors_of
from lorac_deploy.interchange.own_folder import own_file
from lorac_deploy.interchange.reading import OWN, Source, kind_of, read
from lorac_exporters.plan import layer_of
from lorac_runtime.errors import AdapterError
from lorac_runtime.files import atomic_write

SAMPLES = 4  # random ones, on which outputs are compared


@dataclasses.dataclass(frozen=True)
class Imported:
    """What `import_adapter` wrote to ``path``. ``output_error`` is relative to the largest output."""

    path: Path
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]
    output_error: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def import_adapter(
    source: Source, base: Path, out: Path, *, rank: int | None = None, kind: Kind = "lora-c"
) -> Imported:
    """Read an adapter of another library for the checkpoint folder ``base`` and write it as an adapter file.

    ``rank`` and ``kind`` are those of `lorac_deploy.interchange.factorise.fitted`.

    Raises AdapterError if it is damaged or not of this network, listing all problems; CheckpointError, OutputError.
    """
    checkpoint = load_checkpoint(base)
    if kind_of(source) == OWN:
        return _own(source, checkpoint, out, rank, kind)
    change = read(source, tensors_of(checkpoint.module))
    exact = changed(checkpoint.module, change)
    prepared = copy.deepcopy(checkpoint.module)
    try:
        fits = fitted(prepared, change, kind=kind, rank=rank)
    except ValueError as err:
        raise AdapterError(f"{source.path} cannot be held by an adapter of this network: {err}") from err
    save_module_adapter(out, prepared, model=checkpoint.spec.name)
    return Imported(out, fits, change.notes, _difference(exact, prepared, checkpoint))


def _own(source: Source, checkpoint: Checkpoint, out: Path, rank: int | None, kind: Kind) -> Imported:
    """An adapter of this project: put on the network to see that it fits, then copied as it is."""
    if rank is not None or kind != "lora-c":
        raise AdapterError(
            f"{source.path} is an adapter of this project already, which is taken as it is; leave rank and whole out"
        )
    file, prepared = own_file(source.path), copy.deepcopy(checkpoint.module)
    report = attach_adapter(file, prepared)
    content = file.read_bytes()
    atomic_write(out, content)
    fits = [Fit(adapter.layer, adapter.rank, 0.0) for adapter in report.adapters]
    full = dict.fromkeys(layer_of(name) for name in report.full)
    fits += [Fit(layer, None, 0.0) for layer in full]
    return Imported(out, tuple(fits), (f"an adapter of this project (method {report.method}), copied as it is",), 0.0)


def changed(module: nn.Module, change: Change) -> nn.Module:
    """A copy of the network with the exact change in its tensors."""
    found = copy.deepcopy(module)
    state = found.state_dict()
    with torch.no_grad():
        for name, value in change.applied(tensors_of(module)).items():
            state[name].copy_(torch.from_numpy(value))
    return found.eval()


def _difference(exact: nn.Module, prepared: nn.Module, checkpoint: Checkpoint) -> float:
    """Of the outputs for random inputs, relative to the largest."""
    inputs = torch.randn(SAMPLES, *checkpoint.input.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = exact(inputs), prepared.eval()(inputs)
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-30))
