"""Training: schedule, groups, accumulation, reproducibility, and stored logits instead of the teacher."""

from __future__ import annotations

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

from distill import fingerprint
from distill.cache import CachedTeacher, ask
from distill.errors import UserError
from distill.fit import Schedule, fit
from distill.losses import CrossEntropy, LogitsKL, LossSum
from distill.module import DistillModule, parameter_groups, warmup_cosine
from distill.teacher import FrozenTeacher, Teacher


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
    decayed, rest = parameter_groups(module, 0.3)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3), (2, 4)]
    assert [tuple(p.shape) for p in rest["params"]] == [(4,), (4,), (4,), (2,)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)


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
    teacher = CachedTeacher(torch.randn(24, 3, generator=torch.Generator().manual_seed(3)))
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
    stored_losses, stored_weights = course(tmp_path / "stored", CachedTeacher(table))
    assert len(losses) == 12
    assert stored_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(stored_weights, weights, rtol=1e-4, atol=1e-5)

    table[[3, 17]] = table[[17, 3]]
    swapped_losses, swapped_weights = course(tmp_path / "swapped", CachedTeacher(table))
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
        ask(FrozenTeacher(network), Images(size=2), torch.device("cpu"), Console(quiet=True)).logits


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
