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


def shard(network: Tapped, mesh: Any, frozen: bool = False) -> None:
    """Shard the layers of a network, and what is outside of them, in place.

    Args:
        mesh: of the processes, one-dimensional.
        frozen: no backward pass follows that would put what is outside of the layers into shards again.
    """
    network.backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # other shards are refused
    for name in network.layers:
        fully_shard(network.backbone.get_submodule(network.places[name]), mesh=mesh)
    fully_shard(network.backbone, mesh=mesh, reshard_after_forward=True if frozen else None)


def shard_parameters(module: nn.Module, mesh: Any) -> None:
    """Shard a module as one, in place; nothing where it has no parameters."""
    if any(True for _ in module.parameters()):
        fully_shard(module, mesh=mesh)
