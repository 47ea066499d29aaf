"""Ask the teacher for what a cache lacks, shard by shard, in one process or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from distill.cache import DTYPES, Contents, pack
from distill.callbacks.progress import stage_bar
from distill.data.base import DataSet
from distill.data.loading import rebatched
from distill.errors import UserError
from distill.features import Features
from distill.processes import processes, wait_for_all
from distill.shards import Shards
from distill.teacher import Teacher


def fill(
    shards: Shards, contents: Contents, teacher: Teacher, data: DataSet, console: Console, batch_size: int = 128
) -> str:
    """Ask the teacher for the shards that are missing, and write them; several processes share them.

    Args:
        teacher: with the taps of `contents` watched.

    Returns:
        How much of the cache was there and how much was not, for people.

    Raises:
        UserError: a shard can't be written, or the teacher's answers are not finite.
    """
    rank, world = processes()
    missing = shards.missing()
    mine = [number for number in missing if number % world == rank]
    wait_for_all()
    shards.describe(asdict(contents))
    with stage_bar(console) as bar:
        task = bar.add_task("teacher's answers", total=sum(len(shards.span(number)) for number in mine))
        for number in mine:
            rows = shards.span(number)
            shards.write(number, said(rows, contents, teacher, data, batch_size, lambda n: bar.advance(task, n)))
    wait_for_all()
    asked = sum(len(shards.span(number)) for number in missing)
    return (
        f"reused {len(shards) - len(missing)} of {len(shards)} shards ({shards.rows - asked:,} answers), "
        f"computed {len(missing)} ({asked:,} answers)"
    )


@torch.no_grad()
def said(
    rows: range, contents: Contents, teacher: Teacher, data: DataSet, batch_size: int, done: Callable[[int], None]
) -> dict[str, Tensor]:
    """The columns of these rows, in order; `done` is told how many more are there after each batch."""
    loader: Any = data.loader(
        "train", batch_size=batch_size, augment=contents.augment, seed=contents.seed or 0, views=contents.views
    )
    rank = {index: place for place, index in enumerate(chain.from_iterable(loader.batch_sampler))}
    wanted = sorted(rows, key=lambda row: rank[row % contents.examples])  # as the loader would, so by length
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    places: list[Tensor] = []
    pieces: list[dict[str, Tensor]] = []
    for batch in rebatched(loader, batches):
        pieces.append(columns_of(teacher(batch), contents))
        places.append(batch["view"] * contents.examples + batch["index"])
        done(len(places[-1]))
    place = torch.cat(places)
    by_place = place.argsort()
    if place[by_place].tolist() != list(rows):
        raise RuntimeError(f"data set {data.name} does not give each view and index once in rows {rows}")
    return {name: torch.cat([piece[name] for piece in pieces])[by_place] for name in pieces[0]}


def columns_of(features: Features, contents: Contents) -> dict[str, Tensor]:
    """What is stored of the teacher's features of a batch, on the CPU."""
    dtype = DTYPES[contents.dtype]
    columns = pack(features.logits.float(), dtype, contents.top_k)
    columns |= {f"tap.{name}": features.hidden[name].to(dtype) for name in contents.taps}
    if not all(column.isfinite().all() for column in columns.values()):
        raise UserError(
            f"the teacher's answers are not finite in {contents.dtype}, so a student can't learn from them; set "
            "cache.dtype=float32 or trainer.precision=32-true, or look at the teacher's weights"
        )
    return {name: column.cpu() for name, column in columns.items()}
