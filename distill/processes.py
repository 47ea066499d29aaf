"""Several processes that train one network, on Lightning's strategies: who is who, and what only the first one does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch.utils.data import DataLoader, Sampler

from distill.data.loading import rebatched
from distill.errors import UserError

T = TypeVar("T")
VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What Lightning's launcher sets in the environment."""


def processes() -> tuple[int, int]:
    """Rank of this process and the number of all."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Return when every process is here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def once(call: Callable[[], T]) -> T:
    """Call in the first process alone; all of them get what it returns."""
    rank, world = processes()
    box: list[Any] = [call() if rank == 0 else None]
    if world > 1:
        torch.distributed.broadcast_object_list(box)
    return cast(T, box[0])


@contextmanager
def connected(worker: pl.Trainer) -> Iterator[None]:
    """Start the other processes, where that is left to Lightning, and connect them all for every Trainer in the block.

    Lightning does so in the first `fit`; here it is done before the first file is written. If the block fails in the
    first process, those that were started end with it.

    Raises:
        UserError: processes that can't be started this way.
    """
    strategy = worker.strategy
    if not isinstance(strategy, ParallelStrategy):
        yield
        return
    launcher, before = strategy.launcher, set(os.environ)
    starts = not cast(Any, strategy.cluster_environment).creates_processes_externally
    if isinstance(launcher, _MultiProcessingLauncher):
        raise UserError("trainer.strategy: processes that are spawned or forked can't go through all stages; use ddp")
    if starts and worker.world_size > 1 and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            "trainer.devices: in a sweep Lightning can't start the processes of a job; use a launcher that does "
            "(hydra/launcher=submitit_slurm with tasks_per_node), or one run after the other without -m"
        )
    try:
        strategy.connect(pl.LightningModule())
        if launcher is not None:
            launcher.launch(lambda: None)
        strategy.setup_environment()
        yield
        torch.distributed.destroy_process_group()
    except BaseException:
        others = list(getattr(launcher, "procs", []))
        if others:
            cast(Any, launcher).procs.clear()  # else Lightning's observer ends this process too, at once
        for other in others:
            other.kill()
        raise
    finally:
        for name in {*VARIABLES} - before:
            os.environ.pop(name, None)


class Share(Sampler[list[int]]):
    """The rows rank::world of each batch, for this process.

    All processes get equally many rows of a batch, so that the mean of their gradients is the gradient of the batch. Of
    a last, smaller batch up to world - 1 rows are left out; all of it where nothing or one row each would be left.

    Args:
        batches: the batches of one process; with a `sampler` that has `set_epoch`.
        world: number of processes.
    """

    def __init__(self, batches: Any, world: int) -> None:
        self.batches, self.sampler, self.world = batches, batches.sampler, world

    def rows(self, count: int) -> int:
        """How many rows of a batch of `count` each process gets."""
        each = count // self.world
        return each if each > 1 or count == self.batches.batch_size else 0

    def __len__(self) -> int:
        examples, size = len(self.sampler), self.batches.batch_size
        return len(self.batches) - (len(self.batches) * size > examples and not self.rows(examples % size))

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = processes()
        assert world == self.world
        for batch in self.batches:
            if each := self.rows(len(batch)):
                yield batch[rank : each * world : world]


def share(loader: DataLoader[T], world: int) -> DataLoader[T]:
    """What one of `world` processes loads, so that a step of all of them sees the batch that one process would see.

    Raises:
        UserError: the batch can't be divided.
    """
    if world == 1:
        return loader
    batches = cast(Any, loader.batch_sampler)
    check_batch(batches.batch_size, world)
    own = Share(batches, world)
    if not len(own):
        raise UserError(f"{len(batches.sampler)} examples are too few for {world} processes; use fewer trainer.devices")
    return rebatched(loader, own)


def check_batch(batch_size: int, world: int, name: str = "batch_size") -> None:
    """Raises UserError unless `world` processes can share a batch equally."""
    if batch_size % world:
        fits = max(1, round(batch_size / world)) * world
        raise UserError(
            f"{name}={batch_size}: it is the batch of all {world} processes together, and can't be divided equally; "
            f"give a multiple of {world}, such as {fits}"
        )
