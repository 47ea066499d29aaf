"""Losses as pure functions: tensors in, a scalar out, computed in log-space and in fp32 or better."""

from distill.functional.attention import (
    attention_kl,
    attention_log_probabilities,
    attention_probabilities,
    attention_transfer,
    scaled_scores,
    scores_mse,
    spatial_attention,
    split_heads,
)
from distill.functional.hidden import hidden_cosine, hidden_mse, pkd, same_grid, vid
from distill.functional.logits import (
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    dist,
    dkd,
    hard_label,
    logit_std,
    logits_kl,
    logits_mse,
    squared_error,
    standardize,
)
from distill.functional.relation import crd, pkt, rkd_angle, rkd_distance, similarity_preserving

__all__ = [
    "attention_kl",
    "attention_log_probabilities",
    "attention_probabilities",
    "attention_transfer",
    "binary_cross_entropy",
    "binary_kl",
    "crd",
    "cross_entropy",
    "dist",
    "dkd",
    "hard_label",
    "hidden_cosine",
    "hidden_mse",
    "logit_std",
    "logits_kl",
    "logits_mse",
    "pkd",
    "pkt",
    "rkd_angle",
    "rkd_distance",
    "same_grid",
    "scaled_scores",
    "scores_mse",
    "similarity_preserving",
    "spatial_attention",
    "split_heads",
    "squared_error",
    "standardize",
    "vid",
]
