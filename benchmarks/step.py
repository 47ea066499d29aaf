"""A training step of ours against a hand-written minimal PyTorch loop, side by side (`contest.py` says what both do).

    python benchmarks/step.py --out results/benchmarks/step.json

The two take turns step by step, each with a student of its own, so that what else the machine does falls on both alike.
Ratios are ours / by hand, medians over the pairs of steps and quartiles; below 1 ours is faster.

"online": full-size networks and inputs, the teacher asked in the step, by both. "cached": ours, with its answers read
from shards on the disk, against the student *alone* by hand, so the price of distillation once the teacher has been
asked. "gain" is how much faster a cached step of ours is than the online one by hand, as a share of what leaving the
teacher out could bring at most. "epoch": the data, sizes and callbacks that train.py uses by default, all steps of
cached epochs together, against the student alone by hand. Small images and short phrases: here overhead shows most.

Peak memory is the resident set above that of the process after its imports, each side in a process of its own. The
allocator is told to give every freed tensor back at once, so that it counts what was alive together; what it keeps
otherwise differs by some per cent between two runs of one program.

Last, the time from launch to the first step of `train.py model=bert student=tiny` with teacher and cache in the store.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contest import PAIRS, Contest, FullSize, configured
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Sheet

from distill import report, stages
from distill.app import CONF
from distill.quiet import quiet

SIDES = {"online": "online", "cached": "alone"}
"""Mode of ours -> mode of the loop by hand."""
PROMPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Environment in which glibc's malloc gives back at once what is freed."""


def full_size(pair: str, batches: int, folder: Path) -> Contest:
    return Contest(configured(pair), FullSize(pair.startswith("bert"), PAIRS[pair], batches), 1, folder)


def by_default(pair: str, folder: Path) -> Contest:
    cfg = configured(pair)
    return Contest(cfg, stages.data_set(cfg), cfg.optim.batch_size, folder)


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low_quartile": low, "high_quartile": high}


def duel(contest: Contest, mode: str, rounds: int, done: Callable[[], None]) -> dict[str, Any]:
    """Seconds of a step of each side and their ratio, without the first step of a round, which warms up; and of all
    steps together."""
    ours: list[float] = []
    by_hand: list[float] = []
    for _ in range(rounds):
        for mine, times in zip((ours, by_hand), contest.alternate(mode, SIDES[mode]), strict=True):
            mine += times[1:]
        done()
    ratios = [mine / other for mine, other in zip(ours, by_hand, strict=True)]
    return {
        "ours": quartiles(ours), "by_hand": quartiles(by_hand), "ratio": quartiles(ratios), "steps": len(ours),
        "ratio_of_sums": sum(ours) / sum(by_hand),
    }  # fmt: skip


def peak(pair: str, who: str, mode: str) -> int:
    """Bytes of resident memory that three steps take above what the imports took, in a process of its own."""
    command = [sys.executable, __file__, "--memory", pair, who, mode]
    environment = os.environ | PROMPT
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


def memory(pair: str, who: str, mode: str) -> int:
    """See `peak`."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        contest = full_size(pair, 3, Path(folder))
        contest.ours(mode) if who == "ours" else list(contest.by_hand(contest.student, mode))
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
    parser.add_argument("--rounds", type=int, default=4, help="of full-size steps, and of epochs")
    parser.add_argument("--steps", type=int, default=10, help="a round; the first two are not counted")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("overrides", nargs="*", help="of the quick run whose start is timed")
    parser.add_argument("--memory", nargs=3, metavar=("PAIR", "WHO", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.memory:
        print(memory(*options.memory))
        return
    console, pairs, rows = Console(), options.pairs.split(","), {}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("rounds", total=len(pairs) * (3 * options.rounds + 4))

        def done() -> None:
            bar.advance(task)

        for pair in pairs:
            row: dict[str, Any] = {}
            with tempfile.TemporaryDirectory() as folder:
                contest = full_size(pair, options.steps, Path(folder) / "step")
                row |= {mode: duel(contest, mode, options.rounds, done) for mode in SIDES}
                contest = by_default(pair, Path(folder) / "epoch")
                row["epoch"] = duel(contest, "cached", options.rounds, done)
                del contest
            for mode, rival in SIDES.items():
                bytes_ = {}
                for who, how in (("ours", mode), ("by_hand", rival)):
                    bytes_[who] = peak(pair, who, how)
                    done()
                row[mode] |= {"peak_bytes": bytes_, "memory_ratio": bytes_["ours"] / bytes_["by_hand"]}
            row["ceiling"] = row["online"]["by_hand"]["median"] / row["cached"]["by_hand"]["median"]
            row["gain"] = row["online"]["by_hand"]["median"] / row["cached"]["ours"]["median"] / row["ceiling"]
            rows[pair] = row
    console.print(sheet(rows))
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


def sheet(rows: dict[str, Any]) -> Sheet:
    """The ratios, ours / by hand."""
    table = Sheet("pair", "online step", "memory", "cached step", "memory", "gain / ceiling", "cached epoch")
    for pair, row in rows.items():
        figures = [figure for mode in SIDES for figure in (row[mode]["ratio"]["median"], row[mode]["memory_ratio"])]
        table.add_row(pair, *(f"{figure:.3f}" for figure in (*figures, row["gain"], row["epoch"]["ratio_of_sums"])))
    return table


if __name__ == "__main__":
    main()
