"""What both engines share of onnxruntime: session options, and its exceptions as ours."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any

from lorac_runtime.engines import wheel
from lorac_runtime.errors import EngineError

PROVIDERS = ("CPUExecutionProvider",)
WHERE_IN_THE_LIBRARY = re.compile(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", re.DOTALL)
_MMAP_THRESHOLD, _LARGE = -3, 128 << 10  # M_MMAP_THRESHOLD of malloc.h; setting it stops glibc from raising it
OUT_OF_MEMORY = ("bad_alloc", "failed to allocate", "bad allocation")


def session_options(ort: Any, threads: int | None) -> Any:
    """Options of every session; ``threads`` None leaves their number to the library."""
    options = ort.SessionOptions()
    options.log_severity_level = wheel.FATAL
    options.intra_op_num_threads = threads or 0
    # Sessions with a thread pool each: threads that spin while another session works slow it down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def frugal(options: Any) -> Any:
    """The same options for steps at the least memory: buffers are asked for and freed one by one.

    Planned patterns keep the largest of every shape: 200 to 360 MiB more for a ResNet-18 (docs/memory.md).
    """
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    return options


def return_freed_memory() -> None:
    """Make glibc give freed weights back to the system: it keeps them once it has seen some of their size.

    Opening a session copies weights into other layouts and frees the originals. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: there is no mallopt to call
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


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
