"""How much does fine-tuning on the device help, per method and corruption, with default settings?

A ResNet-20 pretrained on CIFAR-10 meets corrupted images. 1,000 corrupted training images are the local data;
accuracy is taken on 1,000 official test images, corrupted alike (and clean: forgetting). The path is the
product's own: export-training-artifact, fine-tuning by the runtime, fused.onnx in onnxruntime.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.cifar10 import DATA, Images, Labels, local_and_test, resnet20_checkpoint
from lorac_deploy.bench.environment import environment
from lorac_deploy.corruptions import corrupt
from lorac_deploy.export import export_training_artifact
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.verify import run_onnx
from lorac_runtime.data import preprocess
from lorac_runtime.manifest import load
from lorac_runtime.session import FinetuneConfig, finetune

DEFAULT = "gaussian_noise:5,impulse_noise:5,contrast:5,brightness:5,jpeg_compression:5,pixelate:5,fog:5,defocus_blur:5"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell: accuracies as fractions of the test images; ``seconds`` is the whole fine-tuning."""

    method: str
    corruption: str
    severity: int
    base_drifted: float
    adapted_drifted: float
    base_clean: float
    adapted_clean: float
    trained_parameters: int
    seconds: float


def accuracy(model: Path, artifact: Path, images: Images, labels: Labels) -> float:
    """Fraction of images that an .onnx file of this artifact classifies rightly."""
    inputs = preprocess(images, load(artifact).input)
    logits = np.concatenate([run_onnx(model, part) for part in np.array_split(inputs, max(1, len(inputs) // 250))])
    return float(np.mean(logits.argmax(1) == labels))


def measure(
    artifact: Path,
    work: Path,
    *,
    corruption: str,
    severity: int,
    local: tuple[Images, Labels],
    test: tuple[Images, Labels],
) -> Row:
    """Fine-tune one artifact on one corruption with its default settings."""
    images, labels = test
    drifted = corrupt(images, corruption, severity, seed=1)
    data = work / "local.npz"
    np.savez(data, images=corrupt(local[0], corruption, severity, seed=2), labels=local[1])
    out = work / f"{artifact.name}-{corruption}"
    report = finetune(artifact, data, out, FinetuneConfig(restart=True))
    manifest, fused = load(artifact), out / "fused.onnx"
    return Row(
        method=manifest.method,
        corruption=corruption,
        severity=severity,
        base_drifted=accuracy(artifact / "base.onnx", artifact, drifted, labels),
        adapted_drifted=accuracy(fused, artifact, drifted, labels),
        base_clean=accuracy(artifact / "base.onnx", artifact, images, labels),
        adapted_clean=accuracy(fused, artifact, images, labels),
        trained_parameters=manifest.trained_parameters,
        seconds=report.seconds,
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, accuracies in percent."""
    head = "| corruption | method | trained | base drifted | adapted drifted | base clean | adapted clean | seconds |"
    lines = [head, "|" + "---|" * 8]
    for row in rows:
        shares = (row.base_drifted, row.adapted_drifted, row.base_clean, row.adapted_clean)
        percent = " | ".join(f"{100 * share:.1f}" for share in shares)
        name = f"{row.corruption} {row.severity}"
        lines.append(f"| {name} | {row.method} | {row.trained_parameters:,} | {percent} | {row.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Run the grid, print the table, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks adaptation", description=__doc__)
    p.add_argument("--methods", default="lora-c", help="comma-separated (default: %(default)s)")
    p.add_argument("--corruptions", default=DEFAULT, help="NAME:SEVERITY, comma-separated (default: %(default)s)")
    p.add_argument("--images", type=int, default=1000, help="local images (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of local images (default: %(default)s)")
    p.add_argument("--data", type=Path, default=DATA, help="data folder (default: beside the checkout)")
    p.add_argument("--out", type=Path, required=True, help="JSON file")
    args = p.parse_args(argv)
    local, test = local_and_test(args.images, args.seed, args.data)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = resnet20_checkpoint(Path(scratch) / "base", args.data)
        for method in args.methods.split(","):
            artifact = Path(scratch) / method
            export_training_artifact(base, artifact, config=ArtifactConfig(method=method))
            for cell in args.corruptions.split(","):
                name, severity = cell.split(":")
                rows.append(
                    measure(artifact, Path(scratch), corruption=name, severity=int(severity), local=local, test=test)
                )
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    result = {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    return 0
