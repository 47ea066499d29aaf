"""The order in which examples are visited, and which view of them is shown."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Visits each example once an epoch in an order that is a pure function of (seed, epoch); draws nothing global.

    It gives rows, view · size + index: a row alone says which example in which view is meant, so that a process which
    loads ahead needs to know no epoch. The view is the epoch, or epoch mod `views`.

    Lightning calls `set_epoch` itself; a plain loop calls `loader.batch_sampler.sampler.set_epoch(epoch)`.

    Args:
        size: number of examples.
        shuffle: False visits them in order in every epoch.
        seed: any integer.
        views: random augmentation starts over after this many epochs; None for a new view in every epoch, 1 where
            there is no augmentation.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0, views: int | None = 1) -> None:
        self.size, self.shuffle, self.seed, self.views = size, shuffle, seed, views
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        view = self.epoch if self.views is None else self.epoch % self.views
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.size, generator=generator)
        return iter((view * self.size + order).tolist())
