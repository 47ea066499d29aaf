"""MobileNetV3 teachers."""

from __future__ import annotations

from collections.abc import Sequence

from distill.features import TappedImage
from teachers.vision import network, taps

TAPS = taps(["blocks.1", "blocks.2", "blocks.4", "blocks.6"], "flatten")
"""The last block of each resolution: strides 4, 8, 16, 32."""


def mobilenetv3_large(
    num_labels: int, mean: Sequence[float], std: Sequence[float], weights: str = "scratch"
) -> TappedImage:
    """MobileNetV3-Large, width 1.0, 4.2M parameters without the classifier; see `teachers.vision.network`."""
    return network("mobilenetv3_large_100", TAPS, num_labels, mean, std, weights)
