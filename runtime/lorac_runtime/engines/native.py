"""What both engines share of onnxruntime: session options, and its exceptions as ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from lorac_runtime.engines import wheel
from lorac_runtime.errors import EngineError

PROVIDERS = ("CPUExecutionProvider",)
WHERE_IN_THE_LIBRARY = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", re.DOTALL)
OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "bad allocation")


def session_options(ort: Any, threads: int | None) -> Any:
    """Options of every session; ``threads`` None leaves their number to the library."""
    options = ort.SessionOptions()
    options.log_severity_level = wheel.FATAL
    options.intra_op_num_threads = threads or 0
    # Sessions with a thread pool each: threads that spin while another session works slow it down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


@contextlib.contextmanager
def translated(engine: str, action: str) -> Iterator[None]:
    """Turn what the native library raises into EngineError, or MemoryError where that is the reason."""
    try:
        yield
    except Exception as err:
        # The training API raises RuntimeError; the exceptions of InferenceSession share only this module.
        if not isinstance(err, RuntimeError) and not type(err).__module__.startswith("onnxruntime."):
            raise
        text = WHERE_IN_THE_LIBRARY.sub("", str(err)).strip()
        if any(sign in text.lower() for sign in OUT_OF_MEMORY):
            raise MemoryError(f"{engine} could not {action}") from err
        raise EngineError(f"{engine} could not {action}: {text}") from err
