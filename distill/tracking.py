"""Loggers: `metrics.csv` is the record of a run, Weights & Biases a mirror of it that can never stop the run."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from distill.errors import UserError, one_line
from distill.report import replace


class _Record(ExperimentWriter):
    """Adds to what is there; Lightning's own deletes it, and warns of everything else that is in the folder."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class RecordLogger(CSVLogger):
    """`metrics.csv` straight in the run folder, for all stages; no `hparams.yaml`, since `config.yaml` is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=20)
        self._experiment = _Record(str(folder))

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run folder has `config.yaml`."""

    def save(self) -> None:
        self.experiment.save()

    def rewind(self, stage: str, step: float) -> None:
        """Drop what an earlier start of the run logged for a stage from `step` on, and its evaluation: both are going
        to be logged again."""
        path = Path(self.experiment.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or [])
        mine = [name for name in names if name.startswith(f"{stage}/")]

        def again(row: dict[str, str]) -> bool:
            return any(row[name] for name in mine) and (int(row["step"]) >= step or bool(row.get(f"{stage}/params")))

        kept = [row for row in rows if None not in row.values() and not again(row)]  # None: a kill cut the line off
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(kept)
        replace(path, text.getvalue())


class MirrorLogger(Logger):
    """A W&B run that is switched off with one line on stderr at its first failure.

    Lightning's own `WandbLogger` would do, were it not that every call of it may raise, and so end the training.

    Attributes:
        run: the W&B run, or None.
        failed: why the mirror is off, or None.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.folder, self._name = folder, name
        self.run: Any = None
        self.failed: str | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str | None:
        return getattr(self.run, "id", None)

    def guard(self, call: Callable[[], Any]) -> None:
        if self.failed is not None:
            return
        try:
            call()
        except Exception as error:  # whatever W&B raises: the run is worth more than its mirror
            self.failed = f"{type(error).__name__}: {one_line(error)}"
            print(f"warning: W&B is off for the rest of this run ({self.failed}); metrics.csv goes on", file=sys.stderr)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.guard(lambda: self.run.log({**metrics, "step": step}))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.guard(lambda: self.run.config.update(params, allow_val_change=True))

    def finish(self, summary: dict[str, Any]) -> None:
        """Put the figures of the report into the W&B summary and end the W&B run."""
        self.guard(lambda: (self.run.summary.update(summary), self.run.finish()))


def csv_logger(folder: Path) -> RecordLogger:
    """`metrics.csv` in the run folder."""
    return RecordLogger(folder)


def wandb_logger(
    folder: Path, name: str, project: str = "distill", mode: str = "offline", entity: str | None = None
) -> MirrorLogger:
    """A W&B run in the run folder.

    Args:
        mode: "offline" writes files that `wandb sync` can send later, without account, prompt or network; "online"
            sends.

    Raises:
        UserError: another mode.
    """
    if mode not in ("offline", "online"):
        raise UserError(f"logger.wandb.mode={mode}: there are offline and online; logger=csv leaves W&B out")
    os.environ.setdefault("WANDB_SILENT", "true")
    mirror = MirrorLogger(folder, name)

    def start() -> None:
        import wandb

        settings = wandb.Settings(console="off", init_timeout=30)
        known = cast(Literal["offline", "online"], mode)
        mirror.run = wandb.init(project=project, name=name, entity=entity, dir=folder, mode=known, settings=settings)

    mirror.guard(start)
    return mirror


def rewind(loggers: list[Logger], stage: str, step: float) -> None:
    """Let the record forget what a stage logged from `step` on, and its evaluation."""
    for logger in loggers:
        if isinstance(logger, RecordLogger):
            logger.rewind(stage, step)


def finish(loggers: list[Logger], summary: dict[str, Any]) -> None:
    """End every logger; flat `summary` figures go to W&B."""
    for logger in loggers:
        if isinstance(logger, MirrorLogger):
            logger.finish(summary)
        else:
            logger.save()
