"""The losses against values worked out by hand and against plain float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.functional import cross_entropy, logits_kl


def softmax(row: list[float], temperature: float) -> list[float]:
    shifted = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(shifted) for value in shifted]


def kl_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for mine, other in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softmax(other, temperature), softmax(mine, temperature), strict=True)
        total += sum(p * math.log(p / q) for p, q in pairs)
    return total / len(student) * temperature**2


def ce_by_hand(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        logs = [math.log(p) for p in softmax(row, 1.0)]
        total -= (1 - smoothing) * logs[label] + smoothing * sum(logs) / len(logs)
    return total / len(logits)


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, 5, (7,), generator=draw)


def test_cross_entropy_of_a_sure_and_of_an_undecided_network() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_known_distributions() -> None:
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert logits_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert logits_kl(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kl_equals_a_plain_loop(temperature: float, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = drawn
    expected = kl_by_hand(student, teacher, temperature)
    assert logits_kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_a_plain_loop(smoothing: float, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, labels = drawn
    assert cross_entropy(logits, labels, smoothing).item() == pytest.approx(
        ce_by_hand(logits, labels, smoothing), rel=1e-6
    )


def test_kl_does_not_shrink_with_copies_of_the_batch_nor_with_unused_classes(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    student, teacher, _ = drawn
    once = logits_kl(student, teacher, 2.0).item()
    assert logits_kl(student.repeat(3, 1), teacher.repeat(3, 1), 2.0).item() == pytest.approx(once)
    unused = torch.full((7, 20), -1e4, dtype=torch.float64)
    wide = logits_kl(torch.cat([student, unused], 1), torch.cat([teacher, unused], 1), 2.0)
    assert wide.item() == pytest.approx(once)


def test_kl_is_zero_only_where_the_distributions_agree(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = drawn
    assert logits_kl(teacher + 5.0, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-12)
    assert logits_kl(student, teacher, 3.0).item() > 0.01


def test_gradient_tends_to_that_of_half_the_squared_difference_at_high_temperature(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Hinton et al. (2015), equation 4: for zero-mean logits the gradient tends to (student − teacher) / C."""
    student, teacher = (x - x.mean(1, keepdim=True) for x in drawn[:2])
    student.requires_grad_()
    logits_kl(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / (5 * 7), rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_finite_differences(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = drawn
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: logits_kl(x, teacher, 3.0), (student,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, 0.1), (student,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_half_precision_is_computed_in_fp32_and_stays_finite(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1.0]], dtype=dtype)
    loss = logits_kl(student, teacher, temperature) + cross_entropy(student, torch.tensor([1, 0]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() > 1e4
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0.1


def test_float64_stays_float64(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = drawn
    assert logits_kl(student, teacher, 2.0).dtype == cross_entropy(student, labels).dtype == torch.float64


def test_equal_micro_batches_average_to_the_batch(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = (torch.cat([x, x[:1].flip(-1)]) for x in drawn)
    whole = torch.stack([logits_kl(student, teacher, 4.0), cross_entropy(student, labels)])
    parts = [
        torch.stack(
            [
                logits_kl(student[i : i + 2], teacher[i : i + 2], 4.0),
                cross_entropy(student[i : i + 2], labels[i : i + 2]),
            ]
        )
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)
