"""What a data set is to the rest: batches with documented keys, and the facts that networks and exports need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError


class DataSet(ABC):
    """Labelled examples in three splits. Selection is done on "val"; "test" is read once, at the end.

    Attributes:
        name: of the data set.
        task: what labels and logits mean, one of `distill.losses.TASKS`.
        label_names: one a class, in the order of the logits.
        sizes: number of examples in "train", "val" and "test".
        fingerprint: sha256 hex over everything that decides an example.
        network_facts: what the builder of a network may ask for.
        views: how many random augmentations of an example the student and its baseline see; None: a new one in every
            epoch.
        workers: processes that build batches ahead of the training; 0: none.
        replayable: whether augmentation is a pure function of (seed, view, index). Only then can what a teacher says of
            augmented examples be stored.
    """

    name: str
    task: str = "multiclass"
    label_names: list[str]
    sizes: dict[str, int]
    views: int | None = None
    workers: int = 0
    replayable: bool = True

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    @property
    @abstractmethod
    def network_facts(self) -> dict[str, Any]: ...

    @abstractmethod
    def sample(self) -> dict[str, Tensor]:
        """The inputs of a batch of one, of the largest shape that the data set gives; for counting MACs and timing."""

    @abstractmethod
    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        views: int | None = None,
    ) -> DataLoader[dict[str, Tensor]]:
        """Batches of `labels` [B] int64, `index` [B] int64 (place in the split), `view` [B] int64 (number of the random
        augmentation, 0 where there is none) and the inputs.

        The order of epoch e is a pure function of (seed, e); augmentation of (seed, view, index), where the view is e,
        or e mod `views`. `batch_sampler.sampler.set_epoch` sets the epoch. The loader's data set builds the batch of
        any rows view · N + index that it is asked for (`EpochSampler`).
        """


def checked_views(views: int | None) -> int | None:
    """Raises UserError unless the value is None or a whole number >= 1."""
    if views is not None and not (type(views) is int and views >= 1):
        raise UserError(
            f"views={views}: must be a whole number >= 1 of augmented views, or null for a new one in every epoch"
        )
    return views


class TextData(DataSet):
    """Inputs `input_ids` and `attention_mask` [B, L] int64, padded to the longest of the batch.

    Attributes:
        tokenizer: goes into the export.
        max_length: L is never above it.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    def network_facts(self) -> dict[str, Any]:
        """`num_labels`, `vocab_size`, `pad_token_id`."""
        sizes = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id}
        return {"num_labels": len(self.label_names), **sizes}

    def sample(self) -> dict[str, Tensor]:
        ids = torch.full((1, self.max_length), self.tokenizer.unk_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ImageData(DataSet):
    """Input `pixels` [B, 3, H, W] float32 in [0, 1], not normalised: every network brings its own normalisation.

    Attributes:
        input_size: (3, H, W).
        mean, std: of a channel, for networks that are trained from random weights.
        interpolation: how a picture is brought to `input_size`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @property
    def network_facts(self) -> dict[str, Any]:
        """`num_labels`, `mean`, `std`."""
        return {"num_labels": len(self.label_names), "mean": self.mean, "std": self.std}

    def sample(self) -> dict[str, Tensor]:
        return {"pixels": torch.full((1, *self.input_size), 0.5)}
