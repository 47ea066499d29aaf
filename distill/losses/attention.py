"""Terms on attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill import functional
from distill.errors import UserError
from distill.features import Features
from distill.layers import LayerMap, Link
from distill.losses.layer import LayerTerm, width

COMPARISONS = ("scores_mse", "probabilities_mse", "kl")
HEADS = ("auto", "each", "mean")


class AttentionTerm(LayerTerm):
    """A layer term on what is inside a transformer's layers."""

    reads = 3

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        if student.heads is None or teacher.heads is None:
            raise ValueError(self.unfit("one of the networks has no attention heads"))
        self.head_counts = student.heads, teacher.heads
        super().prepare(student, teacher, examples)


def mask_of(features: Features, tap: str) -> Tensor:
    """The mask [B, L], or one that calls every position real."""
    states = features.hidden[tap]
    return features.mask if features.mask is not None else states.new_ones(states.shape[:2])


class Attention(AttentionTerm):
    """Attention maps of linked transformer layers: squared difference of scores or of probabilities
    (`distill.functional.scores_mse`), or KL divergence (`distill.functional.attention_kl`), without padding.

    Computed from the query and key projections of the linked layers alone: SDPA stays on in the forward pass, and no
    dropout is in the maps. A mean over examples. Memory grows with the linked layers, by heads · L² numbers an example.

    Args:
        compare: scores_mse (before softmax, TinyBERT), probabilities_mse, or kl (MiniLM).
        heads: each (head by head; counts must be equal), mean (the mean over heads on both sides), or auto: each where
            counts are equal, else mean.
    """

    parts = (".query", ".key")
    alternatives = "attention_transfer, hidden, sp"

    def __init__(
        self,
        weight: float = 0.02,
        layers: LayerMap = "uniform",
        compare: str = "scores_mse",
        heads: str = "auto",
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers)
        if compare not in COMPARISONS:
            raise UserError(f"compare={compare}: there are {', '.join(COMPARISONS)}")
        if heads not in HEADS:
            raise UserError(f"heads={heads}: there are {', '.join(HEADS)}")
        self.comparison, self.heads = compare, heads

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        mine, theirs = self.head_counts
        if self.heads == "each" and mine != theirs:
            raise ValueError(f"heads=each, and the student has {mine} heads where the teacher has {theirs}; take mean")
        self.merges = self.heads == "mean" or mine != theirs

    def describe(self, link: Link) -> str:
        mine, theirs = self.head_counts
        return f"queries, keys; mean over {theirs} and {mine} heads" if self.merges else f"queries, keys; {mine} heads"

    def maps(self, features: Features, layer: str, mask: Tensor) -> Tensor:
        """What is compared: scores [B, A, L, L], with A = 1 for the mean over heads; logarithms of probabilities are
        scores too."""
        query, key = (features.hidden[layer + part] for part in self.parts)
        assert features.heads is not None
        scores = functional.scaled_scores(query, key, features.heads)
        if self.comparison == "scores_mse":
            return scores.mean(dim=1, keepdim=True) if self.merges else scores
        if self.comparison == "probabilities_mse":
            probabilities = functional.attention_probabilities(scores, mask)
            return probabilities.mean(dim=1, keepdim=True) if self.merges else probabilities
        if not self.merges:
            return scores
        logs = functional.attention_log_probabilities(scores, mask)
        return torch.logsumexp(logs, dim=1, keepdim=True) - math.log(logs.shape[1])

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mask = mask_of(student, link.student + self.parts[0])
        mine, theirs = self.maps(student, link.student, mask), self.maps(teacher, link.teacher, mask)
        return (functional.attention_kl if self.comparison == "kl" else functional.scores_mse)(mine, theirs, mask)


class AttentionTransfer(LayerTerm):
    """Where linked stages of two CNNs look; see `distill.functional.attention_transfer`.

    A mean over examples. Needs no projector: widths are averaged away.
    """

    reads = 4
    alternatives = "attention, hidden, sp"

    def __init__(
        self, weight: float = 400.0, layers: LayerMap = "uniform", schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule, layers)

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        return functional.attention_transfer(student.hidden[link.student], teacher.hidden[link.teacher])


class MiniLM(AttentionTerm):
    """MiniLM: KL divergence of the attention distributions plus that of the value relations, of the last layers.

    Value relations are scaled products of the values with themselves, softmax over the tokens. Both are
    `distill.functional.attention_kl`. A mean over examples. Heads have to be as many on both sides; widths may differ.

    Source: Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
    Transformers" (NeurIPS 2020), equations 6 to 10. No code for training was released.
    """

    parts = (".query", ".key", ".value")
    alternatives = "attention_transfer, hidden, sp"

    def __init__(
        self, weight: float = 1.0, layers: LayerMap = "top", schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule, layers)

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        mine, theirs = self.head_counts
        if mine != theirs:
            raise ValueError(f"the student has {mine} heads and the teacher {theirs}; take minilmv2 or attention")

    def describe(self, link: Link) -> str:
        return f"queries, keys, values; {self.head_counts[0]} heads"

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mask = mask_of(student, link.student + ".query")
        total = []
        for left, right in ((".query", ".key"), (".value", ".value")):
            mine, theirs = (
                functional.scaled_scores(features.hidden[tap + left], features.hidden[tap + right], heads)
                for features, tap, heads in zip((student, teacher), link, self.head_counts, strict=True)
            )
            total.append(functional.attention_kl(mine, theirs, mask))
        return torch.stack(total).sum()


class MiniLMv2(AttentionTerm):
    """MiniLMv2: KL divergence of the query-query, key-key and value-value relations of one layer, mean of the three.

    Queries of all heads are joined and split again into relation heads, as many on both sides, so that numbers of
    heads and widths may differ. Each is `distill.functional.attention_kl`. A mean over examples.

    Args:
        layers: the paper takes the last layer of the student, and of a large teacher one in the upper middle.
        relation_heads: has to divide both widths; None: the greatest number up to 48 that does.

    Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers" (Findings of ACL 2021), equations 4 to 6; 48 relation heads for base-size teachers. No code for
    training was released.
    """

    parts = (".query", ".key", ".value")
    alternatives = "attention_transfer, hidden, sp"

    def __init__(
        self,
        weight: float = 2.5,
        layers: LayerMap = "top",
        relation_heads: int | None = None,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers)
        if relation_heads is not None and not (type(relation_heads) is int and relation_heads >= 1):
            raise UserError(f"relation_heads={relation_heads}: must be a whole number >= 1, or null")
        self.relation_heads = relation_heads

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        self.heads = {}
        for link in self.links:
            widths = width(student.hidden[link.student + ".query"]), width(teacher.hidden[link.teacher + ".query"])
            both = math.gcd(*widths)
            heads = self.relation_heads or max(n for n in range(1, 49) if both % n == 0)
            if both % heads:
                raise ValueError(f"relation_heads={heads} does not divide the widths {widths[0]} and {widths[1]}")
            self.heads[link] = heads

    def describe(self, link: Link) -> str:
        return f"queries, keys, values; {self.heads[link]} relation heads"

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mask = mask_of(student, link.student + ".query")
        values = []
        for part in self.parts:
            mine, theirs = (
                functional.scaled_scores(features.hidden[tap + part], features.hidden[tap + part], self.heads[link])
                for features, tap in zip((student, teacher), link, strict=True)
            )
            values.append(functional.attention_kl(mine, theirs, mask))
        return torch.stack(values).mean()
