"""Tiny networks, data and trainings for the tests of the core."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.data.batches import TextSplit, text_loader
from distill.data.image import Digits, image_loader
from distill.features import Batch, Tapped, TappedImage, TappedText
from distill.fit import Schedule, Settings
from distill.module import DistillModule
from students.bert import bert as build_bert

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def bert(layers: int = 2, width: int = 16, seed: int = 0, labels: int = 3, **options: Any) -> TappedText:
    torch.manual_seed(seed)
    return build_bert(labels, 20, 0, layers, width, 2, 2 * width, **{"zero_init_residual": False, **options})


def cnn(name: str = "resnet10t", seed: int = 0, labels: int = 3) -> TappedImage:
    torch.manual_seed(seed)
    return TappedImage(timm.create_model(name, num_classes=labels), {}, MEAN, STD)


class Linear(Tapped):
    """One matrix on the pixels: as cheap as a network can be."""

    def __init__(self, labels: int = 3, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, labels)), {"pixels": "0", "out": "1"})

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone(batch["pixels"])


class Text:
    """Rows of random pieces; the label is in the first one."""

    name, label_names = "text", ["a", "b", "c"]

    def __init__(self, train: int = 24, held_out: int = 6, longest: int = 9) -> None:
        draw = torch.Generator().manual_seed(0)
        self.sizes = {"train": train, "val": held_out, "test": held_out}
        self.splits = {}
        for split, size in self.sizes.items():
            lengths = torch.randint(3, longest + 1, (size,), generator=draw).tolist()
            rows = [torch.randint(4, 20, (length,), generator=draw).tolist() for length in lengths]
            self.splits[split] = TextSplit(rows, torch.tensor([row[0] % 3 for row in rows]), 0)

    def loader(self, split: str, *, augment: bool = False, **options: Any) -> DataLoader[dict[str, Tensor]]:
        return text_loader(self.splits[split], **options)


class Images:
    """Grey noise that is brighter for a higher label."""

    name, label_names = "images", ["a", "b", "c"]

    def __init__(self, train: int = 16, held_out: int = 6, size: int = 32) -> None:
        draw = torch.Generator().manual_seed(0)
        self.sizes = {"train": train, "val": held_out, "test": held_out}
        self.splits = {}
        for split, count in self.sizes.items():
            labels = torch.arange(count) % 3
            noise = torch.randint(0, 100, (count, 1, size, size), generator=draw)
            self.splits[split] = ((noise + 50 * labels.view(-1, 1, 1, 1)).byte(), labels)

    def loader(self, split: str, *, augment: bool = False, **options: Any) -> DataLoader[dict[str, Tensor]]:
        return image_loader(*self.splits[split], strength=Digits.strength if augment else None, **options)


def schedule(**options: Any) -> Schedule:
    usual = {
        "epochs": 1,
        "batch_size": 8,
        "lr": 1e-2,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "clip": 1.0,
        "augment": False,
    }
    return Schedule(**{**usual, **options})


def settings(folder: Path, loggers: list[Any] | None = None, **trainer: Any) -> Settings:
    ignore_lightning()
    arguments = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **trainer}
    console = Console(file=io.StringIO())
    return Settings(
        folder, 0, arguments, loggers or [], console, {"config": {"seed": 0, "loss": {"ce": {"weight": 1.0}}}}
    )


def ignore_lightning() -> None:
    """Its advice about numbers of workers and logging intervals."""
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|torchmetrics")


def train(module: DistillModule, loader: Any, folder: Path, epochs: int = 1, **options: Any) -> pl.Trainer:
    """A bare training: no files, no validation."""
    ignore_lightning()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader)
    return trainer
