"""Measuring models where they run: what `lorac-deploy bench` and the benchmark suite share."""
