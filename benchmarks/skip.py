"""Skip2-LoRA (arXiv 2410.21073): time of fine-tuning with skip adapters and a cache beside LoRA on all layers.

Both train about as many parameters, on the same data, with the device's engine. Runs are interleaved; seconds are those
of training alone, and those of the whole run from the artifact to the fused file; medians and minima over rounds,
ratios within one run. Skip adapters are also tried behind recalibrated batch normalisations, since they leave the
features as they are. The same is done with adapters in the last block, where the cache must not change a byte of the
adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import DATA, local_and_test, resnet20_checkpoint
from lorac_deploy.bench.environment import environment
from lorac_deploy.checkpoint import save_checkpoint
from lorac_deploy.corruptions import corrupt
from lorac_deploy.data import Dataset
from lorac_deploy.export import export_training_artifact
from lorac_deploy.lora import fuse
from lorac_deploy.models import ModelSpec, build
from lorac_deploy.study.bench import accuracy
from lorac_deploy.study_data import fan_spectra, flip
from lorac_deploy.train_config import DEFAULTS
from lorac_deploy.trainer import train
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.costs import artifact_costs
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import LoraConfig
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.engines import Engine
from lorac_runtime.manifest import ADAPTER, BnPolicy, InputSpec
from lorac_runtime.outputs import FUSED
from lorac_runtime.session import finetune
from lorac_runtime.training import History

CACHE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of fine-tuning: a method with its settings, and whether a cache is used."""

    name: str
    method: str
    lora: LoraConfig
    cache: bool = False
    bn: BnPolicy | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """Data to fine-tune with and to test on, and the ways to compare; the first is what others are divided by."""

    name: str
    base: Path
    local: Path
    test: Path
    epochs: int
    ways: tuple[Way, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one way: ``seconds`` of training and ``whole`` ones in each round, ``work`` multiply-adds of all."""

    case: str
    way: str
    trained: int
    accuracy_before: float
    accuracy: float
    seconds: tuple[float, ...]
    ratio: float
    whole: tuple[float, ...]
    whole_ratio: float
    work: int
    work_ratio: float
    hit_rate: float | None
    adapter_sha256: str


def ways(skip: int, low_rank: int) -> tuple[Way, ...]:
    """LoRA on all layers, and skip adapters without and with a cache; ranks that train about as many parameters."""
    low = Way("lora-all", "lora-all", LoraConfig(rank=low_rank, rank_mode="r"))
    plain = Way("skip", "skip", LoraConfig(rank=skip))
    return (low, plain, dataclasses.replace(plain, name="skip, cache", cache=True))


def image_ways() -> tuple[Way, ...]:
    """Those, and skip adapters behind batch normalisations with statistics of the new images."""
    found = ways(9, 1)
    moved = dataclasses.replace(found[-1], name="skip, cache, recalibrated", bn="recalibrate")
    return (*found, moved)


def rear_ways() -> tuple[Way, ...]:
    """Adapters in the last block, without and with a cache, beside adapters everywhere."""
    rear = Way("lora-c rear", "lora-c", LoraConfig(blocks=("rear",)))
    return (
        Way("lora-c", "lora-c", LoraConfig()),
        rear,
        dataclasses.replace(rear, name="lora-c rear, cache", cache=True),
    )


def cifar_cases(work: Path, data: Path, count: int, epochs: int) -> list[Case]:
    """A ResNet-20 under two corruptions and with flipped labels; under the first its last block alone, too."""
    base = resnet20_checkpoint(work / "resnet20", data)
    (pixels, labels), (test, answers) = local_and_test(count, 0, data)
    cases = []
    for name in ("contrast:5", "gaussian_noise:5", "flip"):
        local, drifted = work / f"{name}.npz", work / f"{name}-test.npz"
        if name == "flip":
            np.savez(local, images=pixels, labels=flip(labels, 10))
            np.savez(drifted, images=test, labels=flip(answers, 10))
        else:
            kind, severity = name.split(":")
            np.savez(local, images=corrupt(pixels, kind, int(severity), seed=2), labels=labels)
            np.savez(drifted, images=corrupt(test, kind, int(severity), seed=1), labels=answers)
        cases.append(Case(f"ResNet-20, {name}", base, local, drifted, epochs, image_ways()))
    first = dataclasses.replace(cases[0], name=f"{cases[0].name}, last block", ways=rear_ways())
    return [*cases, first]


def fan_case(work: Path, data: Path, epochs: int) -> Case:
    """The fan network of the paper: trained in silence, adapted to noise."""
    path = data / "cooling_fan_spectra.npz"
    silent = fan_spectra(path, ("silentA", "silentB"), recordings=("1",), bins=256)
    noisy = fan_spectra(path, ("noisy",), bins=256)
    order = np.random.default_rng(0).permutation(len(noisy))
    local, test = noisy.select(order[: len(order) // 2]), noisy.select(order[len(order) // 2 :])
    for name, part in (("fan", local), ("fan-test", test)):
        np.savez(work / f"{name}.npz", samples=part.images, labels=part.labels)
    base = _fan_network(work / "fan-base", silent)
    return Case("fan, silent to noisy", base, work / "fan.npz", work / "fan-test.npz", epochs, ways(4, 3))


def measure(case: Case, work: Path, rounds: int) -> list[Row]:
    """Run every way of a case ``rounds`` times, in turns that change their order."""
    artifacts = {way.name: _exported(case, way, work) for way in case.ways}
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in case.ways}
    found: dict[str, tuple[float, float | None, str]] = {}
    for turn in range(rounds):
        for way in case.ways if turn % 2 == 0 else reversed(case.ways):
            with tempfile.TemporaryDirectory(dir=work) as out:
                training, whole, rate = _run(artifacts[way.name], case.local, Path(out) / "out", way)
                seconds[way.name].append((training, whole))
                fused, adapter = (Path(out) / "out" / name for name in (FUSED["onnx"], ADAPTER))
                digest = hashlib.sha256(adapter.read_bytes()).hexdigest()
                found[way.name] = (accuracy(fused, case.test, artifacts[way.name]), rate, digest)
    count = len(np.load(case.local)["labels"])
    works = {way.name: _work(artifacts[way.name], way, count, case.epochs) for way in case.ways}
    first = case.ways[0].name
    before = accuracy(artifacts[first] / "base.onnx", case.test, artifacts[first])
    return [
        Row(
            case=case.name,
            way=way.name,
            trained=artifact_costs(artifacts[way.name]).trained_parameters,
            accuracy_before=before,
            accuracy=found[way.name][0],
            seconds=tuple(a for a, _ in seconds[way.name]),
            ratio=_ratio(seconds[way.name], seconds[first], 0),
            whole=tuple(b for _, b in seconds[way.name]),
            whole_ratio=_ratio(seconds[way.name], seconds[first], 1),
            work=works[way.name],
            work_ratio=works[way.name] / works[first],
            hit_rate=found[way.name][1],
            adapter_sha256=found[way.name][2],
        )
        for way in case.ways
    ]


def main(argv: Sequence[str]) -> int:
    """Run all cases, print a table, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks skip", description=__doc__)
    p.add_argument("--epochs", type=int, default=20, help="those on images (default: %(default)s)")
    p.add_argument("--fan-epochs", type=int, default=100, help="those on spectra (default: %(default)s)")
    p.add_argument("--images", type=int, default=1000, help="local images (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    p.add_argument("--data", type=Path, default=DATA, help="data folder (default: beside the checkout)")
    p.add_argument("--out", type=Path, required=True, help="JSON file")
    args = p.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        fans = fan_case(work, args.data, args.fan_epochs)
        for case in (fans, *cifar_cases(work, args.data, args.images, args.epochs)):
            rows += measure(case, work, args.rounds)
            print(table([row for row in rows if row.case == case.name]), flush=True)
    epochs = {"images": args.epochs, "spectra": args.fan_epochs}
    result = {"environment": environment(), "epochs": epochs, "rows": [dataclasses.asdict(row) for row in rows]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    columns = ["case", "way", "trained", "accuracy", "training s (min, median)", "ratio", "whole run s", "ratio"]
    columns += ["multiply-adds", "hits", "adapter's sha256"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        spent, whole = (f"{min(s):.2f}, {statistics.median(s):.2f}" for s in (row.seconds, row.whole))
        hits = "" if row.hit_rate is None else f"{row.hit_rate:.1%}"
        changed = f"{100 * row.accuracy_before:.1f} -> {100 * row.accuracy:.1f}"
        shares = f"{row.ratio:.3f} | {whole} | {row.whole_ratio:.3f} | {row.work_ratio:.3f}"
        cells = (row.case, row.way, f"{row.trained:,}", changed, spent, shares, hits, row.adapter_sha256[:8])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _exported(case: Case, way: Way, work: Path) -> Path:
    out = work / "artifacts" / hashlib.sha256(f"{case.name} {way.name}".encode()).hexdigest()[:12]
    out.parent.mkdir(exist_ok=True)
    training = METHODS[way.method].training(epochs=case.epochs)
    config = ArtifactConfig(
        lora=way.lora, method=way.method, bn_policy=way.bn, engine="onnxruntime", tflite="none", training=training
    )
    export_training_artifact(case.base, out, config=config, on_progress=lambda _: None)
    return out


def _ratio(own: list[tuple[float, float]], reference: list[tuple[float, float]], which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(own, reference, strict=True))


def _run(artifact: Path, data: Path, out: Path, way: Way) -> tuple[float, float, float | None]:
    """(seconds of training, those of the whole run, share of look-ups that the cache answered)."""
    spent = [0.0]

    def note(_: Engine, history: History) -> None:
        spent[0] = history.seconds

    config = FinetuneConfig(val_fraction=0.0, threads=1, cache=CACHE if way.cache else None)
    report = finetune(artifact, data, out, config, on_epoch=note)
    return spent[0], report.seconds, None if report.cache is None else report.cache.hit_rate


def _work(artifact: Path, way: Way, samples: int, epochs: int) -> int:
    """Multiply-adds of all training; a pass that recalibrates counts as one through the frozen front."""
    costs = artifact_costs(artifact, 1)
    passes = (1 if way.cache else epochs) + (way.bn == "recalibrate")
    return samples * (passes * costs.prefix_multiply_adds + epochs * costs.multiply_adds)


def _fan_network(out: Path, silent: Dataset) -> Path:
    """The paper's fully connected network, trained on fans in silent rooms."""
    spec = ModelSpec("mlp", classes=3, channels=silent.images.shape[1])
    mean, std = float(silent.images.mean()), float(silent.images.std())
    given = InputSpec("input", silent.images.shape[1:], 1.0, (mean,), (std,), dtype="float32")
    module = build(spec)
    train(module, silent, input_spec=given, config=dataclasses.replace(DEFAULTS["full"], epochs=20))
    save_checkpoint(out, fuse(module), spec, input_spec=given, class_names=silent.class_names, metrics={})
    return out
