"""Training engines: one module each, the same verbs (`Engine`), opened by `open_engine`."""

from lorac_runtime.engines.engine import AUTO, MODULES, Engine, open_engine

__all__ = ["AUTO", "MODULES", "Engine", "open_engine"]
