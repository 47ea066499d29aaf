"""Progressive stacking: train the lower layers first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from distill.errors import UserError


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def skip_above(layers: nn.ModuleList, active: int) -> None:
    """Let the layers from number `active` on pass their input through; `active=len(layers)` undoes it."""
    for index, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        if index >= active:
            layer.forward = _identity


class ProgressiveStacking(pl.Callback):
    """Train only the first `schedule[e]` layers in epoch e; the ones above are identities until their turn comes.

    Layers that start as identities (zero-init residual) can be left out at first and put back later without a jump. Validation always
    sees the whole network. After Gong et al., "Efficient Training of BERT by Progressively Stacking" (ICML 2019), which copies the
    lower layers into the new ones; here the new ones start as identities.

    Args:
        layers: the transformer layers, bottom first.
        schedule: number of layers in each epoch; the last one must be all of them.

    Raises:
        UserError: a number out of range, or not all layers in the end.
    """

    def __init__(self, layers: nn.ModuleList, schedule: Sequence[int], epochs: int) -> None:
        if len(schedule) != epochs or schedule[-1] != len(layers) or not all(1 <= n <= len(layers) for n in schedule):
            raise UserError(
                f"stacking={list(schedule)}: needs {epochs} numbers (one an epoch) from 1 to {len(layers)}, the last one "
                f"{len(layers)}; null trains all layers always"
            )
        self.layers, self.schedule = layers, list(schedule)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        skip_above(self.layers, self.schedule[trainer.current_epoch])

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        skip_above(self.layers, len(self.layers))

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        skip_above(self.layers, len(self.layers))
