"""Runs .tflite files in an environment that has a TFLite runtime and numpy, and nothing of this project.

Started by `tflite_runtimes`. A message is a JSON object and arrays; see `send` and `receive`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from typing import Any, BinaryIO

import numpy as np

Message = tuple[dict[str, Any], list[np.ndarray]]


def send(stream: BinaryIO, head: dict[str, Any], arrays: list[np.ndarray]) -> None:
    """Write one message: the number of pieces, then each with its length; arrays as .npy."""
    pieces = [json.dumps(head).encode()]
    for array in arrays:
        piece = io.BytesIO()
        np.save(piece, array)
        pieces.append(piece.getvalue())
    stream.write(struct.pack("<I", len(pieces)))
    for content in pieces:
        stream.write(struct.pack("<Q", len(content)))
        stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> Message:
    """Read one message. Raises EOFError if the other side is gone."""
    (count,) = struct.unpack("<I", _exactly(stream, 4))
    pieces = [_exactly(stream, struct.unpack("<Q", _exactly(stream, 8))[0]) for _ in range(count)]
    return json.loads(pieces[0]), [np.load(io.BytesIO(piece)) for piece in pieces[1:]]


def _exactly(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError
    return content


def run(interpreters: Any, head: dict[str, Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of the model ``head["path"]``, or of the bytes that come as the first array, on the other arrays."""
    model: dict[str, Any] = {"model_path": head["path"]} if head["path"] else {"model_content": arrays.pop(0).tobytes()}
    if not head["xnnpack"]:
        kinds = interpreters.OpResolverType
        model["experimental_op_resolver_type"] = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = interpreters.Interpreter(num_threads=head["threads"], **model)
    inputs = interpreter.get_input_details()
    if len(inputs) != len(arrays):
        raise ValueError(f"the model has {len(inputs)} inputs, the test gave {len(arrays)}")
    for place, array in zip(inputs, arrays):  # noqa: B905 - runs on old Pythons too
        interpreter.resize_tensor_input(place["index"], array.shape, strict=True)
    interpreter.allocate_tensors()
    for place, array in zip(inputs, arrays):  # noqa: B905
        interpreter.set_tensor(place["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(place["index"]) for place in interpreter.get_output_details()]


def main() -> None:
    """Answer messages from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    try:
        from tflite_runtime import interpreter as interpreters
    except ImportError:
        from ai_edge_litert import interpreter as interpreters
    while True:
        try:
            head, arrays = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outputs = run(interpreters, head, arrays)
        except (ValueError, RuntimeError) as err:
            send(answers, {"refused": f"{type(err).__name__}: {err}"}, [])
        else:
            send(answers, {"refused": None}, outputs)


if __name__ == "__main__":
    main()
