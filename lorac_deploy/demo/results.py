"""What the demo found: figures, promises, table, plot and summary.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Results:
    """Accuracies are fractions on images that neither training ever saw; times are seconds.

    ``losses`` is the training loss of each epoch on the device. ``device_environment_bytes`` is the installed
    size of the device's environment, ``peak_memory_bytes`` that of its process.
    """

    base_clean: float
    base_drifted: float
    adapted_clean: float
    adapted_drifted: float
    trained_parameters: int
    model_parameters: int
    engine: str
    drop_in: bool
    losses: tuple[float, ...]
    step_seconds: float
    peak_memory_bytes: int
    device_environment_bytes: int
    images: dict[str, int]
    drift: str
    seconds: float

    @property
    def trained_share(self) -> float:
        """Trained parameters as a fraction of the model's."""
        return self.trained_parameters / self.model_parameters

    def to_json(self) -> str:
        """The text of summary.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def broken_promises(results: Results) -> list[str]:
    """What the demo promises and this run did not keep; empty if it kept everything."""
    r = results
    promises = {
        f"base on clean digits at least 97 %, got {r.base_clean:.1%}": r.base_clean >= 0.97,
        f"base on drifted digits below 75 %, got {r.base_drifted:.1%}": r.base_drifted < 0.75,
        f"adapted on drifted digits at least 92 %, got {r.adapted_drifted:.1%}": r.adapted_drifted >= 0.92,
        f"trained parameters below 3 %, got {r.trained_share:.2%}": r.trained_share < 0.03,
        "the fused file is a drop-in for the base": r.drop_in,
    }
    return [text for text, kept in promises.items() if not kept]


def table(results: Results) -> Table:
    """The closing table."""
    r = results
    found = Table("", "base", "adapted", title=f"accuracy on {r.images['test']} digits that neither training saw")
    found.caption = f"drift: {r.drift}"
    found.add_row("drifted", f"{r.base_drifted:.1%}", f"[bold green]{r.adapted_drifted:.1%}[/]")
    found.add_row("clean", f"{r.base_clean:.1%}", f"{r.adapted_clean:.1%}")
    found.add_section()
    found.add_row("parameters", f"{r.model_parameters:,}", f"{r.trained_parameters:,} trained ({r.trained_share:.2%})")
    found.add_row("device: step", "", f"{1000 * r.step_seconds:.0f} ms, batch of 32 ({r.engine})")
    found.add_row("device: peak memory", "", f"{r.peak_memory_bytes / 2**20:.0f} MiB")
    found.add_row("device: environment", "", f"{r.device_environment_bytes / 2**20:.0f} MiB installed, no PyTorch")
    found.add_row("drop-in for the base", "", "yes" if r.drop_in else "[bold red]no[/]")
    return found


def plot(results: Results, path: Path) -> None:
    """Write the plot: the loss on the device, and the accuracies before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(range(1, len(results.losses) + 1), results.losses, marker="o")
    left.set(xlabel="epoch on the device", ylabel="training loss", ylim=(0, None))
    groups = {
        "base": (results.base_drifted, results.base_clean),
        "adapted": (results.adapted_drifted, results.adapted_clean),
    }
    for offset, (name, values) in zip((-0.2, 0.2), groups.items(), strict=True):
        bars = right.bar([offset, 1 + offset], [100 * v for v in values], width=0.38, label=name)
        right.bar_label(bars, fmt="%.1f")
    right.set_xticks([0, 1], ["drifted", "clean"])
    right.set(ylabel="accuracy, %", ylim=(0, 125))
    right.legend(loc="upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
