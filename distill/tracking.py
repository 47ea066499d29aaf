"""Loggers: `metrics.csv` is the record of a run, Weights & Biases a mirror of it that can never stop the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from distill.errors import UserError


class RecordLogger(CSVLogger):
    """`metrics.csv` straight in the run folder, shared by all stages; no `hparams.yaml`, since `config.yaml` is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=20)
        self.experiment.metrics_file_path = str(folder / "metrics.csv")

    def save(self) -> None:
        self.experiment.save()


class MirrorLogger(WandbLogger):
    """W&B's logger, switched off with one line on stderr at its first failure."""

    failed: str | None = None

    def _guard(self, call: Callable[[], Any]) -> Any:
        if self.failed is not None:
            return None
        try:
            return call()
        except Exception as error:  # whatever W&B raises: the run is worth more than its mirror
            self.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"warning: W&B is off for the rest of this run ({self.failed}); metrics.csv goes on", file=sys.stderr)
            return None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._guard(lambda: super(MirrorLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._guard(lambda: super(MirrorLogger, self).log_hyperparams(params, *args, **kwargs))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Checkpoints stay in the run folder."""

    def finalize(self, status: str) -> None:
        """Called at the end of every stage; the W&B run goes on until `finish`."""

    def start(self) -> None:
        self._guard(lambda: self.experiment)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the figures of the report to the W&B summary and end the W&B run."""
        self._guard(lambda: (self.experiment.summary.update(summary), self.experiment.finish()))


def csv_logger(folder: Path) -> RecordLogger:
    """`metrics.csv` in the run folder."""
    return RecordLogger(folder)


def wandb_logger(folder: Path, name: str, project: str = "distill", mode: str = "offline", entity: str | None = None) -> MirrorLogger:
    """A W&B run in the run folder.

    Args:
        mode: "offline" writes files that `wandb sync` can send later, without account, prompt or network; "online" sends.

    Raises:
        UserError: another mode.
    """
    if mode not in ("offline", "online"):
        raise UserError(f"logger.wandb.mode={mode}: there are offline and online; logger=csv leaves W&B out")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_MODE"] = mode
    logger = MirrorLogger(name=name, project=project, save_dir=folder, entity=entity, settings=_settings())
    logger.start()
    return logger


def _settings() -> Any:
    import wandb

    return wandb.Settings(console="off", init_timeout=30)


def finish(loggers: list[Logger], summary: dict[str, Any]) -> None:
    """End every logger; flat `summary` figures go to W&B."""
    for logger in loggers:
        if isinstance(logger, MirrorLogger):
            logger.finish(summary)
        else:
            logger.save()
