"""Networks of which nothing is known but their layers and the sizes of their maps."""

from __future__ import annotations

from lorac_exporters.plan import Layer, Network


def conv(name: str, size_in: int | tuple[int, ...], size_out: int | tuple[int, ...], kernel: int = 3) -> Layer:
    """Of a square map, or of a signal where sizes are tuples of one."""
    before, after = ((s, s) if isinstance(s, int) else s for s in (size_in, size_out))
    return Layer(name, f"{name}.weight", None, (8, 8, *(kernel,) * len(after)), size_in=before, size_out=after)


def plain(*convs: Layer) -> Network:
    return Network(convs, ("fc.weight", (4, 8)), ("fc.bias", (4,)), 1000)
