"""Corruptions and drifts of images: what may happen to a camera after the model was trained.

The corruptions follow the published definition of CIFAR-10-C (Hendrycks and Dietterich 2019), constants for
32 x 32 pixels; the drifts are simpler and stronger, for demonstrations.
"""

from lorac_deploy.corruptions.apply import DRIFTS, corrupt, list_corruptions

__all__ = ["DRIFTS", "corrupt", "list_corruptions"]
