"""MobileNetV3 students, random weights."""

from __future__ import annotations

from collections.abc import Sequence

from distill.features import TappedImage
from teachers.vision import network, taps

TAPS = taps(["blocks.0", "blocks.1", "blocks.3", "blocks.5"], "flatten")
"""The last block of each resolution: strides 4, 8, 16, 32, as the stages of the teachers."""


def mobilenetv3_small(num_labels: int, mean: Sequence[float], std: Sequence[float]) -> TappedImage:
    """MobileNetV3-Small, width 1.0, 1.5M parameters without the classifier."""
    return network("mobilenetv3_small_100", TAPS, num_labels, mean, std)


def mobilenetv3_small_half(num_labels: int, mean: Sequence[float], std: Sequence[float]) -> TappedImage:
    """MobileNetV3-Small, width 0.5, 0.6M parameters without the classifier."""
    return network("mobilenetv3_small_050", TAPS, num_labels, mean, std)
