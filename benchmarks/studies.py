"""The papers' comparisons on real data, on what two cores can do: each is a file for `lorac-deploy study`.

A folder gets the data, the study's TOML file and its results; the TOML file can be run again, or changed, by
`lorac-deploy study --config`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar10 import DATA, OFFICIAL_TEST, images, pretrained_checkpoint
from lorac_deploy.bench.environment import environment
from lorac_deploy.commands.study import main as study
from lorac_deploy.study_data import vendor_split

POOL = 5000  # training images that local data are drawn from
CORRUPTIONS = ("gaussian_noise", "impulse_noise", "contrast", "jpeg_compression", "fog", "defocus_blur")
DRIFTS = [f"{name}:5" for name in CORRUPTIONS]
Table = dict[str, Any]
SHORT = {"epochs": 5}
AT_THE_END: Table = {"training": SHORT, "curve": False}
VENDORS = ("microsoft", "samsung")


def blocks(work: Path, data: Path) -> Table:
    """TBFT (arXiv 2403.15905): each block alone, at 10, 20 and 30 % of 3,333 images."""
    named = ("front", "middle", "rear", "layer3")  # layer3 is the paper's block 3; rear holds the head too
    methods: list[Table] = [{"name": block, "method": "blocks", "blocks": [block]} for block in named]
    methods += [{"method": "head"}, {"method": "full"}]
    grid = {"drifts": [*DRIFTS, "flip"], "sizes": [333, 667, 1000], "seeds": [0, 1], "training": SHORT}
    return _cifar(work, data, "resnet20") | grid | {"methods": methods}


def unseen(work: Path, data: Path) -> Table:
    """Each block alone under drifts that advice was not made on; what `python -m benchmarks advising` is judged by."""
    made: list[Table] = [{"name": b, "method": "blocks", "blocks": [b]} for b in ("front", "middle", "rear")]
    drifts = ["pixelate:5", "elastic_transform:5", "snow:5", "motion_blur:5"]
    grid = {"drifts": drifts, "sizes": [500], "seeds": [0, 1], **AT_THE_END}
    return _cifar(work, data, "resnet20") | grid | {"methods": [*made, {"method": "head"}]}


def methods(work: Path, data: Path) -> Table:
    """Every method: samples needed and costs, the five criteria of arXiv 2110.10969."""
    return _cifar(work, data, "resnet20") | _every_method() | {"sizes": [100, 300, 1000]}


def labels(work: Path, data: Path) -> Table:
    """Every method with 0, 10, 20 and 40 % wrong labels."""
    grid = {"drifts": ["gaussian_noise:5"], "wrong_labels": [0.0, 0.1, 0.2, 0.4], "curve": False}
    return _cifar(work, data, "resnet20") | _every_method() | grid


def ranks(work: Path, data: Path) -> Table:
    """LoRA-C (arXiv 2410.16954): rank and alpha, both layouts and both rank modes."""
    made = [
        {"name": f"r={r} alpha/r={ratio:g}", "method": "lora-c", "rank": r, "alpha": ratio * r}
        for r in (1, 2, 4, 8, 16)
        for ratio in (0.5, 1.0, 2.0, 4.0)
    ]
    made += [
        {"name": f"r=4 {layout} {mode}", "method": "lora-c", "layout": layout, "rank_mode": mode}
        for layout in ("spatial", "paper")
        for mode in ("rk", "r")
    ]
    made += [{"name": "r=4 learnable alpha", "method": "lora-c", "learnable_alpha": True}]
    made += [{"name": "r=4 frozen A", "method": "lora-c", "freeze_a": True}]
    made += [{"name": "r=4 kernel-wise", "method": "lora-kernel", "small_layers": "adapter"}]
    grid = {"drifts": ["gaussian_noise:5", "contrast:5"], "seeds": [0, 1], **AT_THE_END}
    return _cifar(work, data, "resnet20") | grid | {"methods": made}


def rates(work: Path, data: Path) -> Table:
    """Learning rates, method by method: what the methods' own ones stand on."""
    tried = {"head": (0.001, 0.003, 0.01, 0.03), "lora-c": (0.0003, 0.001, 0.003)}
    tried |= dict.fromkeys(("skip", "bias", "bn", "attention"), tried["head"])
    tried |= dict.fromkeys(("lora-all", "paca", "full"), tried["lora-c"])
    made = [{"method": method, "lr": rate} for method, found in tried.items() for rate in found]
    grid = {"drifts": ["contrast:5", "flip"], "sizes": [500], "seeds": [0, 1], **AT_THE_END}
    return _cifar(work, data, "resnet20") | grid | {"methods": made}


def deep(work: Path, data: Path) -> Table:
    """LoRA-C against full and head on a ResNet-56; full at a lower learning rate, too."""
    grid = {"drifts": DRIFTS[:4], "seeds": [0, 1], **AT_THE_END}
    return _cifar(work, data, "resnet56") | grid | {"methods": [*_three(), {"method": "full", "lr": 0.0003}]}


def icons(work: Path, data: Path) -> Table:
    """Icons-50, a vendor held out: a CIFAR-10 network learns 50 kinds of icons from the other vendors."""
    base = pretrained_checkpoint(work / "icons-base", "resnet20", data, classes=50)
    drifts = []
    for vendor in VENDORS:
        others, held_out = vendor_split(data / "icons50_32x32.npz", vendor)
        for name, part in ((vendor, others), (f"{vendor}-test", held_out)):
            np.savez(work / f"{name}.npz", images=part.images, labels=part.labels)
        drifts.append({"name": f"without {vendor}", "data": f"{vendor}.npz", "test": f"{vendor}-test.npz"})
    first = {"checkpoint": base.name, "data": f"{VENDORS[0]}.npz", "test": f"{VENDORS[0]}-test.npz"}
    grid = {"drifts": drifts, "sizes": [3000], "seeds": [0, 1], "training": {"epochs": 10}, "curve": False}
    return first | grid | {"methods": [*_three(), {"method": "lora-c", "lr": 0.003}]}


def unlabelled(work: Path, data: Path) -> Table:
    """Entropy minimisation and recalibrated batch normalisation, no labels used."""
    made = [{"method": "recalibrate"}, {"method": "tent"}]
    return _cifar(work, data, "resnet20") | {"drifts": DRIFTS, "seeds": [0, 1], "methods": made}


STUDIES: dict[str, Callable[[Path, Path], Table]] = {
    f.__name__: f for f in (blocks, unseen, methods, labels, ranks, rates, deep, icons, unlabelled)
}


def main(argv: Sequence[str]) -> int:
    """Prepare a study, run it, and note the environment beside its results."""
    p = argparse.ArgumentParser(prog="python -m benchmarks studies", description=__doc__)
    summaries = "; ".join(f"{name}: {str(f.__doc__).splitlines()[0]}" for name, f in STUDIES.items())
    p.add_argument("study", choices=tuple(STUDIES), help=summaries)
    p.add_argument("--out", type=Path, required=True, help="folder of the study")
    p.add_argument("--data", type=Path, default=DATA, help="data folder (default: beside the checkout)")
    p.add_argument("--workers", type=int, default=2, help="processes at a time (default: %(default)s)")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / f"{args.study}.toml"
    config.write_text(as_toml(STUDIES[args.study](args.out, args.data)))
    status = study(["--config", str(config), "--workers", str(args.workers)])
    (args.out / args.study / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    return status


def as_toml(table: Table) -> str:
    """Plain data as TOML: methods become tables of an array, everything else stands on a line.

    >>> print(as_toml({"sizes": [1], "methods": [{"method": "head", "lr": 0.01}]}), end="")
    sizes = [1]
    <BLANKLINE>
    [[methods]]
    method = "head"
    lr = 0.01
    """
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if key != "methods"]
    for method in table["methods"]:
        lines += ["", "[[methods]]", *(f"{key} = {_value(value)}" for key, value in method.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def _every_method() -> Table:
    made: list[Table] = [{"method": "lora-c"}, {"method": "lora-kernel", "rank": 1}, {"method": "lora-all"}]
    made += [{"method": "full"}, {"method": "head"}, {"method": "bias"}, {"method": "bn"}]
    made += [{"name": f"block {b}", "method": "blocks", "blocks": [b]} for b in ("front", "middle", "rear")]
    made += [{"method": "skip"}, {"method": "attention"}, {"method": "paca"}]
    return {"drifts": ["gaussian_noise:5", "contrast:5"], "seeds": [0, 1], "training": SHORT, "methods": made}


def _three() -> list[Table]:
    return [{"method": "lora-c"}, {"method": "full"}, {"method": "head"}]


def _cifar(work: Path, data: Path, model: str) -> Table:
    """The pretrained network, a pool of training images and the official test images, in ``work``."""
    if not (work / "pool.npz").is_file():
        pixels, labels = images(data)
        np.savez(work / "pool.npz", images=pixels[:POOL], labels=labels[:POOL])
        np.savez(work / "test.npz", images=pixels[OFFICIAL_TEST:], labels=labels[OFFICIAL_TEST:])
    base = pretrained_checkpoint(work / model, model, data)
    return {"checkpoint": base.name, "data": "pool.npz", "test": "test.npz"}
