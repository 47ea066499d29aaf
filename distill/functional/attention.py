"""Losses on attention: of transformers, computed from queries and keys, and of CNNs, as spatial maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.hidden import mean_over_examples, same_grid
from distill.functional.precision import full_precision


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[B, L, D] to [B, heads, L, D / heads].

    Raises:
        ValueError: D is not a multiple of `heads`.
    """
    batch, length, width = states.shape
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    return states.view(batch, length, heads, width // heads).transpose(1, 2)


@full_precision
def scaled_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Attention scores before softmax, query · key / √d for each head: [B, heads, L, L].

    Of the projections and not of the attention itself, so that SDPA stays on in the network's forward pass, and the
    dropout that it applies to its probabilities is not in the scores.

    Args:
        query, key: [B, L, D].
    """
    q, k = split_heads(query, heads), split_heads(key, heads)
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def _real_pairs(mask: Tensor) -> Tensor:
    """[B, L] to [B, 1, L, L]: whether both the query and the key are real tokens."""
    real = mask.bool()
    return real[:, None, :, None] & real[:, None, None, :]


@full_precision
def attention_log_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities over the keys; padding gets no probability, and a row of nothing but padding is uniform."""
    lowest = torch.finfo(scores.dtype).min
    return torch.log_softmax(scores.masked_fill(~mask.bool()[:, None, None, :], lowest), dim=-1)


def attention_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax over the real keys: [B, A, L, L]; rows of padded queries are there, and mean nothing."""
    return attention_log_probabilities(scores, mask).exp()


@full_precision
def scores_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """(student − teacher)² of attention scores or probabilities: mean over heads and over an example's pairs of real
    tokens, then over the batch.

    Args:
        student, teacher: [B, A, L, L].
        mask: [B, L], 1 for real tokens.

    Source: Jiao et al., "TinyBERT" (Findings of EMNLP 2020), equation 7, on scores before softmax; it sums over layers.
    The released code averages over padding too, with every score below −100 set to 0.
    """
    squared = (student - teacher).square().mean(dim=1)
    return mean_over_examples(squared, _real_pairs(mask).squeeze(1))


@full_precision
def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention distributions: mean over heads and an example's real queries, then over the
    batch.

    Args:
        student, teacher: scores [B, A, L, L] before softmax; the softmax is over the real keys.
        mask: [B, L], 1 for real tokens.

    Source: Wang et al., "MiniLM" (NeurIPS 2020), equation 6.
    """
    log_p, log_q = (attention_log_probabilities(scores, mask) for scores in (teacher, student))
    real = _real_pairs(mask)
    # Where a key is padding both log-probabilities are hugely negative; their difference must not meet a probability.
    terms = torch.where(real, log_p.exp() * (log_p - log_q), 0.0)
    return mean_over_examples(terms.sum(dim=-1).mean(dim=1), mask)


@full_precision
def spatial_attention(features: Tensor) -> Tensor:
    """Where a CNN looks: the mean over channels of the squared activations [B, D, H, W], as a vector [B, H·W] of
    length 1."""
    return F.normalize(features.square().mean(dim=1).flatten(1), dim=-1, eps=1e-12)


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """(student − teacher)² of spatial attention maps: mean over positions and over the batch.

    Widths may differ; where the grids do, the larger one is average-pooled to the smaller.

    Args:
        student, teacher: [B, D, H, W].

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), equation 2 with p = 2, which has
    the norm of the difference, a sum over layers and a factor β / 2; the released code, like this one, has the mean of
    the squares over batch and positions, and sums over layers.
    """
    student, teacher = same_grid(student, teacher)
    return (spatial_attention(student) - spatial_attention(teacher)).square().mean()
