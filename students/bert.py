"""BERT of any size as a sequence classifier, and its start from a teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from distill.errors import UserError
from distill.features import Tapped, TappedText

SHAPES = (
    *("hidden_size", "intermediate_size", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)
"""What has to be equal for layers and embeddings of one BERT to fit into another."""


def places(backbone: BertForSequenceClassification) -> dict[str, str]:
    """Taps of a BERT: `embeddings`, then `layer1` to `layerN` (hidden states [B, L, D] after each layer)."""
    layers = {f"layer{i + 1}": f"bert.encoder.layer.{i}" for i in range(backbone.config.num_hidden_layers)}
    return {"embeddings": "bert.embeddings", **layers}


def bert(
    num_labels: int,
    vocab_size: int,
    pad_token_id: int,
    layers: int,
    hidden_size: int,
    heads: int,
    intermediate_size: int,
    dropout: float = 0.1,
    zero_init_residual: bool = True,
) -> TappedText:
    """A BERT with random weights.

    Args:
        layers, hidden_size, heads, intermediate_size: the shape; hidden_size must be a multiple of heads.
        dropout: on hidden states and attention probabilities.
        zero_init_residual: set the two output projections of each layer to zero, so that a layer starts as the identity
            (up to its LayerNorm). A deep post-LN BERT hardly learns from plain random weights in a few hundred steps.
            Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 5.1, does it for ResNets.

    Raises:
        UserError: hidden_size is not a multiple of heads.
    """
    if hidden_size % heads:
        raise UserError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
    options: dict[str, Any] = {
        "num_labels": num_labels,
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    config = BertConfig(**options)
    backbone: Any = BertForSequenceClassification(config)
    if zero_init_residual:
        for layer in backbone.bert.encoder.layer:
            torch.nn.init.zeros_(layer.attention.output.dense.weight)
            torch.nn.init.zeros_(layer.output.dense.weight)
    return TappedText(backbone, places(backbone))


@torch.no_grad()
def start_from(student: Tapped, teacher: Tapped, layers: Sequence[int]) -> None:
    """Copy embeddings, pooler, classifier and these layers (from 0) of a teacher of the same width into the student.

    Source: Sanh et al., "DistilBERT" (2019), section 3, takes one layer out of two.

    Raises:
        UserError: widths differ (nothing is truncated), or the layers are not as many as the student has, or do not
            exist.
    """
    small: Any = student.backbone
    big: Any = teacher.backbone
    depth = big.config.num_hidden_layers
    for name in SHAPES:
        if getattr(small.config, name) != getattr(big.config, name):
            raise UserError(
                f"init_layers={list(layers)}: {name} of the student is {getattr(small.config, name)}, of the teacher "
                f"{getattr(big.config, name)}; only equal shapes are copied, use student.init_layers=null"
            )
    if len(layers) != small.config.num_hidden_layers or not all(0 <= i < depth for i in layers):
        raise UserError(
            f"init_layers={list(layers)}: need {small.config.num_hidden_layers} numbers from 0 to {depth - 1}"
        )
    small.bert.embeddings.load_state_dict(big.bert.embeddings.state_dict())
    small.bert.pooler.load_state_dict(big.bert.pooler.state_dict())
    small.classifier.load_state_dict(big.classifier.state_dict())
    for mine, index in zip(small.bert.encoder.layer, layers, strict=True):
        mine.load_state_dict(big.bert.encoder.layer[index].state_dict())
