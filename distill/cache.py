"""Ask the teacher once per training example instead of once per example and epoch."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import Tensor

from distill.callbacks.progress import stage_bar
from distill.data.base import DataSet
from distill.teacher import FrozenTeacher


@torch.no_grad()
def teacher_logits(
    teacher: FrozenTeacher, data: DataSet, device: torch.device, console: Console, batch_size: int = 128
) -> Tensor:
    """The teacher's logits [N, C] fp32 on the CPU, row i for example i of the training split, without augmentation."""
    teacher.to(device)
    table = torch.full((data.sizes["train"], len(data.label_names)), torch.nan)
    loader = data.loader("train", batch_size=batch_size)
    with stage_bar(console) as bar:
        for batch in bar.track(loader, description="teacher's logits"):
            batch = {key: value.to(device) for key, value in batch.items()}
            table[batch["index"].cpu()] = teacher(batch).logits.float().cpu()
    if not torch.isfinite(table).all():
        raise FloatingPointError("the teacher's logits are not finite, or not every training example was visited")
    return table
