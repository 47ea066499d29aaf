"""Training: schedule, groups, accumulation, reproducibility, and stored logits instead of the teacher."""

from __future__ import annotations

import csv
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from tiny import Images, Linear, Text, bert, cnn, schedule, settings, train
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill import fingerprint
from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.fit import Schedule, fit
from distill.losses import CrossEntropy, Hidden, LogitsKL, LogitsMSE, LossSum
from distill.module import DistillModule, parameter_groups, warmup_cosine
from distill.recall import Recall, ask
from distill.teacher import FrozenTeacher, Teacher
from distill.tracking import RecordLogger


def loss() -> LossSum:
    return LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})


def test_schedule_at_known_steps() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[4] == pytest.approx(5 / 11)
    assert factors[10] == 1.0
    assert factors[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert max(factors) == 1.0


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (7, 0.33), (50, 0.0), (3, 0.9), (1, 0.1), (1, 0.0)])
def test_schedule_rises_then_falls_and_no_step_is_wasted(total: int, warmup: float) -> None:
    factors = [warmup_cosine(step, total, warmup) for step in range(total)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    assert warmup_cosine(total + 5, total, warmup) == pytest.approx(0, abs=1e-12)


def test_weight_decay_is_for_matrices_and_kernels() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False)
    )
    decayed, rest = parameter_groups(module, 0.3, 0.02)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3), (2, 4)]
    assert [tuple(p.shape) for p in rest["params"]] == [(4,), (4,), (4,), (2,)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert (decayed["lr"], rest["lr"]) == (0.02, 0.02)
    assert parameter_groups(nn.LayerNorm(4), 0.3, 0.02)[0]["weight_decay"] == 0.0
    assert parameter_groups(nn.Flatten(), 0.3, 0.02) == []


def test_the_learning_rate_follows_the_schedule_step_by_step(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = DistillModule(Linear(), LossSum({"ce": CrossEntropy()}), num_labels=3, lr=0.2, warmup=0.3)
    loader = Images(train=20, size=2).loader("train", batch_size=4)
    train(module, loader, tmp_path, epochs=2, callbacks=[Rates()])
    assert rates == pytest.approx([0.2 * warmup_cosine(step, 10, 0.3) for step in range(10)])


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path, clip: float | None) -> None:
    weights = []
    for batch_size, accumulate in ((24, 1), (6, 4)):
        student, teacher = bert(dropout=0.0), FrozenTeacher(bert(3, seed=1))
        module = DistillModule(student, loss(), teacher=teacher, num_labels=3, lr=1e-3)
        loader = Text(train=48).loader("train", batch_size=batch_size)
        trainer = train(module, loader, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
        assert trainer.global_step == 2
        weights.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    start = nn.utils.parameters_to_vector(bert(dropout=0.0).parameters())
    assert (weights[0] - start).abs().max() > 1e-4
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=2e-6)


def digest(folder: Path, family: str, seed: int, drawn_before: int = 0) -> str:
    network, data = (bert(), Text()) if family == "bert" else (cnn("mobilenetv3_small_050"), Images())
    options = settings(folder)
    object.__setattr__(options, "seed", seed)
    torch.rand(drawn_before)
    teacher = Recall(torch.randn(24, 3, generator=torch.Generator().manual_seed(3)))
    fit(network, loss(), data, schedule(augment=True), options, stage="student", teacher=teacher, checkpoints=folder)
    return fingerprint.of_weights(network)


@pytest.mark.parametrize("family", ["bert", "mobilenet"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(family: str, tmp_path: Path) -> None:
    first = digest(tmp_path / "a", family, 0)
    assert digest(tmp_path / "b", family, 0, drawn_before=7) == first
    assert digest(tmp_path / "c", family, 1) != first


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def course(folder: Path, teacher: Teacher) -> tuple[list[float], Tensor]:
    """Losses step by step, and final weights, of two shuffled epochs."""
    student, losses = bert(), Losses()
    fit(
        student, loss(), Text(), schedule(epochs=2, batch_size=4), settings(folder),
        stage="student", teacher=teacher, callbacks=[losses], checkpoints=folder,
    )  # fmt: skip
    return losses.seen, nn.utils.parameters_to_vector(student.parameters()).detach()


def test_stored_logits_train_as_the_teacher_itself_and_swapped_rows_do_not(tmp_path: Path) -> None:
    teacher = FrozenTeacher(bert(3, seed=1))
    with torch.no_grad():
        teacher.network.backbone.classifier.weight.mul_(50)  # type: ignore
    table = ask(teacher, Text(), torch.device("cpu"), Console(quiet=True), batch_size=5).logits
    losses, weights = course(tmp_path / "online", teacher)
    stored_losses, stored_weights = course(tmp_path / "stored", Recall(table))
    assert len(losses) == 12
    assert stored_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(stored_weights, weights, rtol=1e-4, atol=1e-5)

    table[[3, 17]] = table[[17, 3]]
    swapped_losses, swapped_weights = course(tmp_path / "swapped", Recall(table))
    assert swapped_losses != pytest.approx(losses, rel=1e-5)
    assert not torch.allclose(swapped_weights, weights, rtol=1e-4, atol=1e-5)


def test_the_table_has_a_row_for_every_example() -> None:
    teacher, data = FrozenTeacher(Linear()), Images(size=2)
    table = ask(teacher, data, torch.device("cpu"), Console(quiet=True), batch_size=5).logits
    pixels = (data.splits["train"][0] / 255).expand(-1, 3, -1, -1)
    torch.testing.assert_close(table, teacher({"pixels": pixels}).logits)


def test_an_answer_that_is_not_finite_is_not_stored() -> None:
    network = Linear()
    nn.init.constant_(network.backbone[1].bias, torch.nan)  # type: ignore
    with pytest.raises(FloatingPointError):
        ask(FrozenTeacher(network), Images(size=2), torch.device("cpu"), Console(quiet=True))


def test_mixed_precision_trains_with_clipping(tmp_path: Path) -> None:
    fit(
        Linear(), LossSum({"ce": CrossEntropy()}), Images(size=2), schedule(clip=1.0),
        settings(tmp_path, precision="bf16-mixed"), stage="student", checkpoints=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize(("keep", "second", "kept"), [("best", 1, 0), ("best", 0, 1), ("last", 1, 1)])
def test_the_latest_of_the_best_epochs_is_kept_unless_the_last_one_is_wanted(
    keep: str, second: int, kept: int, tmp_path: Path
) -> None:
    """Every validation label is 0. The first epoch always says 0, the second one too, or always 1."""

    class Say(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            with torch.no_grad():
                layer.weight.zero_()
                layer.bias.copy_(torch.eye(3)[second] * 20 if trainer.current_epoch else torch.eye(3)[0] * 10)

    network, data = Linear(), Images(size=2)
    layer: Any = network.backbone.get_submodule("1")
    data.splits["val"] = (data.splits["val"][0], torch.zeros(6, dtype=torch.long))
    module = fit(
        network, LossSum({"ce": CrossEntropy()}), data, schedule(epochs=2, lr=1e-5), settings(tmp_path),
        stage="student", callbacks=[Say()], checkpoints=tmp_path, keep=keep,
    )  # fmt: skip
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert module.student is network
    assert (best["epoch"], last["epoch"]) == (kept, 1)
    assert layer.bias.max().item() == pytest.approx([10, 20][kept], abs=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_weights_only_leaves_no_optimiser_and_no_last(tmp_path: Path) -> None:
    fit(
        Linear(), LossSum({"ce": CrossEntropy()}), Images(size=2), schedule(), settings(tmp_path),
        stage="teacher", checkpoints=tmp_path, weights_only=True,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert "optimizer_states" not in torch.load(tmp_path / "best.ckpt", weights_only=True)


def test_ctrl_c_stays_ctrl_c(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(
                Linear(), LossSum({"ce": CrossEntropy()}), Images(size=2), schedule(), settings(tmp_path),
                stage="student", callbacks=[Stop()], checkpoints=tmp_path,
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"epochs": 1.5}, {"batch_size": True}, {"lr": 0}, {"lr": "fast"}, {"warmup": 1}, {"clip": -1},
     {"weight_decay": None}, {"augment": "yes"}],
)  # fmt: skip
def test_a_schedule_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name}={value}: must be"):
        schedule(**wrong)
    assert isinstance(schedule(), Schedule)


# Parameters of the terms


def attached(student: Tapped, teacher: Tapped, terms: LossSum, data: Any) -> LossSum:
    """The terms, connected to the pair, which is watched."""
    terms.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), data.sizes["train"])
    terms.watch(student, teacher)
    return terms


def flat(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@pytest.mark.parametrize("multiplier", [1, 10, 0])
def test_projectors_are_trained_with_their_own_learning_rate(multiplier: float, tmp_path: Path) -> None:
    data, student, teacher = Text(), bert(dropout=0.0), bert(4, 24, seed=1)
    terms = attached(student, teacher, LossSum({"hidden": Hidden(lr_multiplier=multiplier)}), data)
    before, projected = flat(student), flat(terms)
    module = DistillModule(
        student, terms, teacher=FrozenTeacher(teacher), num_labels=3, lr=0.002, weight_decay=0.0, warmup=0.0
    )
    trainer = train(module, data.loader("train", batch_size=24), tmp_path)
    groups = trainer.optimizers[0].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    assert rates == {
        **{id(p): 0.002 for p in student.parameters()},
        **{id(p): pytest.approx(0.002 * multiplier) for p in terms.parameters()},
    }
    # The first step of Adam has the size of the learning rate, wherever there is a gradient.
    assert (flat(student) - before).abs().max().item() == pytest.approx(0.002, rel=1e-3)
    assert (flat(terms) - projected).abs().max().item() == pytest.approx(0.002 * multiplier, rel=1e-3)


def test_projectors_are_clipped_with_the_student(tmp_path: Path) -> None:
    data, norms = Text(), []
    for clip in (None, 0.01):
        student, teacher = bert(dropout=0.0), bert(4, 24, seed=1)
        torch.manual_seed(0)
        terms = attached(student, teacher, LossSum({"hidden": Hidden(10.0)}), data)
        module = DistillModule(student, terms, teacher=FrozenTeacher(teacher), num_labels=3)
        train(module, data.loader("train", batch_size=24), tmp_path, gradient_clip_val=clip)
        gradients = [[p.grad for p in part.parameters() if p.grad is not None] for part in (student, terms)]
        norms.append([nn.utils.get_total_norm(part).item() for part in gradients])
    free, clipped = norms
    assert math.hypot(*clipped) == pytest.approx(0.01, rel=1e-3)
    assert clipped == pytest.approx([norm * 0.01 / math.hypot(*free) for norm in free], rel=1e-3)
    assert free[1] > 0.01


def test_the_checkpoint_holds_projectors_beside_the_student(tmp_path: Path) -> None:
    data, student, teacher = Text(), bert(), bert(4, 24, seed=1)
    terms = attached(student, teacher, LossSum({"ce": CrossEntropy(), "hidden": Hidden()}), data)
    module = fit(
        student, terms, data, schedule(), settings(tmp_path), stage="student", teacher=FrozenTeacher(teacher),
        checkpoints=tmp_path,
    )  # fmt: skip
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    mine = {name for name in state if not name.startswith("student.")}
    assert mine == {f"loss.terms.hidden.own.layer{n}_from_layer{2 * n}.{p}" for n in (1, 2) for p in ("weight", "bias")}
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


# Losses that are not finite


class Overflowing:
    """Answers like a teacher until a step, and with infinite logits from there on."""

    def __init__(self, good_steps: int) -> None:
        self.left = good_steps

    def __call__(self, batch: Batch) -> Features:
        self.left -= 1
        logits = torch.eye(3)[batch["labels"]]
        return Features(logits if self.left >= 0 else torch.full_like(logits, torch.inf))


class Weights(pl.Callback):
    """The student's weights at the beginning of each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(module, DistillModule)
        self.seen.append(flat(module.student))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_good_epochs(tmp_path: Path) -> None:
    network, weights = Linear(), Weights()
    terms = LossSum({"ce": CrossEntropy(), "kd": LogitsMSE(1.0)})
    with pytest.raises(UserError) as caught:
        fit(
            network, terms, Images(size=2), schedule(epochs=4, batch_size=4), settings(tmp_path), stage="student",
            teacher=Overflowing(6), callbacks=[weights], checkpoints=tmp_path,
        )  # fmt: skip
    message = str(caught.value)
    assert message.startswith("the loss is not finite at step 6 of stage student: kd is inf (weight 1), ce is ")
    assert "optim.lr" in message
    assert "\n" not in message
    assert len(weights.seen) == 7
    assert torch.equal(flat(network), weights.seen[6])
    assert not torch.equal(weights.seen[6], weights.seen[5])
    for name in ("best", "last"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        kept = nn.utils.parameters_to_vector(checkpoint["state_dict"].values())
        assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 4)
        assert torch.equal(kept, weights.seen[4])


def test_a_weight_that_overflows_is_not_finite_either(tmp_path: Path) -> None:
    terms = LossSum({"ce": CrossEntropy(), "kd": LogitsMSE(1e38)})
    table = torch.full((16, 3), 1e3)
    with pytest.raises(UserError, match=r"not finite at step 0 of stage student: kd is .* \(weight 1e\+38\), ce is "):
        fit(
            Linear(), terms, Images(size=2), schedule(), settings(tmp_path), stage="student",
            teacher=Recall(table), checkpoints=tmp_path,
        )  # fmt: skip


# What is logged


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """Figure -> step -> value, from metrics.csv; each is logged once a step."""
    figures: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell and name != "epoch":
                    assert step not in figures.setdefault(name, {}), f"{name} twice at step {step}"
                    figures[name][step] = float(cell)
    return figures


LATE = {"before": 0, "after": 1, "start": 0.5, "end": 0.5}
EARLY = {"before": 1, "after": 0, "start": 0.5, "end": 0.5}


def two_stages(folder: Path, epochs: int, **trainer: Any) -> dict[str, dict[int, float]]:
    """Hidden states first, then labels and logits; 6 steps an epoch."""
    data, student, teacher = Text(), bert(dropout=0.0), bert(4, 24, seed=1)
    terms = {
        "hidden": Hidden(2.0, schedule=EARLY),
        "ce": CrossEntropy(3.0, schedule=LATE),
        "kd": LogitsKL(schedule=LATE),
    }
    record = RecordLogger(folder)
    fit(
        student, attached(student, teacher, LossSum(terms), data), data, schedule(epochs=epochs, batch_size=4),
        settings(folder, [record], **trainer), stage="student", teacher=FrozenTeacher(teacher), checkpoints=folder,
    )  # fmt: skip
    record.save()
    return logged(folder)


@pytest.mark.parametrize("epochs", [1, 3])
def test_two_stages_log_each_term_only_while_it_is_on(epochs: int, tmp_path: Path) -> None:
    figures = two_stages(tmp_path, epochs)
    half, total = 3 * epochs, 6 * epochs
    assert list(figures["student/train_hidden"]) == list(range(half))
    assert list(figures["student/train_ce"]) == list(figures["student/train_kd"]) == list(range(half, total))
    expected = {step: 2 * value for step, value in figures["student/train_hidden"].items()}
    expected |= {
        step: 3 * value + figures["student/train_kd"][step] for step, value in figures["student/train_ce"].items()
    }
    assert figures["student/train_loss"] == pytest.approx(expected, rel=1e-5)


def test_terms_are_logged_as_often_as_the_loss(tmp_path: Path) -> None:
    figures = two_stages(tmp_path / "seldom", 2, log_every_n_steps=4)
    assert list(figures["student/train_loss"]) == [3, 7, 11]
    assert list(figures["student/train_hidden"]) == [3]
    assert list(figures["student/train_ce"]) == [7, 11]
    figures = two_stages(tmp_path / "accumulated", 4, accumulate_grad_batches=3)
    assert list(figures["student/train_loss"]) == list(range(8))
    assert list(figures["student/train_hidden"]) == list(range(4))
    assert list(figures["student/train_ce"]) == list(range(4, 8))


def test_one_term_is_logged_as_the_loss_alone(tmp_path: Path) -> None:
    record = RecordLogger(tmp_path)
    fit(
        Linear(), LossSum({"ce": CrossEntropy(), "off": LogitsKL(0.0)}), Images(size=2), schedule(),
        settings(tmp_path, [record]), stage="teacher", checkpoints=tmp_path,
    )  # fmt: skip
    record.save()
    assert logged(tmp_path).keys() == {"teacher/train_loss", "teacher/val_accuracy"}


# Tasks


class Table:
    """Pixels, and labels [B, C] that are a linear function of them: numbers, or whether they are above 0."""

    name, label_names = "table", ["a", "b", "c"]

    def __init__(self, task: str, outputs: int = 3, held_out: int = 7) -> None:
        draw = torch.Generator().manual_seed(0)
        self.task, self.sizes = task, {"train": 32, "val": held_out}
        matrix = torch.randn(12, outputs, generator=draw)
        self.splits: dict[str, tuple[Tensor, Tensor]] = {}
        for split, size in self.sizes.items():
            pixels = torch.randn(size, 3, 2, 2, generator=draw)
            numbers = pixels.flatten(1) @ matrix
            self.splits[split] = pixels, (numbers > 0).float() if task == "multilabel" else numbers

    def loader(self, split: str, *, batch_size: int, **_: Any) -> DataLoader[dict[str, Tensor]]:
        pixels, labels = self.splits[split]
        rows: Any = [
            {"pixels": p, "labels": y, "index": torch.tensor(i)}
            for i, (p, y) in enumerate(zip(pixels, labels, strict=True))
        ]
        return DataLoader(rows, batch_size=batch_size)


class Spoil(pl.Callback):
    """Makes the last epoch a bad one."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 3:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.neg_()


def score(task: str, logits: Tensor, labels: Tensor) -> float:
    """Share of labels that are right, or the mean over outputs of 1 − the share of the variance that is left."""
    if task == "multilabel":
        return ((logits > 0) == labels.bool()).float().mean().item()
    left = (labels - logits).square().sum(0) / (labels - labels.mean(0)).square().sum(0)
    return (1 - left).mean().item()


@pytest.mark.parametrize(("task", "metric", "good"), [("multilabel", "accuracy", 0.9), ("regression", "r2", 0.8)])
def test_other_tasks_learn_and_keep_their_best_epoch(task: str, metric: str, good: float, tmp_path: Path) -> None:
    data, network, record = Table(task), Linear(), RecordLogger(tmp_path)
    teacher = Recall(data.splits["train"][1] * 4 - 2 if task == "multilabel" else data.splits["train"][1])
    distilled = LogitsKL(0.5, temperature=2.0) if task == "multilabel" else LogitsMSE(0.5)
    module = fit(
        network, LossSum({"ce": CrossEntropy(), "kd": distilled}, task), data,
        schedule(epochs=4, lr=0.1, batch_size=2, weight_decay=0.0), settings(tmp_path, [record]), stage="student",
        teacher=teacher, callbacks=[Spoil()], checkpoints=tmp_path,
    )  # fmt: skip
    record.save()
    scores = list(logged(tmp_path)[f"student/val_{metric}"].values())
    best = max(scores)
    assert len(scores) == 4
    assert best > good > scores[3]
    latest = max(epoch for epoch, value in enumerate(scores) if value == best)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == latest
    pixels, labels = data.splits["val"]
    assert score(task, module.student({"pixels": pixels}).logits.detach(), labels) == pytest.approx(best, abs=1e-5)


def validated(data: Table, network: Linear, batch_size: int, folder: Path) -> dict[str, float]:
    module = DistillModule(network, LossSum({"ce": CrossEntropy()}, data.task), stage="s", num_labels=3)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, **options)
    settings(folder)
    return trainer.validate(module, data.loader("val", batch_size=batch_size), verbose=False)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_validation_does_not_depend_on_the_batches(batch_size: int, tmp_path: Path) -> None:
    """Nor on the size of the logits: those within [0, 1] are no probabilities."""
    for task, metric in (("multilabel", "accuracy"), ("regression", "r2")):
        data, network = Table(task), Linear()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1e-3)
        pixels, labels = data.splits["val"]
        expected = score(task, network({"pixels": pixels}).logits.detach(), labels)
        assert validated(data, network, batch_size, tmp_path) == {f"s/val_{metric}": pytest.approx(expected, abs=1e-5)}


def test_one_number_may_be_labelled_without_a_dimension(tmp_path: Path) -> None:
    data, network = Table("regression", outputs=1), Linear(labels=1)
    expected = validated(data, network, 4, tmp_path)
    data.splits["val"] = data.splits["val"][0], data.splits["val"][1][:, 0]
    assert validated(data, network, 4, tmp_path) == expected
