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
    """Writes beside the target, flushes to the disk and renames: a kill or a full disk leaves the old checkpoint.

    Lightning's own writer truncates the target first, and returns as if all were well where the folder is not writable.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
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


def load_weights(module: nn.Module, path: str | Path, prefix: str = "") -> dict[str, Any]:
    """Load the weights of a checkpoint whose names begin with `prefix`, and return it; nothing in it is executed."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    module.load_state_dict(weights)
    return checkpoint
