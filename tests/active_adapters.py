"""Run by an environment with onnxruntime 1.20 or later: what a model answers without and with an active adapter.

``active_adapters.py MODEL INPUT.npy OUT.npz ADAPTER...``; also the adapters' tensors as onnxruntime reads them.
"""

from __future__ import annotations

import sys

import numpy as np


def main(model: str, given: str, out: str, *adapters: str) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = {session.get_inputs()[0].name: np.load(given)}
    found = {"plain": session.run(None, x)[0]}
    for number, path in enumerate(adapters):
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(path)
        options.add_active_adapter(adapter)
        found[f"adapted{number}"] = session.run(None, x, options)[0]
        for name, value in ort.AdapterFormat.read_adapter(path).get_parameters().items():
            found[f"{number}:{name}"] = value.numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
