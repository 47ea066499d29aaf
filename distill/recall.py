"""All that a teacher says of the training split, layers included, in memory: for small data and many trainings."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from distill.callbacks.progress import stage_bar
from distill.data.base import DataSet
from distill.features import Batch, Features
from distill.teacher import FrozenTeacher


class Ragged:
    """One [L, D] of its own length for each example, without padding.

    Args:
        values: [sum of lengths, D].
        starts, lengths: [N]: the rows of example i begin at `starts[i]`.
    """

    def __init__(self, values: Tensor, starts: Tensor, lengths: Tensor) -> None:
        self.values, self.starts, self.lengths = values, starts, lengths

    def rows(self, index: Tensor, length: int) -> Tensor:
        """[B, length, D] for examples [B]; what is behind an example's end means nothing."""
        places = self.starts[index, None] + torch.arange(length)
        return self.values[places.clamp_max(len(self.values) - 1)]


class Recall:
    """What the teacher said of the training split, looked up by an example's index.

    Only valid where the student sees exactly what the teacher saw, so not with random augmentation.

    Args:
        logits: [N, C].
        hidden: tap -> [N, ...], or `Ragged` for taps with a token dimension.
        heads: as in `Features`.
    """

    def __init__(
        self, logits: Tensor, hidden: dict[str, Tensor | Ragged] | None = None, heads: int | None = None
    ) -> None:
        self.logits, self.hidden, self.heads = logits, hidden or {}, heads

    def __call__(self, batch: Batch) -> Features:
        device, index, mask = batch["index"].device, batch["index"].cpu(), batch.get("attention_mask")
        hidden = {
            name: table.rows(index, 0 if mask is None else mask.shape[1]) if isinstance(table, Ragged) else table[index]
            for name, table in self.hidden.items()
        }
        return Features(
            self.logits[index].to(device), {name: rows.to(device) for name, rows in hidden.items()}, mask, self.heads
        )


@torch.no_grad()
def ask(teacher: FrozenTeacher, data: DataSet, device: torch.device, console: Console, batch_size: int = 128) -> Recall:
    """Run the teacher over the training split, without augmentation, and keep logits and watched taps in fp32 in
    memory.

    Raises:
        FloatingPointError: logits that are not finite, or an example that was not visited.
    """
    teacher.to(device)
    total = data.sizes["train"]
    logits = torch.full((total, len(data.label_names)), torch.nan)
    starts, lengths, used = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.long), 0
    parts: dict[str, list[Tensor]] = {}
    order: list[Tensor] = []
    ragged: set[str] = set()
    with stage_bar(console) as bar:
        for batch in bar.track(data.loader("train", batch_size=batch_size), description="teacher's answers"):
            batch = {key: value.to(device) for key, value in batch.items()}
            features, index = teacher(batch), batch["index"].cpu()
            logits[index] = features.logits.float().cpu()
            order.append(index)
            if features.mask is not None:
                counts = features.mask.sum(dim=1).cpu()
                starts[index], lengths[index] = used + counts.cumsum(0) - counts, counts
                used += int(counts.sum())
            for name, states in features.hidden.items():
                if features.mask is not None and states.ndim == 3:
                    ragged.add(name)
                    states = states[features.mask.bool()]
                parts.setdefault(name, []).append(states.float().cpu())
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the teacher's logits are not finite, or not every training example was visited")
    by_index = torch.cat(order).argsort()
    hidden = {
        name: Ragged(torch.cat(pieces), starts, lengths) if name in ragged else torch.cat(pieces)[by_index]
        for name, pieces in parts.items()
    }
    return Recall(logits, hidden, teacher.network.heads)
