"""Which term drives the student: norms, shares, and that looking changes nothing."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import Images, Linear, Text, bert, schedule, settings
from torch import Tensor, nn

from distill import fingerprint
from distill.callbacks.diagnostics import Diagnostics, gradient_norms
from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.fit import fit
from distill.losses import CrossEntropy, Hidden, LogitsKL, LogitsMSE, LossSum, LossTerm
from distill.recall import Recall
from distill.teacher import FrozenTeacher
from distill.tracking import RecordLogger

Figures = dict[str, dict[int, float]]


def logged(folder: Path) -> Figures:
    """Figure without its stage -> step -> value, from metrics.csv; each is logged at most once a step."""
    figures: Figures = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell and name != "epoch":
                    values = figures.setdefault(name.removeprefix("student/"), {})
                    assert step not in values, f"{name} twice at step {step}"
                    values[step] = float(cell)
    return figures


def terms() -> LossSum:
    return LossSum({"ce": CrossEntropy(0.5), "kd": LogitsMSE(2.0)})


def watched(
    folder: Path, every: int | None, loss: LossSum | None = None, epochs: int = 3, **trainer: Any
) -> tuple[Figures, str, Tapped]:
    """Figures, what was printed, and the network, after a training of 4 micro-batches an epoch; None: no callback."""
    network, record, console = Linear(), RecordLogger(folder), Console(file=io.StringIO())
    fit(
        network, loss or terms(), Images(size=2), schedule(epochs=epochs, batch_size=4),
        settings(folder, [record], **trainer), stage="student", teacher=Recall(torch.eye(3).repeat(6, 1)[:16]),
        callbacks=[] if every is None else [Diagnostics(every, console)], checkpoints=folder,
    )  # fmt: skip
    record.save()
    return logged(folder), console.file.getvalue(), network  # type: ignore[attr-defined]


def test_norms_are_those_of_autograd_and_leave_the_graph() -> None:
    network, seen = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    out = network(seen)
    values = {"a": out.square().mean(), "b": 3 * out[:, 0].sum(), "bias": network[2].bias.sum(), "none": seen.sum()}
    values["none"] = values["none"] + 0 * out.sum()
    norms = gradient_norms(values, list(network.parameters()))
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, value in values.items():
        network.zero_grad()
        value.backward(retain_graph=True)
        squares = [p.grad.square().sum().item() for p in network.parameters() if p.grad is not None]
        assert norms[name] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    assert norms["bias"] == pytest.approx(math.sqrt(3))
    assert norms["none"] == 0
    assert gradient_norms({"constant": seen.sum()}, list(network.parameters())) == {"constant": 0.0}


def test_figures_of_the_first_step_are_those_of_the_weighted_terms_on_the_student_alone(tmp_path: Path) -> None:
    data, student, teacher = Text(train=24), bert(dropout=0.0), bert(4, 24, seed=1)
    loss = LossSum({"ce": CrossEntropy(0.5), "hidden": Hidden(7.0), "kd": LogitsKL(2.0)})
    loss.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), 24)
    loss.watch(student, teacher)
    batch = next(iter(data.loader("train", batch_size=24)))
    frozen = FrozenTeacher(teacher)
    values: dict[str, Tensor] = loss(student(batch), frozen(batch), batch)[1]
    weighted = {name: loss.weights[name] * value for name, value in values.items()}
    total = sum(value.item() for value in weighted.values())
    expected: dict[str, float] = {}
    for name, value in weighted.items():
        gradients = torch.autograd.grad(value, list(student.parameters()), retain_graph=True, allow_unused=True)
        expected[f"grad_{name}"] = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
        expected[f"share_{name}"] = value.item() / total
        expected[f"train_{name}"] = values[name].item()

    record = RecordLogger(tmp_path)
    fit(
        student, loss, data, schedule(batch_size=24), settings(tmp_path, [record]), stage="student", teacher=frozen,
        callbacks=[Diagnostics(1, Console(quiet=True))], checkpoints=tmp_path,
    )  # fmt: skip
    record.save()
    found = {name: values[0] for name, values in logged(tmp_path).items() if name in expected}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(12))), (5, [0, 5, 10]), (12, [0]), (50, [0])])
def test_figures_are_logged_every_so_many_steps(every: int, steps: list[int], tmp_path: Path) -> None:
    figures, _, _ = watched(tmp_path, every)
    names = {f"{kind}_{term}" for kind in ("grad", "share") for term in ("ce", "kd")}
    assert names < figures.keys()
    for name in names:
        assert list(figures[name]) == steps
        assert all(value > 0 for value in figures[name].values())
    for step in steps:
        assert figures["share_ce"][step] + figures["share_kd"][step] == pytest.approx(1)
        ce, kd = 0.5 * figures["train_ce"][step], 2 * figures["train_kd"][step]
        assert figures["share_ce"][step] == pytest.approx(ce / (ce + kd), rel=1e-5)


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    figures, _, _ = watched(tmp_path / "a", 1, accumulate_grad_batches=2)
    assert list(figures["grad_ce"]) == list(figures["share_kd"]) == list(range(6))
    figures, _, _ = watched(tmp_path / "b", 3, accumulate_grad_batches=3)
    assert list(figures["grad_ce"]) == [0, 3]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_looking_changes_nothing(precision: str, tmp_path: Path) -> None:
    digests = []
    for every in (None, 1):
        data, student, teacher = Text(), bert(), bert(4, 24, seed=1)
        torch.manual_seed(0)
        loss = LossSum({"ce": CrossEntropy(), "hidden": Hidden()})
        loss.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), 24)
        loss.watch(student, teacher)
        fit(
            student, loss, data, schedule(batch_size=4), settings(tmp_path, precision=precision), stage="student",
            teacher=FrozenTeacher(teacher), callbacks=[Diagnostics(every, Console(quiet=True))] if every else [],
            checkpoints=tmp_path / str(every),
        )  # fmt: skip
        digests.append((fingerprint.of_weights(student), fingerprint.of_weights(loss)))
    assert digests[0] == digests[1]


def test_off_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    off, printed, network = watched(tmp_path / "off", 0, LossSum({"ce": CrossEntropy(), "kd": LogitsMSE(1e4)}))
    none, _, other = watched(tmp_path / "none", None, LossSum({"ce": CrossEntropy(), "kd": LogitsMSE(1e4)}))
    assert off == none
    assert off.keys() == {"train_loss", "train_ce", "train_kd", "val_accuracy"}
    assert printed == ""
    assert fingerprint.of_weights(network) == fingerprint.of_weights(other)


def test_one_term_has_nothing_to_compare(tmp_path: Path) -> None:
    figures, printed, _ = watched(tmp_path, 1, LossSum({"ce": CrossEntropy(), "off": LogitsMSE(0.0)}))
    assert figures.keys() == {"train_loss", "val_accuracy"}
    assert printed == ""


def test_a_term_that_dominates_is_named_once(tmp_path: Path) -> None:
    loss = LossSum({"ce": CrossEntropy(1e-3), "kd": LogitsMSE(100.0)})
    figures, printed, _ = watched(tmp_path, 1, loss)
    shares = {step: kd / (kd + figures["grad_ce"][step]) for step, kd in figures["grad_kd"].items()}
    assert sum(share > 0.95 for share in shares.values()) > 1
    assert printed == (
        f"  warning: term kd holds {shares[0]:.0%} of the gradient at step 0, so the others hardly count; lower "
        "loss.kd.weight or raise theirs\n"
    )


def test_terms_in_balance_are_not_warned_of(tmp_path: Path) -> None:
    figures, printed, _ = watched(tmp_path, 1)
    assert all(0.05 < ce / (ce + figures["grad_kd"][step]) < 0.95 for step, ce in figures["grad_ce"].items())
    assert printed == ""


def test_a_term_that_is_off_has_no_figures(tmp_path: Path) -> None:
    late = {"before": 0, "after": 1, "start": 0.5, "end": 0.5}
    loss = LossSum({"ce": CrossEntropy(), "kd": LogitsMSE(), "late": LogitsKL(schedule=late)})
    figures, _, _ = watched(tmp_path, 2, loss)
    assert list(figures["grad_ce"]) == list(figures["share_kd"]) == [0, 2, 4, 6, 8, 10]
    assert list(figures["grad_late"]) == list(figures["share_late"]) == [6, 8, 10]
    for step in figures["share_ce"]:
        shares = [figures[f"share_{name}"].get(step, 0.0) for name in ("ce", "kd", "late")]
        assert sum(shares) == pytest.approx(1)


class Rising(LossTerm):
    """Rewards large logits, so it is negative."""

    needs_teacher = False

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        return -student.logits.square().mean()


def test_the_share_of_a_negative_term_is_that_of_its_size(tmp_path: Path) -> None:
    figures, _, _ = watched(tmp_path, 1, LossSum({"ce": CrossEntropy(0.5), "mine": Rising(2.0)}))
    for step, share in figures["share_mine"].items():
        ce, mine = 0.5 * figures["train_ce"][step], 2 * figures["train_mine"][step]
        assert mine < 0
        assert share == pytest.approx(-mine / (ce - mine), rel=1e-5)
        assert figures["share_ce"][step] == pytest.approx(1 - share)


@pytest.mark.parametrize("every", [-1, 1.5, 1.0, "5", None, True])
def test_every_is_a_whole_number(every: Any) -> None:
    with pytest.raises(
        UserError, match=rf"callbacks\.diagnostics\.every={every}: must be a whole number of steps >= 0"
    ):
        Diagnostics(every, Console(quiet=True))
