"""What the device's command lines share: exit statuses, options made from dataclasses, how errors end a command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from lorac_runtime.display import Shows
from lorac_runtime.errors import BusyError, LoracDeployError, StoppedError
from lorac_runtime.version import __version__

PROG = "lorac-finetune"
DONE, FAILED, NOT_BETTER, BUSY, STOPPED, INTERRUPTED = 0, 1, 3, 4, 75, 130  # 2 is argparse's, for a wrong command line
STATUSES = (
    "Exit status: 0 done, or accepted; 1 failed, and nothing in place was changed; 2 wrong command line; 3 not better, "
    "the model in place stays; 4 another process works in OUT; 75 the time is up, the same command goes on; "
    "130 interrupted."
)


def add_version(made: argparse.ArgumentParser) -> None:
    """`--version`: what a report of a problem begins with."""
    made.add_argument("--version", action="version", version=f"lorac-runtime {__version__}", help="show the version")


class _TakesOptions(Protocol):
    def add_argument(self, *names: str, **settings: Any) -> argparse.Action: ...


@dataclasses.dataclass
class End:
    """How a command ended."""

    status: int = DONE


def add_fields(made: _TakesOptions, kind: Any, *, optional: bool = False) -> None:
    """An option for each field of a dataclass; with ``optional`` one that is not given is None."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        default = None if optional else field.default
        text = text.replace("%(default)s", str(field.default)) if optional else text
        if hints[field.name] is bool:
            made.add_argument(name, action="store_true", help=text)
        elif get_origin(hints[field.name]) is tuple:
            made.add_argument(name, type=_names, default=default, metavar="FORMATS", help=text)
        else:
            plain = next(iter(get_args(hints[field.name])), hints[field.name])
            parse, choices, unit = (field.metadata[key] for key in ("parse", "choices", "unit"))
            reads = plain if parse is None else _explained(parse)
            made.add_argument(name, type=reads, default=default, help=text, choices=choices, metavar=unit)


@contextlib.contextmanager
def ended(display: Shows, how_to_go_on: Callable[[], str]) -> Iterator[End]:
    """Turn what ends a command early into a message and a status."""
    end = End()
    try:
        yield end
    except LoracDeployError as err:
        statuses = {StoppedError: STOPPED, BusyError: BUSY}
        end.status = display.failed(err, str(err), statuses.get(type(err), FAILED))
    except MemoryError as err:
        end.status = display.failed(err, _out_of_memory(err), FAILED)
    except KeyboardInterrupt as err:
        end.status = display.failed(err, f"interrupted; {how_to_go_on()}", INTERRUPTED)


def _out_of_memory(err: MemoryError) -> str:
    reason = f" ({err})" if str(err) else ""
    return (
        f"not enough memory{reason}. Try a smaller --batch-size, or with the engine onnxruntime a --micro-batch: a "
        "step's memory grows with it"
    )


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
