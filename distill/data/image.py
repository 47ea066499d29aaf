"""Images: the batches every image data set yields, and the embedded set of handwritten digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.augment import jitter, uniforms
from distill.data.base import ImageData, checked_views
from distill.data.loading import batch_loader, checked_batch_size, checked_workers
from distill.data.sampler import EpochSampler
from distill.errors import UserError

FRACTIONS = {"train": 0.60, "val": 0.15, "test": 0.25}


class ImageSplit(Dataset[dict[str, Tensor]]):
    """One split held in memory; a whole batch is built at once.

    Args:
        pixels: [N, 1 or 3, H, W] uint8; one grey channel is repeated in the batch.
        labels: [N] int64.
        strength: arguments of `augment.jitter`, drawn by (seed, view, index); None: no augmentation.
        seed: of the augmentation.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, strength: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self.strength, self.seed = None if strength is None else dict(strength), seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        row = torch.tensor(rows)
        view, index = row // len(self), row % len(self)
        pixels = self.pixels[index].float() / 255
        if self.strength is not None:
            pixels = jitter(pixels, uniforms(self.seed, view, index), **self.strength)
        return {
            "pixels": pixels.expand(-1, 3, -1, -1).contiguous(),
            "labels": self.labels[index],
            "index": index,
            "view": view,
        }


def image_loader(
    pixels: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    shuffle: bool = False,
    strength: Mapping[str, float] | None = None,
    seed: int = 0,
    views: int | None = None,
    workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of `pixels` [B, 3, H, W] float32 in [0, 1], `labels` [B], `index` [B], the place in the split, and `view`
    [B]; see `DataSet.loader`, `ImageSplit` for `strength` and `batch_loader` for `workers`.

    A shuffled epoch leaves out a last batch of one example, on which batch normalisation is undefined.

    Raises:
        UserError: `batch_size` is not a positive integer.
    """
    return batch_loader(
        ImageSplit(pixels, labels, strength, seed),
        workers,
        batch_size=checked_batch_size(batch_size),
        sampler=EpochSampler(len(labels), shuffle=shuffle, seed=seed, views=1 if strength is None else views),
        drop_last=shuffle and len(labels) > batch_size and len(labels) % batch_size == 1,
    )


def stratified(labels: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Positions of each split's examples, with equal shares of every class; the last split takes the remainder."""
    random = np.random.RandomState(seed)
    parts: dict[str, list[np.ndarray]] = {split: [] for split in fractions}
    bounds = np.cumsum(list(fractions.values()))[:-1]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        for split, part in zip(fractions, np.split(members, np.rint(bounds * len(members)).astype(int)), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def balanced(labels: np.ndarray, limit: int) -> np.ndarray:
    """Positions of the first `limit` examples, taken in turn from each class, in their original order."""
    rank = np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.sort(np.lexsort((labels, rank))[:limit])


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, split 60/15/25 with equal shares of each class.

    The pixels are what `timm.data.create_transform(..., is_training=False)` makes of the 8x8 picture saved as a PNG,
    with bicubic interpolation and crop_pct 1.0, before normalisation; an exported network fed with such a file sees
    what it was measured on. The set (the test part of UCI Optdigits) does not say who wrote what, so the same hand is
    in every split.

    Args:
        size: side of the square the pictures are enlarged to, 8 to 256 pixels.
        limit: at most this many examples a split, balanced over the classes; None for all.
        seed: of the split. The default is the split that all results use.
        views, workers: see `DataSet`.

    Attributes:
        mean, std: of the training split at 32x32, in units of [0, 1] pixels; constants, whatever the arguments are.
        strength: of the random augmentation, see `augment.jitter`.

    Raises:
        UserError: `size` or `limit` out of range.
    """

    name = "digits"
    interpolation = "bicubic"
    crop_pct = 1.0
    mean = (0.309, 0.309, 0.309)
    std = (0.348, 0.348, 0.348)
    strength: Mapping[str, float] = MappingProxyType({"degrees": 12.0, "scale": 0.12, "shear": 0.15, "shift": 0.08})

    def __init__(
        self, size: int = 32, limit: int | None = None, seed: int = 0, views: int | None = None, workers: int = 0
    ) -> None:
        self.views, self.workers = checked_views(views), checked_workers(workers)
        if not 8 <= size <= 256:
            raise UserError(f"size={size}: the digits are 8x8 and may be enlarged up to 256; give a size from 8 to 256")
        if limit is not None and limit < 1:
            raise UserError(
                f"limit={limit}: a split needs at least one example; give a positive integer or null for all"
            )
        self.input_size = (3, size, size)
        digits = load_digits()
        self.label_names = [str(name) for name in digits.target_names]
        members = stratified(digits.target, FRACTIONS, seed)
        if limit is not None:
            members = {split: part[balanced(digits.target[part], limit)] for split, part in members.items()}
        self._labels = {split: torch.from_numpy(digits.target[part]).long() for split, part in members.items()}
        self._pixels = {
            split: enlarge(picture(digits.images[part]), self.input_size) for split, part in members.items()
        }
        self.sizes = {split: len(part) for split, part in members.items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over pixels, labels and order of every split, and the augmentation; the pixels decide the size
        too."""
        digest = hashlib.sha256(json.dumps(dict(self.strength), sort_keys=True).encode())
        for split in FRACTIONS:
            digest.update(f"{split} {tuple(self._pixels[split].shape)}".encode())
            digest.update(self._pixels[split].numpy().tobytes())
            digest.update(self._labels[split].numpy().tobytes())
        return digest.hexdigest()

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
        """See `image_loader`."""
        if split not in FRACTIONS:
            raise UserError(f"split={split!r}: no such split; choose one of {', '.join(FRACTIONS)}")
        strength = self.strength if augment else None
        return image_loader(
            self._pixels[split], self._labels[split],
            batch_size=batch_size, shuffle=shuffle, strength=strength, seed=seed, views=views, workers=self.workers,
        )  # fmt: skip


def picture(images: np.ndarray) -> list[Image.Image]:
    """The digits [N, 8, 8], grey levels 0 to 16, as 8-bit grey pictures."""
    return [Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)) for image in images]


def enlarge(pictures: Sequence[Image.Image], input_size: tuple[int, int, int]) -> Tensor:
    """timm's evaluation preprocessing without normalisation; [N, 1, H, W] uint8, since grey channels are equal."""
    transform = create_transform(
        input_size, is_training=False, interpolation=Digits.interpolation, crop_pct=Digits.crop_pct, normalize=False
    )
    return torch.stack([transform(grey.convert("RGB"))[:1] for grey in pictures])
