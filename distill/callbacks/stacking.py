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


def fits(schedule: Sequence[Any], depth: int) -> bool:
    """Whether these are (share, number) pairs with rising shares in [0, 1), and numbers up to `depth`, the last one."""
    try:
        shares, numbers = zip(*schedule, strict=True)
        rising = list(shares) == sorted(set(shares)) and shares[0] == 0 and shares[-1] < 1
        return rising and all(number in range(1, depth + 1) for number in numbers) and numbers[-1] == depth
    except (TypeError, ValueError):
        return False


class ProgressiveStacking(pl.Callback):
    """Train only the lower layers at first; the ones above are identities until their turn comes.

    Layers that start as identities (zero-init residual) can be left out at first and put back later without a jump.
    Validation sees the layers that are active then, so only the last epoch tells of the whole network. After Gong et
    al., "Efficient Training of BERT by Progressively Stacking" (ICML 2019), which copies the lower layers into the new
    ones; here the new ones start as identities.

    Args:
        layers: the transformer layers, bottom first.
        schedule: (share, number) pairs: from this share of all steps on, this many layers. The first share is 0, shares
            rise, and the last number is all of them.

    Raises:
        UserError: a schedule that is none of that.
    """

    def __init__(self, layers: nn.ModuleList, schedule: Sequence[Sequence[float]]) -> None:
        if not fits(schedule, len(layers)):
            raise UserError(
                f"stacking={schedule}: needs [share of the steps, layers] pairs with rising shares from 0 to below 1, "
                f"and {len(layers)} layers in the last one; null trains all layers always"
            )
        self.layers, self.schedule = layers, [(share, int(number)) for share, number in schedule]

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        done = trainer.global_step / trainer.estimated_stepping_batches
        skip_above(self.layers, [number for share, number in self.schedule if share <= done][-1])

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        skip_above(self.layers, len(self.layers))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        skip_above(self.layers, len(self.layers))
