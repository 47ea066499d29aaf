"""Losses on relations against values worked out by hand, plain float64 loops and the papers' released formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional import crd, pkt, rkd_angle, rkd_distance, similarity_preserving

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = list[list[float]]
LOSSES = [rkd_distance, rkd_angle, similarity_preserving, pkt]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(batch: int = 6) -> tuple[Tensor, Tensor]:
    """Students are wider than teachers here; cubes have outliers, for the linear part of the Huber loss."""
    return draw(batch, 5) ** 3, draw(batch, 3, seed=1) ** 3


def contrast(batch: int = 4, negatives: int = 6) -> tuple[Tensor, ...]:
    """Anchor, positive, negatives, allowed, log_noise."""
    unit = [F.normalize(draw(rows, 3, seed=i), dim=-1) for i, rows in enumerate((batch, batch, negatives))]
    return *unit, draw(batch, negatives, seed=3) > -0.5, torch.tensor(0.7, dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: list[float]) -> list[float]:
    norm = math.sqrt(dot(a, a))
    return [x / norm for x in a] if norm else a


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def distances(rows: Rows) -> list[float]:
    found = [math.dist(a, b) for a, b in product(rows, repeat=2)]
    positive = [distance for distance in found if distance > 0]
    return [distance * len(positive) / sum(positive) for distance in found]


def angles(rows: Rows) -> list[float]:
    return [dot(unit(minus(a, v)), unit(minus(b, v))) for v, a, b in product(rows, repeat=3)]


def grams(rows: Rows) -> list[float]:
    return [value for a in rows for value in unit([dot(a, b) for b in rows])]


def neighbours(rows: Rows) -> list[float]:
    similarities = [[(dot(unit(a), unit(b)) + 1) / 2 for b in rows] for a in rows]
    return [value / sum(row) for row in similarities for value in row]


BY_HAND: dict[Loss, tuple[Callable[[Rows], list[float]], Callable[[float, float], float]]] = {
    rkd_distance: (distances, huber),
    rkd_angle: (angles, huber),
    similarity_preserving: (grams, lambda a, b: (a - b) ** 2),
    pkt: (neighbours, lambda q, p: p * math.log((p + 1e-7) / (q + 1e-7))),
}


def by_hand(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    relation, penalty = BY_HAND[loss]
    terms = [penalty(a, b) for a, b in zip(relation(student.tolist()), relation(teacher.tolist()), strict=True)]
    return sum(terms) / len(terms)


def crd_by_hand(
    anchor: Tensor, positive: Tensor, negatives: Tensor, allowed: Tensor, log_noise: Tensor, temperature: float
) -> float:
    total, noise = 0.0, math.exp(log_noise.item())
    for v, same, use in zip(anchor.tolist(), positive.tolist(), allowed.tolist(), strict=True):
        x = math.exp(dot(v, same) / temperature)
        total -= math.log(x / (x + noise))
        others = [math.exp(dot(v, n) / temperature) for n, u in zip(negatives.tolist(), use, strict=True) if u]
        total -= sum(math.log(noise / (x + noise)) for x in others)
    return total / len(anchor)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


KNOWN = {
    # Distances 1, 3, 2 over their mean 2 against 2, 4, 2 over 8/3: differences ¼, 0, ¼, each pair twice, of 9 pairs.
    rkd_distance: (column(0, 1, 3), column(0, 2, 4), 2 * 2 * (0.25**2 / 2) / 9),
    # On a line cosines are ±1: at the first and the second example they differ by 2, in two triplets each, of 27.
    rkd_angle: (column(0, 1, 3), column(0, 1, -1), 2 * 2 * (2 - 0.5) / 27),
    # Rows (1, 0), (0, 1) against (9, 12) / 15 and (12, 16) / 20, which are both (0.6, 0.8).
    similarity_preserving: (torch.eye(2), column(3, 4), (0.4**2 + 0.8**2 + 0.6**2 + 0.2**2) / 4),
    # Cosines 1 and 0 become 1 and ½, so ⅔ and ⅓, against ½ and ½; the same for both rows, mean over 4 entries.
    pkt: (column(1, 2), torch.eye(2), 2 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 4),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_known_values(loss: Loss) -> None:
    student, teacher, expected = KNOWN[loss]
    # PKT has 1e-7 inside its logarithm.
    assert loss(student.double(), teacher.double()).item() == pytest.approx(expected, rel=1e-6)


def test_known_contrast() -> None:
    """h = x / (x + 2) with x = e for the positive, 1 and 1 / e for the negatives."""
    anchor, log_noise = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor(math.log(2.0)).double()
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    near, middle, far = -math.log(math.e / (math.e + 2)), -math.log(2 / 3), -math.log(2 / (math.exp(-1) + 2))
    for allowed, expected in (([True, True], near + middle + far), ([False, True], near + far), ([False] * 2, near)):
        found = crd(anchor, anchor, negatives, torch.tensor([allowed]), log_noise, 1.0)
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("batch", "mine", "other"), [(2, 3, 3), (5, 1, 4), (7, 6, 2)])
def test_relations_equal_plain_loops(loss: Loss, batch: int, mine: int, other: int) -> None:
    student, teacher = draw(batch, mine) ** 3, draw(batch, other, seed=1) ** 3
    assert loss(student, teacher).item() == pytest.approx(by_hand(loss, student, teacher), rel=1e-8, abs=1e-14)
    # With two equal examples too.
    student, teacher = torch.cat([student, student[:1]]), torch.cat([teacher, draw(1, other, seed=2)])
    assert loss(student, teacher).item() == pytest.approx(by_hand(loss, student, teacher), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
@pytest.mark.parametrize("negatives", [1, 6])
def test_contrast_equals_a_plain_loop(temperature: float, negatives: int) -> None:
    tensors = contrast(5, negatives)
    assert crd(*tensors, temperature).item() == pytest.approx(crd_by_hand(*tensors, temperature), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    student, teacher = draw(5, 3).requires_grad_(), draw(5, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


def test_gradients_of_the_contrast_are_those_of_finite_differences() -> None:
    *vectors, allowed, log_noise = contrast()
    leaves = [x.requires_grad_() for x in vectors]
    assert torch.autograd.gradcheck(lambda *x: crd(*x, allowed, log_noise, 0.3), leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_agreement_is_the_minimum_in_any_width(loss: Loss) -> None:
    """Rotation into a wider space and a common factor change no relation; for RKD the origin does not count either."""
    student, teacher = pair()
    basis = torch.linalg.qr(draw(5, 3, seed=2)).Q.T
    agreeing = (4 * teacher @ basis + 7 * (loss in (rkd_distance, rkd_angle))).requires_grad_()
    value = loss(agreeing, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-14)
    assert agreeing.grad.abs().max() < 1e-7
    assert loss(student, teacher).item() > 1e-3


def test_no_anchor_is_better_than_the_positive_itself() -> None:
    _, positive, negatives, allowed, log_noise = contrast()
    nothing = torch.zeros_like(allowed)
    best = crd(positive, positive, negatives, nothing, log_noise, 0.1)
    for seed in range(20):
        anchor = F.normalize(positive + 0.1 * draw(4, 3, seed=seed), dim=-1)
        assert crd(anchor, positive, negatives, nothing, log_noise, 0.1) > best


def test_negatives_that_are_not_allowed_change_nothing() -> None:
    anchor, positive, negatives, allowed, log_noise = contrast()
    allowed[:, 2] = False
    results = []
    for value in (0.0, 1e30):
        mine, filled = anchor.float().requires_grad_(), negatives.float()
        filled[2] = value
        loss = crd(mine, positive.float(), filled, allowed, log_noise.float(), 0.07)
        loss.backward()
        results.append((loss.detach(), mine.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_relates_to_nothing(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = draw(1, 4).to(dtype).requires_grad_(), draw(1, 3, seed=1).to(dtype)
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["two equal", "all equal", "one zero", "all zero", "opposite"])
def test_degenerate_students_have_gradients_of_ordinary_size(loss: Loss, dtype: torch.dtype, case: str) -> None:
    """Where a direction is not defined, dividing by a tiny number would make its gradient huge."""
    student, teacher = draw(6, 5), draw(6, 3, seed=1)
    if case.startswith("all"):
        student[:] = student[0] * (case == "all equal")
    else:
        student[1] = {"two equal": 1, "one zero": 0, "opposite": -1}[case] * student[0]
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and value >= 0
    assert student.grad.isfinite().all() and student.grad.abs().max() < 10
    assert loss(teacher, student.detach()).isfinite()


def test_opposite_examples_are_neighbours_with_probability_zero() -> None:
    """Rounding can make a cosine less than −1, and a logarithm of its negative probability NaN."""
    for seed in range(200):
        vector = draw(1, 48, seed=seed).float()
        student, teacher = torch.cat([vector, -vector]).requires_grad_(), draw(2, 3, seed=seed).float()
        loss = pkt(student, teacher)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all() and pkt(teacher, student.detach()).isfinite()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_halves_are_computed_in_fp32_and_stay_finite_and_float64_stays(dtype: torch.dtype, autocast: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [1e4 * draw(5, width, seed=width) for width in (8, 4)]
    anchor, positive, negatives, allowed, log_noise = contrast(5)
    calls = [(loss, vectors) for loss in LOSSES]
    calls += [(lambda *x: crd(*x[:3], allowed, x[3], 0.07), [1e4 * anchor, positive, negatives, log_noise])]
    for loss, tensors in calls:
        student, *rest = (x.to(dtype) for x in tensors)
        student.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(student, *rest)
        value.backward()
        assert torch.equal(value, loss(*(x.to(wide) for x in (student, *rest)))) and value.dtype == wide
        assert value.isfinite() and value > 0.01 and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_order_does_not_count_but_who_is_in_the_batch_does(loss: Loss) -> None:
    student, teacher = pair()
    whole, order = loss(student, teacher), [3, 1, 5, 0, 2, 4]
    torch.testing.assert_close(loss(student[order], teacher[order]), whole)
    assert not math.isclose(loss(student[order], teacher), whole, rel_tol=1e-3)
    parts = torch.stack([loss(student[i : i + 3], teacher[i : i + 3]) for i in (0, 3)])
    assert not math.isclose(parts.mean(), whole, rel_tol=1e-3)


def test_equal_micro_batches_of_the_contrast_average_to_the_batch_in_any_order() -> None:
    anchor, positive, negatives, allowed, log_noise = contrast()

    def part(chosen: list[int]) -> Tensor:
        return crd(anchor[chosen], positive[chosen], negatives, allowed[chosen], log_noise, 0.07)

    whole = part([0, 1, 2, 3])
    torch.testing.assert_close((part([0, 1]) + part([2, 3])) / 2, whole)
    torch.testing.assert_close(part([2, 0, 3, 1]), whole)
    back = list(range(5, -1, -1))
    torch.testing.assert_close(crd(anchor, positive, negatives[back], allowed[:, back], log_noise, 0.07), whole)


def smooth_l1(difference: Tensor) -> Tensor:
    size = difference.abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5).mean()


def test_rkd_released_code() -> None:
    """lenscloth/RKD, metric/loss.py: Gram-matrix distances, at least 1e-6 off the diagonal, over the mean of those
    above 0; unit difference vectors. Equal for batches without equal examples, up to rounding in the Gram matrix."""

    def pdist(x: Tensor) -> Tensor:
        lengths, other = (x**2).sum(1), ~torch.eye(len(x), dtype=torch.bool)
        found = (lengths[:, None] + lengths[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt() * other
        return found / found[found > 0].mean()

    def cosines(x: Tensor) -> Tensor:
        directions = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", directions, directions)

    student, teacher = pair()
    expected = smooth_l1(pdist(student) - pdist(teacher))
    torch.testing.assert_close(rkd_distance(student, teacher), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(rkd_angle(student, teacher), smooth_l1(cosines(student) - cosines(teacher)))


def test_similarity_preserving_released_code() -> None:
    """HobbitLong/RepDistiller, distiller_zoo/SP.py: squared Frobenius norm of the difference over B²."""
    student, teacher = pair()
    rows = [x @ x.T / (x @ x.T).norm(dim=1, keepdim=True) for x in (student, teacher)]
    expected = torch.linalg.matrix_norm(rows[1] - rows[0]) ** 2 / 6**2
    torch.testing.assert_close(similarity_preserving(student, teacher), expected)


def test_pkt_released_code() -> None:
    """passalis/probabilistic_kt, nn/pkt.py: 1e-7 is added to norms, which are at least 1e-7 here: hence rtol 1e-5."""

    def probabilities(x: Tensor) -> Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        kernel = 0.5 * (1 + x @ x.T)
        return kernel / kernel.sum(1, keepdim=True)

    student, teacher = pair()
    p, q = probabilities(teacher), probabilities(student)
    expected = (p * ((p + 1e-7).log() - (q + 1e-7).log())).mean()
    torch.testing.assert_close(pkt(student, teacher), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_crd_released_code(temperature: float) -> None:
    """HobbitLong/RepDistiller, crd/criterion.py and memory.py: scores exp(s / τ) over Z = M · their mean, noise K / M,
    each denominator with 1e-7 added, which is 4e-7 of the noise here: hence rtol 1e-5."""
    anchor, positive, negatives, allowed, _ = contrast()
    examples, drawn = 25, len(negatives)
    scores = torch.cat([(anchor * positive).sum(1, keepdim=True), anchor @ negatives.T], dim=1)
    x = (scores / temperature).exp()
    z = x.mean() * examples
    x, noise = x / z, drawn / examples
    positives = (x[:, 0] / (x[:, 0] + noise + 1e-7)).log()
    others = (noise / (x[:, 1:] + noise + 1e-7)).log()
    expected = -(positives.sum() + others.sum()) / len(anchor)
    log_noise = (drawn * z / examples).log()
    found = crd(anchor, positive, negatives, torch.ones_like(allowed), log_noise, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
