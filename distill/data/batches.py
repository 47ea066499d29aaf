"""Batches of tokenised text, padded as little as possible."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.sampler import EpochSampler
from distill.errors import UserError


class BucketBatches(Sampler[list[int]]):
    """Batches of examples of similar length; every example once an epoch, only the last batch of the epoch may be
    smaller.

    Shuffled: the order of `sampler` is cut into windows of `window` batches, each window is sorted by length and cut
    into batches, and the batches of the epoch are shuffled; a pure function of (seed, epoch). Not shuffled: all
    examples sorted by length.

    Args:
        lengths: [N] number of tokens of each example.
        sampler: order of the examples, and the epoch: Lightning calls `batch_sampler.sampler.set_epoch`.
        batch_size: examples a batch.
        window: batches that are sorted together; more pads less and mixes less.
    """

    def __init__(self, lengths: Sequence[int], sampler: EpochSampler, batch_size: int, window: int = 16) -> None:
        self.lengths, self.sampler, self.batch_size, self.window = lengths, sampler, batch_size, window

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        step = self.batch_size * self.window if self.sampler.shuffle else max(1, len(order))
        batches = []
        for start in range(0, len(order), step):
            window = sorted(order[start : start + step], key=self.lengths.__getitem__)
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        if self.sampler.shuffle:
            random.Random(f"{self.sampler.seed} {self.sampler.epoch}").shuffle(batches)
        return iter(batches)

    @property
    def padding_ratio(self) -> float:
        """Share of the positions of this epoch's batches that are padding."""
        padded = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in self)
        return 1 - sum(self.lengths) / padded


class TextSplit(Dataset[dict[str, Tensor]]):
    """One split, tokenised; a whole batch is built at once and padded to its longest example.

    Args:
        tokens: N lists of ids, special tokens included.
        labels: [N] int64.
        pad: id of the padding token.
        retokenise: index and random stream -> another list of ids for the same example, for augmentation; None leaves
            them as they are.
        sampler: tells seed and view of the random streams.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        labels: Tensor,
        pad: int,
        retokenise: Callable[[int, random.Random], Sequence[int]] | None = None,
        sampler: EpochSampler | None = None,
    ) -> None:
        self.tokens, self.labels, self.pad = tokens, labels, pad
        self.retokenise, self.sampler = retokenise, sampler

    def row(self, i: int) -> Sequence[int]:
        """Ids of example i; with augmentation a pure function of (seed, view, i)."""
        if self.retokenise is None or self.sampler is None:
            return self.tokens[i]
        return self.retokenise(i, random.Random(f"{self.sampler.seed} {self.sampler.view} {i}"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = [self.row(i) for i in indices]
        width = max(map(len, rows))
        index = torch.tensor(indices)
        view = self.sampler.view if self.retokenise is not None and self.sampler is not None else 0
        return {
            "input_ids": torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": self.labels[index],
            "index": index,
            "view": torch.full_like(index, view),
        }


def text_loader(
    split: TextSplit,
    *,
    batch_size: int,
    shuffle: bool = False,
    retokenise: Callable[[int, random.Random], Sequence[int]] | None = None,
    seed: int = 0,
    views: int | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of `input_ids`, `attention_mask` [B, L], `labels` [B], `index` [B], the place in the split, and `view`
    [B]; see `BucketBatches` and `DataSet.loader`.

    Raises:
        UserError: `batch_size` is not a positive integer.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: a batch needs at least one example; give a positive integer")
    sampler = EpochSampler(len(split), shuffle=shuffle, seed=seed, views=views)
    batches = BucketBatches([len(row) for row in split.tokens], sampler, batch_size)
    examples = TextSplit(split.tokens, split.labels, split.pad, retokenise, sampler)
    return DataLoader(examples, batch_sampler=batches, collate_fn=_as_is, generator=torch.Generator())


def _as_is(batch: Any) -> Any:
    return batch
