"""Examples a second in training, for each pair: the teacher asked in the step or its answers read from a cache, plain
or through `torch.compile`.

    python benchmarks/throughput.py --out results/benchmarks/throughput.json               # on the CPU
    python benchmarks/throughput.py --batch 64 --out FILE trainer=gpu                      # on a GPU, in bfloat16

Full-size networks and inputs, `distill.fit.fit` with all it does. The four ways take turns; medians over rounds, each
from the third step to the end of the last one. What compiling takes is not in there, but beside it: the time of the
first two steps of the first round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from contest import PAIRS, Contest, FullSize, configured
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Sheet

from distill import report
from distill.quiet import quiet

WAYS = (("online", False), ("cached", False), ("online", True), ("cached", True))


def name_of(mode: str, compiled: bool) -> str:
    return f"{mode}, compiled" if compiled else mode


def measure(contest: Contest, batch: int, rounds: int, done: Any) -> dict[str, Any]:
    """Way -> examples a second, and seconds of the first two steps."""
    pace: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for number in range(rounds):
        turn = number % len(WAYS)
        for mode, compiled in (*WAYS[turn:], *WAYS[:turn]):
            with contest.compiled(compiled):
                marks = contest.ours(mode)
            name = name_of(mode, compiled)
            first.setdefault(name, marks[2] - marks[0])
            pace.setdefault(name, []).append(batch * (len(marks) - 3) / (marks[-1] - marks[2]))
            done()
    return {
        name: {"examples_per_second": statistics.median(found), "rounds": found, "seconds_of_first_steps": first[name]}
        for name, found in pace.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="a round and way; the first two are not counted")
    parser.add_argument("--batch", type=int, help="examples a step; a small one for each pair where it is not given")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    options = parser.parse_args()
    quiet()
    pairs, rows, settings = options.pairs.split(","), {}, {}
    with Progress(transient=True) as bar, tempfile.TemporaryDirectory() as folder:
        task = bar.add_task("rounds", total=len(pairs) * options.rounds * len(WAYS))
        for pair in pairs:
            batch = options.batch or PAIRS[pair]
            data = FullSize(pair.startswith("bert"), batch, options.steps)
            contest = Contest(configured(pair, options.overrides), data, 1, Path(folder) / pair)
            settings = {key: contest.settings.trainer[key] for key in ("accelerator", "precision")}
            rows[pair] = {"batch": batch, "ways": measure(contest, batch, options.rounds, lambda: bar.advance(task))}
    table = Sheet("pair", "batch", *(name_of(*way) for way in WAYS))
    for pair, row in rows.items():
        cells = (f"{row['ways'][name_of(*way)]['examples_per_second']:,.1f}" for way in WAYS)
        table.add_row(pair, str(row["batch"]), *cells)
    Console().print("examples a second", table)
    if options.out:
        document = {
            "command": shlex.join(["python", *sys.argv]), "trainer": settings, "threads": torch.get_num_threads(),
            "rows": rows, "versions": report.versions(), "hardware": report.hardware(),
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
