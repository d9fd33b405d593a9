"""Coverage-guided fuzzing of what a device reads from outside: `make fuzz`, which needs atheris.

    python tests/fuzz.py all SECONDS            # each target for so long, in its own process; a table in the end
    python tests/fuzz.py TARGET FOLDER [options of libFuzzer]

An input is a fault if it raises anything but an error of this project, takes more than 5 seconds or 128 MB more than
the seed does, or makes the runtime write outside of the work folder. Faults are kept in the folder as ``crash-*``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SECONDS_EACH, MEGABYTES = 5, 128
NAMES = (
    "manifest", "patch table", "adapter", "training state", "checkpoint", "npz", "generation", "state", "report"
)  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["all"]:
        return fuzz_all(int(sys.argv[2]))
    return fuzz_one(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])


def fuzz_all(seconds: int) -> int:
    """Every target, two at a time; how many inputs each was given, and how many were faults."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    waiting, running, failed = list(NAMES), dict[str, subprocess.Popen[bytes]](), False
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            home = folder / name.replace(" ", "-")
            home.mkdir()
            command = [sys.executable, __file__, name, str(home), f"-max_total_time={seconds}"]
            with (home / "log").open("wb") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(0.5)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            failed |= running.pop(name).returncode != 0
            print(summary(name, folder / name.replace(" ", "-")), flush=True)
    print(f"logs, corpora and faults: {folder}")
    return int(failed)


def summary(name: str, home: Path) -> str:
    text = (home / "log").read_text(errors="replace")
    runs = re.findall(r"Done (\d+) runs in (\d+) second", text)
    coverage = re.findall(r"cov: (\d+)", text)
    done = f"{int(runs[-1][0]):,} inputs in {runs[-1][1]} s" if runs else "stopped at a fault"
    faults = len([path for path in home.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-"))])
    return f"{name:15} {done}, {coverage[-1] if coverage else '?'} edges covered, {faults} faults"


def fuzz_one(name: str, home: Path, options: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["lorac_runtime"]):
        from hostile import targets
    work = home / "work"
    work.mkdir()
    target = targets(work)[name]
    corpus = home / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(target.seed)
    stay_inside(work)

    def one(content: bytes) -> None:
        fault = target.fault(content)
        if fault is not None:
            raise fault

    limits = [f"-timeout={SECONDS_EACH}", f"-rss_limit_mb={memory_now() + MEGABYTES}", f"-artifact_prefix={home}/"]
    options = [*limits, "-max_len=200000", *options]
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=altered)
    atheris.Fuzz()
    return 0


def altered(content: bytes, most: int, seed: int) -> bytes:
    """Half of the time something else within a file that stays well-formed, else what libFuzzer does to bytes."""
    import atheris

    rng = random.Random(seed)
    kind = altered_archive if content.startswith(b"PK") else altered_json
    kind = altered_header if content[7:9] == b"\0{" else kind
    if rng.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError, KeyError, EOFError, NotImplementedError, RuntimeError):
            return kind(content, rng)[:most]
    found: bytes = atheris.Mutate(content, most)
    return found


def altered_json(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a JSON text."""
    return json.dumps(with_other_value(json.loads(content), rng)).encode()


def altered_header(content: bytes, rng: random.Random) -> bytes:
    """Another value in the header of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = altered_json(content[8:end], rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def altered_archive(content: bytes, rng: random.Random) -> bytes:
    """Other bytes in one of the files of an archive, with the right checksum."""
    import atheris

    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as given, zipfile.ZipFile(made, "w") as other:
            members = [(entry.filename, given.read(entry)) for entry in given.infolist()]
            chosen = rng.randrange(len(members))
            for index, (name, bytes_) in enumerate(members):
                other.writestr(name, atheris.Mutate(bytes_, len(bytes_) + 64) if index == chosen else bytes_)
    except (zipfile.BadZipFile, zlib.error, OSError) as err:
        raise ValueError from err
    return made.getvalue()


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**63), 10**40, 0.5, 1e308, "", "../../x", "/etc/passwd", "base.onnx",
    "\0", [], {}, [2**62] * 4, {"a": {}},
)  # fmt: skip


def with_other_value(value: Any, rng: random.Random) -> Any:
    """The value with a random one of its parts replaced, removed, doubled or taken from elsewhere in it."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.05:
        return rng.choice(ODD)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.2 and isinstance(copy, list):
        copy.append(copy[key])
    elif kind < 0.3:
        other = rng.choice(list(value.values()) if isinstance(value, dict) else value)
        copy[key] = other
    else:
        copy[key] = with_other_value(value[key], rng)
    return copy


def stay_inside(folder: Path) -> None:
    """End the process if something is written elsewhere; libFuzzer's own files do not pass here."""
    home = os.path.realpath(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "shutil.rmtree")
        writes |= event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        path = arguments[1] if event in ("os.rename", "os.symlink") else arguments[0]
        if writes and isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(Path(os.fsdecode(path)).parent)
            if not (place + os.sep).startswith(home + os.sep) and os.fsdecode(path) != os.devnull:
                os.write(2, f"written outside of {home}: {event} {path!r}\n".encode())
                os.abort()

    sys.addaudithook(hook)


def memory_now() -> int:
    """Megabytes that this process has."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) // 1024


if __name__ == "__main__":
    sys.exit(main())
