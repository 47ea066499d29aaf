"""Data, teachers and caches for the tests of the cache, and for the processes that they start."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny import cnn
from torch import nn

from distill import fingerprint
from distill.cache import CachedTeacher, Contents
from distill.cache_stage import Options, contents_of
from distill.data.image import Digits
from distill.data.text import Cldr
from distill.features import Batch, Features, Tapped
from distill.fill import fill
from distill.teacher import FrozenTeacher
from students.bert import bert

QUIET = Console(file=io.StringIO())
OPTIONS = Options("on", "float32", None, 7)


def text(**options: Any) -> Cldr:
    return Cldr(**{"languages": 2, "limit": 20, "views": 2, **options})


def images(**options: Any) -> Digits:
    return Digits(**{"limit": 20, "views": 2, **options})


def network(data: Any, layers: int = 1, seed: int = 0) -> Tapped:
    """A student for the data, or with two layers its teacher, whose answers differ between examples."""
    torch.manual_seed(seed)
    if isinstance(data, Digits):
        made: Tapped = cnn("mobilenetv3_small_050" if layers == 1 else "resnet10t", seed, labels=10)
    else:
        made = bert(2, len(data.tokenizer), 0, layers, 16, 2, 32, zero_init_residual=False)
    if layers == 2:
        for weight in made.backbone.parameters() if isinstance(data, Cldr) else [made.backbone.fc.weight]:
            nn.init.normal_(weight, std=0.5)
    return made


def teacher_of(data: Any) -> FrozenTeacher:
    return FrozenTeacher(network(data, 2, seed=1))


def contents(teacher: FrozenTeacher | Counting, data: Any, options: Options = OPTIONS, **changes: Any) -> Contents:
    usual = {"widths": {}, "augment": True, "seed": 0, "precision": "32-true"}
    return contents_of(teacher.network, data, options, **{**usual, **changes})


class Counting:
    """The teacher, and how many examples it was asked for."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher, self.network, self.asked = teacher, teacher.network, 0

    def __call__(self, batch: Batch) -> Features:
        self.asked += len(batch["index"])
        return self.teacher(batch)


def cached(
    folder: Path, teacher: FrozenTeacher | Counting, data: Any, options: Options = OPTIONS, **changes: Any
) -> CachedTeacher:
    what = contents(teacher, data, options, **changes)
    teacher.network.watch(what.taps)
    shards = what.shards(folder)
    fill(shards, what, teacher, data, QUIET, batch_size=6)
    return CachedTeacher(shards.open(), what, teacher.network.heads)


def digest(answers: CachedTeacher) -> str:
    return fingerprint.of_tensors(answers.table[torch.arange(40)])
