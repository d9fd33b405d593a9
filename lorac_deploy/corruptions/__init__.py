"""Corruptions and drifts of images: what may happen to a camera after the model was trained.

The corruptions follow the published definition of CIFAR-10-C (Hendrycks and Dietterich 2019), constants for
32 x 32 pixels. `CIFAR_C` names all 19; the first 15 are those whose mean is reported, the last four its extra ones.
The drifts are simpler and stronger, for demonstrations.
"""

from lorac_deploy.corruptions.apply import CIFAR_C, DRIFTS, corrupt, list_corruptions

__all__ = ["CIFAR_C", "DRIFTS", "corrupt", "list_corruptions"]
