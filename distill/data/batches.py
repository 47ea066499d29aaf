"""Batches of tokenised text, padded as little as possible."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.data.loading import batch_loader, checked_batch_size
from distill.data.sampler import EpochSampler


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

    def length(self, row: int) -> int:
        return self.lengths[row % len(self.lengths)]

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        step = self.batch_size * self.window if self.sampler.shuffle else max(1, len(order))
        batches = []
        for start in range(0, len(order), step):
            window = sorted(order[start : start + step], key=self.length)
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        if self.sampler.shuffle:
            random.Random(f"{self.sampler.seed} {self.sampler.epoch}").shuffle(batches)
        return iter(batches)

    @property
    def padding_ratio(self) -> float:
        """Share of the positions of this epoch's batches that are padding."""
        padded = sum(len(batch) * max(map(self.length, batch)) for batch in self)
        return 1 - sum(self.lengths) / padded


def padding(loader: DataLoader[dict[str, Tensor]]) -> str | None:
    """What the length buckets of a loader save, for people; None where it has none."""
    batches = loader.batch_sampler
    if not isinstance(batches, BucketBatches):
        return None
    unsorted = BucketBatches(batches.lengths, batches.sampler, batches.batch_size, window=1)
    return (
        f"padding is {batches.padding_ratio:.0%} of the positions in batches of {batches.batch_size}; without length "
        f"buckets it would be {unsorted.padding_ratio:.0%}"
    )


class TextSplit(Dataset[dict[str, Tensor]]):
    """One split, tokenised; a whole batch is built at once and padded to its longest example.

    Args:
        tokens: N lists of ids, special tokens included.
        labels: [N] int64.
        pad: id of the padding token.
        retokenise: index and random stream -> another list of ids for the same example, for augmentation; None leaves
            them as they are.
        seed: of the random streams.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        labels: Tensor,
        pad: int,
        retokenise: Callable[[int, random.Random], Sequence[int]] | None = None,
        seed: int = 0,
    ) -> None:
        self.tokens, self.labels, self.pad = tokens, labels, pad
        self.retokenise, self.seed = retokenise, seed

    def ids(self, view: int, index: int) -> Sequence[int]:
        """Those of one example; with augmentation a pure function of (seed, view, index)."""
        if self.retokenise is None:
            return self.tokens[index]
        return self.retokenise(index, random.Random(f"{self.seed} {view} {index}"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        places = [divmod(row, len(self)) for row in rows]
        texts = [self.ids(*place) for place in places]
        width = max(map(len, texts))
        view, index = torch.tensor(places).unbind(1)
        return {
            "input_ids": torch.tensor([[*ids, *[self.pad] * (width - len(ids))] for ids in texts]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]),
            "labels": self.labels[index],
            "index": index,
            "view": view,
        }


def text_loader(
    split: TextSplit,
    *,
    batch_size: int,
    shuffle: bool = False,
    retokenise: Callable[[int, random.Random], Sequence[int]] | None = None,
    seed: int = 0,
    views: int | None = None,
    workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of `input_ids`, `attention_mask` [B, L], `labels` [B], `index` [B], the place in the split, and `view`
    [B]; see `BucketBatches`, `DataSet.loader`, and `batch_loader` for `workers`.

    Raises:
        UserError: `batch_size` is not a positive integer.
    """
    sampler = EpochSampler(len(split), shuffle=shuffle, seed=seed, views=1 if retokenise is None else views)
    lengths = [len(ids) for ids in split.tokens]
    batches = BucketBatches(lengths, sampler, checked_batch_size(batch_size))
    examples = TextSplit(split.tokens, split.labels, split.pad, retokenise, seed)
    return batch_loader(examples, workers, batch_sampler=batches)
