"""Does `lorac-deploy advise` find the best block, without being told what drifted?

For each drift, number of images and seed of a finished study of blocks (`python -m benchmarks studies blocks`), advice
is asked for on the same local data, and the accuracy of the block that it chose, as the study found it on test images,
is set beside that of the best block.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from lorac_deploy.advise.advice import advise
from lorac_deploy.advise.trial import Trial
from lorac_deploy.bench.environment import environment
from lorac_deploy.export import export_training_artifact
from lorac_deploy.study.bench import Bench, open_bench, read_local, write_local
from lorac_deploy.study.cells import grid
from lorac_deploy.study.config import StudyDrift, read_config
from lorac_deploy.study.worker import read_row, row_file
from lorac_exporters.artifact import ArtifactConfig

BLOCKS = ("front", "middle", "rear", "head")
NEAR = 0.01


@dataclasses.dataclass(frozen=True)
class Row:
    """A case: what was chosen, the accuracy of every block on test images, the blocks' relative gradients, and of
    every candidate its accuracies in trials and the multiply-adds of a whole run."""

    drift: str
    size: int
    seed: int
    chosen: str
    accuracies: dict[str, float]
    scores: dict[str, float]
    trials: dict[str, tuple[float, ...]]
    work: dict[str, int]

    @property
    def best(self) -> str:
        """The block with the highest accuracy."""
        return max(self.accuracies, key=lambda block: self.accuracies[block])

    @property
    def behind(self) -> float:
        """How far the chosen block is behind the best one."""
        return self.accuracies[self.best] - self.accuracies[self.chosen]

    @property
    def ranked(self) -> str:
        """The block that gradients alone would choose."""
        return max(self.scores, key=lambda block: self.scores[block])


def measure(bench: Bench, artifact: Path, drift: StudyDrift, size: int, seed: int) -> Row:
    """Ask for advice on one case of the study."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "local.npz"
        local = read_local(bench, drift, seed, size, artifact)
        write_local(data, local, local.labels, artifact)
        found = advise(artifact, data, methods=("head", "blocks"), trial=Trial(seed=seed, threads=1))
    options = {option.candidate.block or option.candidate.method: option for option in found.options}
    chosen = next(name for name, option in options.items() if option is found.chosen)
    rows = [read_row(row_file(bench, cell)) for cell in grid(bench.config)]
    same = [r for r in rows if r is not None and (r.drift, r.size, r.seed, r.wrong) == (drift.name, size, seed, 0.0)]
    accuracies = {row.method: row.drifted for row in same if row.method in BLOCKS and row.drifted is not None}
    trials = {name: option.score.after for name, option in options.items()}
    work = {name: option.work for name, option in options.items()}
    return Row(drift.name, size, seed, chosen, accuracies, found.scores, trials, work)


def main(argv: Sequence[str]) -> int:
    """Run all cases of a study, print a table, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks advising", description=__doc__)
    p.add_argument("--study", type=Path, required=True, help="TOML file of the finished study")
    p.add_argument("--workers", type=int, default=2, help="processes at a time (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, help="JSON file")
    args = p.parse_args(argv)
    config = read_config(args.study)
    bench = open_bench(config, args.study.with_suffix(""))
    with tempfile.TemporaryDirectory() as scratch:
        artifact = Path(scratch) / "artifact"
        settings = ArtifactConfig(training=config.methods[0].training)
        export_training_artifact(config.checkpoint, artifact, config=settings, on_progress=lambda _: None)
        cases = list(itertools.product(config.drifts, config.sizes, config.seeds))
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(measure, bench, artifact, *case) for case in cases]
            for count, _ in enumerate(as_completed(futures), 1):
                print(f"{count} of {len(cases)} cases", file=sys.stderr)
            rows = [future.result() for future in futures]
    print(table(rows))
    result = {"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def table(rows: list[Row]) -> str:
    """The cases, and how often the choice is within a point of the best, as Markdown."""
    lines = ["| drift | images | seed | chosen | best | points behind | by gradients alone |", "|" + "---|" * 7]
    for row in rows:
        chosen, best = (f"{block} {100 * row.accuracies[block]:.1f}" for block in (row.chosen, row.best))
        cells = (row.drift, row.size, row.seed, chosen, best, f"{100 * row.behind:.1f}", row.ranked)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    near = sum(row.behind <= NEAR for row in rows)
    return "\n".join([*lines, "", f"within a point of the best: {near} of {len(rows)} ({near / len(rows):.0%})"])
