"""`trainer.strategy=fsdp2`: parameters, gradients and optimiser states in shards, one a process.

PyTorch's `fully_shard` by Lightning's `ModelParallelStrategy`, on GPUs and on CPUs. Lightning's `fsdp` is the older
one: it flattens parameters, and then nothing tells a matrix, which decays, from a bias, which does not.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard

from distill.features import Tapped

NAME = "fsdp2"


class ShardedStrategy(ModelParallelStrategy):
    """All processes hold shards of one network; checkpoints are whole and written by the first one."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP2: fully_shard over all processes")


def shard(student: Tapped, loss: nn.Module, mesh: Any) -> None:
    """Shard the layers of the student, what is outside of them, and the parameters of the loss, in place.

    Args:
        mesh: of the processes, one-dimensional.
    """
    student.backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # other shards are refused
    for name in student.layers:
        fully_shard(student.backbone.get_submodule(student.places[name]), mesh=mesh)
    fully_shard(student.backbone, mesh=mesh)
    if any(True for _ in loss.parameters()):
        fully_shard(loss, mesh=mesh)
