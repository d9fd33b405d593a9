"""One round on a device: start from the fleet's adapter, train on local data, give back tensors and a few numbers."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np

from lorac_runtime.adapter import load_adapter, save_adapter
from lorac_runtime.config import Settings
from lorac_runtime.data import LocalData, load_data, split
from lorac_runtime.engines import AUTO, Engine, open_engine
from lorac_runtime.errors import AdapterError, ArtifactError, DivergenceError
from lorac_runtime.files import output_folder
from lorac_runtime.fleet.payload import Given, Payload, Tensors, from_wire, payload_of, to_wire
from lorac_runtime.fused_files import write_fused
from lorac_runtime.job import start_of
from lorac_runtime.manifest import ADAPTER, FILE_NAME, Manifest, load, sha256, verify_files
from lorac_runtime.outputs import check_place
from lorac_runtime.report import FusedFile
from lorac_runtime.tasks import require_classifier
from lorac_runtime.training import Evaluation, History, Samples, evaluate, exploded, train_epoch

PERSONAL_FILE = "personal.safetensors"
SEEDS = 1_000_003  # rounds have orders of samples of their own
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device has its artifact, its data, and a folder for what it keeps.

    ``test`` holds samples for accuracies; without it ``val_fraction`` of the data are held out for them, by class.
    """

    artifact: Path
    data: Path
    out: Path
    test: Path | None = None
    val_fraction: float = 0.2
    engine: str = AUTO
    threads: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")


@dataclasses.dataclass(frozen=True)
class Order:
    """What the server asks for. ``artifact`` is the sha256 of its manifest; ``lr`` and ``batch_size`` None: the
    artifact's own. ``personal`` and ``numbers`` say what travels (`payload_of`).
    """

    artifact: str
    round: int
    epochs: int = 1
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0
    personal: str = "none"
    numbers: str = "float32"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What goes back to the server: ``tensors``, the number of ``samples`` behind them, and the mean ``loss`` of the
    last epoch; ``before`` is how the adapter that came did on samples held out, None without any.
    """

    tensors: Tensors
    samples: int
    loss: float
    before: Evaluation | None


@dataclasses.dataclass(frozen=True)
class Device:
    """An opened `Place`: ``training`` and ``held_out`` samples, and the ``start`` state of the artifact."""

    place: Place
    manifest: Manifest
    digest: str
    training: Samples
    held_out: Samples
    start: Tensors
    metadata: dict[str, str]

    def train(self, tensors: Given, order: Order) -> Trained:
        """Train from what came; a personal head is written to the device's folder before anything is given back.

        Raises AdapterError if the artifact is another one or ``tensors`` do not fit it, DivergenceError, EngineError.
        """
        payload = self._payload(order)
        settings = self._settings(order)
        engine = self._engine(self._state(payload, tensors))
        before = evaluate(engine, self.held_out) if len(self.held_out) else None
        history = History()
        samples = dataclasses.replace(self.training, batch_size=settings.batch_size)
        while history.epoch < settings.epochs:
            history = train_epoch(engine, samples, settings, history, on_progress=lambda _: None)
        state = engine.state()
        _require_sound(state, history, settings, self.manifest.output.classes)
        sent = to_wire(payload, state)
        self._keep(payload, state, order)
        return Trained(sent, len(self.training), history.epoch_losses[-1], before)

    def evaluate(self, tensors: Given, order: Order) -> Evaluation:
        """How what came, with this device's head where that is personal, does on samples held out.

        Raises AdapterError as `train` does, ArtifactError if no samples are held out.
        """
        if not len(self.held_out):
            raise ArtifactError("no samples are held out on this device: there is nothing to evaluate on")
        return evaluate(self._engine(self._state(self._payload(order), tensors)), self.held_out)

    def adopt(self, tensors: Given, order: Order, to: tuple[str, ...] = ("onnx",)) -> tuple[FusedFile, ...]:
        """Write what came as this device's adapter.safetensors and fused files, each whole or not at all.

        Raises AdapterError as `train` does, OutputError.
        """
        state = self._state(self._payload(order), tensors)
        save_adapter(self.place.out / ADAPTER, state, self.metadata)
        return write_fused(self.place.artifact, self.place.out, state, to)

    def base(self) -> Evaluation | None:
        """How the artifact's own adapter does on samples held out; None without any."""
        return evaluate(self._engine(self.start), self.held_out) if len(self.held_out) else None

    def _payload(self, order: Order) -> Payload:
        if order.artifact != self.digest:
            raise AdapterError(
                f"the fleet trains another artifact (manifest {order.artifact[:12]}) than this device has "
                f"({self.digest[:12]}): copy the server's artifact folder to the device"
            )
        return payload_of(self.manifest, personal=order.personal, numbers=order.numbers)

    def _settings(self, order: Order) -> Settings:
        own = self.manifest.training
        return Settings(
            epochs=order.epochs,
            batch_size=order.batch_size or own.batch_size,
            lr=order.lr or own.lr,
            warmup=own.warmup,
            val_fraction=self.place.val_fraction,
            seed=order.seed * SEEDS + order.round,
        )

    def _engine(self, state: Tensors) -> Engine:
        engine = open_engine(self.place.artifact, self.manifest, engine=self.place.engine, threads=self.place.threads)
        try:
            engine.load_state(state)
        except ValueError as err:
            raise AdapterError(str(err)) from err
        return engine

    def _state(self, payload: Payload, tensors: Given) -> Tensors:
        return {**self.start, **self._personal(payload), **from_wire(payload, tensors)}

    def _personal(self, payload: Payload) -> Tensors:
        """What an earlier round kept here, nothing before the first one. Raises AdapterError for another artifact's."""
        path = self.place.out / PERSONAL_FILE
        if not payload.personal or not path.exists():
            return {}
        file = load_adapter(path)
        if file.metadata.get("artifact") != self.digest or set(file.tensors) != set(payload.personal):
            raise AdapterError(f"{path} belongs to another artifact; choose another folder, or remove it to begin anew")
        return file.tensors

    def _keep(self, payload: Payload, state: Tensors, order: Order) -> None:
        if payload.personal:
            kept = {name: state[name] for name in payload.personal}
            save_adapter(self.place.out / PERSONAL_FILE, kept, {"artifact": self.digest, "round": str(order.round)})


def open_device(place: Place) -> Device:
    """Check artifact, data and folder, and read the data. One class of samples will do: the fleet knows the others.

    Raises ArtifactError, DataError, AdapterError, OutputError.
    """
    manifest = load(place.artifact)
    require_classifier(
        place.artifact, manifest.task, "a fleet compares accuracies", "use `lorac-finetune` on each device"
    )
    check_place(place.artifact, place.out, place.data)
    output_folder(place.out)
    verify_files(place.artifact, manifest)
    local = _read(place.data, manifest)
    start, metadata = start_of(place.artifact, manifest)
    whole = Samples(local, np.arange(len(local)), manifest.input, manifest.training.batch_size)
    if place.test is not None:
        test = _read(place.test, manifest)
        training, held = whole, dataclasses.replace(whole, data=test, index=np.arange(len(test)))
    else:
        kept, out = split(local, place.val_fraction, 0)
        training, held = (dataclasses.replace(whole, index=index) for index in (kept, out))
    return Device(place, manifest, sha256(place.artifact / FILE_NAME), training, held, start, metadata)


def _read(path: Path, manifest: Manifest) -> LocalData:
    required = 1 if manifest.needs_labels else 0
    return load_data(path, manifest.input, manifest.output.classes, manifest.class_names, require_classes=required)


def _require_sound(state: Tensors, history: History, settings: Settings, classes: int) -> None:
    wrong = [name for name, value in state.items() if not np.isfinite(value).all()]
    if wrong or exploded(history, classes) or not math.isfinite(history.epoch_losses[-1]):
        raise DivergenceError(
            f"training diverged at a peak learning rate of {settings.lr:g} (the loss ended at "
            f"{history.epoch_losses[-1]:.3g}): the fleet needs a lower --lr"
        )
