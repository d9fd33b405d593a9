"""`export-training-artifact`: from a checkpoint or an ONNX file to the folder a device trains with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorac_deploy.commands._artifact_table import show
from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._options import (
    Paragraphs,
    add_device_options,
    add_lora_options,
    add_method_option,
    device_defaults,
    lora_config,
    lora_given,
    names,
    refuse_idle_lora_options,
    refuse_idle_step_options,
    sizes,
)
from lorac_exporters.artifact_config import ArtifactConfig
from lorac_exporters.choices import ENGINE_CHOICES, FORM_CHOICES, TFLITE_CHOICES
from lorac_exporters.methods import METHODS
from lorac_exporters.task_config import TaskConfig
from lorac_runtime.manifest import BN_POLICIES
from lorac_runtime.tasks import CLASSIFICATION, CUSTOM, REGRESSION, SEGMENTATION
from lorac_runtime.version import __version__

if TYPE_CHECKING:  # it imports all that exports
    from lorac_exporters.artifact import ExportReport
    from lorac_exporters.plan import LoraConfig

ARTIFACT = ArtifactConfig()


def numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers.

    >>> numbers("0.5,0.25")
    (0.5, 0.25)
    """
    return tuple(float(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    """The command's options; defaults come from the dataclasses that the API takes."""
    p = argparse.ArgumentParser(
        prog="export-training-artifact",
        formatter_class=Paragraphs,
        description="Write a training artifact: base.onnx and base.tflite, what trains them on a device, the manifest.",
    )
    p.add_argument("--version", action="version", version=f"lorac-deploy {__version__}", help="show the version")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder written by `lorac-deploy train --method full`")
    source.add_argument(
        "--onnx", type=Path, help="any ONNX classifier of images or signals, or with --task or --loss-graph any network"
    )
    p.add_argument("--out", type=Path, required=True, help="the artifact's folder; an earlier artifact is replaced")
    p.add_argument(
        "--adapter",
        type=Path,
        help="start the device from this adapter, trained in PyTorch or imported; with --checkpoint its method and "
        "settings are taken from it, unless some are given",
    )
    p.add_argument(
        "--input-uint8", action="store_true", help="put scale/mean/std into the graph: it takes raw uint8 NHWC"
    )
    p.add_argument(
        "--anchors",
        type=Path,
        help="a few images with labels (.npz or class folders) to pack into the artifact: with --keep-if-better a "
        "device accepts no model that gets worse on them",
    )
    p.add_argument("--list-changes", action="store_true", help="list everything that base.onnx does otherwise")
    _add_onnx_options(p)
    _add_task_options(p)
    _add_method_options(p)
    _add_engine_options(p)
    _add_tflite_options(p)
    add_device_options(p)
    return p


def _add_onnx_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what an ONNX file does not say (with --onnx)")
    g.add_argument(
        "--num-classes",
        type=int,
        help="equal to the graph's output width keeps the head, another number replaces it (default: keep)",
    )
    g.add_argument("--class-names", type=names, help="comma-separated, in label order (default: 0,1,2,...)")
    g.add_argument("--mean", type=numbers, help="per channel, after scaling, e.g. 0.485,0.456,0.406")
    g.add_argument("--std", type=numbers, help="per channel, after scaling, e.g. 0.229,0.224,0.225")
    g.add_argument("--scale", type=float, help="factor before mean and std (default: 1/255 of images, else 1)")
    g.add_argument("--size", type=sizes, help="HEIGHT,WIDTH where the file leaves them open")


def _add_task_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what the network is for")
    g.add_argument(
        "--task",
        choices=(CLASSIFICATION, SEGMENTATION, REGRESSION),
        help="what an ONNX file answers: a class, a class per pixel, or numbers (default: classification; a checkpoint "
        "says it itself)",
    )
    g.add_argument(
        "--loss-graph",
        type=Path,
        metavar="LOSS.onnx",
        help="for any other network, such as a detector: an ONNX graph with inputs named like the network's outputs, "
        "inputs for what the data hold (the targets), and one output, loss, a scalar",
    )
    g.add_argument(
        "--ignore-index",
        type=int,
        help="label of pixels that do not count, of segmentation (default: 255 where that is no class)",
    )


def _add_method_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what trains")
    add_method_option(g, None, f"{ARTIFACT.method}, or that of --adapter")
    g.add_argument("--bn", choices=BN_POLICIES, help=f"batch normalisation ({_policies()})")
    g.add_argument(
        "--seed",
        type=int,
        default=ARTIFACT.lora.seed,
        help="of lora_a's first values and of a new head (default: %(default)s)",
    )
    add_lora_options(p)


def _policies() -> str:
    """The default in words."""
    usual = ARTIFACT.policy
    others = [f"{own} for {name}" for name, method in METHODS.items() if (own := method.policy()) != usual]
    return ", ".join([f"default: {usual}", *others])


def _add_engine_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("what trains it on the device")
    g.add_argument(
        "--engine",
        choices=ENGINE_CHOICES,
        default=ARTIFACT.engine,
        help="onnxruntime runs everywhere; auto takes it wherever it can train the model (default: %(default)s)",
    )
    g.add_argument(
        "--form",
        choices=FORM_CHOICES,
        default=ARTIFACT.form,
        help="how onnxruntime computes adapters: as thin branches, by updating weights, or by layer as costs less "
        "(default: %(default)s)",
    )


def _add_tflite_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("base.tflite")
    g.add_argument(
        "--tflite",
        choices=TFLITE_CHOICES,
        default=ARTIFACT.tflite,
        help="how it stores its weights; auto is float32, or no such file where TFLite cannot do the model "
        "(default: %(default)s)",
    )
    g.add_argument(
        "--calibration",
        type=Path,
        help="with --tflite int8: images (.npz or class folders) from which the ranges of activations are measured",
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.onnx is not None and (args.mean is None or args.std is None):
        p.error("--onnx needs --mean and --std: the file does not say how its input was normalised")
    with usage_errors(p):
        lora = _settled(args)
    _refuse_idle_options(p, args)
    with usage_errors(p):
        config = _config(args, lora)
    console = Console(stderr=True)
    with console.status("reading the model") as status:
        report = _export(args, config, lambda text: status.update(text))
    show(report, list_changes=args.list_changes)
    return 0


def _refuse_idle_options(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that would change nothing."""
    given = [n for n in ("num_classes", "class_names", "mean", "std", "scale", "size") if getattr(args, n) is not None]
    if args.checkpoint is not None and given:
        p.error(f"--{given[0].replace('_', '-')} describes an ONNX file; a checkpoint says it itself")
    if args.checkpoint is not None and args.task is not None:
        p.error("--task says what an ONNX file is for; a checkpoint says it itself")
    if args.loss_graph is not None:
        told = [n for n in ("task", "num_classes", "class_names", "loss", "anchors") if getattr(args, n) is not None]
        if told:
            p.error(f"--{told[0].replace('_', '-')} does not go with --loss-graph, which alone says what is learned")
    if args.anchors is not None and args.task not in (None, CLASSIFICATION):
        p.error(f"--anchors are samples with a class, and the task is {args.task}: leave them out")
    if (args.tflite == "int8") != (args.calibration is not None):
        p.error("--tflite int8 needs --calibration, and nothing else does")
    refuse_idle_lora_options(p, args)
    refuse_idle_step_options(p, args, dataclasses.asdict(ARTIFACT.settings))


def _settled(args: argparse.Namespace) -> LoraConfig:
    """The settings that are given, else the adapter's; the method, which `args` then has, likewise."""
    if args.adapter is not None and args.checkpoint is not None and not (args.method or lora_given(args)):
        from lorac_deploy.adapter_files import settings_of
        from lorac_deploy.checkpoint import load_checkpoint

        args.method, lora = settings_of(args.adapter, load_checkpoint(args.checkpoint).module)
        return lora
    args.method = args.method or ARTIFACT.method
    return lora_config(args, args.seed)


def _config(args: argparse.Namespace, lora: LoraConfig) -> ArtifactConfig:
    kind = _kind(args)
    return ArtifactConfig(
        lora=lora,
        method=args.method,
        bn_policy=args.bn,
        engine=args.engine,
        form=args.form,
        tflite=args.tflite,
        training=device_defaults(args.method, args, kind),
        task=TaskConfig(kind, args.loss_graph, args.ignore_index),
    )


def _kind(args: argparse.Namespace) -> str:
    """The task: as asked for, or as the checkpoint says."""
    if args.loss_graph is not None:
        return CUSTOM
    if args.checkpoint is not None:
        from lorac_deploy.checkpoint import task_of

        return task_of(args.checkpoint)
    return args.task or CLASSIFICATION


def _export(args: argparse.Namespace, config: ArtifactConfig, on_progress: Callable[[str], None]) -> ExportReport:
    from lorac_deploy.export import OnnxSource, export_training_artifact

    source: Path | OnnxSource = args.checkpoint
    if args.onnx is not None:
        source = OnnxSource(
            path=args.onnx,
            mean=args.mean,
            std=args.std,
            scale=args.scale,
            num_classes=args.num_classes,
            class_names=args.class_names,
            size=args.size,
        )
    return export_training_artifact(
        source,
        args.out,
        config=config,
        adapter=args.adapter,
        input_uint8=args.input_uint8,
        calibration=args.calibration,
        anchors=args.anchors,
        on_progress=on_progress,
    )
