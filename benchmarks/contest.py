"""One pair of networks, trained by `distill.fit.fit` and by a hand-written loop that does the same work.

The hand-written loop has the same networks and batches, the same loss formulas, AdamW (fused) and gradient clipping,
and nothing else: no metrics, no logging, no checkpoints, no progress bar. Ours has all of them. "online" asks the
teacher in the step; "cached" reads what it said from shards on the disk; "alone" is the student on the labels, without
a teacher.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from distill.app import CONF
from distill.build import build, build_all
from distill.cache import CachedTeacher, Contents
from distill.callbacks.diagnostics import Diagnostics
from distill.features import Tapped
from distill.fit import Schedule, Settings, fit
from distill.losses import LossSum, LossTerm
from distill.precision import precision
from distill.teacher import FrozenTeacher
from distill.tracking import RecordLogger

PAIRS = {"bert_tiny": 8, "resnet50_small": 8, "mobilenet_v3_small": 16}
"""Pair -> batch size of a full-size step; 128 tokens, 224 pixels."""


def configured(pair: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a pair, as train.py composes it."""
    model, _, student = pair.rpartition("_")
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra.compose("config", [f"model={model}", f"student={student}", *overrides])


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Random inputs at full size, made once."""

    def __init__(self, text: bool, batch: int, steps: int) -> None:
        draw = torch.Generator().manual_seed(0)
        total = batch * steps
        self.index = torch.arange(total).split(batch)
        self.labels = torch.randint(2, (total,), generator=draw).split(batch)
        if text:
            ids = torch.randint(1, 30522, (batch, 128), generator=draw)
            self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            self.inputs = {"pixels": torch.rand(batch, 3, 224, 224, generator=draw)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {**self.inputs, "labels": self.labels[i], "index": self.index[i], "view": 0 * self.index[i]}


class FullSize:
    """What `fit` asks of a data set: batches of full size; the validation split is one batch of one."""

    label_names = ("a", "b")

    def __init__(self, text: bool, batch: int, steps: int) -> None:
        self.train, self.val = Batches(text, batch, steps), Batches(text, 1, 1)
        self.sizes = {"train": batch * steps}
        self.network_facts: dict[str, Any] = {"num_labels": 2}
        self.network_facts |= (
            {"vocab_size": 30522, "pad_token_id": 0} if text else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        )

    def loader(self, split: str, **options: Any) -> Any:
        return DataLoader(
            self.train if split == "train" else self.val, batch_size=None, pin_memory=torch.cuda.is_available()
        )


class Clock(pl.Callback):
    """Seconds at the beginning of each step, and at the end of the last one."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            wait()
            self.marks.append(time.perf_counter())


class Turns(pl.Callback):
    """After each step of ours, one by hand.

    A step of ours is all that passes from the end of one by hand to the end of the next of ours, so it has what is done
    between steps as well. The first one, which has no beginning, is not there.
    """

    def __init__(self, rival: Iterator[float]) -> None:
        self.rival, self.last = rival, 0.0
        self.ours: list[float] = []
        self.by_hand: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        seconds = time.perf_counter() - self.last
        by_hand = next(self.rival)
        if self.last:
            self.ours.append(seconds)
            self.by_hand.append(by_hand)
        self.last = time.perf_counter()


def wait() -> None:
    """Until a GPU, where there is one, has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stored(folder: Path, logits: torch.Tensor) -> CachedTeacher:
    """A cache of these logits [N, C], on the disk."""
    examples, classes = logits.shape
    contents = Contents("", "", "", examples, classes, False, 1, None, "32-true", "float32", None, {}, 8192)
    shards = contents.shards(folder)
    for number in shards.missing():
        span = shards.span(number)
        shards.write(number, {"logits": logits[span.start : span.stop].clone()})
    return CachedTeacher(shards.open(), contents)


class Contest:
    """A teacher and a student with random weights, and both ways to train.

    Args:
        cfg: from `configured`.
        data: what they are fed with.
        batch_size: of `data.loader`; `FullSize` has its own.
        folder: for checkpoints and cache.
    """

    def __init__(self, cfg: DictConfig, data: Any, batch_size: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.cfg, self.data, self.batch_size, self.folder = cfg, data, batch_size, folder
        self.teacher = FrozenTeacher(build(cfg.teacher.network, Tapped, weights="scratch", **data.network_facts))
        self.student = build(cfg.student.network, Tapped, **data.network_facts)
        self.answers = stored(folder / "cache", torch.randn(data.sizes["train"], len(data.label_names)))
        arguments = {key: value for key, value in cfg.trainer.items() if key != "smoke"}
        arguments["precision"] = precision(arguments["precision"], arguments["accelerator"])
        console = Console(file=io.StringIO())
        loggers: list[Logger] = [RecordLogger(folder)]
        self.settings = Settings(folder, 0, arguments, loggers, console, {})
        self.diagnostics = Diagnostics(console=console, **cfg.callbacks.diagnostics)

    @contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        with self.student.compiled(wanted), self.teacher.network.compiled(wanted):
            yield

    def ours(self, mode: str, *callbacks: pl.Callback) -> list[float]:
        """Times of an epoch by `fit`; `mode` is "online" or "cached"."""
        clock = Clock()
        fit(
            self.student, LossSum(build_all(self.cfg.loss, LossTerm)), self.data,
            Schedule(1, self.batch_size, 1e-4, 0.01, 0.1, 1.0, False), self.settings, stage="student",
            teacher=self.answers if mode == "cached" else self.teacher,
            callbacks=[clock, self.diagnostics, *callbacks], checkpoints=self.folder / "checkpoints", weights_only=True,
        )  # fmt: skip
        for path in self.folder.glob("checkpoints/*.ckpt"):
            path.unlink()
        return clock.marks

    def by_hand(self, student: Tapped, mode: str) -> Iterator[float]:
        """Train a student for an epoch by hand and give the seconds of each step; `mode` is "online" or "alone"."""
        teacher, temperature = self.teacher, float(self.cfg.loss.logits.temperature)
        decayed = [p for p in student.parameters() if p.ndim >= 2]
        others = [p for p in student.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        student.train()
        batches = iter(self.data.loader("train", batch_size=self.batch_size, shuffle=True))
        for _ in range(len(batches)):
            start = time.perf_counter()
            batch = next(batches)
            with torch.no_grad():
                target = teacher(batch).logits if mode == "online" else None
            logits = student(batch).logits
            loss = F.cross_entropy(logits, batch["labels"])
            if target is not None:
                soft = F.kl_div(
                    F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1),
                    log_target=True, reduction="batchmean",
                )  # fmt: skip
                loss = loss + temperature**2 * soft
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            yield time.perf_counter() - start

    def alternate(self, mode: str, rival: str) -> tuple[list[float], list[float]]:
        """Seconds of each step of ours in `mode`, and of a step by hand as `rival` right after each."""
        turns = Turns(self.by_hand(copy.deepcopy(self.student), rival))
        self.ours(mode, turns)
        return turns.ours, turns.by_hand
