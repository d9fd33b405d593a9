"""Methods that train biases or batch normalisation: little to store, and no gradient of a weight is ever formed."""

from __future__ import annotations

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import LoraConfig, Network, Norm, Plan
from lorac_runtime.manifest import Trainable


def plan_bias(network: Network, config: LoraConfig) -> Plan:
    """Every bias and nothing else (TinyTL, arXiv 2007.11622; FT-Bias of Skip2-LoRA, arXiv 2410.21073).

    Where a batch normalisation has a shift of its own, that trains and not a bias of the convolution before it: the
    sum of both is one bias of the folded network, and there it is this one that trains.

    Raises ValueError if nothing would train, or one of ``config.blocks`` holds no layer that could.
    """
    shifts = [norm for norm in network.norms if norm.shift is not None]
    parts.check_blocks(network, config, *_places(shifts))
    doubled = {norm.conv for norm in shifts}
    layers = [layer for layer in parts.usable(network.body, config) if layer.name not in doubled]
    trainables = [*parts.biases(layers), *(t for norm in _chosen(shifts, config) if (t := norm.shift) is not None)]
    if inside(network.head, config.blocks) and network.head_bias is not None:
        trainables.append(Trainable(*network.head_bias, "bias"))
    trainables += parts.biases(parts.usable(network.more_heads, config))
    _require_some(trainables, "bias", config)
    return Plan("bias", (), tuple(trainables), parts.frozen(network, config, trainables, "only biases train"))


def plan_norms(network: Network, config: LoraConfig) -> Plan:
    """Scale and shift of every batch normalisation and nothing else, the head neither.

    Raises ValueError if there is no batch normalisation, or one of ``config.blocks`` holds no layer that could train.
    """
    _require_norms(network)
    parts.check_blocks(network, config, *_places(network.norms))
    chosen = _chosen(network.norms, config)
    trainables = [t for norm in chosen for t in (norm.scale, norm.shift) if t is not None]
    _require_some(trainables, "scale or shift of a batch normalisation", config)
    why = "only scale and shift of batch normalisations train"
    return Plan("bn", (), tuple(trainables), parts.frozen(network, config, trainables, why))


def plan_statistics(network: Network, config: LoraConfig) -> Plan:
    """Nothing trains: forward passes estimate the statistics of batch normalisation anew.

    Raises ValueError for ``config.blocks``, which are meant to change what trains.
    """
    if config.blocks:
        raise ValueError(f"blocks {', '.join(config.blocks)}: method recalibrate trains nothing; leave them out")
    return Plan("recalibrate", (), (), parts.frozen(network, config, (), "only statistics change"))


def _places(norms: list[Norm] | tuple[Norm, ...]) -> list[Trainable]:
    """A tensor in each place where blocks may be: the batch normalisation's own, and its convolution's."""
    names = [name for norm in norms for name in (norm.name, norm.conv) if name is not None]
    return [Trainable(f"{name}.bias", (), "bias") for name in names]


def _chosen(norms: list[Norm] | tuple[Norm, ...], config: LoraConfig) -> list[Norm]:
    """Those inside of the blocks, by their own name or by that of the convolution that they follow."""
    return [n for n in norms if inside(n.name, config.blocks) or (n.conv is not None and inside(n.conv, config.blocks))]


def _require_norms(network: Network) -> None:
    if not any(norm.scale is not None for norm in network.norms):
        raise ValueError(
            "this network has no batch normalisation with a scale and a shift (none at all, or folded by whoever "
            "exported it): choose another method, such as bias"
        )


def _require_some(trainables: list[Trainable], what: str, config: LoraConfig) -> None:
    if not trainables:
        where = f"blocks {', '.join(config.blocks)}" if config.blocks else "this network"
        raise ValueError(f"nothing would train: there is no {what} in {where}; choose another method, or other blocks")


METHODS = (
    Method(
        "bias",
        "every bias, and shifts of batch normalisations",
        plan_bias,
        frozenset({"blocks"}),
        batchnorm="shift",
        lr=0.01,
    ),
    Method(
        "bn",
        "scale and shift of every batch normalisation",
        plan_norms,
        frozenset({"blocks"}),
        bn_policies=("frozen", "batch"),
        batchnorm="live",
        lr=0.01,
    ),
    Method(
        "recalibrate",
        "nothing: statistics of batch normalisations are estimated anew by forward passes, no labels needed",
        plan_statistics,
        bn_policies=("recalibrate",),
        loss="entropy",
        trains=False,
    ),
    Method(
        "tent",
        "scale and shift of every batch normalisation, by the entropy of the outputs: no labels needed",
        plan_norms,
        frozenset({"blocks"}),
        bn_policies=("batch", "frozen"),
        loss="entropy",
        batchnorm="live",
    ),
)
