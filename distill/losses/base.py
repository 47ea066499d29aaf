"""What a loss term is, and the weighted sum of terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distill.errors import UserError, one_line
from distill.features import Batch, Features, Tapped
from distill.layers import Link
from distill.ramp import Ramp, is_number, ramp

TASKS = ("multiclass", "multilabel", "regression")
"""What logits [B, C] mean: one of C classes (softmax), C yes-or-no labels (sigmoid), or C numbers (as they are)."""


class LossTerm(nn.Module):
    """One named part of the loss.

    Args:
        weight: factor of this term in the sum, >= 0; 0 switches it off. Weights are independent: none is `1 -` another.
        schedule: how the weight changes in the course of the training, as the fields of `distill.ramp.Ramp`, whose
            factor it is multiplied with; None leaves it as it is.

    Attributes:
        needs_teacher: whether the term reads the teacher. Where no term does, the teacher is never run in training.
        tasks: those of `TASKS` that the term is for.
        alternatives: what to take instead, for the message where the term does not fit.
        links: taps that it reads beyond the logits; empty until `connect`.
        own: modules of the term itself, such as projectors, by `Link.key`: trained, clipped and checkpointed with
            the student, never exported; empty until `prepare`.
        lr_multiplier: of the learning rate of the term's own parameters.
    """

    needs_teacher: bool = True
    tasks: tuple[str, ...] = TASKS
    alternatives: str = "logits, mse"
    lr_multiplier: float = 1.0

    def __init__(self, weight: float, schedule: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not (is_number(weight) and weight >= 0):
            raise UserError(f"weight={weight} of {type(self).__name__}: a loss weight is a finite number >= 0")
        self.weight = float(weight)
        self.schedule: Ramp = ramp(schedule)
        self.task = TASKS[0]
        self.done = 0.0
        self.links: list[Link] = []
        self.own = nn.ModuleDict()

    @property
    def weight_now(self) -> float:
        """The weight where a share `done` of the training is done."""
        return self.weight * self.schedule.at(self.done)

    @property
    def used(self) -> bool:
        """Whether the weight is ever above 0."""
        return self.weight * self.schedule.largest > 0

    def connect(self, student: Tapped, teacher: Tapped) -> None:
        """Decide which taps to read (`links`); nothing by default, for a term on logits.

        Raises:
            ValueError: a network has no such tap.
        """

    def taps(self, link: Link) -> tuple[list[str], list[str]]:
        """The student's and the teacher's taps that a link reads."""
        return [link.student], [link.teacher]

    def describe(self, link: Link) -> str:
        """What is done to make the two sides of a link comparable, in a few words."""
        return ""

    def prepare(self, student: Features, teacher: Features, examples: int) -> None:
        """Make the term's own parameters, given features of a first batch; nothing by default.

        Args:
            examples: size of the training split.

        Raises:
            ValueError: the shapes do not fit.
        """

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        """The unweighted value, a scalar."""
        raise NotImplementedError


class Row(NamedTuple):
    """One line of the table of what learns from what; shapes are those of a batch of two."""

    term: str
    teacher: str
    student: str
    teacher_shape: list[int]
    student_shape: list[int]
    how: str
    parameters: int


class LossSum(nn.Module):
    """Weighted sum of named terms.

    Args:
        terms: name -> term, at least one.
        task: one of `TASKS`.

    Raises:
        UserError: no term at all, all weights are zero (be it at some time of the training), or a term is not for the
            task.
    """

    def __init__(self, terms: Mapping[str, LossTerm], task: str = TASKS[0]) -> None:
        super().__init__()
        self.task = task
        for name, term in terms.items():
            if task not in term.tasks:
                raise UserError(
                    f"loss term {name!r} is for {' and '.join(term.tasks)} and the task is {task}: "
                    f"take one of {term.alternatives}"
                )
            term.task = task
        if not any(term.used for term in terms.values()):
            raise UserError(f"loss={sorted(terms)}: no term has a weight above 0, so there is nothing to learn from")
        # A weight falls to 0 at its `end` or is 0 from the start, so a time without any weight begins at one of these.
        for done in sorted({0.0, *(term.schedule.end for term in terms.values())} - {1.0}):
            if not any(term.weight * term.schedule.at(done) > 0 for term in terms.values()):
                raise UserError(
                    f"loss={sorted(terms)}: all weights are 0 when {100 * done:.4g} % of the steps are done, so there "
                    "is nothing to learn from; change a schedule"
                )
        self.terms = nn.ModuleDict({name: term for name, term in terms.items() if term.used})

    def items(self) -> Iterable[tuple[str, LossTerm]]:
        """The terms whose weight is ever above 0, by name."""
        return cast(Iterable[tuple[str, LossTerm]], self.terms.items())

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for _, term in self.items())

    def taps(self) -> tuple[list[str], list[str]]:
        """All taps of the student, and of the teacher, that the terms read, each once."""
        sides = [term.taps(link) for _, term in self.items() for link in term.links]
        student, teacher = (dict.fromkeys(name for side in sides for name in side[i]) for i in (0, 1))
        return list(student), list(teacher)

    def at(self, done: float) -> None:
        """Tell every term that a share `done` of the training is done."""
        for _, term in self.items():
            term.done = done

    @property
    def weights(self) -> dict[str, float]:
        """The weights as they are now, of the terms that are on now."""
        return {name: term.weight_now for name, term in self.items() if term.weight_now > 0}

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted total, a scalar, and the unweighted value of each term that is on, by name."""
        weights = self.weights
        values = {name: self.terms[name](student, teacher, batch) for name in weights}
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, values

    def attach(self, student: Tapped, teacher: Tapped | None, batch: Batch, examples: int) -> list[Row]:
        """Connect the terms to a pair: choose taps, make projectors, and evaluate every term once.

        The networks are left as they were; `watch` switches their taps on.

        Args:
            teacher: needed where a term reads one.
            batch: real examples, at least two.
            examples: size of the training split.

        Returns:
            What learns from what, for people to read.

        Raises:
            UserError: a term does not fit this pair; names the term and says why.
        """
        for name, term in self.items():
            if teacher is not None:
                _explained(name, lambda term=term: term.connect(student, teacher))  # type: ignore[misc]
        before = [(network, network.training, network.watched) for network in (student, teacher) if network is not None]
        self.watch(student, teacher)
        try:
            for network, *_ in before:
                network.eval()
            with torch.no_grad():
                mine, theirs = student(batch), teacher(batch) if teacher is not None else None
                for name, term in self.items():
                    if theirs is not None:
                        _explained(name, lambda term=term: term.prepare(mine, theirs, examples))  # type: ignore[misc]
                    term.eval()
                    _explained(name, lambda term=term: term(mine, theirs, batch))  # type: ignore[misc]
                    term.train()
        finally:
            for network, mode, watched in before:
                network.train(mode)
                network.watch(watched)
        return [row for name, term in self.items() for row in _rows(name, term, mine, theirs)]

    def watch(self, student: Tapped, teacher: Tapped | None) -> None:
        """Let both networks capture what the terms read."""
        mine, theirs = self.taps()
        student.watch(mine)
        if teacher is not None:
            teacher.watch(theirs)


def _explained(name: str, call: Any) -> None:
    """Call, and turn what a term raises where it does not fit into a UserError that names it."""
    try:
        call()
    except (ValueError, LookupError, RuntimeError) as error:
        raise UserError(f"loss term {name!r} does not fit this pair: {one_line(error)}") from error


def _rows(name: str, term: LossTerm, student: Features, teacher: Features | None) -> Iterable[Row]:
    for link in term.links:
        assert teacher is not None
        mine, theirs = (taps[0] for taps in term.taps(link))
        count = sum(p.numel() for p in term.own[link.key].parameters()) if link.key in term.own else 0
        shapes = list(teacher.hidden[theirs].shape), list(student.hidden[mine].shape)
        yield Row(name, link.teacher, link.student, shapes[0], shapes[1], term.describe(link), count)
