"""Make the Python environments that other benchmarks need: ``python -m benchmarks setup``."""

from benchmarks.environments import main

__all__ = ["main"]
