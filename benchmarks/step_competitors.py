"""What is measured beside what: variants of the artifact, and competitors that make a step of one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.interpreters import ONNXSIM, PROJECT, RUNTIME
from lorac_exporters.artifact import ArtifactConfig
from lorac_exporters.plan import LoraConfig

RANK = 4
RUNTIME_WORKER = "benchmarks.step_worker_runtime"
FORWARD_WORKER = "benchmarks.step_worker_forward"
TORCH_WORKER = "benchmarks.step_worker_torch"
ONNXSIM_WORKER = "benchmarks.step_worker_onnxsim"
SIMPLIFIED = "simplified"  # the variant `r` as onnxsim.simplify gives it back

REFERENCE = "ours-r"
FLOOR = "forward-twice"
LAST_BLOCKS = {"mobilenet_v2": ("features.17", "features.18")}  # elsewhere a ResNet's last stage


def variants(model: str) -> dict[str, ArtifactConfig]:
    """Artifacts by name, for both engines. All adapt every convolution with r = 4 but for ``full`` and ``last``."""
    lora = LoraConfig(rank=RANK, rank_mode="r")
    last = LAST_BLOCKS.get(model, ("layer3" if model in ("resnet20", "resnet32") else "layer4",))
    loras = {
        "r": lora,
        "rk": dataclasses.replace(lora, rank_mode="rk"),
        "freeze-a": dataclasses.replace(lora, freeze_a=True),
        "paper": dataclasses.replace(lora, layout="paper"),
        "last": dataclasses.replace(lora, freeze_a=True, blocks=(*last, "head")),
    }
    configs = {name: ArtifactConfig(lora=config, engine="both") for name, config in loras.items()}
    configs |= {form: ArtifactConfig(lora=lora, engine="onnxruntime", form=form) for form in ("weight", "branch")}
    return configs | {"full": ArtifactConfig(method="full", engine="both")}


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A worker module, the environment it runs in, the variant that it steps, and its options."""

    what: str
    variant: str
    environment: str
    worker: str
    options: dict[str, Any]


def _ours(what: str, variant: str, environment: str = RUNTIME, **options: Any) -> Competitor:
    return Competitor(what, variant, environment, RUNTIME_WORKER, {"engine": "onnxruntime", **options})


def _native(what: str, variant: str) -> Competitor:
    return Competitor(what, variant, PROJECT, RUNTIME_WORKER, {"engine": "onnxruntime-training"})


def _torch(what: str, variant: str, form: str = "weight") -> Competitor:
    return Competitor(what, variant, PROJECT, TORCH_WORKER, {"form": form})


def _onnxsim(what: str, variant: str, session: str) -> Competitor:
    return Competitor(what, variant, ONNXSIM, ONNXSIM_WORKER, {"session": session})


def _forward(what: str, variant: str, passes: int) -> Competitor:
    return Competitor(what, variant, RUNTIME, FORWARD_WORKER, {"passes": passes})


COMPETITORS: dict[str, Competitor] = {
    "ours-r": _ours("ours, inner rank r", "r"),
    "ours-rk": _ours("ours, inner rank r*k", "rk"),
    "ours-freeze-a": _ours("ours, lora_a frozen", "freeze-a"),
    "ours-paper": _ours("ours, layout paper", "paper"),
    "ours-weight": _ours("ours, all adapters in weight space", "weight"),
    "ours-branch": _ours("ours, all adapters as branches", "branch"),
    "ours-full": _ours("ours, full fine-tuning", "full"),
    "ours-last": _ours("ours, lora_a frozen, last block only", "last"),
    "ours-micro8": _ours("ours, in micro-batches of 8", "r", micro_batch=8),
    "ours-1.19": _ours("ours, on the onnxruntime of the training build", "r", PROJECT),
    "forward-twice": _forward("two forward passes of base.onnx", "r", 2),
    "torch-weight": _torch("PyTorch, LoRA-C in weight space", "r"),
    "torch-branch": _torch("PyTorch, LoRA-C as thin branches", "r", "branch"),
    "torch-rk": _torch("PyTorch, LoRA-C in weight space, inner rank r*k", "rk"),
    "torch-full": _torch("PyTorch, full fine-tuning", "full"),
    "torch-last": _torch("PyTorch, lora_a frozen, last block only", "last"),
    "native-r": _native("onnxruntime-training 1.19.2", "r"),
    "native-full": _native("onnxruntime-training 1.19.2, full fine-tuning", "full"),
    "native-last": _native("onnxruntime-training 1.19.2, lora_a frozen, last block only", "last"),
    "onnxsim-weight": _onnxsim("onnxsim's training loop, weight space", "weight", "own"),
    "onnxsim-branch": _onnxsim("onnxsim's training loop, branches", "branch", "own"),
    "onnxsim-optimized": _onnxsim("onnxsim's step graph, branches, optimized session", "branch", "optimized"),
    "ours-simplified": _ours("ours, its graph simplified by onnxsim", SIMPLIFIED),
    "forward-twice-simplified": _forward("two forward passes, simplified by onnxsim", SIMPLIFIED, 2),
}
STEP = (
    "ours-r,forward-twice,ours-rk,ours-freeze-a,ours-paper,ours-weight,ours-branch,ours-full,ours-1.19,torch-weight,"
    "torch-branch,torch-rk,torch-full,native-r,native-full,onnxsim-weight,onnxsim-branch,onnxsim-optimized,"
    "ours-simplified,forward-twice-simplified"
)
MEMORY = "ours-r,ours-micro8,ours-last,ours-full,torch-weight,torch-last,torch-full,native-r,native-last,native-full"
STARTUP = "ours-r,ours-full,torch-weight,torch-full,native-r"


def chosen(text: str) -> dict[str, Competitor]:
    """Competitors by their names, comma-separated. Raises ValueError naming those that do not exist."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in COMPETITORS]
    if unknown or not names:
        raise ValueError(f"no competitors {', '.join(unknown) or '(none)'}: choose from {', '.join(COMPETITORS)}")
    return {name: COMPETITORS[name] for name in names}
