"""Options that are made from settings: each field of a dataclass becomes one, its default stands beside the field."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lorac_deploy.train_config import DEFAULTS, TrainConfig
from lorac_exporters.methods import METHODS
from lorac_exporters.plan import BIASES, SMALL_LAYERS, LoraConfig
from lorac_runtime.delta import LAYOUTS, RANK_MODES
from lorac_runtime.manifest import LOSSES, OPTIMIZERS, TrainingDefaults
from lorac_runtime.tasks import CLASSIFICATION, LOSSES_OF

OF_MODEL = "model"  # what the weights of --model were trained with
_NAMES = {"bn_policy": "bn"}  # field -> option, where it is not the field's name
_WITHOUT_STEPS = {"batch_size", "loss", "bn_policy", "val_fraction", "seed", "threads"}  # count without training too


class Paragraphs(argparse.HelpFormatter):
    """Help in which the line breaks of an option's text stay."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in super(Paragraphs, self)._split_lines(part, width)]


def sizes(text: str) -> tuple[int, int]:
    """``HEIGHT,WIDTH`` or one number for both.

    >>> sizes("224"), sizes("96,128")
    ((224, 224), (96, 128))
    """
    parts = [int(part) for part in text.split(",")]
    if len(parts) > 2 or min(parts) < 1:
        raise ValueError(text)
    return parts[0], parts[-1]


def image_size(text: str) -> tuple[int, int] | str:
    """`sizes`, or ``model``: the size that the network's own weights were trained on.

    >>> image_size("96"), image_size("model")
    ((96, 96), 'model')
    """
    return text if text == OF_MODEL else sizes(text)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names.

    >>> names("cat, dog")
    ('cat', 'dog')
    """
    return tuple(part.strip() for part in text.split(","))


def pair(text: str) -> tuple[float, float]:
    """Two numbers.

    >>> pair("0.9,0.99")
    (0.9, 0.99)
    """
    first, second = (float(part) for part in text.split(","))
    return first, second


def add_method_option(p: argparse._ActionsContainer, default: str | None, shown: str = "%(default)s") -> None:
    """``--method``, whose help says what each does, and ``shown`` for the default."""
    lines = [f"{name}: {method.summary}" for name, method in METHODS.items()]
    text = "\n".join([f"what trains (default: {shown})", *lines])
    p.add_argument("--method", choices=tuple(METHODS), default=default, metavar="METHOD", help=text)


def add_training_options(p: argparse.ArgumentParser) -> None:
    """An option for each field of `TrainConfig`; those not given are None (see `training_config`)."""
    g = p.add_argument_group("training")
    for field in dataclasses.fields(TrainConfig):
        g.add_argument(
            "--" + _NAMES.get(field.name, field.name).replace("_", "-"),
            dest=field.name,
            type=_type(field),
            choices=field.metadata["choices"] or None,
            help=f"{field.metadata['help']} ({_default(field.name)})",
        )


def training_config(method: str, args: argparse.Namespace, task: str = CLASSIFICATION) -> TrainConfig:
    """The defaults of method and task, and what was given instead. Raises ValueError for a value out of range."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)}
    if task != CLASSIFICATION and METHODS[method].loss is None:
        given["loss"] = given["loss"] or LOSSES_OF[task][0]
    return dataclasses.replace(DEFAULTS[method], **_stated(given))


def add_lora_options(p: argparse.ArgumentParser) -> None:
    """Options for the fields of `LoraConfig`; those not given are None (see `lora_config`)."""
    default = LoraConfig()
    g = p.add_argument_group("the method's settings (those of LoRA-C but for what is said)")
    g.add_argument("--rank", type=int, help=f"nominal rank r (default: {default.rank})")
    g.add_argument("--alpha", type=float, help="scale is alpha / rank (default: 2 * rank)")
    g.add_argument(
        "--rank-mode",
        choices=RANK_MODES,
        help=f"inner rank r * kernel width (rk), r, or rk below ResNet-50's size (default: {default.rank_mode})",
    )
    g.add_argument("--layout", choices=LAYOUTS, help=f"how B A becomes a kernel (default: {default.layout})")
    g.add_argument(
        "--learnable-alpha",
        action="store_const",
        const=True,
        help=f"train alpha of every adapter too (default: {'yes' if default.learnable_alpha else 'no'})",
    )
    g.add_argument("--biases", choices=BIASES, help=f"biases that train besides (default: {default.biases})")
    g.add_argument(
        "--small-layers",
        choices=SMALL_LAYERS,
        help=f"layers whose adapter would not be smaller than the weight (default: {default.small_layers})",
    )
    g.add_argument(
        "--freeze-a",
        action="store_const",
        const=True,
        help="lora_a keeps its random start, only lora_b trains: about half of the parameters "
        f"(default: {'yes' if default.freeze_a else 'no'})",
    )
    g.add_argument(
        "--linear",
        action="store_const",
        const=True,
        help="with --method lora-c: hidden fully connected layers behind convolutions get adapters too "
        f"(default: {'yes' if default.linear else 'no'})",
    )
    g.add_argument(
        "--share",
        type=float,
        help=f"with --method paca: share of each weight's input channels that trains (default: {default.share})",
    )
    g.add_argument(
        "--reduction",
        type=int,
        help=f"with --method attention: a gate has channels / reduction hidden units (default: {default.reduction})",
    )
    g.add_argument(
        "--blocks",
        type=names,
        metavar="BLOCK[,BLOCK...]",
        help="train nothing but these: front, middle, rear, head, or names of layers, which hold those below them, "
        "such as layer4 (default: all)",
    )


def lora_config(args: argparse.Namespace, seed: int) -> LoraConfig:
    """The settings given, the defaults for the others. Raises ValueError for a value out of range."""
    return LoraConfig(**lora_given(args), seed=seed)


def lora_given(args: argparse.Namespace) -> dict[str, Any]:
    """The LoRA-C options that were given, by field."""
    fields = [f.name for f in dataclasses.fields(LoraConfig) if f.name != "seed"]
    return _stated({name: getattr(args, name) for name in fields})


def refuse_idle_lora_options(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for an option given that changes nothing under the method."""
    for name in lora_given(args):
        if name not in METHODS[args.method].options:
            fitting = either(other.name for other in METHODS.values() if name in other.options)
            p.error(f"--{name.replace('_', '-')} goes with --method {fitting}, not with {args.method}")


def refuse_idle_step_options(p: argparse.ArgumentParser, args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """End with a usage error for a setting of training steps where the method makes none.

    ``defaults`` has every setting, and its value where the option was not given.
    """
    for name, default in defaults.items():
        idle = name not in _WITHOUT_STEPS and getattr(args, name) not in (None, default)
        if idle and not METHODS[args.method].trains:
            option = _NAMES.get(name, name).replace("_", "-")
            p.error(f"--{option} changes nothing with --method {args.method}, which makes no training steps")


def either(words: Iterable[str]) -> str:
    """Alternatives in words.

    >>> either(["full"]), either(["lora-c", "full", "blocks"])
    ('full', 'lora-c, full or blocks')
    """
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def add_device_options(p: argparse.ArgumentParser) -> None:
    """An option for each field of `TrainingDefaults`: how a device trains (see `device_defaults`)."""
    _add_schedule_options(p)
    _add_step_options(p)


def device_defaults(method: str, args: argparse.Namespace, task: str = CLASSIFICATION) -> TrainingDefaults:
    """The settings of the device's training; ``--lr`` unless given is the method's, ``--loss`` its or the task's.

    Their ranges are checked where the artifact is made. Raises ValueError for a loss that the method cannot use.
    """
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainingDefaults)}
    if task != CLASSIFICATION and METHODS[method].loss is None:
        given["loss"] = given["loss"] or LOSSES_OF[task][0]
    return METHODS[method].training(**_stated(given))


def _add_schedule_options(p: argparse.ArgumentParser) -> None:
    t = TrainingDefaults()
    g = p.add_argument_group("defaults of the device's training (the device may override them)")
    own = "".join(f", {m.lr} for {name}" for name, m in METHODS.items() if m.lr != t.lr)
    g.add_argument("--lr", type=float, help=f"peak learning rate (default: {t.lr}{own})")
    g.add_argument("--epochs", type=int, default=t.epochs, help="default: %(default)s")
    g.add_argument("--batch-size", type=int, default=t.batch_size, help="default: %(default)s")
    g.add_argument("--warmup", type=float, default=t.warmup, help="share of all steps (default: %(default)s)")


def _add_step_options(p: argparse.ArgumentParser) -> None:
    t = TrainingDefaults()
    g = p.add_argument_group("a training step (fixed in the artifact's graphs)")
    own = "".join(f", {method.loss} for {name}" for name, method in METHODS.items() if method.loss)
    g.add_argument("--loss", choices=LOSSES, help=f"default: {t.loss}{own}; l1 with --task regression")
    g.add_argument("--focal-gamma", type=float, default=t.focal_gamma, help="exponent of focal (default: %(default)s)")
    g.add_argument(
        "--distillation-weight",
        type=float,
        default=t.distillation_weight,
        help="share of distillation that is for the base's own answers, above 0 and below 1; the rest is for labels "
        "(default: %(default)s)",
    )
    g.add_argument(
        "--temperature",
        type=float,
        default=t.temperature,
        help="that softens answers, of distillation (default: %(default)s)",
    )
    g.add_argument(
        "--label-smoothing", type=float, default=t.label_smoothing, help="of cross_entropy (default: %(default)s)"
    )
    g.add_argument("--optimizer", choices=OPTIMIZERS, default=t.optimizer, help="default: %(default)s")
    g.add_argument("--weight-decay", type=float, default=t.weight_decay, help="default: %(default)s")
    g.add_argument(
        "--clip-norm", type=float, default=t.clip_norm, help="gradient norm, 0 for none (default: %(default)s)"
    )
    g.add_argument("--momentum", type=float, default=t.momentum, help="of sgd (default: %(default)s)")
    g.add_argument("--dampening", type=float, default=t.dampening, help="of sgd's momentum (default: %(default)s)")
    g.add_argument("--nesterov", action="store_true", help="Nesterov's form of sgd's momentum")
    betas = ",".join(map(str, t.betas))
    g.add_argument("--betas", type=pair, default=t.betas, metavar="B1,B2", help=f"of adamw (default: {betas})")
    g.add_argument("--eps", type=float, default=t.eps, help="of adamw (default: %(default)s)")
    g.add_argument("--amsgrad", action="store_true", help="adamw divides by the largest mean square so far")


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _type(field: dataclasses.Field[Any]) -> type:
    kinds = {"int": int, "int | None": int, "float": float, "float | None": float}
    return kinds.get(str(field.type), str)


def _default(name: str) -> str:
    """The default in words: that of most methods, then those of the others."""
    by_method = {method: getattr(config, name) for method, config in DEFAULTS.items()}
    usual = collections.Counter(by_method.values()).most_common(1)[0][0]
    others = {method: value for method, value in by_method.items() if value != usual}
    return ", ".join([f"default: {'unset' if usual is None else usual}", *(f"{v} for {m}" for m, v in others.items())])
