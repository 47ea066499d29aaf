"""The cache stage: the teacher's answers are stored, where that is possible and wanted, or it runs in every step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill import fingerprint
from distill.cache import DTYPES, CachedTeacher, Contents
from distill.data.base import DataSet
from distill.errors import UserError
from distill.features import Batch, Tapped
from distill.fill import fill
from distill.fit import Schedule, trainer
from distill.losses import LossSum
from distill.plan import Pace, decide, estimate, pace
from distill.processes import once, processes, wait_for_all
from distill.stages import Job
from distill.teacher import FrozenTeacher, Teacher, as_in_training

USES = ("auto", "on", "off")


@dataclass(frozen=True)
class Options:
    """What the user says of the cache.

    Attributes:
        use: "on": store or refuse; "off": never store; "auto": store where it is possible and costs nothing.
        dtype: a name of `cache.DTYPES`.
        top_k: how many logits of an example are kept; None for all.
        rows: of a shard.

    Raises:
        UserError: a value out of range or of the wrong type.
    """

    use: str
    dtype: str
    top_k: int | None
    rows: int

    def __post_init__(self) -> None:
        for name, value, known in (("use", self.use, USES), ("dtype", self.dtype, tuple(DTYPES))):
            if value not in known:
                raise UserError(f"cache.{name}={value}: there are {', '.join(known)}")
        for name, count in (("top_k", self.top_k), ("rows", self.rows)):
            if not (type(count) is int and count >= 1) and not (name == "top_k" and count is None):
                raise UserError(f"cache.{name}={count}: must be a whole number >= 1")


def tap_shapes(network: Tapped, taps: Sequence[str], batch: Batch) -> dict[str, tuple[int, ...]]:
    """Shapes [B, ...] of these taps for a batch; the network is left as it was."""
    if not taps:
        return {}
    before, device = (network.training, network.watched), next(network.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    network.watch(taps)
    try:
        with torch.no_grad():
            return {name: tuple(states.shape) for name, states in network.eval()(batch).hidden.items()}
    finally:
        network.train(before[0])
        network.watch(before[1])


def obstacle(options: Options, data: DataSet, augment: bool, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the teacher's answers can't be stored; None where they can.

    Args:
        augment: whether the student's inputs are augmented.
        shapes: of the teacher's taps that the loss reads.
    """
    if deep := [f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) != 2]:
        return f"the loss reads {deep[0]} of the teacher, and only logits and vectors [B, D] are stored"
    if augment and not data.replayable:
        return f"the augmentation of data set {data.name} can't be replayed (replayable is False)"
    if augment and data.views is None:
        return "augmentation is new in every epoch: data.views=K gives each example K augmented views"
    if options.top_k is not None and data.task != "multiclass":
        return f"cache.top_k={options.top_k} is for classes and the task is {data.task}"
    if options.top_k is not None and options.top_k >= len(data.label_names):
        return f"cache.top_k={options.top_k} is not below the number of classes {len(data.label_names)}"
    return None


def demand(options: Options, reason: str | None) -> None:
    """Raises UserError where the user wants a cache and there is a reason against it."""
    if options.use == "on" and reason is not None:
        raise UserError(f"cache=on is not possible: {reason}; change that, or set cache=auto")


def contents_of(
    teacher: Tapped, data: DataSet, options: Options, widths: dict[str, int], augment: bool, seed: int, precision: str
) -> Contents:
    """What a cache of the training split holds.

    Args:
        widths: D of each tap [B, D] that is stored.
        augment, seed: of the student's inputs.
        precision: of the trainer.
    """
    return Contents(
        teacher=fingerprint.of_weights(teacher),
        network=fingerprint.of_values([re.sub(r" at 0x\w+", "", repr(teacher.backbone)), teacher.heads]),
        data=data.fingerprint,
        examples=data.sizes["train"],
        classes=len(data.label_names),
        augment=augment,
        views=(data.views or 1) if augment else 1,
        seed=seed if augment else None,
        precision=precision,
        dtype=options.dtype,
        top_k=options.top_k,
        taps=widths,
        shard=options.rows,
    )


def cache_obstacle(
    job: Job, loss: LossSum, teacher: Tapped, schedule: Schedule, options: Options
) -> tuple[dict[str, int], str | None]:
    """Widths of the teacher's taps that the loss reads, and why its answers can't be stored; None where they can.

    Raises:
        UserError: they can't, and the user wants it.
    """
    if not loss.needs_teacher or options.use == "off":
        return {}, None
    shapes = tap_shapes(teacher, loss.taps()[1], next(iter(job.data.loader("val", batch_size=2))))
    reason = obstacle(options, job.data, schedule.augment, shapes)
    demand(options, reason)
    return {name: shape[-1] for name, shape in shapes.items()}, reason


def cache_stage(
    job: Job, teacher: FrozenTeacher, loss: LossSum, student: Tapped, schedule: Schedule, options: Options
) -> Teacher | None:
    """What answers for the teacher in training: nothing where no term asks; what it said, stored, where that is
    possible and wanted; else the network itself.

    Raises:
        UserError: the user wants a cache and there can't be one, or a stored shard is damaged or can't be written.
    """
    if not loss.needs_teacher:
        return None
    if options.use == "off":
        job.say("cache is off; the teacher runs in every step")
        return teacher
    with job.stage("cache", "what the teacher says of the training split"):
        worker, seed, augment = trainer(job.settings), job.settings.seed, schedule.augment
        widths, reason = cache_obstacle(job, loss, teacher.network, schedule, options)
        teacher.to(worker.strategy.root_device)

        def measure() -> Pace:
            loader = job.data.loader(
                "train", batch_size=schedule.batch_size // processes()[1], shuffle=True, augment=augment, seed=seed,
                views=job.data.views,
            )  # fmt: skip
            return pace(teacher, student, next(iter(loader)), worker)

        if reason is not None:
            share = once(measure).share
            job.say(f"  the teacher runs in every step, {share:.0%} of it, for {schedule.epochs} epochs: {reason}")
            return teacher
        contents = contents_of(teacher.network, job.data, options, widths, augment, seed, str(worker.precision))
        root = job.settings.folder if job.cfg.trainer.smoke else Path(job.cfg.store).expanduser()
        shards = contents.shards(root / "cache")
        estimated = once(lambda: estimate(shards, contents, schedule.epochs, processes()[1], measure))
        chosen, why = decide(options.use, estimated)
        job.say(f"  {'stored' if chosen else 'the teacher runs in every step'}: {why}")
        if not chosen:
            return teacher
        teacher.network.watch(widths)
        found = fill(shards, contents, as_in_training(teacher, worker), job.data, job.settings.console)
        teacher.cpu().network.watch([])
        table = shards.open()
        job.say(f"  {found} in {shards.folder}")
        if job.cfg.trainer.smoke:
            wait_for_all()
            shutil.rmtree(root / "cache", ignore_errors=True)
    return CachedTeacher(table, contents, teacher.network.heads)
