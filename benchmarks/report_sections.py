"""Sections of the report, one for each benchmark: what is asked, its plots, its tables, how to make it again."""

from __future__ import annotations

import dataclasses
import re

from benchmarks.report_environment import command, names
from benchmarks.report_panels import Group
from benchmarks.report_plots import plots
from benchmarks.report_tables import Table, tables
from benchmarks.rows import Results

TITLES = {
    "latency": "Latency",
    "finetune": "Fine-tuning",
    "memory": "Memory",
    "export": "Export",
    "footprint": "Footprint",
}
TEXTS = {
    "latency": (
        "How long one forward pass takes. Base is the pretrained model's file; fused is that file with the adapters "
        "folded into its weights. Before anything is timed, the drop-in check compares the structure of the two. Files "
        "then take turns in fresh processes, and ratios are made of the least times of each process, so they need not "
        "be those of the medians. “Same” means that the whole confidence interval of the ratio lies within the margin, "
        "1 % unless a row's details say otherwise; “different” that the ratio is beyond the margin and a wider "
        "interval, of 99 %, excludes 1; all else is “too noisy”. Files that do more work (adapters as inputs, an "
        "adapter branch) and files with a planted fault are measured beside them: if those do not stand out, nothing "
        "here can be believed. "
        "Loading and the first run are apart."
    ),
    "finetune": (
        "What fine-tuning on a device costs: the time of a step, of an epoch and until a target accuracy is reached, "
        "for several methods, on this project's runtime and on what else one could use. Two forward passes are the "
        "floor, for a backward pass costs at least as much as a forward one."
    ),
    "memory": (
        "The largest resident memory of the whole process as the kernel counts it, in fresh processes that load and "
        "make some steps. Libraries are part of it."
    ),
    "export": "What it takes to make the files that a device is given, and how large these files are.",
    "footprint": "What a device has to install and hold in memory before the first step, for each way to fine-tune.",
}
OTHER = "A benchmark that the report knows nothing more of: its rows are below."


@dataclasses.dataclass(frozen=True)
class Section:
    """One benchmark's part of the page."""

    name: str
    title: str
    text: str
    command: str
    environments: tuple[str, ...]
    groups: tuple[Group, ...]
    tables: tuple[Table, ...]


def sections(results: Results) -> list[Section]:
    """A section for every benchmark that has rows: those known in their order, then all others."""
    present = dict.fromkeys(row.benchmark for row in results.rows)
    order = [*(name for name in TITLES if name in present), *(name for name in present if name not in TITLES)]
    return [section(name, results) for name in order]


def section(name: str, results: Results) -> Section:
    """The section of one benchmark."""
    rows = [row for row in results.rows if row.benchmark == name]
    title = TITLES.get(name, name[:1].upper() + name[1:]) or "Without a name"
    return Section(
        name=identifier(name),
        title=title,
        text=TEXTS.get(name, OTHER),
        command=command(name, results),
        environments=tuple(names(rows)),
        groups=tuple(plots(name, rows)),
        tables=tuple(tables(rows)),
    )


def identifier(name: str) -> str:
    """A name as part of an id: every sign that is not a letter, digit or hyphen as its number.

    >>> identifier("latency"), identifier("a b<")
    ('latency', 'a_20_b_3c_')
    """
    return re.sub(r"[^A-Za-z0-9-]", lambda found: f"_{ord(found[0]):x}_", name)
