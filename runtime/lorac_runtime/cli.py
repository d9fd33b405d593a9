"""The command line of the device: ``python runtime/ort_finetune.py`` or ``lorac-finetune``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, get_args, get_origin, get_type_hints

from lorac_runtime import resume
from lorac_runtime.config import FinetuneConfig
from lorac_runtime.errors import LoracDeployError
from lorac_runtime.manifest import ADAPTER
from lorac_runtime.report import FILE_NAME as REPORT
from lorac_runtime.report import CacheReport, FinetuneReport
from lorac_runtime.session import Progress, finetune

DESCRIPTION = (
    "Fine-tune the model of a training artifact on local images and write OUT/adapter.safetensors, OUT/fused.onnx "
    "(the base file with other numbers in some weights) and OUT/report.json; with --to onnx,tflite OUT/fused.tflite "
    "too. A run that was interrupted goes on after its last whole epoch when the same command is given again; a "
    "finished one is not repeated, but a fused file that is asked for and is not there yet is made from its adapter. "
    "With other images, another artifact or other settings the folder is refused, unless --restart begins anew."
)
FAILED, INTERRUPTED = 1, 130  # 2 is argparse's own, for a wrong command line


def parser() -> argparse.ArgumentParser:
    """The command line; its options are the fields of `FinetuneConfig` and a few files."""
    made = argparse.ArgumentParser(prog="lorac-finetune", description=DESCRIPTION)
    made.add_argument("artifact", type=Path, help="folder that export-training-artifact wrote")
    made.add_argument(
        "--data",
        type=Path,
        required=True,
        help=".npz file with images (uint8) and labels, or a folder with one sub-folder of images per class; labels "
        "may be missing where the artifact's method needs none (tent, recalibrate)",
    )
    made.add_argument("--out", type=Path, required=True, help="output folder; created where it is missing")
    made.add_argument("--adapter", type=Path, help="start from this adapter file (default: the artifact's own)")
    hints = get_type_hints(FinetuneConfig)
    for field in dataclasses.fields(FinetuneConfig):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if hints[field.name] is bool:
            made.add_argument(name, action="store_true", help=text)
        elif get_origin(hints[field.name]) is tuple:
            made.add_argument(name, type=_names, default=field.default, metavar="FORMATS", help=text)
        else:
            kind = next(iter(get_args(hints[field.name])), hints[field.name])
            parse, choices = field.metadata["parse"], field.metadata["choices"]
            reads = kind if parse is None else _explained(parse)
            metavar = None if parse is None else "SIZE"
            made.add_argument(name, type=reads, default=field.default, help=text, choices=choices, metavar=metavar)
    made.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    made.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    return made


def _explained(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same function with an error that argparse shows as it is."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return read


def _names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted."""
    p = parser()
    args = p.parse_args(argv)
    try:
        config = FinetuneConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(FinetuneConfig)})
    except ValueError as err:
        p.error(str(err))
    display = Display(sys.stderr, quiet=args.quiet)
    try:
        with _logged_to(display):
            report = finetune(
                args.artifact, args.data, args.out, config, adapter=args.adapter, on_progress=display.progress
            )
    except LoracDeployError as err:
        return display.failed(f"error: {err}", FAILED)
    except MemoryError as err:
        return display.failed(f"error: {_out_of_memory(err)}", FAILED)
    except KeyboardInterrupt:
        return display.failed(f"interrupted; {_how_to_go_on(args.out, config)}", INTERRUPTED)
    print(report.to_json() if args.json else table(report, args.out), end="")
    return 0


def _out_of_memory(err: MemoryError) -> str:
    reason = f" ({err})" if str(err) else ""
    return (
        f"not enough memory{reason}. Try a smaller --batch-size, or with the engine onnxruntime a --micro-batch: a "
        "step's memory grows with it"
    )


def _how_to_go_on(out: Path, config: FinetuneConfig) -> str:
    if not resume.exists(out):
        return "no epoch was finished, nothing was kept"
    without = " without --restart" if config.restart else ""
    return f"the same command{without} goes on after the last whole epoch"


class Display:
    """Progress and messages for a person; on a terminal the line of the current epoch is updated in place."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self.quiet = stream, quiet
        self._live = stream.isatty() and not quiet
        self._width = 0  # of the unfinished line on the terminal

    def progress(self, p: Progress) -> None:
        """Show a step."""
        if self._live:
            self._write(_line(p), end="\n" if p.epoch_done else "")
        elif p.epoch_done and not self.quiet:
            self._write(_line(p))

    def message(self, text: str) -> None:
        """A line of its own."""
        if self._width:
            self._write("")
        self._write(text)

    def failed(self, text: str, status: int) -> int:
        """Say why, return ``status``."""
        self.message(text)
        return status

    def _write(self, text: str, end: str = "\n") -> None:
        """Write over the unfinished line, if there is one."""
        back = "\r" if self._width else ""
        print(back + text.ljust(self._width), end=end, file=self._stream, flush=True)
        self._width = 0 if end else len(text)


def _line(p: Progress) -> str:
    width = len(str(p.epochs))
    return (
        f"epoch {p.epoch:{width}}/{p.epochs}  step {p.step}/{p.steps}  loss {p.loss:.4f}  lr {p.lr:.2e}  "
        f"{p.seconds:.1f} s  eta {p.eta:.0f} s"
    )


@contextlib.contextmanager
def _logged_to(display: Display) -> Iterator[None]:
    """Show what the library logs: information unless quiet, warnings always."""
    handler = _Handler(display)
    log = logging.getLogger("lorac_runtime")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if display.quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class _Handler(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._display.message(prefix + record.getMessage())


def table(report: FinetuneReport, out: Path) -> str:
    """The figures of a run for a person, a line each."""
    share = report.trained_parameters / report.model_parameters
    memory = "unknown" if report.peak_memory_bytes is None else f"{report.peak_memory_bytes / 2**20:.0f} MiB"
    rows = {
        "accuracy": _accuracies(report),
        "loss": _losses(report),
        "trained": f"{report.trained_parameters:,} of {report.model_parameters:,} parameters ({share:.2%})",
        "samples": f"{report.train_images} for training, {report.val_images} held out",
        "time": f"{report.seconds:.1f} s" + (f", a step {1e3 * report.step_seconds:.1f} ms" if report.losses else ""),
        "memory": memory,
        **({} if report.cache is None else {"cache": _cache(report.cache)}),
        "written": ", ".join(str(out / name) for name in (ADAPTER, *(f.name for f in report.fused), REPORT)),
    }
    return "".join(f"{name:10}{text}\n" for name, text in rows.items())


def _cache(cache: CacheReport) -> str:
    return (
        f"{cache.hit_rate:.1%} of {cache.hits + cache.misses:,} look-ups answered; {cache.stored} of {cache.samples} "
        f"samples in {cache.nbytes / 1e6:.1f} MB"
    )


def _losses(report: FinetuneReport) -> str:
    if report.epoch_losses:
        return f"{report.epoch_losses[0]:.4f} in the first epoch, {report.epoch_losses[-1]:.4f} in the last"
    if report.loss_before is None or report.loss_after is None:
        return "not measured: no samples were held out"
    return f"{report.loss_before:.4f} before, {report.loss_after:.4f} after, on held-out samples; nothing trained"


def _accuracies(report: FinetuneReport) -> str:
    before, after = report.accuracy_before, report.accuracy_after
    if before is None or after is None:
        return f"not measured: no {'labels' if report.val_images else 'samples were held out'}"
    return f"{before:.1%} before, {after:.1%} after, on {report.val_images} held-out samples"
