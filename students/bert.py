"""BERT of any size as a sequence classifier, and its start from a teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from distill.errors import UserError
from distill.features import Tapped, TappedText
from distill.layers import resolve

EMBEDDING_SHAPES = ("hidden_size", "vocab_size", "max_position_embeddings", "type_vocab_size")
"""What has to be equal for the embeddings of one BERT to fit into another."""

LAYER_SHAPES = ("intermediate_size", "num_attention_heads")
"""What has to be equal for its layers, besides."""

STARTS = ("uniform", "first", "last")
"""Layer maps that a student can start from."""


def places(backbone: BertForSequenceClassification) -> dict[str, str]:
    """Taps of a BERT: `embeddings`; `layer1` to `layerN`, the hidden states [B, L, D] after each layer; `pooled`
    [B, D]; `layerN.cls`, the state of the first token [B, D]; and `layerN.query`, `layerN.key`, `layerN.value`, the
    projections [B, L, D] inside each layer."""
    layers = {f"layer{i + 1}": f"bert.encoder.layer.{i}" for i in range(backbone.config.num_hidden_layers)}
    inside = {
        f"{name}.{part}": f"{path}.attention.self.{part}"
        for name, path in layers.items()
        for part in ("query", "key", "value")
    }
    first = {f"{name}.cls": path for name, path in layers.items()}
    return {"embeddings": "bert.embeddings", **layers, "pooled": "bert.pooler", **first, **inside}


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


def chosen(start: str | Sequence[int], student: Tapped, teacher: Tapped) -> list[int]:
    """Numbers, from 0, of the teacher's layers that a student starts from, one for each of its own.

    Args:
        start: "uniform" (every k-th, the last included), "first" or "last", as in `distill.layers.resolve`; the numbers
            themselves; or "embeddings" for no layer.

    Raises:
        UserError: it is none of these, or does not fit the depths.
    """
    depth = len(teacher.layers)
    if start == "embeddings":
        return []
    if isinstance(start, str):
        if start not in STARTS:
            raise UserError(
                f"init_layers={start}: there are {', '.join(STARTS)}, embeddings, and numbers such as [0,6]"
            )
        try:
            links = resolve(start, student.layers, teacher.layers, [])
        except ValueError as error:
            raise UserError(f"init_layers={start}: {error}") from error
        return [teacher.layers.index(link.teacher) for link in links]
    numbers: list[Any] = list(start) if isinstance(start, Sequence) else []
    if len(numbers) != len(student.layers) or not all(type(i) is int and 0 <= i < depth for i in numbers):
        raise UserError(
            f"init_layers={start}: need {len(student.layers)} numbers from 0 to {depth - 1}, or one of "
            f"{', '.join(STARTS)}, embeddings"
        )
    return numbers


@torch.no_grad()
def start_from(student: Tapped, teacher: Tapped, start: str | Sequence[int]) -> None:
    """Copy a teacher's embeddings and these layers into a student of the same width; with layers, the pooler and the
    classifier too.

    Source: Sanh et al., "DistilBERT" (2019), section 3, takes one layer out of two.

    Args:
        start: see `chosen`.

    Raises:
        UserError: the networks are no BERTs, widths differ (nothing is truncated), or the layers do not fit.
    """
    small: Any = student.backbone
    big: Any = teacher.backbone
    if not all(type(network) is BertForSequenceClassification for network in (small, big)):
        raise UserError(
            f"init_layers={start}: only a BERT starts from a teacher's layers; use student.init_layers=null"
        )
    layers = chosen(start, student, teacher)
    for name in (*EMBEDDING_SHAPES, *(LAYER_SHAPES if layers else ())):
        if getattr(small.config, name) != getattr(big.config, name):
            raise UserError(
                f"init_layers={start}: {name} of the student is {getattr(small.config, name)}, of the teacher "
                f"{getattr(big.config, name)}; only equal shapes are copied, use student.init_layers=null"
            )
    small.bert.embeddings.load_state_dict(big.bert.embeddings.state_dict())
    if not layers:
        return
    small.bert.pooler.load_state_dict(big.bert.pooler.state_dict())
    small.classifier.load_state_dict(big.classifier.state_dict())
    for mine, index in zip(small.bert.encoder.layer, layers, strict=True):
        mine.load_state_dict(big.bert.encoder.layer[index].state_dict())
