"""The only LightningModule: trains one network with a sum of terms, with or without a teacher."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from distill.features import Batch, Tapped
from distill.losses import LossSum
from distill.teacher import Teacher


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: weight decay for matrices and kernels, none for what has fewer than 2 dimensions."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise to 1 over a share `warmup` of `total` steps, then a half cosine to 0.

    Step 0 is already one part of the rise, since a step with a learning rate of 0 would be wasted.
    """
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total - rise))))


class DistillModule(pl.LightningModule):
    """Trains `student` on `loss`; a `teacher` is asked only if a term needs it.

    The teacher is not registered as a submodule: it is in no checkpoint, in no optimiser, and no `train()` reaches it.

    Args:
        student: the network that is trained (in the teacher and baseline stages: the teacher, the undistilled student).
        loss: terms and weights.
        teacher: answers a batch with the teacher's features; needed iff `loss.needs_teacher`.
        stage: prefix of everything logged: "teacher", "baseline" or "student".
        num_labels: C, for the accuracy.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled weight decay of AdamW, for matrices and kernels.
        warmup: share of the steps over which the learning rate rises.
    """

    def __init__(
        self,
        student: Tapped,
        loss: LossSum,
        *,
        teacher: Teacher | None = None,
        stage: str = "student",
        num_labels: int,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"terms {list(loss.terms)} need a teacher and none was given")
        self.student = student
        self.loss = loss
        self.stage = stage
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self._teacher = (teacher,) if loss.needs_teacher else (None,)
        self.val_accuracy = MulticlassAccuracy(num_labels, average="micro")

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0]

    def on_fit_start(self) -> None:
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        teacher = self.teacher(batch) if self.teacher is not None else None
        total, parts = self.loss(self.student(batch), teacher, batch)
        self.log(f"{self.stage}/train_loss", total.detach(), batch_size=len(batch["labels"]))
        if len(parts) > 1:
            self.log_dict({f"{self.stage}/train_{n}": v for n, v in parts.items()}, batch_size=len(batch["labels"]))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_accuracy(self.student(batch).logits, batch["labels"])
        self.log(f"{self.stage}/val_accuracy", self.val_accuracy, on_epoch=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.student(batch).logits, "labels": batch["labels"], "index": batch["index"]}

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(nn.ModuleList([self.student, self.loss]), self.weight_decay)
        fused = "mixed" not in str(self.trainer.precision)  # Lightning clips no gradients of a fused optimiser there
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
