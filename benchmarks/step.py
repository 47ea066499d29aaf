"""A training step of ours against a hand-written minimal PyTorch loop, side by side (`contest.py` says what both do).

    python benchmarks/step.py --out results/benchmarks/step.json

"step": full-size networks and inputs. Online, ours is compared with the same work by hand; cached, with the student
*alone* by hand, so the price of distillation once the teacher has been asked. Medians of the steps of all rounds, and
quartiles; below 1 ours is faster. "gain" is how much faster a cached step of ours is than the online one by hand, as a
share of what leaving the teacher out could bring at most.

"epoch": the data, sizes and callbacks that train.py uses by default, from the first batch of a cached epoch to the end
of its last one, against an epoch of the student alone by hand. Small images and short phrases: here overhead shows
most.

Rounds alternate between all contestants, in turning order. Peak memory is the resident set above that of the process
after its imports, each in a process of its own: "live" has the allocator give every freed tensor back at once, so that
it counts what was alive together; "resident" is as the allocator does by default, medians of three, where fragmentation
alone makes a difference of some per cent between two runs of one program.

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
from contest import PAIRS, Contest, FullSize, configured, steps
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Sheet

from distill import report, stages
from distill.app import CONF
from distill.quiet import quiet

SIDES = ("by_hand online", "ours online", "by_hand alone", "ours cached")
ALLOCATORS = {
    "live": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
    "resident": {},
}
"""Environment of glibc's malloc."""


def full_size(pair: str, batches: int, folder: Path) -> Contest:
    return Contest(configured(pair), FullSize(pair.startswith("bert"), PAIRS[pair], batches), 1, folder)


def by_default(pair: str, folder: Path) -> Contest:
    cfg = configured(pair)
    return Contest(cfg, stages.data_set(cfg), cfg.optim.batch_size, folder)


def run(contest: Contest, side: str) -> list[float]:
    who, mode = side.split()
    return contest.ours(mode) if who == "ours" else contest.by_hand(mode)


def interleaved(
    contest: Contest, sides: tuple[str, ...], rounds: int, read: Callable[[list[float]], list[float]], done: Any
) -> dict[str, dict[str, float]]:
    """Median and quartiles of what `read` makes of the times of each side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            times[side] += read(run(contest, side))
            done()
    rows = {}
    for side, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        rows[side] = {"median": median, "low_quartile": low, "high_quartile": high, "count": len(values)}
    return rows


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of the medians of the sides that were timed."""
    median = {side: row["median"] for side, row in rows.items()}
    found = {"cached": median["ours cached"] / median["by_hand alone"]}
    if "ours online" in median:
        found["online"] = median["ours online"] / median["by_hand online"]
        found["ceiling"] = median["by_hand online"] / median["by_hand alone"]
        found["gain"] = median["by_hand online"] / median["ours cached"] / found["ceiling"]
    return found


def peaks(pair: str, allocator: str, repeats: int, done: Any) -> dict[str, int]:
    """Median peak of each side in bytes."""
    found: dict[str, list[int]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            command = [sys.executable, __file__, "--memory", pair, side]
            environment = os.environ | ALLOCATORS[allocator]
            said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            found[side].append(int(said.split()[-1]))
            done()
    return {side: int(statistics.median(values)) for side, values in found.items()}


def memory(pair: str, side: str) -> int:
    """Bytes of resident memory that three steps take above what the imports took."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        run(full_size(pair, 3, Path(folder)), side)
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
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7, help="a round and side; the first two are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="of the resident memory")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("overrides", nargs="*", help="of the quick run whose start is timed")
    parser.add_argument("--memory", nargs=2, metavar=("PAIR", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.memory:
        print(memory(*options.memory))
        return
    console, pairs, rows = Console(), options.pairs.split(","), {}
    with Progress(console=console, transient=True) as bar:
        work = len(pairs) * (6 * options.rounds + 4 * (options.repeats + 1))
        task = bar.add_task("rounds", total=work)

        def done() -> None:
            bar.advance(task)

        for pair in pairs:
            with tempfile.TemporaryDirectory() as folder:
                contest = full_size(pair, options.steps, Path(folder) / "step")
                step = interleaved(contest, SIDES, options.rounds, steps, done)
                contest = by_default(pair, Path(folder) / "epoch")
                epoch = interleaved(contest, SIDES[2:], options.rounds, lambda marks: [marks[-1] - marks[0]], done)
                del contest
            bytes_ = {
                name: peaks(pair, name, options.repeats if name == "resident" else 1, done) for name in ALLOCATORS
            }
            rows[pair] = {
                "step": step, "step_ratios": ratios(step), "epoch": epoch, "epoch_ratios": ratios(epoch),
                "peak_bytes": bytes_,
                "memory_ratios": {
                    name: {
                        "online": b["ours online"] / b["by_hand online"],
                        "cached": b["ours cached"] / b["by_hand alone"],
                    }
                    for name, b in bytes_.items()
                },
            }  # fmt: skip
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
        step, memory_ = row["step_ratios"], row["memory_ratios"]["live"]
        figures = (step["online"], memory_["online"], step["cached"], memory_["cached"], step["gain"])
        table.add_row(pair, *(f"{figure:.3f}" for figure in (*figures, row["epoch_ratios"]["cached"])))
    return table


if __name__ == "__main__":
    main()
