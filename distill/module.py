"""The only LightningModule: trains one network with a sum of terms, with or without a teacher."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, R2Score
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from distill.cache import CachedTeacher
from distill.features import Batch, Tapped
from distill.finite import FiniteLoss
from distill.losses import LossSum
from distill.sharded import shard, shard_parameters
from distill.teacher import FrozenTeacher, Teacher


def parameter_groups(module: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
    """Optimiser groups of a module: weight decay for matrices and kernels, none for what has under 2 dimensions."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    split = ([p for p in parameters if p.ndim >= 2], weight_decay), ([p for p in parameters if p.ndim < 2], 0.0)
    return [{"params": params, "weight_decay": decay, "lr": lr} for params, decay in split if params]


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise to 1 over a share `warmup` of `total` steps, then a half cosine to 0.

    Step 0 is already one part of the rise, since a step with a learning rate of 0 would be wasted.
    """
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, total - rise))))


def validation_metric(task: str, num_labels: int) -> tuple[str, Metric]:
    """Name and metric, of logits [B, C] and labels, by which the best epoch is chosen; more is better."""
    if task == "multiclass":
        return "accuracy", MulticlassAccuracy(num_labels, average="micro")
    if task == "multilabel":
        return "accuracy", MultilabelAccuracy(num_labels, average="micro")
    return "r2", R2Score()


class DistillModule(pl.LightningModule):
    """Trains `student` on `loss`; a `teacher` is asked only if a term needs it.

    The teacher is not registered as a submodule: it is in no checkpoint, in no optimiser, and no `train()` reaches it.
    Nor does DDP: what it wraps is the student and the loss, and the buffers of the loss (memories) stay those of each
    process.

    Args:
        student: the network that is trained (in the teacher and baseline stages: the teacher, the undistilled student).
        loss: terms and weights.
        teacher: answers a batch with the teacher's features; needed iff `loss.needs_teacher`.
        stage: prefix of everything logged: "teacher", "baseline" or "student".
        num_labels: C, for the metric.
        lr: peak learning rate of AdamW; that of a term's own parameters is `term.lr_multiplier` times it.
        weight_decay: decoupled weight decay of AdamW, for matrices and kernels.
        warmup: share of the steps over which the learning rate rises.
        shard_teacher: a teacher that is a network is sharded wherever the student is; else each process has all of it.
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
        shard_teacher: bool = False,
    ) -> None:
        super().__init__()
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"terms {list(loss.terms)} need a teacher and none was given")
        self.student = student
        self.loss = loss
        self._ddp_params_and_buffers_to_ignore = [f"loss.{name}" for name, _ in loss.named_buffers()]
        self.stage = stage
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.shard_teacher = shard_teacher
        self._teacher = (teacher,) if loss.needs_teacher else (None,)
        self.metric, metric = validation_metric(loss.task, num_labels)
        self.val_metric = metric
        self.values: dict[str, Tensor] = {}
        self.finite = FiniteLoss()

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0]

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard(self.student, mesh)
            shard_parameters(self.loss, mesh)
            if self.shard_teacher and isinstance(self.teacher, FrozenTeacher):
                shard(self.teacher.network, mesh, frozen=True)

    def on_fit_start(self) -> None:
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        self._steps = self.trainer.estimated_stepping_batches

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """What a cache says is looked up on the CPU, since asking a GPU for the index would wait for it."""
        teacher = self.teacher if self.trainer.training else None
        return teacher.look_up(batch) if isinstance(teacher, CachedTeacher) else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.loss.at(self.global_step / self._steps)
        teacher = self.teacher(batch) if self.teacher is not None else None
        total, self.values = self.loss(self.student(batch), teacher, batch)
        self.finite.follow(total, self.values, self.loss.weights, f"step {self.global_step} of stage {self.stage}")
        self.log(f"{self.stage}/train_loss", total.detach(), batch_size=len(batch["labels"]))
        self.log_terms(batch_idx)
        return total

    def log_terms(self, batch_idx: int) -> None:
        """The unweighted value of each of several terms, as often as Lightning logs.

        Not by `self.log`, which repeats the last value of a term that was switched off until the epoch ends.
        """
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if len(self.loss.terms) > 1 and first and (self.global_step + 1) % every == 0:
            figures = {f"{self.stage}/train_{name}": value.item() for name, value in self.values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.global_step)

    def on_after_backward(self) -> None:
        self.values = {}

    def on_validation_start(self) -> None:
        self.finite.settle()  # before this epoch is kept

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning, which refuses to clip for a fused optimiser wherever precision is mixed, though bfloat16 has no
        gradient scaler."""
        if gradient_clip_val and self.fused:
            torch.nn.utils.clip_grad_norm_(self.trainer.precision_plugin.main_params(optimizer), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @property
    def fused(self) -> bool:
        """Whether the optimiser is: everywhere but under a gradient scaler, which would have to unscale before
        clipping."""
        return str(self.trainer.precision) != "16-mixed"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, labels = self.student(batch).logits.float(), batch["labels"]
        if self.loss.task == "multilabel":
            logits = (logits > 0).int()  # the metric takes logits that are all within [0, 1] for probabilities
        elif self.loss.task == "regression":
            labels = labels.reshape(logits.shape)
        self.val_metric.update(logits, labels)
        self.log(f"{self.stage}/val_{self.metric}", self.val_metric, on_epoch=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.student(batch).logits, "labels": batch["labels"], "index": batch["index"]}

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.student, self.weight_decay, self.lr)
        for _, term in self.loss.items():
            groups += parameter_groups(term, self.weight_decay, self.lr * term.lr_multiplier)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=self.fused)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
