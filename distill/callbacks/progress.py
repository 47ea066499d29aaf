"""One progress bar with an ETA for a whole stage, and one line for each epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def stage_bar(console: Console) -> Progress:
    """A bar that vanishes when done; nothing at all where the output is not a terminal."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class StageProgress(pl.Callback):
    """Shows steps done of all steps of the stage, and prints loss and validation accuracy after each epoch."""

    def __init__(self, stage: str, console: Console) -> None:
        self.stage, self.console = stage, console
        self.bar = stage_bar(console)
        self.task: TaskID | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            self.stage, total=int(trainer.estimated_stepping_batches), completed=trainer.global_step
        )

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert self.task is not None
        self.bar.update(
            self.task,
            completed=trainer.global_step,
            description=f"{self.stage} {trainer.current_epoch + 1}/{trainer.max_epochs}",
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get(f"{self.stage}/train_loss")
        metric = getattr(module, "metric", "accuracy")
        score = trainer.callback_metrics.get(f"{self.stage}/val_{metric}")
        parts = [f"{self.stage:<9}epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        parts += [f"loss {float(loss):.3f}"] if loss is not None else []
        parts += [f"val {metric} {float(score):.3f}"] if score is not None else []
        self.console.print("  " + "  ".join(parts), highlight=False)

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.start()
        self.task = self.bar.add_task(f"{self.stage}: test", total=sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert self.task is not None
        self.bar.advance(self.task)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.bar.stop()
