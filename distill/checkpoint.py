"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import nn


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk and renames: a kill or a full disk leaves the old checkpoint in place.

    Lightning's own writer truncates the target first, and returns as if all were well where the folder can't be written to.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


class Provenance(pl.Callback):
    """Puts plain facts (the resolved config, the teacher's fingerprint) into every checkpoint under `distill`."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["distill"] = self.facts


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load the weights of a checkpoint; nothing in it is executed."""
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
