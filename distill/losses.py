"""Loss terms and their weighted sum.

A term is a thin class around a function of `distill.functional`. To add one: write the function, the class, and
`conf/loss/<name>.yaml` with its `_target_`, `weight` and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from distill import functional
from distill.errors import UserError, one_line
from distill.features import Batch, Features


def is_number(value: object) -> bool:
    """Whether a value from a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class LossTerm(nn.Module):
    """One named part of the loss.

    Args:
        weight: factor of this term in the sum, >= 0. Weights are independent: none is `1 -` another.

    Attributes:
        needs_teacher: whether the term reads the teacher. Where no term does, the teacher is never run in training.
        needs: names of the taps that the term reads on both sides.
    """

    needs_teacher: bool = True
    needs: tuple[str, ...] = ()

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not (is_number(weight) and weight >= 0):
            raise UserError(f"weight={weight} of {type(self).__name__}: a loss weight is a finite number >= 0")
        self.weight = float(weight)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        """The unweighted value, a scalar."""
        raise NotImplementedError


class CrossEntropy(LossTerm):
    """Cross entropy with the labels; see `distill.functional.cross_entropy`. Mean over the batch."""

    needs_teacher = False

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):
            raise UserError(f"label_smoothing={label_smoothing}: must be a number in [0, 1)")
        self.label_smoothing = float(label_smoothing)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        return functional.cross_entropy(student.logits, batch["labels"], self.label_smoothing)


class LogitsKL(LossTerm):
    """Hinton's loss on softened logits, T² included; see `distill.functional.logits_kl`. Mean over the batch."""

    def __init__(self, weight: float = 1.0, temperature: float = 4.0) -> None:
        super().__init__(weight)
        if not (is_number(temperature) and temperature > 0):
            raise UserError(f"temperature={temperature}: must be a number > 0; 1 changes nothing, 2 to 8 are usual")
        self.temperature = float(temperature)

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        assert teacher is not None
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                f"student logits {list(student.logits.shape)} and teacher logits {list(teacher.logits.shape)} differ"
            )
        return functional.logits_kl(student.logits, teacher.logits, self.temperature)


class LossSum(nn.Module):
    """Weighted sum of named terms.

    Args:
        terms: name -> term, at least one.

    Raises:
        UserError: no term at all, or all weights are zero.
    """

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        if not any(term.weight > 0 for term in terms.values()):
            raise UserError(f"loss={sorted(terms)}: no term has a weight above 0, so there is nothing to learn from")
        self.terms = nn.ModuleDict(dict(terms))

    def _all(self) -> Iterable[LossTerm]:
        return cast(Iterable[LossTerm], self.terms.values())

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self._all())

    @property
    def needs(self) -> list[str]:
        """All taps that the terms read, each once."""
        return list(dict.fromkeys(name for term in self._all() for name in term.needs))

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted total, a scalar, and the unweighted value of each term by name (detached)."""
        parts = {name: term(student, teacher, batch) for name, term in self.terms.items()}
        total = torch.stack([self.terms[name].weight * value for name, value in parts.items()]).sum()
        return total, {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def check(self, student: Features, teacher: Features | None, batch: Batch) -> None:
        """Evaluate every term once on real features, before training starts.

        Raises:
            UserError: a term does not fit this pair; names the term and says why.
        """
        for name, term in self.terms.items():
            try:
                term(student, teacher, batch)
            except (ValueError, LookupError, RuntimeError) as error:
                raise UserError(f"loss term {name!r} does not fit this pair: {one_line(error)}") from error
