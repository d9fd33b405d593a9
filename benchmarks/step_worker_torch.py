"""Worker: the same step in PyTorch. Option ``form``: of the adapters, ``weight`` or ``branch``; unused without any.

The network is folded like base.onnx, starts from the artifact's own tensors, and trains those that the artifact
trains, with AdamW (foreach) and clipping. It is in evaluation mode: a folded network differs by dropout alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.step_protocol import CLIP, LR, NETWORK, Job, Step, serve
from lorac_deploy.lora import LoraConfig, LoraConv2d, load_adapter_tensors, select_trainable
from lorac_deploy.lora_layers import recast
from lorac_runtime.adapter import load_adapter
from lorac_runtime.manifest import ADAPTER


class ThinConv2d(LoraConv2d):
    """The spatial layout as conv(x, W) + conv(conv(x, A), B): a 1 x k_w convolution, then a k_h x 1 one."""

    def forward(self, input: Tensor) -> Tensor:
        """The same output as `LoraConv2d`'s, without ever forming the weight's update."""
        (s_h, s_w), (d_h, d_w) = self.stride, self.dilation
        p_h, p_w = (int(p) for p in self.padding)
        high, wide = self.kernel_size
        rank = self.lora_a.shape[0]
        down = self.lora_a.reshape(rank, -1, 1, wide).repeat(self.groups, 1, 1, 1)
        up = (self.scale * self.lora_b).reshape(self.out_channels, high, rank).transpose(1, 2).unsqueeze(3)
        if high == 1:  # all of the geometry belongs to the first one
            hidden = functional.conv2d(input, down, None, (s_h, s_w), (p_h, p_w), (d_h, d_w), self.groups)
            change = functional.conv2d(hidden, up, groups=self.groups)
        else:
            hidden = functional.conv2d(input, down, None, (1, s_w), (0, p_w), (1, d_w), self.groups)
            change = functional.conv2d(hidden, up, None, (s_h, 1), (p_h, 0), (d_h, 1), self.groups)
        whole: Tensor = self._conv_forward(input, self.weight, self.bias)
        return whole + change


def use_branches(network: nn.Module) -> None:
    """Turn every weight-space adapter into thin branches, in place.

    Raises ValueError for another layout than the spatial one, or padding that is not zeros given as numbers.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, LoraConv2d):
            if layer.adapter.layout != "spatial" or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise ValueError(f"{name} has no thin form here: {layer}")
            recast(layer, ThinConv2d)


def trained_network(artifact: Path, form: str) -> nn.Module:
    """The network beside the artifact, prepared by the artifact's method and at its start."""
    network: nn.Module = torch.load(artifact.parent / NETWORK, weights_only=False)
    said = load_adapter(artifact / ADAPTER).metadata
    settings: dict[str, Any] = {"freeze_a": said["freeze_a"] == "true"}
    settings["blocks"] = tuple(name for name in said["blocks"].split(",") if name)
    if said["r"]:
        settings |= {"rank": int(said["r"]), "alpha": float(said["alpha"])}
        settings |= {"rank_mode": said["rank_mode"], "layout": said["layout"]}
    select_trainable(network.eval(), said["method"], LoraConfig(**settings))
    load_adapter_tensors(network, load_file(artifact / ADAPTER))
    if form == "branch":
        use_branches(network)
    return network


def prepare(job: Job) -> Step:
    """A step of AdamW."""
    torch.set_num_threads(job.threads)
    torch.set_num_interop_threads(1)
    network = trained_network(Path(job.artifact), job.options["form"])
    images, labels = (torch.from_numpy(value) for value in job.load_batch())
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, foreach=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, CLIP, foreach=True)
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    sys.exit(serve(prepare))
