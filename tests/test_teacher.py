"""The teacher is the same after training as before, and in nothing that training leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Images, Linear, Text, bert, cnn, schedule, settings
from torch import Tensor, nn

from distill import fingerprint
from distill.features import Batch, Features, Tapped
from distill.fit import fit
from distill.losses import CrossEntropy, LogitsKL, LossSum
from distill.module import DistillModule
from distill.recall import Recall
from distill.teacher import FrozenTeacher


def both_terms() -> LossSum:
    return LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})


def in_training(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if child.training]


def test_neither_train_nor_a_parent_puts_it_in_train_mode() -> None:
    teacher = FrozenTeacher(cnn().train())
    assert not in_training(teacher)
    assert teacher.train() is teacher
    assert not in_training(teacher)
    parent = nn.ModuleList([teacher]).train()
    assert in_training(parent) == [""]


def test_nobody_gives_it_gradients() -> None:
    teacher = FrozenTeacher(Linear())
    teacher.requires_grad_()
    nn.ModuleList([teacher]).requires_grad_()
    features = teacher({"pixels": torch.rand(2, 3, 2, 2, requires_grad=True)})
    assert not features.logits.requires_grad
    assert features.logits.grad_fn is None


def test_trained_parameters_do_not_need_gradients_any_more() -> None:
    assert not any(parameter.requires_grad for parameter in FrozenTeacher(Linear()).parameters())


@dataclass
class Fitted:
    teacher: FrozenTeacher
    before: str
    student: Tapped
    module: DistillModule
    checkpoint: dict[str, Any]
    steps: int


FAMILIES: dict[str, tuple[Callable[[], Tapped], Callable[[], Tapped], Callable[[], Any]]] = {
    "bert": (lambda: bert(4, 24, seed=1), bert, lambda: Text(train=16)),
    "resnet": (lambda: cnn("resnet10t", seed=1), lambda: cnn("mobilenetv3_small_050"), Images),
    "mobilenet": (lambda: cnn("mobilenetv3_small_050", seed=1), lambda: cnn("mobilenetv3_small_050", seed=2), Images),
}


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    build_teacher, build_student, build_data = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    teacher, student = FrozenTeacher(build_teacher()), build_student()
    before = fingerprint.of_weights(teacher)
    options = settings(folder)
    options.provenance["teacher"] = fingerprint.of_weights(teacher.network)
    module = fit(
        student, both_terms(), build_data(), schedule(), options, stage="student", teacher=teacher, checkpoints=folder
    )
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    return Fitted(teacher, before, student, module, checkpoint, checkpoint["global_step"])


def test_training_changes_no_parameter_and_no_buffer_of_it(fitted: Fitted) -> None:
    assert fitted.steps == 2
    assert fingerprint.of_weights(fitted.teacher) == fitted.before


def test_the_fingerprint_would_notice_batch_normalisation(fitted: Fitted) -> None:
    for name, buffer in fitted.teacher.named_buffers():
        if name.endswith(("running_mean", "mean")):
            old = buffer.clone()
            buffer.add_(1e-3)
            assert fingerprint.of_weights(fitted.teacher) != fitted.before
            buffer.copy_(old)


def test_the_checkpoint_holds_the_student_and_nothing_of_the_teacher(fitted: Fitted) -> None:
    state, student = fitted.checkpoint["state_dict"], fitted.student.state_dict()
    assert state.keys() == {f"student.{name}" for name in student}
    assert sum(tensor.numel() for tensor in state.values()) == sum(tensor.numel() for tensor in student.values())
    moments = [t for s in fitted.checkpoint["optimizer_states"][0]["state"].values() for t in s.values()]
    trained = sum(p.numel() for p in fitted.student.parameters())
    assert sum(tensor.numel() for tensor in moments if tensor.ndim) == 2 * trained
    assert fitted.checkpoint.keys() & {"hyper_parameters", "teacher"} == set()


def test_the_checkpoint_says_what_it_was_made_of(fitted: Fitted) -> None:
    assert fitted.checkpoint["distill"] == {
        "config": {"seed": 0, "loss": {"ce": {"weight": 1.0}}},
        "teacher": fingerprint.of_weights(fitted.teacher.network),
    }


def test_the_optimiser_holds_the_student_only(fitted: Fitted) -> None:
    groups = fitted.module.trainer.optimizers[0].param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in fitted.student.parameters())


def unanswering(_: Batch) -> Features:
    raise AssertionError("the teacher was asked")


def test_labels_alone_never_ask_the_teacher(tmp_path: Path) -> None:
    loss = LossSum({"ce": CrossEntropy()})
    fit(
        Linear(),
        loss,
        Images(size=2),
        schedule(),
        settings(tmp_path),
        stage="s",
        teacher=unanswering,
        checkpoints=tmp_path,
    )


def test_logits_do_ask_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the teacher was asked"):
        fit(
            Linear(), both_terms(), Images(size=2), schedule(), settings(tmp_path),
            stage="s", teacher=unanswering, checkpoints=tmp_path,
        )  # fmt: skip


def test_a_term_without_its_teacher_is_a_bug() -> None:
    with pytest.raises(ValueError, match="need a teacher and none was given"):
        DistillModule(Linear(), both_terms(), num_labels=3)


def test_stored_logits_are_found_by_index() -> None:
    table: Tensor = torch.arange(12.0).view(4, 3)
    assert Recall(table)({"index": torch.tensor([2, 0])}).logits.tolist() == [[6, 7, 8], [0, 1, 2]]
