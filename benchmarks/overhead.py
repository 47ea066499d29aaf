"""What terms on layers cost: the step time of a loss against that of `ce + logits`, side by side in one run.

    python benchmarks/overhead.py --out results/benchmarks/overhead.json model=bert student=tiny

Random weights and random tokens at full length: times do not depend on either. Steps of all losses are interleaved, in
turning order, so that what else the machine does falls on all alike; medians and quartiles of each, and the median of
each round's ratios. "student" is a
step whose teacher answers from memory (forward, loss, backward, optimiser), "teacher" the teacher's forward pass with
the taps of the loss, and "online" is both.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from distill import report
from distill.app import CONF
from distill.build import build, build_all
from distill.features import Features, Tapped
from distill.losses import LossSum, LossTerm
from distill.module import parameter_groups
from distill.quiet import quiet

LOSSES = (
    ["ce", "logits"],
    ["ce", "logits", "hidden"],
    ["ce", "logits", "attention"],
    ["ce", "logits", "hidden", "attention"],
)


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Contestant:
    """A student with its loss and optimiser, and the teacher's features for one batch."""

    def __init__(
        self, names: list[str], overrides: list[str], teacher: Tapped, batch: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = hydra.compose("config", [*overrides, f"loss=[{','.join(names)}]"])
        self.name, self.batch, self.network = "+".join(names), batch, teacher
        self.student = build(cfg.student.network, Tapped, **facts)
        self.loss = LossSum(build_all(cfg.loss, LossTerm))
        self.loss.attach(self.student, teacher, {k: v[:2] for k, v in batch.items()}, 2)
        groups = [group for module in (self.student, self.loss) for group in parameter_groups(module, 0.01, 1e-4)]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.answer: Features | None = None
        self.times: dict[str, list[float]] = {"teacher": [], "student": []}

    def ask(self) -> None:
        with torch.no_grad():
            self.answer = self.network(self.batch)

    def step(self) -> None:
        total, _ = self.loss(self.student(self.batch), self.answer, self.batch)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def run(self, record: bool) -> None:
        self.loss.watch(self.student, self.network)
        self.student.train()
        teacher, student = clock(self.ask), clock(self.step)
        self.answer = None
        if record:
            self.times["teacher"].append(teacher)
            self.times["student"].append(student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    facts = {"num_labels": 2, "vocab_size": 30522, "pad_token_id": 0}
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = hydra.compose("config", options.overrides)
    teacher = build(cfg.teacher.network, Tapped, weights="scratch", **facts).eval()
    tokens = torch.randint(1, 30522, (options.batch, options.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}
    contestants = [Contestant(names, options.overrides, teacher, batch, facts) for names in LOSSES]
    for number in track(range(options.rounds + 2), description="rounds", transient=True):
        turn = number % len(contestants)  # the first of a round finds colder caches than the others
        for contestant in (*contestants[turn:], *contestants[:turn]):
            contestant.run(record=number >= 2)

    rows: dict[str, dict[str, dict[str, float]]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    for contestant in contestants:
        times = dict(contestant.times)
        times["online"] = [a + b for a, b in zip(times["teacher"], times["student"], strict=True)]
        seconds[contestant.name] = times
        rows[contestant.name] = {kind: summary(values) for kind, values in times.items()}
    for contestant in contestants:
        for kind, figures in rows[contestant.name].items():
            pairs = zip(seconds[contestant.name][kind], seconds["ce+logits"][kind], strict=True)
            figures["ratio"] = statistics.median(mine / base for mine, base in pairs)
    table = Table("loss", "student step, s", "ratio", "teacher, s", "ratio", "online, s", "ratio")
    for name, row in rows.items():
        cells = [
            cell
            for kind in ("student", "teacher", "online")
            for cell in (f"{row[kind]['median']:.3f}", f"{row[kind]['ratio']:.2f}")
        ]
        table.add_row(name, *cells)
    Console().print(table)
    if options.out:
        document = {
            "command": shlex.join(["python", *sys.argv]),
            "pair": f"{cfg.teacher.name} → {cfg.student.name}",
            "batch": options.batch, "length": options.length, "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "rows": rows, "versions": report.versions(), "hardware": report.hardware(),
        }  # fmt: skip
        options.out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low_quartile": low, "high_quartile": high}


if __name__ == "__main__":
    main()
