"""Files that the writer would not write: fields overwritten in place, several sub-graphs, absurd sizes."""

from __future__ import annotations

import struct
from typing import Any

from lorac_exporters.tflite.network import Network
from lorac_exporters.tflite.schema_write import IDENTIFIER, _Writer


def set_field(content: bytearray, table: Any, slot: int, form: str, value: int) -> None:
    """Overwrite a number of a table that the `tflite` package has read from ``content``."""
    place = table._tab.Offset(4 + 2 * slot)
    assert place, "the field is not in the file"
    struct.pack_into(form, content, table._tab.Pos + place, value)


def many_graphs(network: Network, count: int) -> bytes:
    """A file whose list of sub-graphs holds the same one ``count`` times."""
    writer = _Writer(1 << 20)
    tensors = network.tensors()
    graph = writer.subgraph(network, tensors, [("CONV_2D", 1)])
    code = writer.operator_code("CONV_2D", 1)
    root = writer.table(
        "Model", version=3, operator_codes=writer.tables([code]), subgraphs=writer.tables([graph] * count)
    )
    writer.builder.Finish(root, file_identifier=IDENTIFIER)
    return bytes(writer.content())


def hostile_names(letters: int) -> bytes:
    """A file with 10,000 tensors that share one name of so many letters."""
    writer = _Writer(letters + (1 << 20))
    tensor = writer.table("Tensor", shape=writer.ints([1]), name=writer.string("n" * letters))
    graph = writer.table("SubGraph", tensors=writer.tables([tensor] * 10_000))
    buffers = writer.tables([writer.table("Buffer")])
    root = writer.table("Model", version=3, subgraphs=writer.tables([graph]), buffers=buffers)
    writer.builder.Finish(root, file_identifier=IDENTIFIER)
    return bytes(writer.content())
