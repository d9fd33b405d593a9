"""A plot of what each client gains; matplotlib comes with the extra ``demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorac_deploy.fleet.simulation import ClientResult
from lorac_runtime.errors import OutputError
from lorac_runtime.files import staged

SHOWN = (("base", "before", "o"), ("local", "alone", "s"), ("federated", "federated", "D"))
COLOURS = ("#888888", "#c7762c", "#1f6fb4")  # told apart by their lightness too


def draw(clients: Sequence[ClientResult], path: Path) -> None:
    """A row for each client, from its accuracy before over that alone to that in the fleet.

    Raises OutputError if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise OutputError(f"{path} was not drawn: pip install 'lorac-deploy[demo]' brings matplotlib") from err
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(clients)), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(clients), 0, -1)
    for client, row in zip(clients, rows, strict=True):
        known = [100 * v for v in (client.base, client.local, client.federated) if v is not None]
        if known:
            axes.hlines(row, min(known), max(known), color="#dddddd", linewidth=2, zorder=0)
    for (field, label, marker), colour in zip(SHOWN, COLOURS, strict=True):
        points = [
            (100 * getattr(c, field), r) for c, r in zip(clients, rows, strict=True) if getattr(c, field) is not None
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], label=label, marker=marker, color=colour, s=28)
    axes.set_yticks(list(rows), [c.client for c in clients])
    axes.set_xlabel("accuracy on the client's own test images, %")
    axes.set_xlim(0, 100)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    with staged(path) as part:
        figure.savefig(part, dpi=150, format="png")
