"""The DataLoader of every data set whose `__getitems__` builds a whole batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.errors import UserError


def batch_loader(dataset: Dataset[dict[str, Tensor]], workers: int = 0, **order: Any) -> DataLoader[dict[str, Tensor]]:
    """A DataLoader of the batches that `dataset.__getitems__` builds.

    Args:
        dataset: asked for the rows of a batch (`EpochSampler`), and a function of them alone.
        workers: processes that build batches ahead of the training, which go on from one epoch to the next; 0 builds
            them in the training's own.
        order: `batch_sampler`, or `sampler` and `batch_size`; what else a DataLoader takes.
    """
    return DataLoader(
        dataset,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **order,
    )


def rebatched(loader: DataLoader[Any], batches: Iterable[list[int]]) -> DataLoader[Any]:
    """What a loader loads, in other batches of rows; all else is as in the loader."""
    return DataLoader(
        loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers, pin_memory=loader.pin_memory, generator=torch.Generator(),
    )  # fmt: skip


def _as_is(batch: Any) -> Any:
    return batch


def checked_batch_size(batch_size: int) -> int:
    """Raises UserError unless there is an example in a batch."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: a batch needs at least one example; give a positive integer")
    return batch_size


def checked_workers(workers: int) -> int:
    """Raises UserError unless the value is a whole number >= 0."""
    if type(workers) is not int or workers < 0:
        raise UserError(f"workers={workers}: must be a whole number >= 0 of processes that build batches ahead")
    return workers
