"""The order in which examples are visited, and which view of them is shown."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Visits 0 .. size-1 once an epoch in an order that is a pure function of (seed, epoch); draws nothing global.

    Lightning calls `set_epoch` itself; a plain loop calls `loader.sampler.set_epoch(epoch)`.

    Args:
        size: number of examples.
        shuffle: False visits them in order in every epoch.
        seed: any integer.
        views: random augmentation starts over after this many epochs; None for a new view in every epoch.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0, views: int | None = None) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.views = views
        self.epoch = 0

    @property
    def view(self) -> int:
        """Number of this epoch's random augmentation, from 0."""
        return self.epoch if self.views is None else self.epoch % self.views

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.size))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return iter(torch.randperm(self.size, generator=generator).tolist())
