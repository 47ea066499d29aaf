"""The losses on hidden states and feature maps against values worked out by hand, plain loops and released code."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional import hidden_cosine, hidden_mse, pkd, same_grid, vid
from distill.functional.hidden import mean_over_examples

Vector = list[float]
Loss = Callable[[Tensor, Tensor], Tensor]
VARIANCE = torch.tensor([0.5, 1.0, 2.0, 0.1, 30.0])  # for each of the 5 channels
MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "nothing padded": torch.ones(4, 3).long(),
    "padded right": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]),
    "holes": torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1]]).bool(),
    "no tokens": torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]),
}
SHAPES = {"tokens": (4, 3, 5), "maps": (4, 5, 2, 3), "vectors": (4, 5)}


def mse(x: Vector, y: Vector) -> float:
    return mean((a - b) ** 2 for a, b in zip(x, y, strict=True))


def length(x: Vector) -> float:
    return math.sqrt(sum(a * a for a in x))


def cosine(x: Vector, y: Vector) -> float:
    return 1 - sum(a * b for a, b in zip(x, y, strict=True)) / (length(x) * length(y))


def apart(x: Vector, y: Vector) -> float:
    return sum((a / length(x) - b / length(y)) ** 2 for a, b in zip(x, y, strict=True))


def unlikely(x: Vector, y: Vector) -> float:
    return mean((b - a) ** 2 / (2 * v) + math.log(v) / 2 for a, b, v in zip(x, y, VARIANCE.tolist(), strict=True))


def positions(features: Tensor) -> list[list[Vector]]:
    """Of each example, the vectors at its positions."""
    nested = features.tolist()
    if features.ndim == 4:
        height, width = (range(n) for n in features.shape[2:])
        return [[[channel[i][j] for channel in example] for i in height for j in width] for example in nested]
    return nested if features.ndim == 3 else [[row] for row in nested]


def by_hand(
    distance: Callable[[Vector, Vector], float], student: Tensor, teacher: Tensor, mask: Tensor | None
) -> float:
    values = []
    for i, (mine, theirs) in enumerate(zip(positions(student), positions(teacher), strict=True)):
        real = [1] * len(mine) if mask is None or student.ndim != 3 else mask[i].tolist()
        kept = [distance(x, y) for x, y, keep in zip(mine, theirs, real, strict=True) if keep]
        values.append(mean(kept) if kept else 0.0)
    return mean(values)


def vid_of(student: Tensor, teacher: Tensor) -> Tensor:
    return vid(student, VARIANCE.to(torch.promote_types(student.dtype, torch.float32)), teacher)


# The loss as a function of student and teacher; the distance of two vectors by hand; shape; mask.
CASES: dict[str, tuple[Loss, Callable[[Vector, Vector], float], str, Tensor | None]] = {
    f"{name}-{shape}-{which}": (partial(loss, mask=mask), distance, shape, mask)
    for name, loss, distance in (("hidden_mse", hidden_mse, mse), ("hidden_cosine", hidden_cosine, cosine))
    for shape in SHAPES
    for which, mask in MASKS.items()
    if shape == "tokens" or which in ("no mask", "padded right")  # a mask means nothing to what has no tokens
} | {"pkd": (pkd, apart, "vectors", None), "vid": (vid_of, unlikely, "maps", None)}
each_case = pytest.mark.parametrize("case", CASES)


def drawn(shape: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(SHAPES[shape], generator=draw, dtype=torch.float64) for _ in range(2))
    return student, teacher


@each_case
def test_equals_a_plain_loop(case: str) -> None:
    loss, distance, shape, mask = CASES[case]
    student, teacher = drawn(shape)
    value = loss(student, teacher)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(by_hand(distance, student, teacher, mask), rel=1e-9)


@each_case
def test_gradient_is_that_of_finite_differences(case: str) -> None:
    loss, _, shape, _ = CASES[case]
    student, teacher = drawn(shape)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student.requires_grad_(),))


def test_gradient_of_vid_for_the_variance_is_that_of_finite_differences() -> None:
    inputs = (drawn("maps")[0].requires_grad_(), VARIANCE.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda mean, variance: vid(mean, variance, drawn("maps")[1]), inputs)


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine, pkd, vid_of])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_huge_states_are_computed_in_fp32_and_stay_finite(loss: Loss, dtype: torch.dtype, autocast: bool) -> None:
    shape = {pkd: (2, 5), vid_of: (2, 5, 2, 2)}.get(loss, (2, 3, 5))
    student = torch.tensor([1e4, -1e4, 3.0]).repeat(20)[: math.prod(shape)].view(shape).to(dtype).requires_grad_()
    teacher = student.detach().roll(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
@pytest.mark.parametrize("mask", [MASKS["padded right"], MASKS["holes"], MASKS["no tokens"]])
def test_padding_changes_nothing(loss: Callable[..., Tensor], mask: Tensor, dtype: torch.dtype) -> None:
    """Neither by huge values, whose squares are infinite in fp32, nor by zeros, which have no direction."""
    student, teacher = (x.to(dtype) for x in drawn("tokens"))
    padding = ~mask.bool().unsqueeze(-1)
    expected = loss(student, teacher, mask)
    for mine, theirs in ((1e30, -1e30), (1e30, 1.0), (0.0, 0.0)):
        changed = student.masked_fill(padding, mine).requires_grad_()
        value = loss(changed, teacher.masked_fill(padding, theirs), mask)
        (gradient,) = torch.autograd.grad(value, changed)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        assert gradient.isfinite().all() and not gradient.masked_select(padding).any()
    longer = [F.pad(x, (0, 0, 0, 2), value=7.0) for x in (student, teacher)]
    torch.testing.assert_close(loss(*longer, F.pad(mask, (0, 2))), expected)


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
def test_examples_of_nothing_but_padding_count_zero(loss: Callable[..., Tensor]) -> None:
    student, teacher = drawn("tokens")
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(loss(student, teacher, mask), loss(student[:1], teacher[:1]) / 4)
    value = loss(student.requires_grad_(), teacher, 0 * mask)
    assert value.item() == 0.0 and not torch.autograd.grad(value, student)[0].any()


@pytest.mark.parametrize("loss", [hidden_cosine, pkd])
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_vectors_without_a_direction_stay_finite(loss: Loss, zero: str) -> None:
    """A zero vector has cosine 0 with any other, and a distance of 1 to any unit vector."""
    student, teacher = torch.full((2, 3), float(zero == "teacher")), torch.full((2, 3), float(zero == "student"))
    value = loss(student.requires_grad_(), teacher)
    assert value.item() == pytest.approx(0.0 if zero == "both" and loss is pkd else 1.0)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


@each_case
def test_is_least_where_student_and_teacher_agree(case: str) -> None:
    """There it is 0; for VID, half the mean of the logarithms of the variances, which may be negative."""
    loss, _, shape, _ = CASES[case]
    student, teacher = drawn(shape)
    least = VARIANCE.double().log().mean().item() / 2 if case == "vid" else 0.0
    same = teacher.clone().requires_grad_()
    value = loss(same, teacher)
    assert value.item() == pytest.approx(least, abs=1e-9)
    torch.testing.assert_close(torch.autograd.grad(value, same)[0], torch.zeros_like(same), rtol=0, atol=1e-9)
    assert loss(student, teacher).item() > least + 0.01


@pytest.mark.parametrize("case", [case for case in CASES if "tokens" not in case or "no mask" in case])
def test_order_of_the_batch_does_not_matter_and_equal_micro_batches_average_to_it(case: str) -> None:
    loss, _, shape, _ = CASES[case]
    student, teacher = drawn(shape)
    whole = loss(student, teacher)
    torch.testing.assert_close(loss(student.flip(0), teacher.flip(0)), whole)
    for size in (1, 2):
        parts = zip(student.split(size), teacher.split(size), strict=True)
        torch.testing.assert_close(torch.stack([loss(*part) for part in parts]).mean(), whole)


@pytest.mark.parametrize("loss", [hidden_mse, hidden_cosine])
@pytest.mark.parametrize("mask", [mask for mask in MASKS.values() if mask is not None])
def test_so_it_is_with_examples_of_different_lengths(loss: Callable[..., Tensor], mask: Tensor) -> None:
    batch = (*drawn("tokens"), mask)
    torch.testing.assert_close(loss(*(x.flip(0) for x in batch)), loss(*batch))
    for size in (1, 2):
        parts = zip(*(x.split(size) for x in batch), strict=True)
        torch.testing.assert_close(torch.stack([loss(*part) for part in parts]).mean(), loss(*batch))


# Known values.

STATES = torch.tensor([[[1.0, 1.0], [9.0, 9.0]], [[0.0, 2.0], [4.0, 0.0]]])
MEAN, TARGET, SPREAD = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]), torch.tensor([0.5, 2.0])
VALUES = torch.tensor([[1.0, 5.0], [2.0, math.inf], [3.0, 3.0]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: hidden_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])), (4 + 9) / 2),
        # An example counts the same with one token as with two.
        (
            lambda: hidden_mse(STATES, 0 * STATES, torch.tensor([[1, 0], [1, 1]])),
            ((1 + 1) / 2 + (0 + 4 + 16 + 0) / 4) / 2,
        ),
        (lambda: hidden_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])), 1 - 3 / 5),
        (lambda: hidden_cosine(STATES[1:], torch.tensor([[[3.0, 4.0], [-9.0, 0.0]]])), ((1 - 4 / 5) + (1 + 1)) / 2),
        (lambda: pkd(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])), (3 / 5 - 1) ** 2 + (4 / 5) ** 2),
        (lambda: pkd(torch.tensor([[1.0, 2.0]]), torch.tensor([[-10.0, -20.0]])), 4),
        (
            lambda: vid(MEAN.view(1, 2, 1, 1), SPREAD, TARGET.view(1, 2, 1, 1)),
            ((2**2 / (2 * 0.5) + math.log(0.5) / 2) + (1**2 / (2 * 2) + math.log(2) / 2)) / 2,
        ),
        (lambda: mean_over_examples(VALUES, torch.tensor([[1, 1], [1, 0], [0, 0]])), ((1 + 5) / 2 + 2 + 0) / 3),
    ],
)
def test_known_values(value: Callable[[], Tensor], expected: float) -> None:
    assert value().item() == pytest.approx(expected, rel=1e-6)


def test_the_larger_grid_is_pooled_to_the_smaller() -> None:
    """Block by block, each side by itself; what is of one grid, or no map at all, is left alone."""
    wide, small = torch.arange(8.0).view(1, 1, 2, 4), torch.ones(1, 3, 1, 2)
    pooled = torch.tensor([[[[(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4]]]])
    for student, teacher, expected in ((wide, small, (pooled, small)), (small, wide, (small, pooled))):
        for got, wanted in zip(same_grid(student, teacher), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert [list(x.shape) for x in same_grid(torch.ones(2, 3, 6, 2), torch.ones(2, 5, 3, 4))] == [
        [2, 3, 3, 2],
        [2, 5, 3, 2],
    ]
    for pair in ((wide, wide + 1), drawn("tokens"), drawn("vectors")):
        assert all(got is given for got, given in zip(same_grid(*pair), pair, strict=True))


def test_vid_is_least_where_the_variance_is_the_squared_error() -> None:
    student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    values = [vid(student, torch.tensor([variance]), teacher).item() for variance in (8.0, 9.0, 10.0)]
    assert min(values) == values[1] == pytest.approx(1 / 2 + math.log(9) / 2)


# The papers' released code, in our words.


def test_hidden_mse_is_that_of_tinybert_and_fitnets() -> None:
    """huawei-noah/Pretrained-Language-Model (TinyBERT), HobbitLong/RepDistiller (HintLoss): the mean of all squares."""
    for shape in ("tokens", "maps"):
        student, teacher = drawn(shape)
        torch.testing.assert_close(hidden_mse(student, teacher), torch.nn.MSELoss()(student, teacher))
    states, mask = drawn("tokens"), MASKS["padded right"]
    assert abs(hidden_mse(*states, mask) - torch.nn.MSELoss()(*states)) > 0.01  # there padding counts too


@pytest.mark.parametrize(("mask", "equal"), [([[1, 1, 0]] * 4, True), ([[1, 1, 0]] * 3 + [[1, 0, 0]], False)])
def test_hidden_cosine_is_that_of_distilbert_for_examples_of_one_length(mask: list[list[int]], equal: bool) -> None:
    """huggingface/transformers (distillation): CosineEmbeddingLoss with target 1, mean over all real tokens."""
    student, teacher = drawn("tokens")
    real = torch.tensor(mask)
    tokens = [x[real.bool()] for x in (student, teacher)]
    released = torch.nn.CosineEmbeddingLoss()(*tokens, torch.ones(len(tokens[0])))
    assert torch.isclose(hidden_cosine(student, teacher, real), released, rtol=1e-9, atol=0).item() == equal


def test_pkd_is_that_of_pkd_for_bert_times_the_width() -> None:
    """intersun/PKD-for-BERT-Model-Compression (patience_loss): F.mse_loss of normalised [B, layers, D]."""
    student, teacher = drawn("tokens")
    released = F.mse_loss(F.normalize(teacher, dim=2), F.normalize(student, dim=2))
    layers = [pkd(student[:, i], teacher[:, i]) for i in range(3)]
    torch.testing.assert_close(torch.stack(layers).mean() / 5, released)


def test_vid_is_that_of_repdistiller() -> None:
    """HobbitLong/RepDistiller (VIDLoss): variance softplus + 1e-5 a channel, maps pooled to the smaller grid."""
    scale = torch.linspace(-2, 4, 5, dtype=torch.float64)
    variance = torch.log1p(torch.exp(scale)) + 1e-5
    teacher = drawn("maps")[1]
    large = torch.randn(4, 5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = F.adaptive_avg_pool2d(large, (2, 3))
    spread = variance[:, None, None].expand_as(teacher)
    released = (0.5 * ((student - teacher) ** 2 / spread + spread.log())).mean()
    pooled, target = same_grid(large, teacher)
    torch.testing.assert_close(vid(pooled, variance, target), released)
