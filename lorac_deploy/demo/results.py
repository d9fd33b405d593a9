"""What the demo found: figures, promises, table, plot and summary.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class LiteRow:
    """What came of fused.tflite; accuracies are None where no TFLite interpreter is installed."""

    drop_in: bool
    nbytes: int
    adapted_clean: float | None
    adapted_drifted: float | None


@dataclasses.dataclass(frozen=True)
class EngineRow:
    """What one engine made of the base. Accuracies are fractions on images that neither training ever saw.

    ``losses`` is the training loss of each epoch, ``step_seconds`` the median step, ``finetune_seconds`` the whole
    command, import and fusing included. ``peak_memory_bytes`` is that of the process, None where the system does not
    tell. ``device_environment_bytes`` is what is installed beside pip and setuptools. ``tflite`` tells of fused.tflite
    where it was asked for.
    """

    engine: str
    adapted_clean: float
    adapted_drifted: float
    drop_in: bool
    losses: tuple[float, ...]
    step_seconds: float
    peak_memory_bytes: int | None
    device_environment_bytes: int
    finetune_seconds: float
    versions: dict[str, str]
    tflite: LiteRow | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """The base, and what each engine made of it; the first engine is the one that a device would take.

    ``seconds`` is what the whole demo took.
    """

    base_clean: float
    base_drifted: float
    trained_parameters: int
    model_parameters: int
    engines: tuple[EngineRow, ...]
    images: dict[str, int]
    drift: str
    seconds: float

    @property
    def trained_share(self) -> float:
        """Trained parameters as a fraction of the model's."""
        return self.trained_parameters / self.model_parameters

    def to_json(self) -> str:
        """The text of summary.json: the first engine's figures stand at the top as well."""
        return json.dumps(dataclasses.asdict(self) | dataclasses.asdict(self.engines[0]), indent=1) + "\n"


def broken_promises(results: Results) -> list[str]:
    """What the demo promises and this run did not keep; empty if it kept everything."""
    r = results
    promises = {
        f"base on clean digits at least 97 %, got {r.base_clean:.1%}": r.base_clean >= 0.97,
        f"base on drifted digits below 75 %, got {r.base_drifted:.1%}": r.base_drifted < 0.75,
        f"trained parameters below 3 %, got {r.trained_share:.2%}": r.trained_share < 0.03,
    }
    for row in r.engines:
        text = f"{row.engine}: adapted on drifted digits at least 92 %, got {row.adapted_drifted:.1%}"
        promises[text] = row.adapted_drifted >= 0.92
        promises[f"{row.engine}: the fused file is a drop-in for the base"] = row.drop_in
        promises |= {} if row.tflite is None else _lite_promises(row.engine, row.tflite, row.adapted_drifted)
    return [text for text, kept in promises.items() if not kept]


def _lite_promises(engine: str, row: LiteRow, onnx: float) -> dict[str, bool]:
    """Of fused.tflite: it answers as fused.onnx does, up to images on the border between two classes."""
    found = {f"{engine}: fused.tflite is a drop-in for base.tflite": row.drop_in}
    if row.adapted_drifted is not None:
        text = f"{engine}: fused.tflite as accurate as fused.onnx ({onnx:.1%}), got {row.adapted_drifted:.1%}"
        found[text] = abs(row.adapted_drifted - onnx) <= 0.005
    return found


def table(results: Results) -> Table:
    """The closing table, a row for the base and one for each engine."""
    r = results
    title = f"accuracy on {r.images['test']} digits that neither training saw"
    found = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=0)  # fits into 80 columns
    found.caption = (
        f"drift: {r.drift}. {r.trained_parameters:,} of {r.model_parameters:,} parameters trained "
        f"({r.trained_share:.2%}), batches of 32, no PyTorch in these environments"
    )
    for heading in ("", "drifted", "clean", "step", "memory", "installed", "time", "drop-in"):
        found.add_column(heading, justify="left" if heading in ("", "drop-in") else "right")
    found.add_row("base", f"{r.base_drifted:.1%}", f"{r.base_clean:.1%}")
    for row in r.engines:
        found.add_row(*_cells(row))
        if row.tflite is not None:
            found.add_row(*_lite_cells(row.tflite))
    return found


def _lite_cells(row: LiteRow) -> tuple[str, ...]:
    shares = ["no runtime" if x is None else f"{x:.1%}" for x in (row.adapted_drifted, row.adapted_clean)]
    return "  fused.tflite", *shares, "", "", "", "", _drop_in(row.drop_in)


def _drop_in(ok: bool) -> str:
    return "yes" if ok else "[bold red]no[/]"


def _cells(row: EngineRow) -> tuple[str, ...]:
    memory = "unknown" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / MIB:.0f} MiB"
    return (
        row.engine,
        f"[bold green]{row.adapted_drifted:.1%}[/]",
        f"{row.adapted_clean:.1%}",
        f"{1000 * row.step_seconds:.0f} ms",
        memory,
        f"{row.device_environment_bytes / MIB:.0f} MiB",
        f"{row.finetune_seconds:.0f} s",
        _drop_in(row.drop_in),
    )


def plot(results: Results, path: Path) -> None:
    """Write the plot: the loss on the device, and the accuracies before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    _losses(left, results)
    _accuracies(right, results)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _losses(axes: Axes, results: Results) -> None:
    """A curve for each engine; they nearly coincide, so the later ones are dashed."""
    for number, row in enumerate(results.engines):
        style: dict[str, Any] = {
            "color": f"C{number + 1}",
            "linestyle": "--" if number else "-",
            "marker": "x" if number else "o",
        }
        axes.plot(range(1, len(row.losses) + 1), row.losses, label=row.engine, **style)
    axes.set(xlabel="epoch on the device", ylabel="training loss", ylim=(0, None))
    axes.legend(frameon=False)


def _accuracies(axes: Axes, results: Results) -> None:
    """Bars side by side: the base, then each engine's fused file."""
    groups = {"base": (results.base_drifted, results.base_clean)}
    groups |= {row.engine: (row.adapted_drifted, row.adapted_clean) for row in results.engines}
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        bars = axes.bar([offset, 1 + offset], [100 * v for v in values], width=0.95 * width, label=name)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks([0, 1], ["drifted", "clean"])
    axes.set(ylabel="accuracy, %", ylim=(0, 120), yticks=range(0, 101, 20))
    axes.legend(loc="upper center", ncols=len(groups), frameon=False, columnspacing=1, handlelength=1)
