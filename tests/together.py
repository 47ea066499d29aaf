"""Trainings for test_distributed.py: `python -m torch.distributed.run --nproc-per-node 2 together.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from test_cache import Counting, contents
from test_cache import text as cacheable
from tiny import Images, Linear, Text, bert, schedule, settings
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.cache import CachedTeacher
from distill.errors import UserError
from distill.features import Tapped
from distill.fill import fill
from distill.fit import check_trainer, fit
from distill.losses import Contrastive, CrossEntropy, Hidden, LogitsKL, LossSum
from distill.processes import connected, processes
from distill.shards import Shards
from distill.teacher import FrozenTeacher, Teacher
from students.bert import bert as build_bert

DDP = {"strategy": "ddp", "devices": 2}
UNUSED = {**DDP, "strategy": "ddp_find_unused_parameters_true"}


def whole(gradient: Tensor | None) -> Tensor | None:
    """All of a gradient, be it in shards."""
    found = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return None if found is None else found.clone()


def here(module: nn.Module) -> int:
    """Numbers in the parameters of a module that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())


class Watch(pl.Callback):
    """What the processes are to have in common, and what each has for itself.

    Attributes:
        gradients: of the first step, by name, before they are clipped.
        indices: of the examples that this process saw, batch by batch.
        held: numbers in the parameters of what the strategy wraps, in this process.
        taught: numbers in those of the teacher.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor | None] = {}
        self.indices: list[list[int]] = []
        self.scores: list[float] = []
        self.held = self.taught = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.indices.append(batch["index"].tolist())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = module.named_parameters()
            self.gradients = {name: whole(p.grad) for name, p in named}
            self.held = here(trainer.strategy.model)
            self.taught = here(module.teacher) if isinstance(module.teacher, FrozenTeacher) else 0

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.scores.append(float(trainer.callback_metrics[f"student/val_{module.metric}"]))


def train(
    folder: Path,
    network: Tapped,
    loss: LossSum,
    data: Any,
    teacher: Teacher,
    plan: dict[str, Any],
    trainer: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Train, and tell all there is to compare."""
    watch = Watch()
    module = fit(
        network, loss, data, schedule(lr=1e-3, epochs=2, **plan), settings(folder, **trainer), stage="student",
        teacher=teacher, callbacks=[watch], checkpoints=folder, keep="last", **options,
    )  # fmt: skip
    kept = ("gradients", "indices", "scores", "held", "taught")
    return {"weights": dict(module.state_dict()), **{name: getattr(watch, name) for name in kept}}


def logits(
    folder: Path,
    trainer: dict[str, Any],
    plan: dict[str, Any] | None = None,
    layers: bool = False,
    shard_teacher: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A BERT that learns from a wider one that runs in every step."""
    student, teacher, data = bert(dropout=0.0), bert(3, 24, seed=1), Text(train=48)
    hidden = {"hidden": Hidden(layers="uniform", **options)} if layers else {}
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL(), **hidden})
    loss.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), 48)
    loss.watch(student, teacher)
    return train(
        folder, student, loss, data, FrozenTeacher(teacher), plan or {}, trainer, shard_teacher=shard_teacher
    )  # fmt: skip


def plain(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    return logits(folder, trainer)


def accumulated(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    return logits(folder, {**trainer, "accumulate_grad_batches": 3}, {"clip": 0.05})


def projector(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    return logits(folder, trainer, layers=True)


def scheduled(folder: Path, trainer: dict[str, Any], needed: bool = False) -> dict[str, Any]:
    """The projectors have no gradient in the second half, which the strategy can do without unless `needed`."""
    off = {"before": 1.0, "after": 0.0, "start": 0.5, "end": 0.5}
    return logits(folder, {**trainer, **(UNUSED if trainer and not needed else {})}, layers=True, schedule=off)


def images(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    """Without batch normalisation, with augmentation; the last batch has 4 of 8 examples."""
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})
    teacher = FrozenTeacher(Linear(seed=1))
    return train(folder, Linear(), loss, Images(train=20, size=2), teacher, {"augment": True}, trainer)


def stored(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    """From a cache that the processes fill together."""
    data = cacheable()
    torch.manual_seed(0)
    student, teacher = (
        build_bert(2, len(data.tokenizer), 0, layers, 16, 2, 32, zero_init_residual=False, dropout=0.0)
        for layers in (1, 2)
    )
    asked = Counting(FrozenTeacher(teacher))
    what = contents(asked.teacher, data)
    shards, wrote, write = what.shards(folder / "cache"), [], Shards.write
    Shards.write = lambda self, number, tensors: (wrote.append(number), write(self, number, tensors))[1]  # type: ignore
    fill(shards, what, asked, data, Console(quiet=True), batch_size=6)
    Shards.write = write  # type: ignore
    table = shards.open()
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})
    plan = {"augment": True, "batch_size": 4}
    told = train(folder, student, loss, data, CachedTeacher(table, what), plan, trainer, views=data.views)
    return told | {"wrote": wrote, "asked": asked.asked, "table": table[torch.arange(shards.rows)]["logits"]}


def contrastive(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    """With a memory, and a last batch of which one row is left out."""
    student, teacher, data = bert(dropout=0.0), bert(3, 24, seed=1), Text(train=21)
    loss = LossSum({"ce": CrossEntropy(), "crd": Contrastive(negatives=8, embedding=4)})
    loss.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), 21)
    loss.watch(student, teacher)
    return train(folder, student, loss, data, FrozenTeacher(teacher), {}, trainer)


def sharded(folder: Path, trainer: dict[str, Any], shard_teacher: bool = False) -> dict[str, Any]:
    """By FSDP2, with a projector."""
    trainer = {**trainer, "strategy": "fsdp2"} if trainer else {}
    return logits(folder, trainer, {"clip": 0.05}, layers=True, shard_teacher=shard_teacher)


def teacher_too(folder: Path, trainer: dict[str, Any]) -> dict[str, Any]:
    """By FSDP2, and the teacher in shards as well."""
    return sharded(folder, trainer, shard_teacher=True)


CASES: dict[str, Any] = {
    case.__name__: case
    for case in (sharded, teacher_too, plain, accumulated, projector, scheduled, images, stored, contrastive)
}


def refused(folder: Path) -> str:
    """What is said where a parameter has no gradient and the strategy needs one."""
    try:
        scheduled(folder, DDP, needed=True)
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    with connected(check_trainer({"accelerator": "cpu", **DDP})):
        rank, _ = processes()
        told = {name: case(folder / name, DDP) for name, case in CASES.items()}
        torch.save(told | {"refused": refused(folder / "refused")}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
