"""A stand-in for the latency worker whose times are told by the files' names, so that tests do not depend on a clock.

``x1.05`` in a file's name makes it take 1.05 times as long; ``noisy`` lets processes disagree by 10 %; ``broken``
refuses to open. Every request is appended to the file that the environment variable BENCH_LOG names.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path

opened: dict[str, str] = {}
chance = random.Random(0)
log = Path(os.environ.get("BENCH_LOG", os.devnull))


def seconds(name: str) -> float:
    path = Path(opened[name])
    found = re.search(r"x(\d\.\d+)", path.name)
    noise = wobble() if "noisy" in path.name else chance.uniform(0, 1e-4)
    return 0.01 * (float(found[1]) if found else 1.0) * (1 + noise)


def wobble() -> float:
    """A tenth up in every second process, a tenth down in the others."""
    return 0.1 if log.read_text().count('"hello"') % 2 else -0.1


def answer(request: dict) -> dict:
    what = request["do"]
    if what == "open":
        if "broken" in Path(request["path"]).name:
            return {"error": "NotImplemented: this operator"}
        opened[request["name"]] = request["path"]
        return {"load": 0.5, "first": 0.25}
    if what == "warm":
        return {name: [0.01] * 5 for name in request["names"]}
    if what == "turns":
        pairs = zip(request["names"], request["counts"], strict=True)
        return {"seconds": [[seconds(name) for _ in range(count)] for name, count in pairs]}
    return {"runtimes": {"onnxruntime": "9.9"}, "cores": [0]}


if __name__ == "__main__":
    with log.open("a") as stream:
        for line in sys.stdin:
            stream.write(json.dumps([os.getpid(), json.loads(line)]) + "\n")
            stream.flush()
            print(json.dumps(answer(json.loads(line))), flush=True)
