"""Small modules that read the inputs of layers (sites): where they are, their tensors, their nodes in a graph."""
