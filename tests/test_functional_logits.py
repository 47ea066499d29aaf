"""The losses on logits against values worked out by hand, plain float64 loops and the papers' released code."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional import (
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    dist,
    dkd,
    hard_label,
    logit_std,
    logits_kl,
    logits_mse,
    squared_error,
    standardize,
)
from distill.functional.precision import full_precision

Row = list[float]
Drawn = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LN3 = math.log(3.0)  # the logits (ln 3, 0) are the probabilities (3/4, 1/4)


def softmax(row: Row, temperature: float = 1.0) -> Row:
    shifted = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(shifted) for value in shifted]


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def divergence_of(p: Row, q: Row, divergence: str) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    halves = (kl(p, middle) + kl(q, middle)) / 2
    return {"forward": kl(p, q), "reverse": kl(q, p), "jensen_shannon": halves}[divergence]


def ce_row(student: Row, teacher: Row, label: int, label_smoothing: float = 0.0) -> float:
    logs = [math.log(p) for p in softmax(student)]
    return -(1 - label_smoothing) * logs[label] - label_smoothing * mean(logs)


def hard_row(student: Row, teacher: Row, label: int, label_smoothing: float = 0.0) -> float:
    return ce_row(student, teacher, teacher.index(max(teacher)), label_smoothing)


def bce_row(student: Row, teacher: Row, label: int, label_smoothing: float = 0.0) -> float:
    targets = [(value > 0) * (1 - label_smoothing) + label_smoothing / 2 for value in teacher]
    yes = [1 / (1 + math.exp(-value)) for value in student]
    return mean(-y * math.log(p) - (1 - y) * math.log(1 - p) for y, p in zip(targets, yes, strict=True))


def mse_row(student: Row, teacher: Row, label: int) -> float:
    return mean((a - b) ** 2 for a, b in zip(student, teacher, strict=True))


def kl_row(student: Row, teacher: Row, label: int, temperature: float, divergence: str = "forward") -> float:
    return temperature**2 * divergence_of(softmax(teacher, temperature), softmax(student, temperature), divergence)


def binary_kl_row(student: Row, teacher: Row, label: int, temperature: float, divergence: str = "forward") -> float:
    pairs = zip(student, teacher, strict=True)
    return mean(kl_row([0.0, a], [0.0, b], label, temperature, divergence) for a, b in pairs)


def dkd_row(student: Row, teacher: Row, label: int, temperature: float, alpha: float, beta: float) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [[x / (1 - row[label]) for i, x in enumerate(row) if i != label] for row in (p, q)]
    return temperature**2 * (alpha * target + beta * kl(*others))


def std_row(student: Row, teacher: Row, label: int, temperature: float) -> float:
    student, teacher = ([(x - mean(row)) / (stdev(row) + 1e-7) for x in row] for row in (student, teacher))
    return kl_row(student, teacher, label, temperature)


def correlation(x: Row, y: Row) -> float:
    x, y = ([value - mean(row) for value in row] for row in (x, y))
    xy, xx, yy = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((x, y), (x, x), (y, y)))
    return xy / math.sqrt(xx * yy) if xx and yy else 0.0


def dist_by_hand(student: list[Row], teacher: list[Row], labels: Row, **options: float) -> float:
    rows = [[softmax(row, options["temperature"]) for row in rows] for rows in (student, teacher)]
    columns = [list(map(list, zip(*x, strict=True))) for x in rows]
    inter, intra = (1 - mean(map(correlation, *x)) for x in (rows, columns))
    return options["temperature"] ** 2 * (options["beta"] * inter + options["gamma"] * intra)


def mean_of(row_loss: Callable[..., float]) -> Callable[..., float]:
    def by_hand(student: list[Row], teacher: list[Row], labels: Row, **options: Any) -> float:
        return mean(partial(row_loss, **options)(*each) for each in zip(student, teacher, labels, strict=True))

    return by_hand


def without_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda student, teacher, labels, **options: loss(student, teacher, **options)


DIVERGENCES = ("forward", "reverse", "jensen_shannon")
SOFTENED = [{"temperature": t, "divergence": d} for t in (0.5, 1.0, 4.0, 20.0) for d in DIVERGENCES]
SMOOTHED = [{"label_smoothing": 0.0}, {"label_smoothing": 0.1}]
DECOUPLED = [{"temperature": t, "alpha": a, "beta": b} for t, a, b in ((1, 1, 8), (4, 1, 8), (2, 0.5, 0), (0.5, 0, 2))]
RELATIONS = [{"temperature": t, "beta": b, "gamma": c} for t, b, c in ((1, 1, 0), (1, 0, 1), (4, 1, 1), (0.5, 2, 0.5))]
# The loss as a function of student, teacher and labels; the same by hand; options to try.
TABLE: dict[str, tuple[Callable[..., Tensor], Callable[..., float], list[dict[str, Any]]]] = {
    "cross_entropy": (lambda s, t, y, **more: cross_entropy(s, y, **more), mean_of(ce_row), SMOOTHED),
    "binary_cross_entropy": (
        lambda s, t, y, **more: binary_cross_entropy(s, (t > 0).long(), **more),
        mean_of(bce_row),
        SMOOTHED,
    ),
    "squared_error": (without_labels(squared_error), mean_of(mse_row), [{}]),
    "hard_label": (without_labels(hard_label), mean_of(hard_row), SMOOTHED),
    "logits_mse": (without_labels(logits_mse), mean_of(mse_row), [{}]),
    "logits_kl": (without_labels(logits_kl), mean_of(kl_row), SOFTENED),
    "binary_kl": (without_labels(binary_kl), mean_of(binary_kl_row), SOFTENED),
    "logit_std": (without_labels(logit_std), mean_of(std_row), [{"temperature": t} for t in (0.5, 2.0, 20.0)]),
    "dkd": (dkd, mean_of(dkd_row), DECOUPLED),
    "dist": (without_labels(dist), dist_by_hand, RELATIONS),
}
CASES: dict[str, tuple[Loss, Callable[..., float]]] = {
    "-".join([name, *map(str, more.values())]): (partial(loss, **more), partial(by_hand, **more))
    for name, (loss, by_hand, options) in TABLE.items()
    for more in options
}
ONE_OF_EACH = [[case for case in CASES if case.split("-")[0] == name][-1] for name in TABLE]
ZERO_AT_BEST = [case for case in CASES if not case.startswith(("cross_entropy", "binary_cross_entropy", "hard_label"))]


@pytest.fixture
def drawn() -> Drawn:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, 5, (7,), generator=draw)


@pytest.mark.parametrize("batch", [7, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_loop(case: str, batch: int, drawn: Drawn) -> None:
    loss, by_hand = CASES[case]
    value = loss(*(x[:batch] for x in drawn))
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(by_hand(*(x[:batch].tolist() for x in drawn)), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_finite_differences(case: str, drawn: Drawn) -> None:
    student, teacher, labels = (x[:4] for x in drawn)
    assert torch.autograd.gradcheck(lambda x: CASES[case][0](x, teacher, labels), (student.requires_grad_(),))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_order_of_the_batch_does_not_matter(case: str, drawn: Drawn) -> None:
    loss, _ = CASES[case]
    torch.testing.assert_close(loss(*(x.flip(0) for x in drawn)), loss(*drawn))


@pytest.mark.parametrize("case", CASES)
def test_equal_micro_batches_average_to_the_batch_but_not_in_the_intra_part_of_dist(case: str, drawn: Drawn) -> None:
    loss, _ = CASES[case]
    batch = [torch.cat([x, x[:1].flip(-1)]) for x in drawn]
    parts = torch.stack([loss(*part) for part in zip(*(x.split(2) for x in batch), strict=True)]).mean()
    if case.startswith("dist") and not case.endswith("-0"):
        assert abs(parts - loss(*batch)) > 0.01
    else:
        torch.testing.assert_close(parts, loss(*batch))


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_huge_logits_are_computed_in_fp32_and_stay_finite(case: str, dtype: torch.dtype, autocast: bool) -> None:
    loss, _ = CASES[case]
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 3.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 1.0]], dtype=dtype)
    labels = torch.tensor([1, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value, loss(student.float(), teacher.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("constant", ["student", "teacher", "both", "one example"])
def test_constant_logits_stay_finite(case: str, constant: str, drawn: Drawn) -> None:
    student, teacher = (x.float() for x in drawn[:2])
    if constant == "one example":
        student[2], teacher[2] = 0.0, 1.0
    else:
        student, teacher = (
            torch.full_like(x, 0.1) if constant in (name, "both") else x
            for name, x in (("student", student), ("teacher", teacher))
        )
    value = CASES[case][0](student.requires_grad_(), teacher, drawn[2])
    assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("case", ZERO_AT_BEST)
def test_is_zero_at_its_least_where_student_and_teacher_agree(case: str, drawn: Drawn) -> None:
    student, teacher, labels = drawn
    same = teacher.clone().requires_grad_()
    value = CASES[case][0](same, teacher, labels)
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, same)[0], torch.zeros_like(same), rtol=0, atol=1e-9)
    assert CASES[case][0](student, teacher, labels).item() > 1e-4


@pytest.mark.parametrize("case", ONE_OF_EACH[3:])
def test_logits_of_different_classes_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 1\]"):
        CASES[case][0](torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2).long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_under_autocast_stay_in_full_precision(dtype: torch.dtype) -> None:
    """300² is infinite in fp16, and 257 is 256 in bf16; integers, booleans and options are handed on as they are."""
    squares = full_precision(lambda x, *, y, labels, option: (x @ y, labels, option))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.tensor([[300.0, 257.0]], dtype=dtype)
        value, labels, option = squares(
            x, y=torch.tensor([[300.0], [1.0]], dtype=dtype), labels=torch.ones(1).long(), option=2
        )
    assert value.dtype == torch.promote_types(dtype, torch.float32) and value.item() == 300 * 300 + x[0, 1].item()
    assert labels.dtype == torch.int64 and option == 2


# Known values, of (3/4, 1/4) for the sure and (1/2, 1/2) for the undecided network.

SURE, UNDECIDED, FIRST = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2), torch.tensor([0])
ENTROPY = -3 / 4 * math.log(3 / 4) - 1 / 4 * math.log(1 / 4)
REVERSE = 1 / 2 * math.log(1 / 2 / (3 / 4)) + 1 / 2 * math.log(1 / 2 / (1 / 4))
# The mean of the two is (5/8, 3/8).
SURE_TO_MEAN = 3 / 4 * math.log(3 / 4 / (5 / 8)) + 1 / 4 * math.log(1 / 4 / (3 / 8))
UNDECIDED_TO_MEAN = 1 / 2 * math.log(1 / 2 / (5 / 8)) + 1 / 2 * math.log(1 / 2 / (3 / 8))
# Of (1/4, 1/4, 1/2) and (1/2, 1/3, 1/6); without the label (1/3, 2/3) and (2/3, 1/3).
THREE, OTHER_THREE = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([[3.0, 2.0, 1.0]]).log()
LABEL = 1 / 2 * math.log(1 / 2 / (1 / 4)) + 1 / 2 * math.log(1 / 2 / (3 / 4))
OTHERS = 2 / 3 * math.log(2 / 3 / (1 / 3)) + 1 / 3 * math.log(1 / 3 / (2 / 3))
# Correlations of two numbers are 1 or -1: here 1 and -1 in the two examples, and 1 and 1 in the two classes.
PAIR, OTHER_PAIR = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log(), torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
# (5, 1) has mean 3 and standard deviation √8, so it becomes (1, -1) / √2, and (0, 20) becomes (-1, 1) / √2.
LIKELY = 1 / (1 + math.exp(-math.sqrt(2)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: cross_entropy(SURE, FIRST, label_smoothing=0.5), ENTROPY),  # the target is (3/4, 1/4) too
        (lambda: hard_label(SURE, torch.tensor([[9.0, 1.0]]), label_smoothing=0.5), ENTROPY),
        (
            lambda: hard_label(SURE.repeat(2, 1), torch.tensor([[2.0, 1.0], [-2.0, -1.0]])),
            (math.log(4 / 3) + math.log(4)) / 2,
        ),
        (lambda: binary_cross_entropy(SURE[:, :1], torch.ones(1, 1), label_smoothing=0.5), ENTROPY),
        (lambda: binary_cross_entropy(SURE, torch.tensor([[0, 1]])), (math.log(4) + math.log(2)) / 2),
        (lambda: squared_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]])), (4 + 1) / 2),
        (lambda: squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 5])), (1 + 9) / 2),
        (
            lambda: logits_mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, -1.0]])),
            (4 + 1) / 4,
        ),
        (lambda: logits_kl(UNDECIDED, SURE, 1.0, "reverse"), REVERSE),
        (lambda: logits_kl(UNDECIDED, SURE, 1.0, "jensen_shannon"), (SURE_TO_MEAN + UNDECIDED_TO_MEAN) / 2),
        (lambda: binary_kl(torch.tensor([[0.0, 5.0]]), torch.tensor([[LN3, 5.0]]), 1.0, "reverse"), (REVERSE + 0) / 2),
        (lambda: dkd(THREE, OTHER_THREE, FIRST, temperature=1.0, alpha=3.0, beta=5.0), 3 * LABEL + 5 * OTHERS),
        (lambda: dist(PAIR, OTHER_PAIR, temperature=1.0, beta=1.0, gamma=0.0), 1 - (1 - 1) / 2),
        (lambda: dist(PAIR, OTHER_PAIR, temperature=1.0, beta=0.0, gamma=1.0), 1 - (1 + 1) / 2),
        (
            lambda: dist(PAIR[:1], OTHER_PAIR[:1], temperature=2.0, beta=3.0, gamma=5.0),
            2**2 * (3 * (1 - 1) + 5 * (1 - 0)),
        ),
        (
            lambda: logit_std(torch.tensor([[5.0, 1.0]]), torch.tensor([[0.0, 20.0]]), 1.0),
            (2 * LIKELY - 1) * math.sqrt(2),
        ),
    ],
)
def test_known_values(value: Callable[[], Tensor], expected: float) -> None:
    assert value().item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_cross_entropy_of_a_sure_and_of_an_undecided_network() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert cross_entropy(logits, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_known_distributions() -> None:
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert logits_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert logits_kl(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


def test_jensen_shannon_is_symmetric_and_at_most_ln_2(drawn: Drawn) -> None:
    student, teacher, _ = drawn
    value, swapped = (logits_kl(*pair, 3.0, "jensen_shannon") for pair in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(value, swapped)
    apart = torch.tensor([[1e4, -1e4]])
    assert logits_kl(apart, -apart, 2.0, "jensen_shannon").item() == pytest.approx(4 * math.log(2), rel=1e-6)


def test_dkd_is_hinton_s_loss_in_parts(drawn: Drawn) -> None:
    """With beta = 1 - p_teacher(label) it is the KL divergence; with two classes there are no others."""
    for student, teacher, label in zip(*(x.split(1) for x in drawn), strict=True):
        unsure = 1 - torch.softmax(teacher / 4, dim=-1)[0, label].item()
        torch.testing.assert_close(dkd(student, teacher, label, 4.0, 1.0, unsure), logits_kl(student, teacher, 4.0))
    two, other, labels = drawn[0][:, :2], drawn[1][:, :2], drawn[2] % 2
    torch.testing.assert_close(dkd(two, other, labels, 4.0, 2.0, 8.0), 2 * logits_kl(two, other, 4.0))


def test_standardised_logits(drawn: Drawn) -> None:
    student, teacher, _ = drawn
    torch.testing.assert_close(standardize(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert standardize(torch.full((2, 4), 7.0)).tolist() == [[0.0] * 4] * 2
    assert standardize(torch.tensor([[6e4, -6e4]], dtype=torch.float16)).dtype == torch.float32
    torch.testing.assert_close(logit_std(3 * student + 1, teacher / 2, 2.0), logit_std(student, teacher, 2.0))


def test_kl_does_not_shrink_with_copies_of_the_batch_nor_with_unused_classes(drawn: Drawn) -> None:
    student, teacher, _ = drawn
    once = logits_kl(student, teacher, 2.0).item()
    assert logits_kl(student.repeat(3, 1), teacher.repeat(3, 1), 2.0).item() == pytest.approx(once)
    unused = torch.full((7, 20), -1e4, dtype=torch.float64)
    wide = logits_kl(torch.cat([student, unused], 1), torch.cat([teacher, unused], 1), 2.0)
    assert wide.item() == pytest.approx(once)


def test_kl_is_zero_only_where_the_distributions_agree(drawn: Drawn) -> None:
    student, teacher, _ = drawn
    assert logits_kl(teacher + 5.0, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-12)
    assert logits_kl(student, teacher, 3.0).item() > 0.01


def test_gradient_tends_to_that_of_half_the_squared_difference_at_high_temperature(drawn: Drawn) -> None:
    """Hinton et al. (2015), equation 4: for zero-mean logits the gradient tends to (student − teacher) / C."""
    student, teacher = (x - x.mean(1, keepdim=True) for x in drawn[:2])
    student.requires_grad_()
    logits_kl(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / (5 * 7), rtol=1e-3, atol=1e-5)


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


# The papers' released code, in our words.


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_that_of_repdistiller_and_torchdistill(temperature: float, drawn: Drawn) -> None:
    """HobbitLong/RepDistiller (DistillKL) and yoshitomo-matsubara/torchdistill (KDLoss, batchmean, times T²)."""
    student, teacher, _ = drawn
    per_class = F.kl_div((student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="none")
    torch.testing.assert_close(logits_kl(student, teacher, temperature), per_class.sum() / 7 * temperature**2)


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(4.0, 1.0, 8.0), (1.0, 0.5, 2.0)])
def test_dkd_is_that_of_mdistiller(temperature: float, alpha: float, beta: float, drawn: Drawn) -> None:
    """megvii-research/mdistiller: probabilities for the label and the rest; 1000 off the label's logit for the rest."""
    student, teacher, labels = (x / temperature if x.is_floating_point() else x for x in drawn)
    label = F.one_hot(labels, 5).double()

    def of_label_and_rest(logits: Tensor) -> Tensor:
        p = logits.softmax(1)
        return torch.stack([(p * label).sum(1), (p * (1 - label)).sum(1)], dim=1)

    tckd = F.kl_div(of_label_and_rest(student).log(), of_label_and_rest(teacher), reduction="sum")
    without = [logits - 1000.0 * label for logits in (student, teacher)]
    nckd = F.kl_div(without[0].log_softmax(1), without[1].softmax(1), reduction="sum")
    expected = (alpha * tckd + beta * nckd) * temperature**2 / len(labels)
    torch.testing.assert_close(dkd(*drawn, temperature, alpha, beta), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 2.0, 2.0), (4.0, 1.0, 1.0)])
def test_dist_is_that_of_dist_kd(temperature: float, beta: float, gamma: float, drawn: Drawn) -> None:
    """hunto/DIST_KD: cosine of centred probabilities, with 1e-8 added to the product of the norms, times T²."""
    p, q = ((x / temperature).softmax(1) for x in drawn[:2])

    def unlike(x: Tensor, y: Tensor, dim: int) -> Tensor:
        x, y = x - x.mean(dim, keepdim=True), y - y.mean(dim, keepdim=True)
        return 1 - ((x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + 1e-8)).mean()

    expected = temperature**2 * (beta * unlike(p, q, 1) + gamma * unlike(p, q, 0))
    torch.testing.assert_close(dist(*drawn[:2], temperature, beta, gamma), expected, rtol=1e-5, atol=0)


def test_logit_std_is_that_of_logit_standardization_kd(drawn: Drawn) -> None:
    """sunshangquan/logit-standardization-KD: z-scores with 1e-7 added to the deviation, then KL times T²."""
    student, teacher = ((x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-7) / 2.0 for x in drawn[:2])
    per_class = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none")
    torch.testing.assert_close(logit_std(*drawn[:2], 2.0), per_class.sum(1).mean() * 2.0**2)
