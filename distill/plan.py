"""What a cache costs and what it saves, and so whether to have one."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch

from distill.cache import Contents
from distill.cost import call_times
from distill.errors import UserError
from distill.features import Batch, Tapped
from distill.shards import Shards
from distill.teacher import FrozenTeacher, as_in_training

SPARE = 64 * 2**20
"""Bytes that stay free on the disk, besides a tenth of what the cache needs."""


@dataclass(frozen=True)
class Pace:
    """How long a step without a cache takes.

    Attributes:
        teacher: seconds of its forward pass for an example.
        student: seconds of a forward and a backward pass for an example.
    """

    teacher: float
    student: float

    @property
    def share(self) -> float:
        """The teacher's, of the time of a step."""
        return self.teacher / (self.teacher + self.student)


def pace(teacher: FrozenTeacher, student: Tapped, batch: Batch, worker: pl.Trainer) -> Pace:
    """Measure one batch; the student is a copy, so it stays as it is."""
    device = worker.strategy.root_device
    asked = as_in_training(teacher, worker)
    trained = as_in_training(copy.deepcopy(student).to(device).train(), worker)

    def step() -> None:
        with torch.enable_grad():
            trained(batch).logits.float().square().mean().backward()

    threads, examples = torch.get_num_threads(), len(batch["index"])
    first, second = (
        call_times(call, warmup=1, repeats=1, threads=threads, device=device)[0] / (1000 * examples)
        for call in (lambda: asked(batch), step)
    )
    return Pace(first, second)


@dataclass(frozen=True)
class Estimate:
    """What a cache costs and saves.

    Attributes:
        epochs, examples, views: of the student's training.
        missing: rows that the teacher is still to be asked for.
        size, needed: bytes of the whole cache, and of the missing rows.
        free: bytes on the disk.
        processes: that fill it.
        pace: of a step without a cache; None where it was not measured, since nothing is missing.
    """

    epochs: int
    examples: int
    views: int
    missing: int
    size: int
    needed: int
    free: int
    processes: int
    pace: Pace | None

    @property
    def room(self) -> bool:
        return self.needed == 0 or 1.1 * self.needed + SPARE <= self.free

    @property
    def pays(self) -> bool:
        """Whether filling asks the teacher no more often than training without a cache does; where it is as often, the
        next run gains."""
        return self.missing <= self.epochs * self.examples

    def __str__(self) -> str:
        rows, steps = self.views * self.examples, self.epochs * self.examples
        text = (
            f"{rows:,} answers ({self.examples:,} examples × {self.views} view{'s' * (self.views > 1)}), "
            f"{self.size:,} bytes"
        )
        if self.pace is None:
            return f"{text}, all there"
        time = timedelta(seconds=math.ceil(self.missing * self.pace.teacher / self.processes))
        return (
            f"{text}, {self.missing:,} answers to compute in about {time}; {self.epochs} "
            f"epoch{'s ask' if self.epochs > 1 else ' asks'} {steps:,} times; "
            f"the teacher is {self.pace.share:.0%} of a step"
        )


def estimate(shards: Shards, contents: Contents, epochs: int, processes: int, measure: Callable[[], Pace]) -> Estimate:
    """What filling these shards costs, as things are on the disk now.

    Args:
        processes: that fill them.
        measure: called where a shard is missing.
    """
    missing = shards.missing()
    return Estimate(
        epochs=epochs,
        examples=contents.examples,
        views=contents.views,
        missing=sum(len(shards.span(number)) for number in missing),
        size=shards.bytes_of(range(len(shards))),
        needed=shards.bytes_of(missing),
        free=free_bytes(shards.folder),
        processes=processes,
        pace=measure() if missing else None,
    )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk where a folder is or is going to be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def decide(use: str, estimate: Estimate) -> tuple[bool, str]:
    """Whether to store, where it is possible, and why, in one line.

    Raises:
        UserError: it has to be stored and there is no room.
    """
    short = f"there is no room: {estimate.needed:,} bytes are needed and {estimate.free:,} are free"
    if use == "on" and not estimate.room:
        raise UserError(
            f"cache=on is not possible: {short}; make room, or set store=FOLDER, cache.dtype=float16 or cache=off"
        )
    if not estimate.room:
        return False, f"{short} ({estimate})"
    if use == "auto" and not estimate.pays:
        return False, f"it would ask the teacher more often than training does: {estimate}"
    if estimate.pace is None:
        return True, str(estimate)
    saved = estimate.pace.share * (1 - estimate.missing / (estimate.epochs * estimate.examples))
    change = f"saves {saved:.0%} of the time" if saved >= 0 else f"costs {-saved:.0%} more time"
    return True, f"{estimate}, and storing {change}"
