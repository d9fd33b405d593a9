"""`lorac-deploy study --config study.toml`: compare methods over drifts, sizes and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lorac_deploy.commands._common import guarded
from lorac_deploy.commands._progress import counted
from lorac_deploy.commands._tables import standard_output

if TYPE_CHECKING:
    from lorac_deploy.study.summary import Table
    from lorac_deploy.study.worker import Row

EXAMPLE = """\
an example of a study's file:
  checkpoint = "base"          # folder of `lorac-deploy train`
  data = "pool.npz"            # what local data are drawn from
  test = "test.npz"
  drifts = ["gaussian_noise:5", "flip", "none"]
  sizes = [100, 1000]
  seeds = [0, 1]
  wrong_labels = [0.0, 0.4]
  training = { epochs = 5 }    # for all methods
  [[methods]]
  method = "lora-c"
  rank = 4
  [[methods]]
  name = "front block"
  method = "blocks"
  blocks = ["front"]
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="lorac-deploy study",
        description="Compare methods of training over drifts, numbers of samples, shares of wrong labels and seeds. "
        "Every cell of the grid is fine-tuned by the device's own runtime. OUT gets results.csv, summary.md and plots; "
        "a study that was stopped goes on where it was.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", type=Path, required=True, help="TOML file of the study")
    p.add_argument("--out", type=Path, help="folder of the results (default: the file's name without .toml)")
    p.add_argument("--workers", type=int, help="processes at a time, a thread each (default: one per processor)")
    return p


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 where cells failed."""
    p = parser()
    args = p.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        p.error(f"--workers must be at least 1, got {args.workers}")
    from lorac_deploy.study.config import read_config
    from lorac_deploy.study.runner import run_study

    config, out = read_config(args.config), args.out or args.config.with_suffix("")
    with counted("reading") as told:
        rows = run_study(config, out, workers=args.workers, on_progress=told)
    return _report(rows, out, config.target_gain)


def _report(rows: list[Row], out: Path, target_gain: float) -> int:
    from lorac_deploy.study.summary import as_csv, tables

    failed = [row for row in rows if row.failed is not None]
    console = standard_output()
    (out / "results.csv").write_text(as_csv(rows), encoding="utf-8")
    if len(failed) < len(rows):
        found = tables(rows, target_gain)
        (out / "summary.md").write_text("\n".join(table.markdown() for table in found), encoding="utf-8")
        for table in found:
            _show(console, table)
        _draw(console, rows, out)
    for row in failed:
        where = f"{row.method}, {row.drift}, {row.size} samples, seed {row.seed}"
        console.print(f"failed: {where}: {row.failed}", soft_wrap=True, markup=False)
    return 1 if failed else 0


def _show(console: Console, table: Table) -> None:
    from rich.table import Table as Drawn

    drawn = Drawn(title=table.title)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)


def _draw(console: Console, rows: list[Row], out: Path) -> None:
    try:
        from lorac_deploy.study.plots import draw

        files = draw(rows, out)
    except ImportError:
        console.print('no plots: they need matplotlib, pip install "lorac-deploy[demo]"', markup=False)
        return
    console.print(f"{out}: results.csv, summary.md, {', '.join(path.name for path in files)}", soft_wrap=True)
