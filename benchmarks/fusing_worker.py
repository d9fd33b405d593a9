"""A process of its own that fuses once and says how its memory grew: ``python -m benchmarks.fusing_worker``.

Arguments: the artifact, a .safetensors file with the state, the base file's name, the file to write. Prints JSON, in
bytes: ``anonymous`` is what the process allocated (RssAnon), ``resident`` all that it held (VmRSS) with pages of mapped
files, which the system may take back at any time. Both are peaks, read every 0.2 ms, above what there was before.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from safetensors.numpy import load_file

from lorac_runtime.patch import fuse

FIELDS = {"anonymous": "RssAnon", "resident": "VmRSS"}


def memory() -> dict[str, int]:
    """Bytes of each of `FIELDS` now. Linux only."""
    lines = dict(line.split(":", maxsplit=1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 for name, field in FIELDS.items()}


class Sampler(threading.Thread):
    """Keeps the largest `memory` until ``stop`` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.peak = memory()

    def run(self) -> None:
        """Look again and again."""
        while not self.stop.is_set():
            found = memory()
            self.peak = {name: max(found[name], before) for name, before in self.peak.items()}
            time.sleep(2e-4)


def main(argv: list[str]) -> int:
    """Fuse, measure, print."""
    artifact, state, base, target = argv
    tensors = load_file(state)
    for value in tensors.values():
        value.sum()  # numpy's own first use of its parts
    before = memory()
    sampler = Sampler()
    sampler.start()
    fuse(Path(artifact), Path(target), tensors, base=base)
    sampler.stop.set()
    sampler.join()
    print(json.dumps({name: peak - before[name] for name, peak in sampler.peak.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
