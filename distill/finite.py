"""Stop a training whose loss is not finite, without a step that waits for a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import UserError


@dataclass(frozen=True)
class Step:
    """The loss of one step.

    Attributes:
        place: which step it was, for people.
        weights: name -> weight of each term.
        figures: [1 + terms] the total and the unweighted values, on the CPU.
        copied: when they are there; None where they are.
    """

    place: str
    weights: Mapping[str, float]
    figures: Tensor
    copied: torch.cuda.Event | None


class FiniteLoss:
    """Looks at the loss of each step: on a CPU at once, on a GPU a step later, when its copy has arrived.

    The step after one whose loss is not finite may have begun by then; `settle` before anything is kept.
    """

    def __init__(self) -> None:
        self._last: Step | None = None

    def follow(self, total: Tensor, values: Mapping[str, Tensor], weights: Mapping[str, float], place: str) -> None:
        """Take a step's loss in, and look at that of the step before, or on a CPU at this one.

        Args:
            total: scalar.
            values: name -> unweighted value, a scalar, of each term that is on.
            weights: name -> weight of these terms.
            place: which step it is, for people.

        Raises:
            UserError: a loss is not finite; names the terms.
        """
        self.settle()
        figures, copied = torch.stack([total.detach(), *(value.detach() for value in values.values())]), None
        if figures.is_cuda:
            host = torch.empty_like(figures, device="cpu", pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._last = Step(place, {name: weights[name] for name in values}, figures.cpu(), copied)
        if copied is None:
            self.settle()

    def settle(self) -> None:
        """Look at the last step, if that has not been done. Raises as `follow` does."""
        step, self._last = self._last, None
        if step is None:
            return
        if step.copied is not None:
            step.copied.synchronize()
        if not step.figures[0].isfinite():
            raise UserError(
                f"the loss is not finite at {step.place}: {told(step.figures[1:], step.weights)}; lower optim.lr, the "
                "weight of that term, or use trainer.precision=32-true; checkpoints/ has the last good epoch"
            )


def told(values: Tensor, weights: Mapping[str, float]) -> str:
    """The terms, their values [terms] and weights, for a message; those whose weighted value is not finite come
    first."""
    rows = list(zip(weights, values, strict=True))
    rows.sort(key=lambda row: math.isfinite((weights[row[0]] * row[1]).item()))
    return ", ".join(f"{name} is {value.item():.4g} (weight {weights[name]:g})" for name, value in rows)
