"""``python -m benchmarks NAME [OPTIONS]``: one module answers one question."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "advising": "does lorac-deploy advise find the best block without being told the drift",
    "adaptation": "accuracy on drifted images before and after fine-tuning, per method and corruption",
    "export": "time, memory and size of making the files that a device is given, beside other converters",
    "fleet": "what 20 cameras with different drifts gain by learning together, and what travels",
    "fleet_alone": "what each of these cameras comes to without the others, at several learning rates",
    "fleet_page": "fill in the tables and the plot of docs/fleet.md from a finished fleet",
    "fleet_traffic": "bytes that a device of a fleet sends and receives in a round, on the wire",
    "footprint": "installed and wheel megabytes, import seconds and memory of a device, beside other frameworks",
    "finetune": "time of fine-tuning steps, of epochs and to a target accuracy, beside what else one would use",
    "forms": "which form of an adapter costs less, layer by layer; the cost model that chooses it",
    "fusing": "time and memory of fusing a ResNet-18 into its ONNX or TFLite file",
    "all": "the whole suite, and its report",
    "latency": "is a fused file as fast as its base, on every runtime; with controls and planted faults",
    "memory": "peak memory of fine-tuning, saved activations, sizes of files, beside what else one would use",
    "page": "fill in the tables and plots of docs/results.md from finished benchmarks",
    "report": "one page, index.html, of a results file: what came out, plots, tables, beside an earlier run",
    "segmentation": "do torchvision's segmentation networks export, step as PyTorch does, fuse (docs/tasks.md)",
    "skip": "Skip2-LoRA: fine-tuning with skip adapters and a cache beside LoRA on all layers, accuracy and time",
    "setup": "make the Python environments that other benchmarks need",
    "startup": "seconds from starting the process to the end of the first step, beside PyTorch",
    "timm": "which of timm's convolutional nets attach, export, step as PyTorch does, fuse (docs/timm.md)",
    "web": "the page that trains beside the runtime: how far apart their adapters are, milliseconds per step",
    "web_page": "fill in the tables of docs/browser.md",
    "studies": "the papers' comparisons of methods on real data, each a grid for lorac-deploy study",
}


def main(argv: list[str]) -> int:
    """Run the named benchmark with the rest of the arguments."""
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [OPTIONS]\n")
        print("\n".join(f"  {name:12} {what}" for name, what in BENCHMARKS.items()))
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    module = importlib.import_module(f"benchmarks.{argv[0]}")
    status: int = module.main(argv[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
