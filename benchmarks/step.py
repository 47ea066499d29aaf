"""One training step of ours against a hand-written minimal PyTorch loop that does the same work, side by side.

    python benchmarks/step.py --out results/benchmarks/step.json

For each pair: "online" asks the teacher in the step; "cached" has its logits in memory. The hand-written loop has the
same networks and batches, the same loss formulas, AdamW (fused) and gradient clipping, and nothing else: no metrics, no
logging, no checkpoints, no progress bar. Ours is `distill.fit.fit` with all of them. Both train in rounds that
alternate; a step's time is from one batch to the next. Medians, quartiles, and ratio of medians (ours / by hand); below
1 ours is faster. Peak memory is the resident set above that of the process after its imports, each in a process of
its own. Last, the time from launch to the first step of `train.py model=bert student=tiny` with teacher and cache in
the store.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table as Sheet
from torch.utils.data import DataLoader, Dataset

from distill import report
from distill.app import CONF
from distill.build import build, build_all
from distill.cache import CachedTeacher, Contents
from distill.features import Tapped
from distill.fit import Schedule, Settings, fit
from distill.losses import LossSum, LossTerm
from distill.quiet import quiet
from distill.shards import Table
from distill.teacher import FrozenTeacher

PAIRS = {"bert_tiny": 8, "resnet50_small": 8, "mobilenet_v3_small": 16}
"""Pair -> batch size; 128 tokens, 224 pixels."""


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


class Data:
    """What `fit` asks of a data set; the validation split is one batch."""

    label_names = ("a", "b")

    def __init__(self, text: bool, batch: int, steps: int) -> None:
        self.steps, self.train = steps, Batches(text, batch, steps)

    def loader(self, split: str, **options: Any) -> Any:
        whole = self.train if split == "train" else Batches("input_ids" in self.train.inputs, 1, 1)
        return DataLoader(whole, batch_size=None)


class Clock(pl.Callback):
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append(time.perf_counter())


def stored(logits: torch.Tensor) -> CachedTeacher:
    """A cache of these logits [N, C]."""
    examples, classes = logits.shape
    contents = Contents("", "", "", examples, classes, False, 1, None, "32-true", "float32", None, {}, examples)
    return CachedTeacher(Table([{"logits": logits}], examples), contents)


class Pair:
    """The networks of a pair at full size with random weights, and both ways to train."""

    def __init__(self, pair: str, steps: int, cached: bool) -> None:
        model, _, student = pair.rpartition("_")
        with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            self.cfg = hydra.compose("config", [f"model={model}", f"student={student}"])
        text = model == "bert"
        mean = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        facts = {"num_labels": 2, **({"vocab_size": 30522, "pad_token_id": 0} if text else mean)}
        torch.manual_seed(0)
        self.facts, self.data = facts, Data(text, PAIRS[pair], steps)
        self.teacher = FrozenTeacher(build(self.cfg.teacher.network, Tapped, weights="scratch", **facts))
        self.logits = torch.randn(PAIRS[pair] * steps, 2)
        self.answers = stored(self.logits) if cached else self.teacher
        self.student = build(self.cfg.student.network, Tapped, **facts)

    def ours(self, folder: Path) -> list[float]:
        arguments = {k: v for k, v in self.cfg.trainer.items() if k != "smoke"} | {"accelerator": "cpu"}
        settings = Settings(folder, 0, arguments, [], Console(file=io.StringIO()), {})
        clock = Clock()
        schedule = Schedule(1, 1, 1e-4, 0.01, 0.1, 1.0, False)
        fit(
            self.student, LossSum(build_all(self.cfg.loss, LossTerm)), self.data, schedule, settings, stage="student",
            teacher=self.answers, callbacks=[clock], checkpoints=folder, weights_only=True,
        )  # fmt: skip
        return differences(clock.marks)

    def by_hand(self) -> list[float]:
        student, teacher, temperature = self.student, self.teacher, float(self.cfg.loss.logits.temperature)
        decayed = [p for p in student.parameters() if p.ndim >= 2]
        others = [p for p in student.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        student.train()
        marks = []
        for batch in self.data.loader("train"):
            marks.append(time.perf_counter())
            if isinstance(self.answers, CachedTeacher):
                target = self.logits[batch["index"]]
            else:
                with torch.no_grad():
                    target = teacher(batch).logits
            logits = student(batch).logits
            soft = F.kl_div(
                F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1),
                log_target=True, reduction="batchmean",
            )  # fmt: skip
            loss = F.cross_entropy(logits, batch["labels"]) + temperature**2 * soft
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        return differences(marks)


def differences(marks: list[float]) -> list[float]:
    """Seconds of each step but the first two, which warm up."""
    return [b - a for a, b in pairwise(marks)][2:]


def measure(pair: str, mode: str, rounds: int, steps: int) -> dict[str, Any]:
    contest = Pair(pair, steps, mode == "cached")
    times: dict[str, list[float]] = {"ours": [], "by_hand": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            times["by_hand"] += contest.by_hand()
            times["ours"] += contest.ours(Path(folder))
            for path in Path(folder).glob("*.ckpt"):
                path.unlink()
    rows: dict[str, Any] = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[name] = {"median": median, "low_quartile": low, "high_quartile": high, "steps": len(values)}
    rows["ratio"] = rows["ours"]["median"] / rows["by_hand"]["median"]
    return rows


def peak(pair: str, mode: str, who: str, steps: int) -> int:
    """Bytes of resident memory that training takes above what the imports took, in a process of its own."""
    command = [sys.executable, __file__, "--memory", pair, mode, who, "--steps", str(steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(pair: str, mode: str, who: str, steps: int) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident_peak()
    contest = Pair(pair, steps, mode == "cached")
    with tempfile.TemporaryDirectory() as folder:
        contest.by_hand() if who == "by_hand" else contest.ours(Path(folder))
    return resident_peak() - before


def resident_peak() -> int:
    """Bytes of the largest resident set of this process so far (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


FIRST_STEP = """
import os, sys
from distill.app import train
from distill.module import DistillModule
DistillModule.on_train_batch_end = lambda *_: os._exit(42)
train()
"""


def first_step(overrides: list[str]) -> float | None:
    """Seconds from launch to the end of the first training step of the quick run; None if the teacher is not in the
    store, or its answers are not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_STEP, *overrides, "logger=csv", f"hydra.run.dir={folder}/run"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    warm = "  reused from " in done.stdout and "computed 0 " in done.stdout
    return seconds if done.returncode == 42 and warm else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="a round and side; the first two are not counted")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("overrides", nargs="*", help="of the quick run whose start is timed")
    parser.add_argument("--memory", nargs=3, metavar=("PAIR", "MODE", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.memory:
        print(memory(*options.memory, steps=options.steps))
        return
    console, rows = Console(), {}
    table = Sheet("pair", "mode", "by hand, s", "ours, s", "ratio", "memory ratio")
    for pair in options.pairs.split(","):
        for mode in ("online", "cached"):
            with console.status(f"{pair} {mode}"):
                row = measure(pair, mode, options.rounds, options.steps)
                bytes_ = {who: peak(pair, mode, who, 3) for who in ("by_hand", "ours")}
            row["peak_bytes"], row["memory_ratio"] = bytes_, bytes_["ours"] / bytes_["by_hand"]
            rows[f"{pair} {mode}"] = row
            cells = [f"{row[who]['median']:.3f}" for who in ("by_hand", "ours")]
            table.add_row(pair, mode, *cells, f"{row['ratio']:.3f}", f"{row['memory_ratio']:.3f}")
    console.print(table)
    starts = [first_step(options.overrides) for _ in range(3)]
    if None in starts:
        console.print("time to the first step: not measured; run python train.py model=bert student=tiny first")
    else:
        console.print(f"time to the first step of the quick run, teacher and cache in the store: {min(starts):.1f} s")
    if options.out:
        document = {
            "command": shlex.join(["python", *sys.argv]), "batch": PAIRS, "threads": torch.get_num_threads(),
            "rows": rows, "seconds_to_first_step": starts, "versions": report.versions(), "hardware": report.hardware(),
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
