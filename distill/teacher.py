"""The teacher: frozen for ever, and outside of everything that is trained or saved."""

from __future__ import annotations

from typing import Protocol

import pytorch_lightning as pl
import torch
from torch import nn

from distill.features import Batch, Features, Tapped


class Teacher(Protocol):
    """Anything that answers a batch with the teacher's features: the network itself, or a table of what it said."""

    def __call__(self, batch: Batch) -> Features: ...


class FrozenTeacher(nn.Module):
    """A network in eval mode for ever and without gradients.

    `train()` and `requires_grad_()` of a parent cannot thaw it: parameters and buffers (BatchNorm statistics) stay
    bit-identical.
    """

    def __init__(self, network: Tapped) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenTeacher:
        return super().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Features:
        return self.network(batch)


def as_in_training(network: Teacher, worker: pl.Trainer) -> Teacher:
    """The network as a training step asks it: on the trainer's device and in its precision."""

    def answer(batch: Batch) -> Features:
        batch = {key: value.to(worker.strategy.root_device) for key, value in batch.items()}
        with worker.precision_plugin.train_step_context():
            return network(worker.precision_plugin.convert_input(batch))

    return answer
