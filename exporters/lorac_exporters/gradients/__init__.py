"""Reverse-mode differentiation of ONNX graphs, losses and optimizers, in plain ONNX operators."""
