"""The teacher: frozen for ever, and outside of everything that is trained or saved."""

from __future__ import annotations

from typing import Protocol

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
