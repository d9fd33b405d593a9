"""Copy an artifact with its graphs simplified by onnxsim; runs in the environment ``onnxsim``.

``python -m benchmarks.step_simplify ARTIFACT TARGET``: base.onnx and train_step.onnx as `onnxsim.simplify` gives them
back, everything else as it was. Prints the numbers of nodes before and after as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import onnx
import onnxsim  # type: ignore[import-not-found]  # lives in an environment of its own

GRAPHS = ("base.onnx", "train_step.onnx")


def simplify(source: Path, target: Path) -> tuple[int, int]:
    """Write a graph simplified, its weights inside and its metadata kept; (nodes before, nodes after)."""
    model = onnx.load(source)
    simplified, sound = onnxsim.simplify(model)
    if not sound:
        raise RuntimeError(f"onnxsim says that its result for {source} is not equal")
    del simplified.metadata_props[:]
    simplified.metadata_props.extend(model.metadata_props)
    onnx.save(simplified, target)
    return len(model.graph.node), len(simplified.graph.node)


def main(source: Path, target: Path) -> int:
    """Copy, then simplify."""
    shutil.copytree(source, target)
    print(json.dumps({name: simplify(source / name, target / name) for name in GRAPHS}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
