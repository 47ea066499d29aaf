"""Progressive stacking: train the lower layers first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from distill.errors import UserError


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def skip_above(layers: nn.ModuleList, active: int) -> None:
    """Let the layers from number `active` on pass their input through; `active=len(layers)` undoes it."""
    for index, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        if index >= active:
            layer.forward = _identity


class ProgressiveStacking(pl.Callback):
    """Train only the lower layers at first; the ones above are identities until their turn comes.

    Layers that start as identities (zero-init residual) can be left out at first and put back later without a jump. Validation sees the
    layers that are active then, so only the last epoch tells of the whole network. After Gong et al., "Efficient Training of BERT by Progressively Stacking" (ICML 2019), which copies the
    lower layers into the new ones; here the new ones start as identities.

    Args:
        layers: the transformer layers, bottom first.
        schedule: (share, number) pairs: from this share of all steps on, this many layers. The first share is 0, shares rise, and the
            last number is all of them.

    Raises:
        UserError: a schedule that is none of that.
    """

    def __init__(self, layers: nn.ModuleList, schedule: Sequence[tuple[float, int]]) -> None:
        shares, numbers = [share for share, _ in schedule], [number for _, number in schedule]
        rising = shares == sorted(set(shares)) and shares[:1] == [0] and shares[-1] < 1
        if not rising or numbers[-1] != len(layers) or not all(1 <= number <= len(layers) for number in numbers):
            raise UserError(
                f"stacking={[list(pair) for pair in schedule]}: needs [share of the steps, layers] pairs with rising shares from 0 to "
                f"below 1, and {len(layers)} layers in the last one; null trains all layers always"
            )
        self.layers, self.schedule = layers, list(schedule)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        done = trainer.global_step / trainer.estimated_stepping_batches
        skip_above(self.layers, [number for share, number in self.schedule if share <= done][-1])

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        skip_above(self.layers, len(self.layers))
