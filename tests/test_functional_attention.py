"""Losses on attention against values worked out by hand, plain float64 loops and the papers' released formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from distill.functional import (
    attention_kl,
    attention_log_probabilities,
    attention_probabilities,
    attention_transfer,
    scaled_scores,
    scores_mse,
    spatial_attention,
    split_heads,
)

Function = Callable[..., Tensor]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
PADDED = ~(MASK[:, None, :, None].bool() & MASK[:, None, None, :].bool()).expand(4, 3, 4, 4)
MASKS = {
    "no padding": torch.ones(3, 4),
    "padding": MASK[:3],
    "one token": torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool(),
    "nothing but padding": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]),
}
MASKED = [scores_mse, attention_kl]
LOSSES = [*MASKED, attention_transfer]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(loss: Function) -> tuple[Tensor, ...]:
    """Student, teacher and, for transformers, a mask; four examples."""
    if loss is attention_transfer:
        return draw(4, 3, 4, 4), draw(4, 5, 2, 2, seed=1)
    return draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1), MASK


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def mean_by_hand(student: Tensor, teacher: Tensor, mask: Tensor, of_rows: Callable[..., float]) -> float:
    """Mean over examples, heads and real queries of `of_rows`(student's, teacher's scores of the real keys)."""
    total = 0.0
    for mine, other, keep in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True):
        real = [position for position, kept in enumerate(keep) if kept]
        rows = [
            of_rows([mine[head][query][key] for key in real], [other[head][query][key] for key in real])
            for head, query in product(range(len(mine)), real)
        ]
        total += sum(rows) / max(len(rows), 1)
    return total / len(student)


def squares(mine: list[float], other: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(mine, other, strict=True)) / len(mine)


def divergence(mine: list[float], other: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(other), softmax(mine), strict=True))


def spatial_by_hand(features: list[list[list[float]]], grid: int) -> list[float]:
    """Of one example: pooled to grid x grid cells, squared, mean over channels, divided by the norm."""
    height, width = len(features[0]), len(features[0][0])
    attention = []
    for y, x in product(range(grid), repeat=2):
        rows = range(y * height // grid, -(-(y + 1) * height // grid))
        columns = range(x * width // grid, -(-(x + 1) * width // grid))
        cells = [sum(channel[i][j] for i in rows for j in columns) / len(rows) / len(columns) for channel in features]
        attention.append(sum(cell**2 for cell in cells) / len(cells))
    norm = math.sqrt(sum(value**2 for value in attention))
    return [value / norm for value in attention]


def test_heads_are_consecutive_slices_of_the_width() -> None:
    states = torch.arange(12.0).view(1, 2, 6)
    assert split_heads(states, 3).tolist() == [[[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]]
    with pytest.raises(ValueError, match="4 heads do not divide the width 6"):
        split_heads(states, 4)


def test_scores_of_known_queries_and_keys() -> None:
    """Two heads of width 4: √4 = 2, so (1·2 + 1·4) / 2 = 3 for the first query and key of the first head."""
    query, key = torch.zeros(2, 1, 2, 8, dtype=torch.float64)
    query[0, 0, :2], key[0, 0, :2] = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0])
    query[0, 1, 7], key[0, 1, 7], key[0, 0, 7] = 3.0, 5.0, -1.0
    assert scaled_scores(query, key, 2).tolist() == [[[[3, 0], [0, 0]], [[0, 0], [-1.5, 7.5]]]]


def test_padding_gets_no_probability() -> None:
    """e^0 / (e^0 + e^ln 3) = 1/4; the third key is padding, whatever its score."""
    scores = torch.tensor([0.0, math.log(3.0), 100.0], dtype=torch.float64).expand(1, 1, 3, 3)
    found = attention_probabilities(scores, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found[0, 0, :2], torch.tensor([[0.25, 0.75, 0.0]] * 2, dtype=torch.float64))
    assert found[..., 2].eq(0).all()
    logs = attention_log_probabilities(scores, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(logs[0, 0, 1, :2], torch.tensor([0.25, 0.75]).double().log())


def test_known_losses_of_scores() -> None:
    """An example of two real tokens counts as much as one of one: ((1 + 4 + 0 + 9) / 4 + 25) / 2 = 14.25."""
    student, teacher = torch.zeros(2, 2, 1, 2, 2)
    student[0, 0], student[1, 0] = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[5.0, 9.0], [9.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert scores_mse(student, teacher, mask).item() == pytest.approx(14.25, rel=1e-6)
    # KL of (3/4, 1/4) from (1/2, 1/2) for one of the first example's two queries; the second has but one key.
    teacher[0, 0, 0, 0] = math.log(3.0)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2 / 2
    assert attention_kl(torch.zeros(2, 1, 2, 2), teacher, mask).item() == pytest.approx(expected, rel=1e-6)


def test_known_spatial_attention_and_transfer() -> None:
    """Means of squares (1 + 5) / 2 = 3 and (4 + 4) / 2 = 4, over their norm 5; against (0, 1): (0.36 + 0.04) / 2."""
    student = torch.tensor([[[[1.0, 2.0]], [[5**0.5, -2.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[0.0, 7.0]]]], dtype=torch.float64)
    torch.testing.assert_close(spatial_attention(student), torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    assert attention_transfer(student, teacher).item() == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_scores_and_their_losses_equal_plain_loops(heads: int, mask: Tensor) -> None:
    query, key, teacher = draw(3, 4, 6), draw(3, 4, 6, seed=1), 4 * draw(3, heads, 4, 4, seed=2)
    student = scaled_scores(query, key, heads)
    assert student.shape == (3, heads, 4, 4)
    q, k, width = query.tolist(), key.tolist(), 6 // heads
    for b, head, i, j in product(range(3), range(heads), range(4), range(4)):
        inner = sum(q[b][i][c] * k[b][j][c] for c in range(head * width, (head + 1) * width))
        assert student[b, head, i, j].item() == pytest.approx(inner / math.sqrt(width), rel=1e-10)
    for loss, of_rows in ((scores_mse, squares), (attention_kl, divergence)):
        expected = mean_by_hand(student, teacher, mask, of_rows)
        assert loss(student, teacher, mask).item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    for b, head, i in product(range(3), range(heads), range(4)):
        real = mask[b].bool()
        if real[i]:
            found = attention_probabilities(teacher, mask)[b, head, i]
            assert found[real].tolist() == pytest.approx(softmax(teacher[b, head, i][real].tolist()), rel=1e-9)
            assert found[~real].eq(0).all()


@pytest.mark.parametrize(("mine", "other"), [(4, 4), (6, 3), (2, 4), (5, 3)])
def test_attention_transfer_equals_a_plain_loop_for_equal_and_other_grids_and_widths(mine: int, other: int) -> None:
    student, teacher, grid = draw(3, 2, mine, mine), draw(3, 5, other, other, seed=1), min(mine, other)
    maps = [[spatial_by_hand(example, grid) for example in x.tolist()] for x in (student, teacher)]
    expected = sum(squares(a, b) for a, b in zip(*maps, strict=True)) / 3
    assert attention_transfer(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    if mine == grid:
        torch.testing.assert_close(spatial_attention(student), torch.tensor(maps[0], dtype=torch.float64))


def test_gradients_are_those_of_finite_differences() -> None:
    for loss in LOSSES:
        student, *rest = inputs(loss)
        assert torch.autograd.gradcheck(lambda x, f=loss, r=rest: f(x, *r), (student.requires_grad_(),))
    query, key = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: scaled_scores(q, k, 2), (query, key))
    assert torch.autograd.gradcheck(lambda x: attention_probabilities(x, MASK), (draw(4, 2, 4, 4).requires_grad_(),))
    assert torch.autograd.gradcheck(spatial_attention, (draw(2, 3, 2, 2).requires_grad_(),))


@pytest.mark.parametrize("loss", LOSSES)
def test_agreement_is_the_minimum(loss: Function) -> None:
    student, teacher, *rest = inputs(loss)
    agreeing = teacher.clone().requires_grad_()
    value = loss(agreeing, teacher, *rest)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-15)
    assert agreeing.grad.abs().max() < 1e-12
    assert loss(student, teacher, *rest).item() > 0.01
    # Scores of a query count but for a constant, and feature maps but for a factor.
    if loss is not scores_mse:
        moved = 3 * teacher if loss is attention_transfer else teacher + draw(4, 3, 4, 1)
        assert loss(moved, teacher, *rest).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("loss", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mine", "other"), [(1e30, -1e30), (-1e30, 1e30), (1e30, 0.0)])
def test_what_padding_holds_changes_neither_value_nor_gradient(
    loss: Function, dtype: torch.dtype, mine: float, other: float
) -> None:
    student, teacher = (x.to(dtype) for x in inputs(loss)[:2])
    clean, filled = (student.masked_fill(PADDED, value).requires_grad_() for value in (0.0, mine))
    values = loss(clean, teacher, MASK), loss(filled, teacher.masked_fill(PADDED, other), MASK)
    sum(values).backward()
    torch.testing.assert_close(*values)
    torch.testing.assert_close(clean.grad, filled.grad)
    assert filled.grad[PADDED].eq(0).all()
    assert filled.grad[~PADDED].ne(0).any()


@pytest.mark.parametrize("loss", MASKED)
def test_a_longer_batch_has_the_same_loss(loss: Function) -> None:
    student, teacher, mask = inputs(loss)
    longer = F.pad(student, (0, 3, 0, 3), value=7.0), F.pad(teacher, (0, 3, 0, 3), value=-2.0), F.pad(mask, (0, 3))
    torch.testing.assert_close(loss(*longer), loss(student, teacher, mask))


@pytest.mark.parametrize("loss", MASKED)
def test_an_example_of_nothing_but_padding_counts_zero(loss: Function) -> None:
    student, teacher, mask = (torch.cat([x[:1], x[:1]]) for x in inputs(loss))
    mask[1] = 0
    student.requires_grad_()
    value = loss(student, teacher, mask)
    value.backward()
    torch.testing.assert_close(value, loss(student[:1], teacher[:1], mask[:1]) / 2)
    assert student.grad.isfinite().all() and student.grad[1].eq(0).all() and student.grad[0].ne(0).any()
    assert attention_probabilities(teacher, mask).isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_micro_batches_average_to_the_batch_in_any_order(loss: Function) -> None:
    tensors = inputs(loss)
    whole, order = loss(*tensors), [2, 0, 3, 1]
    for size in (1, 2):
        parts = [loss(*(x[i : i + size] for x in tensors)) for i in range(0, 4, size)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
    torch.testing.assert_close(loss(*(x[order] for x in tensors)), whole)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_halves_are_computed_in_fp32_and_stay_finite_and_float64_stays(dtype: torch.dtype, autocast: bool) -> None:
    scores, states = ((1e4 * draw(*shape)).to(dtype).requires_grad_() for shape in ((4, 3, 4, 4), (4, 4, 6)))
    other, wide = -scores.detach(), torch.float64 if dtype == torch.float64 else torch.float32
    for function, arguments in (
        (scores_mse, (scores, other, MASK)),
        (attention_kl, (scores, other, MASK)),
        (attention_log_probabilities, (scores, MASK)),
        (attention_probabilities, (scores, MASK)),
        (attention_transfer, (scores, other[:, :, :2, :2])),
        (spatial_attention, (scores,)),
        (scaled_scores, (states, states.flip(0), 2)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = function(*arguments)
        expected = function(*(x.to(wide) if isinstance(x, Tensor) else x for x in arguments))
        assert result.dtype == wide and result.isfinite().all(), function.__name__
        assert torch.equal(result, expected), function.__name__
        (gradient,) = torch.autograd.grad(result.max(), arguments[0])
        assert gradient.isfinite().all() and gradient.dtype == dtype, function.__name__


def test_a_dark_feature_map_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(student, draw(2, 3, 4, 4).float())
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_those_of_transformers_eager_attention(layer: int) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16, num_labels=2
    )
    config._attn_implementation = "eager"
    network = BertForSequenceClassification(config).double().eval()
    attention, seen = network.bert.encoder.layer[layer].attention.self, {}
    for name in ("query", "key"):
        linear = getattr(attention, name)
        linear.weight.data.normal_()
        linear.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    ids = torch.randint(30, (4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=MASK, output_attentions=True).attentions[layer]
    found = attention_probabilities(scaled_scores(seen["query"], seen["key"], 3), MASK)
    real = MASK.bool()[:, None, :, None].expand_as(found)
    assert expected[real].std() > 0.1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-6, atol=1e-9)


def test_tinybert_released_code() -> None:
    """huawei-noah/Pretrained-Language-Model, TinyBERT/task_distill.py: −10⁴ is added to the scores of padded keys,
    scores of at most −100 become 0, MSE over everything. Equal without padding. One example of n real tokens in L,
    with networks that agree about padded queries, is n² / L² of ours there."""

    def released(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        shift = -1e4 * (1 - mask.to(student.dtype))[:, None, None, :]
        student, teacher = ((x + shift) * (x + shift > -100) for x in (student, teacher))
        return ((student - teacher) ** 2).sum() / student.numel()

    student, teacher = 5 * draw(4, 3, 4, 4), 5 * draw(4, 3, 4, 4, seed=1)
    everything = torch.ones_like(MASK)
    torch.testing.assert_close(scores_mse(student, teacher, everything), released(student, teacher, everything))
    student[2, :, 3] = teacher[2, :, 3]
    example = student[2:3], teacher[2:3], MASK[2:3]
    torch.testing.assert_close(released(*example), scores_mse(*example) * 3**2 / 4**2)


def test_minilm_equation() -> None:
    """No released training code; equation 6 of the paper: Σ over heads and queries of KL(teacher ‖ student) divided by
    their number, here of each example without its padding, mean over examples."""
    student, teacher, mask = inputs(attention_kl)
    values = []
    for mine, other, real in zip(student, teacher, mask.bool(), strict=True):
        mine, other = (x[:, real][:, :, real] for x in (mine, other))
        summed = F.kl_div(mine.log_softmax(-1), other.softmax(-1), reduction="sum")
        values.append(summed / (3 * real.sum()))
    torch.testing.assert_close(attention_kl(student, teacher, mask), torch.stack(values).mean())


def test_attention_transfer_released_code() -> None:
    """szagoruyko/attention-transfer, utils.py (`at`, `at_loss`): mean of squares over channels, flattened, over its
    norm; mean of the squared differences. Other grids as in HobbitLong/RepDistiller, distiller_zoo/AT.py."""

    def at(x: Tensor) -> Tensor:
        energy = (x * x).mean(1).reshape(len(x), -1)
        return energy / energy.norm(dim=1, keepdim=True)

    student, teacher = draw(3, 4, 6, 6), draw(3, 2, 6, 6, seed=1)
    torch.testing.assert_close(attention_transfer(student, teacher), ((at(student) - at(teacher)) ** 2).mean())
    small, pooled = draw(3, 7, 3, 3, seed=2), F.avg_pool2d(student, 2)
    for pair in ((student, small), (small, student)):
        torch.testing.assert_close(attention_transfer(*pair), ((at(pooled) - at(small)) ** 2).mean())
