"""Random augmentation of image batches, reproducible an example at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 6
"""Random numbers that `jitter` reads for one image."""


def uniforms(seed: int, view: Tensor, index: Tensor, draws: int = DRAWS) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of (seed, view, index of the example, number of the draw).

    A counter-based generator (the SplitMix64 finaliser, Steele et al. 2014, applied once a key), so that what an
    example gets depends on neither its batch, its place in the epoch, nor what was drawn before.

    Args:
        view, index: [B] int64.

    Returns:
        [B, draws] float32.
    """

    def mix(state: np.ndarray) -> np.ndarray:
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
        return state

    state = np.zeros((len(index), draws), dtype=np.uint64)
    for key in (seed, view.numpy()[:, None], index.numpy()[:, None], np.arange(draws)[None]):
        state = mix(state ^ np.asarray(key, dtype=np.int64).astype(np.uint64))
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32) / 2**24)


def jitter(
    pixels: Tensor,
    draws: Tensor,
    *,
    degrees: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    """A small random affine map of each image: rotation, scale by axis, shear, shift; bilinear, black outside.

    Args:
        pixels: [B, C, H, W] in [0, 1].
        draws: [B, DRAWS] in [0, 1): angle, shear, scale x, scale y, shift x, shift y. All 0.5 is the identity.
        degrees, scale, shear, shift: the largest change either way; `shift` in parts of the image's width.

    Returns:
        [B, C, H, W] in [0, 1].
    """
    angle, skew, scale_x, scale_y, shift_x, shift_y = (2 * draws - 1).to(pixels.dtype).unbind(1)
    angle, skew = math.radians(degrees) * angle, shear * skew
    scale_x, scale_y = 1 + scale * scale_x, 1 + scale * scale_y
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([scale_x * cos, scale_x * (skew * cos - sin), 2 * shift * shift_x], 1)
    row_y = torch.stack([scale_y * sin, scale_y * (skew * sin + cos), 2 * shift * shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)
