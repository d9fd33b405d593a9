"""The network of `artifacts` in PyTorch: the oracle for losses, gradients and batch-normalisation statistics."""

from __future__ import annotations

import numpy as np
import torch
from tiny_network import ADAPTED, ALPHA, BN_FIELDS, BNS, CONVS, EPS, Arrays, R
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]


def tensors(values: Arrays, trained: Arrays, *, dtype: torch.dtype = torch.float64) -> Tensors:
    """Copies as torch tensors; those named in ``trained`` (which override) collect gradients."""
    result = {k: torch.tensor(v, dtype=dtype) for k, v in (values | trained).items()}
    for name in trained:
        result[name].requires_grad_(True)
    return result


def logits(t: Tensors, x: np.ndarray, *, bn: str, activation: str = "Relu", momentum: float = 0.1) -> Tensor:
    """``bn``: "folded", "eval" or "train" (batch statistics; the running ones in ``t`` move)."""
    act = {"Relu": torch.relu, "Tanh": torch.tanh}[activation]
    image = torch.tensor(x, dtype=t["fc.weight"].dtype)

    def norm(name: str, value: Tensor) -> Tensor:
        if bn == "folded":
            return value if BNS[name][0] else value * t[f"{name}.weight"] + t[f"{name}.bias"]
        weight, bias, mean, var = (t[f"{name}.{field}"] for field in BN_FIELDS)
        return functional.batch_norm(value, mean, var, weight, bias, bn == "train", momentum, EPS)

    skip = act(norm("bn2", conv(t, "conv2", act(norm("bn1", conv(t, "conv1", image))))))
    pooled = (conv(t, "conv3", act(norm("bn3", skip))) + skip).mean((2, 3))
    return functional.linear(pooled, t["fc.weight"], t["fc.bias"])


def conv(t: Tensors, name: str, x: Tensor) -> Tensor:
    """A convolution with its adapter, where ``t`` holds one."""
    weight = t[f"{name}.weight"]
    if name in ADAPTED and f"{name}.lora_b" in t:
        c_out, c_in, k_h, k_w = weight.shape
        product = (t[f"{name}.lora_b"] @ t[f"{name}.lora_a"]).reshape(c_out, k_h, c_in, k_w)
        weight = weight + product.permute(0, 2, 1, 3) * (ALPHA / R)
    return functional.conv2d(x, weight, t[f"{name}.bias"], stride=CONVS[name][1], padding=1)


def gradients(t: Tensors, x: np.ndarray, y: np.ndarray, **how: object) -> tuple[float, Arrays]:
    """(loss, gradient by name as float64) of mean cross-entropy; clears the gradients in ``t``."""
    loss = functional.cross_entropy(logits(t, x, **how), torch.tensor(y))
    loss.backward()
    found = {k: v.grad.double().numpy().copy() for k, v in t.items() if v.requires_grad}
    for value in t.values():
        value.grad = None
    return loss.item(), found
