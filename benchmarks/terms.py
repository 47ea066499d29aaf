"""Compare the loss terms one by one: the same student, data, schedule and seeds; only the loss differs.

    python benchmarks/terms.py --out results/terms/bert_micro.json model=bert student=micro

Trains `[ce]`, and `[ce, X]` and `[ce, logits, X]` for each term X of `conf/loss`, with the weight in its file. Terms
that do not fit the pair are listed with the reason. One teacher (of the first seed) teaches all; its answers to the
training split are kept in memory. The file is written after every training, and a second call goes on where the first
one stopped.

With `--balance` every weight is set by gradients instead, without a look at any accuracy: so that the gradient norm of
the term on the student equals that of `ce`, the median over ten batches after one epoch on `ce` alone (first seed).
With `--weights FILE` they are those of an earlier comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from distill import report, stages, store
from distill.app import CONF
from distill.build import build_all
from distill.callbacks.diagnostics import gradient_norms
from distill.errors import UserError
from distill.exported import answers
from distill.features import Tapped
from distill.fit import Schedule, Settings, fit
from distill.losses import CrossEntropy, LossSum, LossTerm
from distill.quiet import quiet
from distill.recall import Recall, ask
from distill.teacher import FrozenTeacher


def compose(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra.compose("config", overrides)


def variants(bases: list[list[str]]) -> list[list[str]]:
    """[ce], [ce, logits], then each base with every other term."""
    terms = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))
    others = [term for term in terms if term not in ("ce", "logits")]
    return [["ce"], ["ce", "logits"], *([*base, x] for base in bases for x in others)]


class Bench:
    """One pair: the data, the teacher, and what it answers."""

    def __init__(
        self, overrides: list[str], bases: list[list[str]], seeds: list[int], folder: Path, console: Console
    ) -> None:
        self.variants = variants(bases)
        self.overrides, self.seeds, self.folder, self.console = overrides, seeds, folder, console
        self.cfg = compose([*overrides, f"seed={seeds[0]}"])
        self.data = stages.data_set(self.cfg)
        job = self.job(self.cfg)
        self.teacher, kept = stages.initial_teacher(job)
        if kept is None or not kept.exists():
            raise UserError(
                f"the teacher is not in the store {self.cfg.store}; train it: python train.py {shlex.join(overrides)}"
            )
        store.load_teacher(kept, self.teacher)
        self.record = stages.evaluate(job, self.teacher, "teacher")
        self.says = self.record.predictions
        self.losses, self.refused = self.fitting()
        taps = list(dict.fromkeys(tap for loss in self.losses.values() for tap in loss.taps()[1]))
        self.teacher.watch(taps)
        self.weights: dict[str, float] = {}
        self.answers: Recall = ask(FrozenTeacher(self.teacher), self.data, torch.device("cpu"), console)

    def job(self, cfg: DictConfig) -> stages.Job:
        arguments = {str(key): value for key, value in cfg.trainer.items() if key != "smoke"}
        return stages.Job(cfg, self.data, Settings(self.folder, cfg.seed, arguments, [], self.console, {}))

    def loss(self, names: list[str], seed: int, student: Tapped) -> LossSum:
        cfg = compose([*self.overrides, f"seed={seed}", f"loss=[{','.join(names)}]"])
        loss = LossSum(build_all(cfg.loss, LossTerm), self.data.task)
        batch = next(iter(self.data.loader("val", batch_size=2)))
        loss.attach(student, self.teacher, batch, self.data.sizes["train"])
        return loss

    def fitting(self) -> tuple[dict[str, LossSum], dict[str, str]]:
        """The variants that fit this pair, and why the others do not."""
        found, refused = {}, {}
        student = stages.new_student(self.job(self.cfg))
        for names in self.variants:
            try:
                found["+".join(names)] = self.loss(names, self.seeds[0], student)
            except UserError as error:
                refused[names[-1]] = str(error)
        return found, refused

    def balance(self, terms: list[str]) -> dict[str, float]:
        """The weight at which each term's gradient on the student is as large as that of `ce`, to two digits."""
        job = self.job(self.cfg)
        student = stages.new_student(job)
        alone = LossSum({"ce": CrossEntropy()}, self.data.task)
        schedule = Schedule(**{**job.cfg.optim, "epochs": 1})
        fit(
            student,
            alone,
            self.data,
            schedule,
            job.settings,
            stage="student",
            checkpoints=self.folder,
            weights_only=True,
        )
        (self.folder / "best.ckpt").unlink()
        loss = self.loss(terms, self.seeds[0], student)
        loss.watch(student, None)
        parameters = list(student.parameters())
        ratios: dict[str, list[float]] = {name: [] for name in terms}
        batches = self.data.loader("train", batch_size=schedule.batch_size, shuffle=True, seed=self.seeds[0])
        for batch in itertools.islice(batches, 10):
            norms = gradient_norms(loss(student.train()(batch), self.answers(batch), batch)[1], parameters)
            for name, norm in norms.items():
                ratios[name].append(norms["ce"] / norm)
        return {name: float(f"{statistics.median(found):.2g}") for name, found in ratios.items()}

    def train(self, variant: str, seed: int) -> dict[str, Any]:
        job = self.job(compose([*self.overrides, f"seed={seed}"]))
        job.teacher_says = self.says
        student = stages.new_student(job)
        loss = self.loss(variant.split("+"), seed, student)
        for name, term in loss.items():
            term.weight = self.weights.get(name, term.weight)
        loss.watch(student, None)
        start = time.perf_counter()
        fit(
            student, loss, self.data, Schedule(**job.cfg.optim), job.settings,
            stage="student", teacher=self.answers, checkpoints=self.folder, weights_only=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        (self.folder / "best.ckpt").unlink()
        student.watch([])
        metrics = stages.evaluate(job, student, "student").result["metrics"]
        said, labels = answers(lambda batch: student(batch).logits, self.data.loader("val", batch_size=128))
        val = (said == labels).float().mean().item()
        return {"seed": seed, **metrics, "val_accuracy": val, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", default="0,1,2", help="of the students; the teacher is that of the first")
    parser.add_argument("--weights", type=Path, help="JSON file of an earlier comparison, to take its weights")
    parser.add_argument("--bases", default="ce,ce+logits", help="what each term is added to")
    parser.add_argument("--balance", action="store_true", help="set weights by gradient norms")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    bases = [base.split("+") for base in options.bases.split(",")]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.overrides, bases, seeds, Path(folder), console)
        if options.weights:
            used = json.loads(options.weights.read_text())["terms"]
            bench.weights = {name: facts["weight"] for name, facts in used.items()}
        if options.balance:
            bench.weights = bench.balance(list(dict.fromkeys(name for v in bench.losses for name in v.split("+"))))
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "pair": f"{bench.cfg.teacher.name} → {bench.cfg.student.name}",
            "data": {"name": bench.data.name, "fingerprint": bench.data.fingerprint, **bench.data.sizes},
            "schedule": OmegaConf.to_container(bench.cfg.optim, resolve=True),
            "teacher": bench.record.result["metrics"],
            "balanced": options.balance,
            "terms": {
                name: term_facts(name, options.overrides) | weight_of(name, bench)
                for name in sorted({n for v in bench.variants for n in v})
            },
            "refused": bench.refused,
            "versions": report.versions(),
            "hardware": report.hardware(),
        }
        runs: dict[str, list[dict[str, Any]]] = (
            json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
        )
        todo = [(v, s) for s in seeds for v in bench.losses if s not in [run["seed"] for run in runs.get(v, [])]]
        for done, (variant, seed) in enumerate(todo, start=1):
            outcome = bench.train(variant, seed)
            runs.setdefault(variant, []).append(outcome)
            options.out.write_text(json.dumps({**facts, "runs": runs}, indent=2, ensure_ascii=False) + "\n")
            console.print(f"{done}/{len(todo)}  {variant}  seed {seed}: {outcome['accuracy']:.4f}", highlight=False)


def weight_of(name: str, bench: Bench) -> dict[str, float]:
    return {"weight": bench.weights[name]} if name in bench.weights else {}


def term_facts(name: str, overrides: list[str]) -> dict[str, Any]:
    """The term's weight and parameters as they were used."""
    node: Any = OmegaConf.to_container(compose([*overrides, f"loss=[{name}]"]).loss[name], resolve=True)
    return {key: value for key, value in node.items() if key not in ("_target_", "schedule")}


if __name__ == "__main__":
    main()
