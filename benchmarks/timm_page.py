"""docs/timm.md, the page of the rows that `python -m benchmarks timm` measured."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.timm_row import FLOAT32, OF_PYTORCH, Row

INTRODUCTION = """\
# timm's networks, measured

Written by `python -m benchmarks timm`; how to use them is in [models.md](models.md). Each network was made with
random numbers and ten classes, and went the way that yours goes, on square images of the given size: adapters attached
in PyTorch, the training artifact exported, one step with the engine `onnxruntime`, the result fused, `verify`
asked whether it is a drop-in.

- **step** is the largest distance of the change of any trained tensor from PyTorch's in float64, relative to that
  change, and in brackets that of PyTorch's own float32. It is the least of up to eight images: on one, rounding
  may flip a ReLU that is nearly zero, whose gradient jumps; a wrong gradient is wrong on all. A step counts as equal
  up to {float32:.0e}, or {times:g} times PyTorch's own float32 error, with a loss equal to {float32:.0e}.
- **fused** is the verdict of `verify` on the fused file. Random numbers make some networks ill-conditioned: `fbnetv3_b`
  answers with 66,000, PyTorch's own float32 is 2,500 off, and two ways to compute it differ more than `verify` allows.
- **onnxruntime-training** says whether that engine could differentiate the network too (it was not run).
- **TFLite** says whether base.tflite could be written (its answers are checked while it is).
"""


def page(rows: Sequence[Row]) -> str:
    """The whole page: how many go the whole way, the table, and the reasons where something does not."""
    whole = [row for row in rows if row.whole]
    families = len({row.family for row in whole})
    head = "| family | network | pixels | parameters | adapters | step | fused | onnxruntime-training | TFLite |"
    lines = [
        INTRODUCTION.format(float32=FLOAT32, times=OF_PYTORCH),
        f"{len(whole)} of {len(rows)} networks, of {families} families, go the whole way.",
        "",
        head,
        "|" + "---|" * 9,
        *map(_line, rows),
        *_reasons("What does not go the whole way", [(row, row.reason) for row in rows]),
        *_reasons("Why there is no base.tflite", [(row, row.tflite or "") for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    step = "no"
    if row.step_error is not None and row.torch_error is not None:
        step = f"{'' if row.agrees else 'no: '}{row.step_error:.0e} ({row.torch_error:.0e})"
    cells = (
        row.family,
        f"`{row.name}`",
        f"{row.pixels}",
        f"{row.parameters:,}",
        f"{row.adapters}" if not row.attach else "no",
        step,
        _word(row.dropin),
        _word(row.training),
        _word(row.tflite),
    )
    return f"| {' | '.join(cells)} |"


def _word(reason: str | None) -> str:
    """Of a stage: reached and well, or not."""
    return {None: "", "": "yes"}.get(reason, "no")


def _reasons(title: str, found: Sequence[tuple[Row, str]]) -> list[str]:
    """A list under a title, networks with the same reason together; nothing where there are none."""
    named: dict[str, list[str]] = {}
    for row, reason in found:
        if reason:
            named.setdefault(_short(reason), []).append(f"`{row.name}`")
    lines = [f"- {', '.join(names)}: {reason}" for reason, names in named.items()]
    return ["", f"## {title}", "", *lines] if lines else []


def _short(reason: str) -> str:
    """One line without the names of single nodes, which differ from network to network."""
    text = " ".join(reason.split())
    return re.sub(r" '[\w./]+'", "", text)[:300]
