"""Terms on relations between the examples of a batch, or of the whole training split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Batch, Features
from distill.functional.precision import full_precision
from distill.layers import LayerMap, Link
from distill.losses.layer import LayerTerm, checked_multiplier, vectors
from distill.losses.logits import checked_factor
from distill.ramp import is_number

POOLED = (("pooled", "pooled"),)
"""What the classifiers read, on both sides."""


class RelationTerm(LayerTerm):
    """A term on one vector an example: [B, D] as it is, the first token of [B, L, D], all of [B, D, H, W].

    Widths may differ: each network is compared with itself first.
    """

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The value for vectors [B, D] and [B, D']."""
        raise NotImplementedError

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        return self.relation(vectors(student.hidden[link.student]), vectors(teacher.hidden[link.teacher]))


class RelationalKD(RelationTerm):
    """Distances between examples (`distill.functional.rkd_distance`) and angles (`distill.functional.rkd_angle`), with
    a factor each.

    Relates the examples of a batch: not a mean over examples, so micro-batches do not add up to one batch.

    Args:
        distance, angle: factors; 25 and 50 in the paper.
    """

    def __init__(
        self,
        weight: float = 0.1,
        layers: LayerMap = POOLED,
        distance: float = 25.0,
        angle: float = 50.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers)
        self.distance, self.angle = checked_factor("distance", distance), checked_factor("angle", angle)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.distance * functional.rkd_distance(student, teacher) + self.angle * functional.rkd_angle(
            student, teacher
        )


class SimilarityPreserving(RelationTerm):
    """Which examples of a batch excite a layer alike; see `distill.functional.similarity_preserving`.

    Relates the examples of a batch: not a mean over examples, so micro-batches do not add up to one batch.
    """

    def __init__(
        self, weight: float = 100.0, layers: LayerMap = "top", schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule, layers)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.similarity_preserving(student, teacher)


class ProbabilisticTransfer(RelationTerm):
    """Who is whose neighbour in a batch; see `distill.functional.pkt`.

    Relates the examples of a batch: not a mean over examples, so micro-batches do not add up to one batch.
    """

    def __init__(
        self, weight: float = 500.0, layers: LayerMap = POOLED, schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule, layers)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.pkt(student, teacher)


@full_precision
def directions(vectors: Tensor) -> Tensor:
    """Divided by their lengths along the last dimension."""
    return F.normalize(vectors, dim=-1)


class Memory(nn.Module):
    """Embeddings of every training example, by its index, and the projections that make them.

    Attributes:
        student, teacher: [M, E], rows of length 1; random until their example was seen.
        labels: [M], -1 until seen.
        log_scale: ln of the mean of exp(similarity / τ) over the negatives of the first batch; NaN before it.
    """

    def __init__(self, narrow: int, wide: int, embedding: int, examples: int) -> None:
        super().__init__()
        self.project_student, self.project_teacher = nn.Linear(narrow, embedding), nn.Linear(wide, embedding)
        for name in ("student", "teacher"):
            self.register_buffer(name, F.normalize(torch.randn(examples, embedding), dim=-1))
        self.register_buffer("labels", torch.full((examples,), -1))
        self.register_buffer("log_scale", torch.tensor(torch.nan))


class Contrastive(LayerTerm):
    """CRD: the embeddings of an example by student and by teacher are told from those of other examples, drawn from a
    memory of the whole training split; see `distill.functional.crd`, which is applied both ways and summed.

    A mean over examples for given negatives. Negatives have another label than the example, where labels are classes.
    The memory is part of the checkpoint: 2 · M · E numbers. With several processes each one has a memory of its own,
    fed with the examples that it sees.

    The released code takes the positives from the memory; here they are the other network's present embeddings, since
    on small data a memory is stale or random for much of the training.

    Args:
        embedding: E.
        negatives: drawn for each batch, with replacement; 16,384 in the paper.
        temperature: τ.
        momentum: how much of an old entry stays when its example is seen again.
        lr_multiplier: of the learning rate of the two projections.
    """

    def __init__(
        self,
        weight: float = 0.4,
        layers: LayerMap = POOLED,
        embedding: int = 128,
        negatives: int = 1024,
        temperature: float = 0.07,
        momentum: float = 0.5,
        lr_multiplier: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers)
        for name, value in (("embedding", embedding), ("negatives", negatives)):
            if not (type(value) is int and value >= 1):
                raise UserError(f"{name}={value}: must be a whole number >= 1")
        if not (is_number(temperature) and temperature > 0):
            raise UserError(f"temperature={temperature}: must be a number > 0; 0.07 is usual")
        if not (is_number(momentum) and 0 <= momentum < 1):
            raise UserError(f"momentum={momentum}: must be a number in [0, 1)")
        self.embedding, self.negatives = embedding, negatives
        self.temperature, self.momentum = temperature, momentum
        self.lr_multiplier = checked_multiplier(lr_multiplier)

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        for link in self.links:
            mine, theirs = vectors(student.hidden[link.student]), vectors(teacher.hidden[link.teacher])
            memory = Memory(mine.shape[-1], theirs.shape[-1], self.embedding, examples)
            self.own[link.key] = memory.to(mine.device)

    def describe(self, link: Link) -> str:
        return f"two projections to {self.embedding}, a memory"

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return torch.stack([self.contrast(link, student, teacher, batch) for link in self.links]).mean()

    def contrast(self, link: Link, student: Features, teacher: Features, batch: Batch) -> Tensor:
        memory: Any = self.own[link.key]
        index, labels = batch["index"], batch["labels"]
        mine = directions(memory.project_student(vectors(student.hidden[link.student])))
        theirs = directions(memory.project_teacher(vectors(teacher.hidden[link.teacher])))
        drawn = torch.randint(len(memory.labels), (self.negatives,), device=index.device)
        allowed = drawn != index[:, None]
        if self.task == "multiclass":
            allowed = allowed & (memory.labels[drawn] != labels[:, None])
        scale = memory.log_scale
        if torch.isnan(scale):
            similarity = mine.detach() @ memory.teacher[drawn].to(mine.dtype).T / self.temperature
            scale = torch.logsumexp(similarity.flatten(), 0) - math.log(similarity.numel())
        log_noise = scale + math.log(self.negatives)
        value = functional.crd(mine, theirs, memory.teacher[drawn], allowed, log_noise, self.temperature)
        value = value + functional.crd(theirs, mine, memory.student[drawn], allowed, log_noise, self.temperature)
        if self.training:
            memory.log_scale.copy_(scale)
            self.remember(memory, index, mine.detach(), theirs.detach(), labels)
        return value

    def remember(self, memory: Any, index: Tensor, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Move the entries of these examples towards their present embeddings."""
        for bank, seen in ((memory.student, student), (memory.teacher, teacher)):
            moved = directions(self.momentum * bank[index] + (1 - self.momentum) * seen)
            bank[index] = moved.to(bank.dtype)
        if self.task == "multiclass":
            memory.labels[index] = labels
