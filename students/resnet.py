"""ResNet students, random weights."""

from __future__ import annotations

from collections.abc import Sequence

from distill.features import TappedImage
from teachers.vision import network, taps

TAPS = taps(["layer1", "layer2", "layer3", "layer4"], "global_pool")
"""Strides 4, 8, 16, 32, in every ResNet."""


def resnet18(num_labels: int, mean: Sequence[float], std: Sequence[float]) -> TappedImage:
    """ResNet-18: two basic blocks a stage, 11.2M parameters without the classifier."""
    return network("resnet18", TAPS, num_labels, mean, std)


def resnet10t(num_labels: int, mean: Sequence[float], std: Sequence[float]) -> TappedImage:
    """timm's ResNet-10-T: three convolutions first, a basic block a stage, 4.9M parameters without the classifier."""
    return network("resnet10t", TAPS, num_labels, mean, std)
