"""Make the Python environments that other benchmarks need: ``python -m benchmarks setup``."""

from benchmarks.interpreters import main

__all__ = ["main"]
