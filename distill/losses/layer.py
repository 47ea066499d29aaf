"""Terms that read taps: the layer map, and projectors where widths differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.layers import LayerMap, Link, resolve
from distill.losses.base import LossTerm
from distill.ramp import is_number

PROJECTORS = ("auto", "always", "never")


class LayerTerm(LossTerm):
    """A term on the taps that a layer map links: the mean over links of `compare`.

    A mean, where most papers have a sum, so that the weight means the same for 2 links and for 6.

    Args:
        layers: a layer map, see `distill.layers.resolve`: a name, or pairs [teacher tap, student tap].

    Attributes:
        parts: what it reads of each layer: "" is the layer's output, ".cls" the first token's state after it, ".query"
            its query projection.
        reads: dimensions that a tap must have; None for any. 2 is [B, D], 3 is [B, L, D], 4 is
            [B, D, H, W].
    """

    parts: tuple[str, ...] = ("",)
    reads: int | None = None

    def __init__(self, weight: float, schedule: Mapping[str, Any] | None, layers: LayerMap) -> None:
        super().__init__(weight, schedule)
        self.layers = layers

    def connect(self, student: Tapped, teacher: Tapped) -> None:
        places = [list(student.places), list(teacher.places)]
        self.links = resolve(self.layers, student.layers, teacher.layers, places)
        for link in self.links:
            for there, wanted in zip(places, self.taps(link), strict=True):
                if absent := [name for name in wanted if name not in there]:
                    raise ValueError(self.unfit(f"there is no {absent[0]}"))

    def unfit(self, reason: str) -> str:
        kind = {
            2: "vectors [B, D] of a transformer",
            3: "the hidden states [B, L, D] of a transformer",
            4: "the feature maps [B, D, H, W] of a CNN",
        }
        inside = ", its " + ", ".join(part[1:] for part in self.parts) if self.parts[0] else ""
        return f"it reads {kind.get(self.reads or 0, 'taps')}{inside}, and {reason}; take one of {self.alternatives}"

    def taps(self, link: Link) -> tuple[list[str], list[str]]:
        return [link.student + part for part in self.parts], [link.teacher + part for part in self.parts]

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        for link in self.links:
            for features, names in zip((student, teacher), self.taps(link), strict=True):
                shape = list(features.hidden[names[0]].shape)
                if self.reads not in (None, len(shape)):
                    raise ValueError(self.unfit(f"{names[0]} is {shape}"))

    def compare(self, link: Link, student: Features, teacher: Features) -> Tensor:
        """The value for one link, a scalar."""
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return torch.stack([self.compare(link, student, teacher) for link in self.links]).mean()


class ProjectedTerm(LayerTerm):
    """A layer term that brings the student's width to the teacher's: by a linear map for hidden states, a 1×1
    convolution for feature maps.

    Args:
        projector: "auto": where widths differ; "always"; "never": a difference is refused.
        lr_multiplier: of the learning rate of the projectors.
    """

    def __init__(
        self,
        weight: float,
        schedule: Mapping[str, Any] | None,
        layers: LayerMap,
        projector: str = "auto",
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(weight, schedule, layers)
        if projector not in PROJECTORS:
            raise UserError(f"projector={projector}: there are {', '.join(PROJECTORS)}")
        self.projector, self.lr_multiplier = projector, checked_multiplier(lr_multiplier)

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        super().prepare(student, teacher, examples)
        for link in self.links:
            mine, theirs = (
                features.hidden[names[0]] for features, names in zip((student, teacher), self.taps(link), strict=True)
            )
            narrow, wide = width(mine), width(theirs)
            if self.projector == "never" and narrow != wide:
                raise ValueError(
                    f"projector=never, and {link.student} is {narrow} wide where the teacher's {link.teacher} is "
                    f"{wide}; projector=auto makes a projector"
                )
            if self.projector == "always" or narrow != wide:
                maps = mine.ndim == 4
                made = nn.Conv2d(narrow, wide, kernel_size=1) if maps else nn.Linear(narrow, wide)
                self.own[link.key] = made.to(mine.device)

    def describe(self, link: Link) -> str:
        if link.key not in self.own:
            return ""
        return "1×1 convolution" if isinstance(self.own[link.key], nn.Conv2d) else "linear"

    def project(self, link: Link, states: Tensor) -> Tensor:
        """The student's states in the teacher's width."""
        return self.own[link.key](states) if link.key in self.own else states


def checked_multiplier(value: float) -> float:
    """The multiplier of a learning rate; raises UserError unless it is a finite number >= 0."""
    if not (is_number(value) and value >= 0):
        raise UserError(f"lr_multiplier={value}: must be a finite number >= 0; 0 keeps the projectors as they start")
    return float(value)


def width(features: Tensor) -> int:
    """D of [B, L, D], [B, D, H, W] or [B, D]."""
    return features.shape[1] if features.ndim == 4 else features.shape[-1]


def vectors(features: Tensor) -> Tensor:
    """One vector an example: [B, D] as it is, the first token of [B, L, D], all of [B, D, H, W] as [B, D·H·W]."""
    return features[:, 0] if features.ndim == 3 else features.flatten(1)
