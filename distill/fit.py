"""One training stage: a network, a loss, a schedule. Teacher, baseline and student all go through here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import Tensor

from distill import tracking
from distill.callbacks.progress import StageProgress
from distill.checkpoint import AtomicCheckpointIO, Provenance, RandomState, latest, load_weights
from distill.errors import UserError, one_line
from distill.features import Tapped
from distill.losses import LossSum
from distill.module import DistillModule
from distill.processes import processes, share
from distill.sharded import NAME as SHARDED
from distill.sharded import ShardedStrategy
from distill.teacher import FrozenTeacher, Teacher


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a network is trained.

    Attributes:
        epochs: passes over the training split.
        batch_size: examples a step, of all processes together.
        lr: peak learning rate of AdamW; rises linearly, falls to zero along a half cosine.
        weight_decay: decoupled weight decay for matrices and kernels.
        warmup: share of the steps over which the learning rate rises, in [0, 1).
        clip: largest gradient norm; 0 for no clipping.
        augment: random augmentation of the training examples, where the data set has one.

    Raises:
        UserError: a value out of range or of the wrong type.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    clip: float
    augment: bool

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
            ("epochs", int, lambda v: v >= 1, "a whole number >= 1"),
            ("batch_size", int, lambda v: v >= 1, "a whole number >= 1"),
            ("lr", float, lambda v: v > 0, "a number > 0"),
            ("weight_decay", float, lambda v: v >= 0, "a number >= 0"),
            ("warmup", float, lambda v: 0 <= v < 1, "a number in [0, 1)"),
            ("clip", float, lambda v: v >= 0, "a number >= 0"),
        )
        for name, kind, fits, want in ranges:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not fits(value):
                raise UserError(f"{name}={value}: must be {want}")
        if not isinstance(self.augment, bool):
            raise UserError(f"augment={self.augment}: must be true or false")


@dataclass(frozen=True)
class Settings:
    """What all stages of a run share.

    Attributes:
        provenance: what every checkpoint holds under `distill`.
        resumed: the folder has what an earlier start of this run left.
    """

    folder: Path
    seed: int
    trainer: dict[str, Any]
    loggers: list[Logger]
    console: Console
    provenance: dict[str, Any]
    resumed: bool = False


def trainer(settings: Settings, callbacks: Sequence[pl.Callback] = (), **more: Any) -> pl.Trainer:
    """Lightning's Trainer with the run's arguments, without its own bars, summaries and checks.

    Args:
        more: arguments instead of the run's, or besides them.
    """
    return pl.Trainer(
        **{**settings.trainer, **more},
        logger=settings.loggers,
        callbacks=list(callbacks),
        default_root_dir=settings.folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C within the block is a KeyboardInterrupt again; Lightning makes a SystemExit of it."""
    try:
        yield
    except SystemExit as end:
        raise KeyboardInterrupt from end


def alone(settings: Settings) -> dict[str, Any]:
    """Arguments for a Trainer of this process by itself, where there are several."""
    if processes()[1] == 1:
        return {}
    devices = settings.trainer["devices"]
    listed = isinstance(devices, Sequence) and not isinstance(devices, str)
    return {"devices": list(devices)[:1] if listed else 1, "num_nodes": 1, "strategy": "auto"}


def check_trainer(arguments: dict[str, Any]) -> pl.Trainer:
    """A Trainer with these arguments that trains nothing.

    Raises:
        UserError: Lightning does not accept them.
    """
    if str(arguments.get("strategy")) in ("fsdp", "fsdp_cpu_offload"):
        raise UserError(
            f"trainer.strategy={arguments['strategy']}: it flattens parameters; use {SHARDED} (fully_shard)"
        )
    try:
        return pl.Trainer(
            **arguments, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"trainer: Lightning does not accept {arguments} ({one_line(error)})") from error


def duplicate(network: Tapped) -> Tapped:
    """A copy that watches the same taps."""
    watched = network.watched
    network.watch([])
    twin = copy.deepcopy(network)
    for each in (network, twin):
        each.watch(watched)
    return twin


@contextmanager
def all_gradients() -> Iterator[None]:
    """Explains what DDP says where a parameter got no gradient."""
    try:
        yield
    except RuntimeError as error:
        if "find_unused_parameters" not in str(error):
            raise
        raise UserError(
            "trainer.strategy=ddp needs a gradient for every parameter in every step, and stacking, a schedule or the "
            "choice of terms leaves some without one; set trainer.strategy=ddp_find_unused_parameters_true"
        ) from error


class LatestBest(ModelCheckpoint):
    """Keeps the latest of epochs with equal scores: on a small split ties are common, and the later has learnt more."""

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        tie = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        return tie or super().check_monitor_top_k(trainer, current)


def stopped_at(path: Path, settings: Settings, stage: str, train: Any) -> Path | None:
    """The checkpoint that an earlier start of the run left in a file, None where it left none; the order of the
    training batches and the record are brought to where it was made.

    Raises:
        UserError: as `latest`.
    """
    found = latest(path, settings.provenance)
    epoch, step = (0, 0) if found is None else (found["epoch"] + 1, found["global_step"])
    train.batch_sampler.sampler.set_epoch(epoch)  # Lightning does so when worker processes have begun to load
    tracking.rewind(settings.loggers, stage, step)
    return None if found is None else path


def fit(
    network: Tapped,
    loss: LossSum,
    data: Any,
    schedule: Schedule,
    settings: Settings,
    *,
    stage: str,
    teacher: Teacher | None = None,
    shard_teacher: bool = False,
    views: int | None = None,
    callbacks: Sequence[pl.Callback] = (),
    checkpoints: Path,
    weights_only: bool = False,
    keep: str = "best",
) -> DistillModule:
    """Train, keep one epoch, and return the module with its weights.

    Goes on from `last.ckpt` where an earlier start of the run left one, to the same weights as without the interruption
    (but for dropout in the processes after the first one).

    Args:
        shard_teacher: with `trainer.strategy=fsdp2`, each process holds a share of the teacher instead of all of it.
        views: random augmentation starts over after this many epochs; None for new views in every epoch.
        checkpoints: folder for `best.ckpt` and, unless `weights_only`, `last.ckpt`.
        weights_only: leave optimiser and scheduler out of the checkpoint, so that nothing can go on from it.
        keep: "best", the latest of the epochs with the best validation accuracy, or "last".
    """
    options = asdict(schedule)
    epochs, batch_size, clip, augment = (options.pop(key) for key in ("epochs", "batch_size", "clip", "augment"))
    options |= {"stage": stage, "num_labels": len(data.label_names)}
    module = DistillModule(network, loss, teacher=teacher, **options)
    saved: dict[str, Any] = {"save_weights_only": weights_only, "enable_version_counter": False}
    choice: dict[str, Any] = {"monitor": f"{stage}/val_{module.metric}", "mode": "max"} if keep == "best" else {}
    best = LatestBest(checkpoints, filename="best", **choice, **saved)
    # A callback of its own: with `save_last` Lightning saves only the epochs that are the best so far.
    last = [] if weights_only else [ModelCheckpoint(checkpoints, filename="last", **saved)]
    own = [StageProgress(stage, settings.console), Provenance(settings.provenance), RandomState(), best, *last]
    worker = trainer(
        settings,
        [*own, *callbacks],
        max_epochs=epochs,
        gradient_clip_val=clip or None,
    )
    world = worker.world_size
    train = data.loader("train", batch_size=batch_size, shuffle=True, augment=augment, seed=settings.seed, views=views)
    pl.seed_everything(settings.seed + worker.global_rank, verbose=False)
    trained = module
    if isinstance(worker.strategy, ShardedStrategy):  # copies, since what is sharded stays in shards
        if shard_teacher and isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(duplicate(teacher.network))
        trained = DistillModule(
            duplicate(network), copy.deepcopy(loss), teacher=teacher, shard_teacher=shard_teacher, **options
        )
    start = stopped_at(checkpoints / "last.ckpt", settings, stage, train) if settings.resumed else None
    with interruptible(), all_gradients():
        worker.fit(
            trained, share(train, world), data.loader("val", batch_size=max(batch_size // world, 128)),
            ckpt_path=start, weights_only=True,
        )  # fmt: skip
    load_weights(module, checkpoints / "best.ckpt")
    return module
