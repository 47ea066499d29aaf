"""A factor that changes in the course of a training: for weights of loss terms, and for temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError

SHAPES = ("linear", "cosine")


def is_number(value: object) -> bool:
    """Whether a value from a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Ramp:
    """`before` until the share `start` of all steps is done, `after` from the share `end` on, and in between a straight
    line or half a cosine.

    `Ramp()` is a constant factor of 1; `start=0`: a warm-up; `start == end`: a switch at that share of the steps.

    Raises:
        UserError: a value out of range.
    """

    before: float = 1.0
    after: float = 1.0
    start: float = 0.0
    end: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            if not (is_number(value := getattr(self, name)) and value >= 0):
                raise UserError(f"{name}={value} in a schedule: a factor is a finite number >= 0")
        if not (is_number(self.start) and is_number(self.end) and 0 <= self.start <= self.end <= 1):
            raise UserError(
                f"start={self.start}, end={self.end} in a schedule: shares of all steps, with 0 <= start <= end <= 1"
            )
        if self.shape not in SHAPES:
            raise UserError(f"shape={self.shape} in a schedule: there are {', '.join(SHAPES)}")

    def at(self, done: float) -> float:
        """The factor once a share `done` of all steps is done."""
        if done < self.start:
            return self.before
        if done >= self.end:
            return self.after
        way = (done - self.start) / (self.end - self.start)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.before + way * (self.after - self.before)

    @property
    def largest(self) -> float:
        return max(self.before, self.after)


def ramp(schedule: Mapping[str, Any] | None) -> Ramp:
    """From a configuration: null is constant, else the fields of `Ramp` by name.

    Raises:
        UserError: it is no such mapping.
    """
    known = Ramp.__dataclass_fields__
    if not isinstance(schedule, Mapping | None) or (schedule and set(schedule) - set(known)):
        raise UserError(f"schedule={schedule}: is null, or has some of {', '.join(known)}")
    if not schedule:
        return Ramp()
    found = Ramp(**schedule)
    if found.before == found.after == 1:
        raise UserError(f"schedule={schedule}: changes nothing, since before and after are both 1")
    return found
