"""Terms on hidden states and feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError
from distill.features import Features
from distill.layers import LayerMap, Link
from distill.losses.layer import LayerTerm, ProjectedTerm, checked_multiplier

DISTANCES = {"mse": functional.hidden_mse, "cosine": functional.hidden_cosine}


class Hidden(ProjectedTerm):
    """Hidden states or feature maps of linked layers: squared difference (`distill.functional.hidden_mse`) or cosine
    (`distill.functional.hidden_cosine`), without padding.

    Feature maps of different grids are compared on the smaller one. A mean over examples. With one hint layer in the
    middle and a projector always, this is FitNets' hint loss.

    Args:
        distance: mse or cosine.
    """

    alternatives = "logits, rkd, sp, pkt"

    def __init__(
        self,
        weight: float = 20.0,
        layers: LayerMap = "uniform",
        distance: str = "mse",
        projector: str = "auto",
        lr_multiplier: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers, projector, lr_multiplier)
        if distance not in DISTANCES:
            raise UserError(f"distance={distance}: there are {', '.join(DISTANCES)}")
        self.distance = distance

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mine, theirs = functional.same_grid(
            self.project(link, student.hidden[link.student]), teacher.hidden[link.teacher]
        )
        return DISTANCES[self.distance](mine, theirs, student.mask)


class PatientKD(ProjectedTerm):
    """Directions of the [CLS] states of linked layers; see `distill.functional.pkd`.

    A mean over examples. The paper's students are as wide as their teacher; where widths differ, a projector comes
    first. It reads `layerN.cls`, one vector an example, which a cache can hold.
    """

    parts = (".cls",)
    reads = 2
    alternatives = "hidden, attention_transfer, sp"

    def __init__(
        self,
        weight: float = 3.5,
        layers: LayerMap = "skip",
        projector: str = "auto",
        lr_multiplier: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers, projector, lr_multiplier)

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mine, theirs = student.hidden[f"{link.student}.cls"], teacher.hidden[f"{link.teacher}.cls"]
        return functional.pkd(self.project(link, mine), theirs)


class Gaussian(nn.Module):
    """The teacher's feature maps, predicted from the student's: a mean from two 1×1 convolutions with a ReLU in
    between, and one variance a channel that starts at 5.

    The released code of Tian et al. (2020) has three convolutions.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Conv2d(narrow, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 1))
        start = torch.tensor(5.0)
        self.raw_variance = nn.Parameter(torch.log(torch.expm1(start)).repeat(wide))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(maps), nn.functional.softplus(self.raw_variance) + 1e-5


class VariationalInformation(LayerTerm):
    """How well the teacher's feature maps can be predicted from the student's; see `distill.functional.vid`.

    A mean over examples. Can be negative.

    Args:
        lr_multiplier: of the learning rate of the predictors.
    """

    reads = 4
    alternatives = "hidden, pkd, attention"

    def __init__(
        self,
        weight: float = 1.0,
        layers: LayerMap = "uniform",
        lr_multiplier: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule, layers)
        self.lr_multiplier = checked_multiplier(lr_multiplier)

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        for link in self.links:
            mine, theirs = student.hidden[link.student], teacher.hidden[link.teacher]
            self.own[link.key] = Gaussian(mine.shape[1], theirs.shape[1]).to(mine.device)

    def describe(self, link: Link) -> str:
        return "predictor"

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        mine, theirs = functional.same_grid(student.hidden[link.student], teacher.hidden[link.teacher])
        mean, variance = self.own[link.key](mine)
        return functional.vid(mean, variance, theirs)
