"""What a base file holds besides the network that it was made from, as manifest.json says it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Additions:
    """Small modules (methods ``skip`` and ``attention``) that no weight of the network can absorb.

    ``sites`` are the layers whose inputs they read. ``nodes``, ``parameters`` and ``multiply_adds`` (for one sample, of
    convolutions and matrix products) are what base.onnx has more than the original network, so that neither it nor a
    fused file is a drop-in for the original; a fused file is one for base.onnx. ``rank`` and ``alpha`` belong to skip
    adapters, ``reduction`` to gates.
    """

    sites: tuple[str, ...]
    nodes: int
    parameters: int
    multiply_adds: int
    rank: int | None = None
    alpha: float | None = None
    reduction: int | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The settings as the metadata of an adapter file have them.

        >>> Additions(("fc",), 5, 20, 20, rank=2, alpha=4.0).settings
        {'r': '2', 'alpha': '4.0'}
        """
        named = {"r": self.rank, "alpha": self.alpha, "reduction": self.reduction}
        return {name: repr(value) for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        return (
            f"{self.nodes} nodes, {self.parameters:,} parameters and {self.multiply_adds:,} multiply-adds more "
            "than the original network: no drop-in for it, only for base.onnx"
        )


def addition_problems(added: Additions) -> list[str]:
    """What is wrong with a description of additions, a line each.

    >>> addition_problems(Additions((), 1, -1, 0))
    ['additions.sites: there are none', 'additions.parameters: -1 is below 1']
    """
    problems = [] if added.sites else ["additions.sites: there are none"]
    least = {"nodes": 1, "parameters": 1, "multiply_adds": 0, "rank": 1, "reduction": 1}
    for name, smallest in least.items():
        value = getattr(added, name)
        if value is not None and value < smallest:
            problems.append(f"additions.{name}: {value} is below {smallest}")
    return problems
