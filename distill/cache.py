"""What the teacher says of the training split, on the disk: asked once an example and view, not in every step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill import fingerprint
from distill.features import Batch, Features
from distill.shards import Columns, Shards, Table

FORMAT = 1
PREFIX = "teacher."
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Contents:
    """All that decides what a cache holds: other contents, another key.

    Attributes:
        teacher: sha256 of the weights.
        network: sha256 of what weights do not tell, such as strides and activations.
        data: fingerprint of the data set.
        examples, classes: N of the training split, C.
        augment, views, seed: of the student's inputs; without augmentation there is one view, and no seed.
        precision: of the trainer, under which the teacher was asked.
        dtype: name of the floats' type.
        top_k: how many logits of an example are kept; None for all.
        taps: name -> D of the taps [B, D] that are kept besides the logits.
        shard: rows of a shard.
    """

    teacher: str
    network: str
    data: str
    examples: int
    classes: int
    augment: bool
    views: int
    seed: int | None
    precision: str
    dtype: str
    top_k: int | None
    taps: dict[str, int]
    shard: int
    format: int = field(default=FORMAT, init=False)

    @property
    def columns(self) -> Columns:
        dtype, kept = DTYPES[self.dtype], self.top_k
        taps: Columns = {f"tap.{name}": (dtype, (width,)) for name, width in self.taps.items()}
        if kept is None:
            return {"logits": (dtype, (self.classes,)), **taps}
        return {"values": (dtype, (kept,)), "indices": (torch.int32, (kept,)), "tail": (dtype, ()), **taps}

    def shards(self, root: Path) -> Shards:
        """The place for these contents, a folder in `root` that is named after the key."""
        key = fingerprint.of_values(asdict(self))
        return Shards(root / key[:20], self.views * self.examples, self.shard, self.columns)


def pack(logits: Tensor, dtype: torch.dtype, top_k: int | None) -> dict[str, Tensor]:
    """Logits [B, C] as they are stored: in `dtype`, all of them, or the `top_k` largest of each example, their places,
    and the log-sum-exp of the others."""
    if top_k is None:
        return {"logits": logits.to(dtype)}
    values, indices = logits.topk(top_k, dim=1)
    tail = logits.scatter(1, indices, -torch.inf).logsumexp(dim=1)
    return {"values": values.to(dtype), "indices": indices.int(), "tail": tail.to(dtype)}


def unpack(columns: dict[str, Tensor], classes: int) -> Tensor:
    """Logits [B, C] float32 of what `pack` gave.

    Logits that were not kept are equal, and as large as gives their log-sum-exp: at temperature 1 the probabilities of
    the `top_k` are exact.
    """
    if "logits" in columns:
        return columns["logits"].float()
    values, indices, tail = columns["values"].float(), columns["indices"].long(), columns["tail"].float()
    rest = tail - math.log(classes - values.shape[1])
    return rest[:, None].repeat(1, classes).scatter(1, indices, values)


class CachedTeacher:
    """What the teacher said, looked up by an example's view and index.

    Args:
        table: row view · N + index.
        heads: as in `Features`.
    """

    def __init__(self, table: Table, contents: Contents, heads: int | None = None) -> None:
        self.table, self.contents, self.heads = table, contents, heads

    def look_up(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the CPU and the columns of its examples, as `teacher.<column>`; in pinned memory if it is."""
        columns = self.table[batch["view"] * self.contents.examples + batch["index"]]
        if batch["index"].is_pinned():
            columns = {name: column.pin_memory() for name, column in columns.items()}
        return {**batch, **{f"{PREFIX}{name}": column for name, column in columns.items()}}

    def __call__(self, batch: Batch) -> Features:
        """The teacher's features of a batch on the CPU, or on any device of one that was looked up."""
        if not any(key.startswith(PREFIX) for key in batch):
            batch = self.look_up(batch)
        columns = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
        hidden = {name: columns[f"tap.{name}"].float() for name in self.contents.taps}
        return Features(unpack(columns, self.contents.classes), hidden, batch.get("attention_mask"), self.heads)
