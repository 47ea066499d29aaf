"""Terms and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.errors import UserError
from distill.features import Batch, Features
from distill.losses import CrossEntropy, LogitsKL, LossSum, LossTerm


class Constant(LossTerm):
    needs_teacher = False

    def __init__(self, weight: float, value: float, needs: tuple[str, ...] = ()) -> None:
        super().__init__(weight)
        self.value, self.needs = value, needs

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        return self.value * student.logits.sum()


ONE = Features(torch.ones(1, 1, requires_grad=True))


def test_total_is_the_weighted_sum_and_parts_are_unweighted() -> None:
    total, parts = LossSum({"a": Constant(0.5, 3.0), "b": Constant(2.0, 7.0)})(ONE, None, {})
    assert total.item() == 0.5 * 3 + 2 * 7
    assert {name: value.item() for name, value in parts.items()} == {"a": 3.0, "b": 7.0}
    assert total.requires_grad
    assert not any(value.requires_grad for value in parts.values())


def test_real_terms_are_summed_with_their_weights() -> None:
    student, teacher = Features(torch.randn(4, 3)), Features(torch.randn(4, 3))
    batch = {"labels": torch.tensor([0, 1, 2, 0])}
    terms = {"ce": CrossEntropy(0.3, label_smoothing=0.1), "logits": LogitsKL(1.7, temperature=2.0)}
    total, parts = LossSum(terms)(student, teacher, batch)
    torch.testing.assert_close(total, 0.3 * parts["ce"] + 1.7 * parts["logits"])
    expected = torch.nn.functional.cross_entropy(student.logits, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(parts["ce"], expected)


@pytest.mark.parametrize("terms", [{}, {"a": Constant(0.0, 1.0), "b": Constant(0, 1.0)}])
def test_nothing_to_learn_from_is_refused(terms: dict[str, LossTerm]) -> None:
    with pytest.raises(UserError, match="no term has a weight above 0"):
        LossSum(terms)


def test_one_weight_above_zero_is_enough() -> None:
    LossSum({"a": Constant(0.0, 1.0), "b": Constant(0.1, 1.0)})


NOT_NUMBERS = [float("nan"), float("inf"), "much", None, True]


@pytest.mark.parametrize("weight", [-0.1, *NOT_NUMBERS])
@pytest.mark.parametrize("term", [CrossEntropy, LogitsKL])
def test_weight_is_a_finite_number_of_at_least_zero(term: Callable[..., LossTerm], weight: object) -> None:
    with pytest.raises(UserError, match=f"weight={weight} of "):
        term(weight=weight)


@pytest.mark.parametrize("temperature", [0, -1.0, *NOT_NUMBERS])
def test_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(UserError, match=f"temperature={temperature}"):
        LogitsKL(temperature=temperature)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, *NOT_NUMBERS])
def test_label_smoothing_is_below_one(smoothing: float) -> None:
    with pytest.raises(UserError, match=f"label_smoothing={smoothing}"):
        CrossEntropy(label_smoothing=smoothing)


def test_needs_the_teacher_only_where_a_term_does() -> None:
    assert not LossSum({"ce": CrossEntropy()}).needs_teacher
    assert LossSum({"ce": CrossEntropy(), "logits": LogitsKL()}).needs_teacher


def test_needed_taps_are_listed_once() -> None:
    loss = LossSum({"a": Constant(1.0, 1.0, ("layer2", "layer1")), "b": Constant(1.0, 1.0, ("layer1",))})
    assert loss.needs == ["layer2", "layer1"]


class Failing(Constant):
    def __init__(self, error: Exception) -> None:
        super().__init__(1.0, 1.0)
        self.error = error

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        raise self.error


def test_check_names_the_term_whose_shapes_differ() -> None:
    student, teacher = Features(torch.zeros(2, 3)), Features(torch.zeros(2, 4))
    loss = LossSum({"ce": CrossEntropy(), "kd": LogitsKL()})
    with pytest.raises(UserError, match=r"loss term 'kd' does not fit this pair: .*\[2, 3\].*\[2, 4\]"):
        loss.check(student, teacher, {"labels": torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize(
    "error", [ValueError("so\nwide"), KeyError("so wide"), IndexError("so wide"), RuntimeError("so wide")]
)
def test_check_explains_in_one_line_whatever_a_term_raises(error: Exception) -> None:
    with pytest.raises(UserError, match=r"loss term 'mine' .*so wide") as caught:
        LossSum({"mine": Failing(error)}).check(ONE, None, {})
    assert "\n" not in str(caught.value)


def test_check_leaves_a_bug_alone() -> None:
    with pytest.raises(AttributeError):
        LossSum({"mine": Failing(AttributeError("a bug"))}).check(ONE, None, {})
