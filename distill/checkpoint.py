"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import nn

from distill.errors import UserError, one_line


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


class RandomState(pl.Callback):
    """Puts the state of PyTorch's random numbers (dropout) into every checkpoint, and takes it from the one that a
    training goes on from. Of several processes it is that of the first one, and the others go on with their own."""

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        gpu = module.device.type == "cuda"
        checkpoint["random"] = {"cpu": torch.get_rng_state(), **({"gpu": torch.cuda.get_rng_state()} if gpu else {})}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._found = checkpoint["random"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._found is None or not trainer.is_global_zero:
            return
        torch.set_rng_state(self._found["cpu"].cpu())
        if module.device.type == "cuda" and "gpu" in self._found:
            torch.cuda.set_rng_state(self._found["gpu"].cpu())


def latest(path: Path, provenance: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in a file; None where there is none.

    Raises:
        UserError: it can't be read, or was made with another teacher.
    """
    if not path.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before, now = (facts.get("teacher") for facts in (checkpoint["distill"], provenance))
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: can't be read ({one_line(error)}); start a new run without resume") from error
    if before != now:
        raise UserError(
            f"{path}: was made with another teacher (sha256 {str(before)[:12]}… and now {str(now)[:12]}…); restore the "
            "teacher's weights or store, or start a new run without resume"
        )
    return checkpoint


def load_weights(module: nn.Module, path: str | Path, prefix: str = "") -> dict[str, Any]:
    """Load the weights of a checkpoint whose names begin with `prefix`, and return it; nothing in it is executed."""
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    module.load_state_dict(weights)
    return checkpoint
