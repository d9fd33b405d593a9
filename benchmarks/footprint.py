"""What does a device have to install and to hold in memory before its first training step?

For each way to equip it: bytes on disk of what is installed with all that it requires (pip, setuptools and wheel apart;
compiled bytecode, which pip writes, counts), bytes of the wheels, seconds to import what a fine-tuning imports, and the
process's largest resident memory after that (VmHWM). Imports happen in fresh processes, in interleaved rounds with a
warm disk cache; the first round is not counted. An import's time is that of the whole process less that of one that
imports nothing, with the same interpreter in the same round; both stand beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import interpreters as envs
from benchmarks.command import Say, common_options, finish
from benchmarks.footprint_devices import DEVICES, OURS, Device
from benchmarks.rows import Row
from benchmarks.step_rounds import interleaved, summary
from lorac_deploy.bench.processes import worker_environment

PROBE = Path(__file__).with_name("footprint_probe.py")
PEAK = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
NOTHING = "pass"
UNITS = {"installed": "bytes", "wheel": "bytes", "import": "s", "resident after import": "bytes"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """``rounds`` are the counted ones; ``python`` holds other interpreters of environments, by name."""

    rounds: int = 5
    quick: bool = False
    python: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @classmethod
    def smallest(cls, python: Mapping[str, Path]) -> Settings:
        """What --quick measures: one round."""
        return cls(rounds=1, quick=True, python=python)


@dataclasses.dataclass(frozen=True)
class Imports:
    """Of one device: seconds of each round's process, of an empty one in the same round, and peaks in bytes."""

    whole: list[float]
    empty: list[float]
    peaks: list[int]

    @property
    def seconds(self) -> list[float]:
        """Of the imports alone, by round."""
        return [whole - empty for whole, empty in zip(self.whole, self.empty, strict=True)]


def process(interpreter: Path, code: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a fresh process that runs ``code``. Raises RuntimeError if it fails."""
    command, started = [str(interpreter), "-I", "-c", f"{code}\n{PEAK}"], time.perf_counter()
    done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{code!r} fails: {' '.join(done.stderr.split()[-20:])}")
    return seconds, int(done.stdout.split()[-1]) * 1024


def imports(devices: Mapping[str, tuple[Path, str]], rounds: int) -> dict[str, Imports]:
    """Interleaved rounds of fresh processes, after one that is not counted; ``devices`` hold (interpreter, code)."""
    codes = {name: (interpreter, code) for name, (interpreter, code) in devices.items()}
    codes |= {str(interpreter): (interpreter, NOTHING) for interpreter, _ in devices.values()}
    turns = {name: functools.partial(process, *what) for name, what in codes.items()}
    found = {name: turn[1:] for name, turn in interleaved(turns, rounds + 1).items()}
    seconds = {name: [turn[0] for turn in turns] for name, turns in found.items()}
    return {
        name: Imports(seconds[name], seconds[str(interpreter)], [int(turn[1]) for turn in found[name]])
        for name, (interpreter, _) in devices.items()
    }


def installed(device: Device, interpreter: Path) -> dict[str, int]:
    """Bytes on disk by release. Raises RuntimeError if something that it requires is not there."""
    command = [str(interpreter), "-I", str(PROBE), *device.roots]
    said: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if said["missing"]:
        raise RuntimeError(f"{interpreter} lacks {', '.join(said['missing'])}")
    releases: dict[str, int] = said["releases"]
    return releases


def rows(settings: Settings, say: Say) -> list[Row]:
    """Four rows for each device; without figures, and with the reason, where it cannot be measured."""
    ready, sizes, absent = {}, {}, {}
    for device in DEVICES:
        try:
            ready[device.variant] = (envs.python(device.environment, settings.python), device.code)
            sizes[device.variant] = installed(device, ready[device.variant][0])
            process(*ready[device.variant])
        except (OSError, RuntimeError, subprocess.CalledProcessError) as err:
            absent[device.variant] = str(err)
            ready.pop(device.variant, None)
        say(f"{device.variant}: {absent.get(device.variant, 'there')}")
    say(f"importing, {settings.rounds} rounds of {len(ready)} devices")
    imported = imports(ready, settings.rounds) if ready else {}
    found = {name: _figures(sizes[name], imported[name]) for name in ready}
    return [row for device in DEVICES for row in _rows(device, found, absent.get(device.variant, ""))]


Figures = dict[str, tuple[float | None, dict[str, Any], str]]  # by quantity: figure, details, note


def _figures(releases: Mapping[str, int], imported: Imports) -> Figures:
    wheels = envs.wheel_bytes()
    unknown = [release for release in releases if release not in wheels]
    of_wheels = {release: wheels[release] for release in releases if release in wheels}
    total = None if unknown else float(sum(of_wheels.values()))
    lacking = f"setup recorded no wheel of {', '.join(unknown)}" if unknown else ""
    spread = summary([imported.seconds])
    whole = {"minimum": spread.minimum, "ninetieth": spread.ninetieth, "samples": imported.seconds}
    whole |= {"process": statistics.median(imported.whole), "empty process": statistics.median(imported.empty)}
    peaks = {"minimum": min(imported.peaks), "maximum": max(imported.peaks), "samples": imported.peaks}
    return {
        "installed": (float(sum(releases.values())), {"releases": dict(releases)}, ""),
        "wheel": (total, {"releases": of_wheels}, lacking),
        "import": (spread.median, whole, ""),
        "resident after import": (float(statistics.median(imported.peaks)), peaks, ""),
    }


def _rows(device: Device, found: Mapping[str, Figures], reason: str) -> list[Row]:
    made = []
    for quantity, unit in UNITS.items():
        figure, details, note = found[device.variant][quantity] if device.variant in found else (None, {}, reason)
        ours = found[OURS][quantity][0] if OURS in found else None
        ratio = figure / ours if figure is not None and ours and device.variant != OURS else None
        made.append(
            Row(
                *("footprint", "", "", device.environment, device.variant, quantity, figure, unit, ratio),
                reference=OURS if ratio is not None else "",
                details={"code": device.code, **details},
                note="; ".join(part for part in (note, device.note) if part),
            )
        )
    return made


def main(argv: Sequence[str]) -> int:
    """Measure, print, write JSON."""
    p = argparse.ArgumentParser(prog="python -m benchmarks footprint", description=__doc__)
    p.add_argument("--rounds", type=int, default=Settings.rounds, help="counted ones (default: %(default)s)")
    common_options(p, "footprint")
    args = p.parse_args(argv)
    if args.rounds < 1:
        p.error(f"--rounds counts from 1, got {args.rounds}")
    settings = Settings.smallest(args.python) if args.quick else Settings(args.rounds, python=args.python)
    return finish("footprint", argv, args, functools.partial(rows, settings))
