"""Full fine-tuning: every weight, or every weight of some blocks (TBFT, arXiv 2403.15905)."""

from __future__ import annotations

from lorac_exporters.blocks import inside
from lorac_exporters.methods import parts
from lorac_exporters.methods.method import Method
from lorac_exporters.plan import LoraConfig, Network, Plan, layer_of
from lorac_exporters.stages import WORDS


def plan_full(network: Network, config: LoraConfig) -> Plan:
    """Every parameter: all layers, the head, and BN affine tensors where BN was not folded.

    Raises ValueError if one of ``config.blocks`` names no layer that could train.
    """
    more = [*network.others, *parts.affine(network, LoraConfig())]
    parts.check_blocks(network, config, *more)
    convs = parts.usable(network.hidden_convs, config)
    trainables = [*parts.weights(convs), *parts.biases(convs)]
    for linear in parts.usable(network.hidden_linears, config):
        trainables += [*parts.weights([linear]), *parts.biases([linear])]
    trainables += [t for t in more if inside(layer_of(t.name), config.blocks)]
    trainables += parts.head(network, config, with_bias=True)
    return Plan("full", (), tuple(trainables), parts.frozen(network, config, trainables, "cannot train"))


def plan_blocks(network: Network, config: LoraConfig) -> Plan:
    """Every parameter of ``config.blocks`` and nothing else: target block fine-tuning (TBFT, arXiv 2403.15905).

    Raises ValueError without blocks, or if one of them names no layer that could train.
    """
    if not config.blocks:
        raise ValueError(
            f"method blocks trains the layers of the blocks that you choose, and none was given: choose of "
            f"{', '.join(WORDS)} and names of layers; method full trains all"
        )
    return plan_full(network, config)


METHODS = (
    Method("full", "every weight and bias", plan_full, frozenset({"blocks"})),
    Method("blocks", "every weight and bias of the blocks that --blocks names", plan_blocks, frozenset({"blocks"})),
)
