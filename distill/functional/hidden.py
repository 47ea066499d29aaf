"""Losses on hidden states [B, L, D] and feature maps [B, D, H, W]; every result is a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.precision import full_precision, same_shape


def mean_over_examples(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the batch of each example's mean over its real positions.

    Averaging within an example first makes the result a mean over examples: padding changes nothing, and equal
    micro-batches average to the batch. An example without any real position counts 0.

    Args:
        values: [B, ...]; one value a position.
        mask: of the shape of `values`, 1 or True for real positions; None where all are.
    """
    if mask is None:
        return values.mean()
    real = mask.bool()
    inner = tuple(range(1, values.ndim))
    # Filled and not multiplied: where padding overflowed to infinity, times 0 is NaN.
    return (values.masked_fill(~real, 0.0).sum(inner) / real.sum(inner).clamp_min(1)).mean()


def _positions(features: Tensor) -> Tensor:
    """Width last: [B, L, D] as it is, [B, D, H, W] as [B, H·W, D], [B, D] as [B, 1, D]."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features.unsqueeze(1) if features.ndim == 2 else features


def _real(features: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask [B, L] where the features have positions that can be padding, so for [B, L, D] alone."""
    return mask if features.ndim == 3 else None


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two feature maps [B, D, H, W] to the grid of the smaller one; widths may differ.

    As in the released code of Tian et al., "Contrastive Representation Distillation" (ICLR 2020), for attention
    transfer and VID; for FitNets it has a strided convolution.
    """
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = (min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return F.adaptive_avg_pool2d(student, (height, width)), F.adaptive_avg_pool2d(teacher, (height, width))


@full_precision
def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """(student − teacher)²: mean over the width, over an example's real positions, and over the batch.

    Args:
        student, teacher: [B, L, D], [B, D, H, W] or [B, D], of equal shape.
        mask: [B, L], 1 for real tokens; for hidden states only.

    Source: Jiao et al., "TinyBERT" (Findings of EMNLP 2020), equation 8, which sums over layers; its released code
    averages over padding as well. For feature maps: Romero et al., "FitNets" (ICLR 2015), equation 3, which sums over
    all elements and halves; most released code averages.
    """
    same_shape(student, teacher)
    squared = (_positions(student) - _positions(teacher)).square().mean(dim=-1)
    return mean_over_examples(squared, _real(student, mask))


@full_precision
def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 − cosine of student and teacher along the width: mean over an example's real positions, and over the batch.

    Source: Sanh et al., "DistilBERT" (2019), section 3 (there on the last layer, mean over the real tokens of the
    whole batch).
    """
    same_shape(student, teacher)
    cosine = F.cosine_similarity(_positions(student), _positions(teacher), dim=-1, eps=1e-8)
    return mean_over_examples(1 - cosine, _real(student, mask))


@full_precision
def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student / ‖student‖ − teacher / ‖teacher‖‖² of one vector an example, mean over the batch; at most 4.

    Args:
        student, teacher: [B, D], the states of the first token ([CLS]).

    Source: Sun et al., "Patient Knowledge Distillation for BERT Model Compression" (EMNLP 2019), equation 7, which sums
    over layers; the released code takes the mean over layers and over D instead, so for one layer its values are D
    times smaller.
    """
    same_shape(student, teacher)
    difference = F.normalize(student, dim=-1, eps=1e-8) - F.normalize(teacher, dim=-1, eps=1e-8)
    return difference.square().sum(dim=-1).mean()


@full_precision
def vid(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Variational information distillation: (teacher − mean)² / (2 σ²) + ½ ln σ², mean over all elements.

    The negative log-likelihood, up to a constant, of the teacher's features under a Gaussian whose mean is predicted
    from the student and whose variance is learnt for each channel; it can be negative.

    Args:
        mean, teacher: [B, D, H, W].
        variance: [D], above 0.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer" (CVPR 2019), equations 5 and 6.
    """
    same_shape(mean, teacher)
    spread = variance.view(1, -1, 1, 1)
    return ((teacher - mean).square() / (2 * spread) + torch.log(spread) / 2).mean()
