"""`lorac-deploy train`: train or fine-tune a CNN in PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorac_deploy.commands._common import guarded, usage_errors
from lorac_deploy.commands._options import (
    OF_MODEL,
    Paragraphs,
    add_lora_options,
    add_method_option,
    add_training_options,
    image_size,
    lora_config,
    names,
    refuse_idle_lora_options,
    refuse_idle_step_options,
    training_config,
)
from lorac_deploy.commands._training_display import Display, show
from lorac_deploy.train_config import TrainConfig
from lorac_exporters.plan import LoraConfig
from lorac_runtime.tasks import CLASSIFICATION, REGRESSION, SEGMENTATION

if TYPE_CHECKING:  # they import PyTorch
    from lorac_deploy.data import Dataset, Split
    from lorac_deploy.start import Start
    from lorac_deploy.training_report import TrainReport

    Prepared = tuple[Start, Dataset, Dataset | None]

MODEL = {3: "resnet18", 2: "cnn1d", 1: "mlp"}  # by the axes of a sample: images, then signals
DENSE_MODEL = "unet_small"
FROM_SCRATCH = "full"  # the method that needs no trained network


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy train",
        usage="%(prog)s --data DATA --out OUT [--base FOLDER | --model NAME] [--method METHOD] [options]",
        formatter_class=Paragraphs,
        description="Train or fine-tune a CNN in PyTorch. The same command goes on where it was interrupted.",
    )
    add_method_option(p, FROM_SCRATCH)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="output folder: a checkpoint, or of adapters adapter.safetensors; report.json and plot.png",
    )
    p.add_argument("--restart", action="store_true", help="begin anew, whatever an interrupted run left in --out")
    _add_data_options(p)
    _add_network_options(p)
    add_training_options(p)
    add_lora_options(p)
    return p


def _add_data_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        required=True,
        help="digits, cifar10, cifar100, an .npz file (images, or samples of signals, and labels), or a folder with "
        "one sub-folder per class (of other tasks see --task)",
    )
    g.add_argument("--data-root", type=Path, help="folder of torchvision's CIFAR files")
    g.add_argument(
        "--task",
        choices=(CLASSIFICATION, SEGMENTATION, REGRESSION),
        help="what is learned: a class, a class for each pixel (labels (n, height, width) in the .npz file, or folders "
        "images and masks), or numbers (targets (n, numbers) in it); default: classification, or what --base says",
    )
    g.add_argument("--download", action="store_true", help="download CIFAR into --data-root if it is not there")
    g.add_argument(
        "--size",
        type=image_size,
        help="resize images to HEIGHT,WIDTH or a square, or as timm's weights of --model want them: "
        "model (default: as stored; digits 32)",
    )
    g.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (default: 3)")
    g.add_argument("--class-names", type=names, help="comma-separated, in label order (default: the data's own)")
    g.add_argument(
        "--normalize",
        choices=("data", OF_MODEL, "imagenet", "cifar10", "cifar100"),
        help="mean and deviation: of the training images, or known ones; model: those of timm's weights of --model "
        "(default: known for CIFAR and with --weights, of timm's networks model; else data)",
    )


def _add_network_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("network")
    g.add_argument("--base", type=Path, help="start from this checkpoint folder; it says model, input and classes")
    g.add_argument("--new-head", action="store_true", help="with --base: a fresh head for the data's classes")
    g.add_argument(
        "--model",
        help=f"a network by name, or one of timm's: timm/NAME (default: {MODEL[3]}, of signals {MODEL[1]} or "
        f"{MODEL[2]}; an unknown name lists all)",
    )
    g.add_argument("--cifar-stem", action="store_true", help="a stem that keeps the resolution of small images")
    g.add_argument(
        "--weights",
        type=Path,
        help="start from a .pth or .safetensors file, or from torchvision's or timm's own: imagenet",
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    _refuse_idle_options(p, args)
    from lorac_deploy.acceleration import is_main, leave, several

    if args.download and several():
        p.error("--download: all processes would download at once; download with a single one first")
    console = Console(stderr=True, highlight=False, quiet=not is_main())
    with usage_errors(p):  # settings that fit neither each other nor the data
        args.task = _task(p, args)
        config = training_config(args.method, args, args.task)
        lora = lora_config(args, config.seed)
        with console.status("reading data and network"):
            prepared = _prepared(args, config.seed)
        report, saved = _run(args, console, prepared, config=config, lora=lora)
    show(report, saved, console)
    leave()
    return 0


def _refuse_idle_options(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An option that would change nothing is a mistake."""
    if args.base is not None:
        told = ("model", "cifar_stem", "weights", "size", "channels", "normalize")
        _refuse(p, args, told, "says what the checkpoint of --base says itself")
    elif args.new_head:
        p.error("--new-head goes with --base; other networks get a head for the data's classes anyway")
    elif args.method != FROM_SCRATCH and args.weights is None:
        p.error(f"--method {args.method} fine-tunes a trained network: give --base or --weights")
    if args.task not in (None, CLASSIFICATION):
        _refuse(p, args, ("data_root", "download", "size", "new_head"), f"does not go with --task {args.task}")
        if args.task == REGRESSION:
            _refuse(p, args, ("class_names",), "names classes, and regression has none")
    if not args.data.startswith("cifar"):
        _refuse(p, args, ("data_root", "download"), "goes with cifar10 and cifar100")
    refuse_idle_lora_options(p, args)
    refuse_idle_step_options(p, args, {field.name: None for field in dataclasses.fields(TrainConfig)})


def _refuse(p: argparse.ArgumentParser, args: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    given = [name for name in options if getattr(args, name) not in (None, False)]
    if given:
        p.error(f"--{given[0].replace('_', '-')} {why}")


def _prepared(args: argparse.Namespace, seed: int) -> Prepared:
    """The starting network, training images and, where there are any, test images, that fit each other."""
    from lorac_deploy.data import has_test_split, with_classes
    from lorac_deploy.start import from_checkpoint, with_new_head

    if OF_MODEL in (args.size, args.normalize):
        _require_timm(args)
    start = None if args.base is None else from_checkpoint(args.base)
    dataset = _load(args, start, "train")
    test = _load(args, start, "test") if has_test_split(args.data) else None
    if start is None:
        return _new_network(args, dataset, seed), dataset, test
    if args.new_head:
        return with_new_head(start, dataset.class_names, seed=seed), dataset, test
    known = start.class_names
    return start, with_classes(dataset, known), None if test is None else with_classes(test, known)


def _task(p: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """As asked for, or as the checkpoint says."""
    if args.base is None:
        return args.task or CLASSIFICATION
    from lorac_deploy.checkpoint import task_of

    known = task_of(args.base)
    if args.task not in (None, known):
        p.error(f"--task {args.task}, but the checkpoint of --base is for {known}")
    return known


def _load(args: argparse.Namespace, start: Start | None, split: Split) -> Dataset:
    from lorac_deploy import timm_nets
    from lorac_deploy.data import load_dataset, named

    channels = args.channels
    size = timm_nets.size(args.model) if args.size == OF_MODEL else args.size
    if start is not None and start.input.is_image:
        channels, size = start.input.shape[0], start.input.shape[1:]
    dataset = load_dataset(
        args.data,
        split=split,
        size=size,
        channels=channels,
        root=args.data_root,
        download=args.download,
        task=args.task,
    )
    return dataset if args.class_names is None else named(dataset, args.class_names)


def _new_network(args: argparse.Namespace, dataset: Dataset, seed: int) -> Start:
    from lorac_deploy import timm_nets
    from lorac_deploy.data import input_spec
    from lorac_deploy.models import ModelSpec, require_axes
    from lorac_deploy.start import from_model

    model = args.model or (DENSE_MODEL if args.task == SEGMENTATION else MODEL[len(dataset.shape)])
    outputs = dataset.labels.shape[1] if args.task == REGRESSION else len(dataset.class_names)
    spec = ModelSpec(model, outputs, args.cifar_stem, dataset.shape[0], args.task)
    require_axes(model, dataset.shape)
    known = args.data if args.data.startswith("cifar") else "imagenet" if args.weights else "data"
    if args.weights and timm_nets.is_timm(model):
        known = OF_MODEL
    normalization = args.normalize or (known if dataset.is_image and dataset.shape[0] == 3 else "data")
    return from_model(
        spec,
        input_spec(dataset.images, timm_nets.statistics(model) if normalization == OF_MODEL else normalization),
        class_names=dataset.class_names,
        weights=args.weights,
        seed=seed,
    )


def _require_timm(args: argparse.Namespace) -> None:
    """Raise ValueError unless --model is one of timm's: no other network says what its weights were trained on."""
    from lorac_deploy.timm_nets import is_timm

    if args.model is None or not is_timm(args.model):
        option = "--size" if args.size == OF_MODEL else "--normalize"
        raise ValueError(f"{option} {OF_MODEL} goes with one of timm's networks: --model timm/NAME")


def _run(
    args: argparse.Namespace, console: Console, prepared: Prepared, *, config: TrainConfig, lora: LoraConfig
) -> tuple[TrainReport, Path]:
    """Train with a progress bar, and save."""
    from lorac_deploy.acceleration import is_main
    from lorac_deploy.train_checks import require_fresh_head_trains
    from lorac_deploy.trainer import train
    from lorac_deploy.training_outputs import save_training
    from lorac_deploy.training_state import STATE
    from lorac_runtime.files import output_folder

    start, dataset, test = prepared
    if start.fresh:
        require_fresh_head_trains(start.module, start.fresh, start.input, method=args.method, config=config, lora=lora)
        console.print(f"these tensors start fresh: {', '.join(start.fresh)}")
    state = output_folder(args.out) / STATE
    with _hint(console, state), Display(console, args.task) as display:
        report = train(
            start.module,
            dataset,
            input_spec=start.input,
            method=args.method,
            config=config,
            lora=lora,
            test=test,
            state=state,
            restart=args.restart,
            on_progress=display.show,
        )
    if not is_main():
        return report, args.out
    saved = save_training(args.out, start, report)
    state.unlink(missing_ok=True)
    return report, saved


@contextmanager
def _hint(console: Console, state: Path) -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if state.exists():
            console.print("the same command (without --restart) goes on after the last whole epoch")
        raise
