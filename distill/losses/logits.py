"""Terms on labels and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from distill import functional
from distill.errors import UserError
from distill.features import Batch, Features
from distill.functional.logits import Divergence
from distill.losses.base import LossTerm
from distill.ramp import Ramp, is_number, ramp


def checked_temperature(value: float) -> float:
    """Raises UserError unless the value is a number > 0."""
    if not (is_number(value) and value > 0):
        raise UserError(f"temperature={value}: must be a number > 0; 1 changes nothing, 2 to 8 are usual")
    return float(value)


def checked_smoothing(value: float) -> float:
    """Raises UserError unless the value is a number in [0, 1)."""
    if not (is_number(value) and 0 <= value < 1):
        raise UserError(f"label_smoothing={value}: must be a number in [0, 1)")
    return float(value)


def checked_factor(name: str, value: float) -> float:
    """Raises UserError unless the value is a finite number >= 0."""
    if not (is_number(value) and value >= 0):
        raise UserError(f"{name}={value}: must be a finite number >= 0")
    return float(value)


class CrossEntropy(LossTerm):
    """The loss with the labels: cross entropy for classes (`distill.functional.cross_entropy`), for yes-or-no labels
    (`distill.functional.binary_cross_entropy`), or squared error for numbers (`distill.functional.squared_error`).

    A mean over examples.
    """

    needs_teacher = False

    def __init__(
        self, weight: float = 1.0, label_smoothing: float = 0.0, schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule)
        self.label_smoothing = checked_smoothing(label_smoothing)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        logits, labels = student.logits, batch["labels"]
        if self.task == "multiclass":
            return functional.cross_entropy(logits, labels, self.label_smoothing)
        if self.task == "multilabel":
            return functional.binary_cross_entropy(logits, labels, self.label_smoothing)
        return functional.squared_error(logits, labels)


class LogitsKL(LossTerm):
    """Hinton's loss on softened logits, T² included: `distill.functional.logits_kl` for classes,
    `distill.functional.binary_kl` for yes-or-no labels.

    A mean over examples.

    Args:
        temperature: T.
        temperature_schedule: how T changes in the course of the training: a factor, as `schedule` for the weight.
        divergence: forward, reverse or jensen_shannon.
    """

    tasks = ("multiclass", "multilabel")
    alternatives = "mse"

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        divergence: Divergence = "forward",
        schedule: Mapping[str, Any] | None = None,
        temperature_schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        if divergence not in get_args(Divergence):
            raise UserError(f"divergence={divergence}: there are {', '.join(get_args(Divergence))}")
        self.temperature, self.divergence = checked_temperature(temperature), divergence
        self.temperature_schedule: Ramp = ramp(temperature_schedule)
        if min(self.temperature_schedule.before, self.temperature_schedule.after) == 0:
            raise UserError("temperature_schedule has a factor of 0: a temperature is above 0")

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        loss = functional.logits_kl if self.task == "multiclass" else functional.binary_kl
        temperature = self.temperature * self.temperature_schedule.at(self.done)
        return loss(student.logits, teacher.logits, temperature, self.divergence)


class DecoupledKD(LossTerm):
    """Decoupled distillation: what the teacher says of the label, and of the other classes, with a factor each; see
    `distill.functional.dkd`.

    A mean over examples.
    """

    tasks = ("multiclass",)

    def __init__(
        self,
        weight: float = 0.06,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        self.temperature = checked_temperature(temperature)
        self.alpha, self.beta = checked_factor("alpha", alpha), checked_factor("beta", beta)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return functional.dkd(student.logits, teacher.logits, batch["labels"], self.temperature, self.alpha, self.beta)


class Dist(LossTerm):
    """DIST: correlations across classes and across the batch instead of equal values; see `distill.functional.dist`.

    The part across the batch (γ) is not a mean over examples: micro-batches do not add up to one batch.
    """

    tasks = ("multiclass",)

    def __init__(
        self,
        weight: float = 0.3,
        temperature: float = 4.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        self.temperature = checked_temperature(temperature)
        self.beta, self.gamma = checked_factor("beta", beta), checked_factor("gamma", gamma)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return functional.dist(student.logits, teacher.logits, self.temperature, self.beta, self.gamma)


class StandardizedKL(LossTerm):
    """Hinton's loss on standardised logits; see `distill.functional.logit_std`.

    A mean over examples.
    """

    tasks = ("multiclass",)

    def __init__(
        self, weight: float = 3.0, temperature: float = 2.0, schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule)
        self.temperature = checked_temperature(temperature)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return functional.logit_std(student.logits, teacher.logits, self.temperature)


class LogitsMSE(LossTerm):
    """Squared difference of the logits themselves; see `distill.functional.logits_mse`. For every task.

    A mean over examples.
    """

    def __init__(self, weight: float = 0.2, schedule: Mapping[str, Any] | None = None) -> None:
        super().__init__(weight, schedule)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return functional.logits_mse(student.logits, teacher.logits)


class HardLabel(LossTerm):
    """Cross entropy with the teacher's answer instead of the label; see `distill.functional.hard_label`.

    A mean over examples.
    """

    tasks = ("multiclass",)

    def __init__(
        self, weight: float = 1.0, label_smoothing: float = 0.0, schedule: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(weight, schedule)
        self.label_smoothing = checked_smoothing(label_smoothing)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        return functional.hard_label(student.logits, teacher.logits, self.label_smoothing)
