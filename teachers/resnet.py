"""ResNet teachers."""

from __future__ import annotations

from collections.abc import Sequence

from distill.features import TappedImage
from students.resnet import TAPS
from teachers.vision import network


def resnet50(num_labels: int, mean: Sequence[float], std: Sequence[float], weights: str = "scratch") -> TappedImage:
    """ResNet-50, 23.5M parameters without the classifier; see `teachers.vision.network`."""
    return network("resnet50", TAPS, num_labels, mean, std, weights)
