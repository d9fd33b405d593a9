"""Measurements: ``python -m benchmarks NAME``. Nothing imports this package, and it is not installed."""
