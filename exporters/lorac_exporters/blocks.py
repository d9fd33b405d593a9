"""Names of blocks: which layers they hold, and what to say about one that holds none."""

from __future__ import annotations

from collections.abc import Iterable


def inside(layer: str, blocks: tuple[str, ...]) -> bool:
    """Whether a layer is, or lies below, one of ``blocks``; without blocks every layer is inside.

    >>> inside("layer4.0.conv1", ("layer4", "fc")), inside("layer40.conv", ("layer4",)), inside("conv1", ())
    (True, False, True)
    """
    return not blocks or any(layer == block or layer.startswith(f"{block}.") for block in blocks)


def require_blocks(blocks: tuple[str, ...], layers: Iterable[str]) -> None:
    """Raise ValueError naming every block that holds none of ``layers``, with what there is instead.

    >>> require_blocks(("layer1", "layer2.0"), ["conv1", "layer1.0.conv1"])
    Traceback (most recent call last):
    ...
    ValueError: blocks: 'layer2.0' holds no layer that could train: there are conv1, layer1
    """
    known = list(dict.fromkeys(layers))
    unknown = [block for block in blocks if not any(inside(layer, (block,)) for layer in known)]
    if unknown:
        hints = (f"{block!r} holds no layer that could train: there are {_nearest(block, known)}" for block in unknown)
        raise ValueError(f"blocks: {'; '.join(hints)}")


def _nearest(block: str, layers: list[str]) -> str:
    """What exists where a name leaves the network, shortened.

    >>> _nearest("layer1.7", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"])
    'layer1.0, layer1.1'
    """
    parts = block.split(".")
    paths = [layer.split(".") for layer in layers]
    depth = max(d for d in range(len(parts)) if any(path[:d] == parts[:d] for path in paths))
    return outline((".".join(path) for path in paths if path[:depth] == parts[:depth]), depth)


def outline(layers: Iterable[str], depth: int = 0) -> str:
    """Names of layers cut after ``depth`` dots, each once, shortened.

    >>> outline(["conv1", "layer1.0.conv1", "layer1.0.conv2"])
    'conv1, layer1'
    """
    names = list(dict.fromkeys(".".join(layer.split(".")[: depth + 1]) for layer in layers))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
