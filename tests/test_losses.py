"""Terms, their weighted sum, and what is decided when they meet a pair of networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import MEAN, STD, Images, Linear, Text, bert
from torch import Tensor, nn

from distill import fingerprint, functional
from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.layers import Link
from distill.losses import (
    Attention,
    AttentionTransfer,
    CrossEntropy,
    DecoupledKD,
    Dist,
    HardLabel,
    Hidden,
    LogitsKL,
    LogitsMSE,
    LossSum,
    LossTerm,
    MiniLM,
    PatientKD,
    RelationalKD,
    Row,
    SimilarityPreserving,
    StandardizedKL,
    VariationalInformation,
)
from students.mobilenet import mobilenetv3_small_half
from students.resnet import resnet10t

OFF_AT_HALF = {"before": 1, "after": 0, "start": 0.5, "end": 0.5}
ON_AT_HALF = {"before": 0, "after": 1, "start": 0.5, "end": 0.5}


class Constant(LossTerm):
    needs_teacher = False

    def __init__(self, weight: float, value: float, schedule: dict[str, Any] | None = None) -> None:
        super().__init__(weight, schedule)
        self.value = value

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        return self.value * student.logits.sum()


ONE = Features(torch.ones(1, 1, requires_grad=True))


def numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def test_total_is_the_weighted_sum_and_values_are_unweighted_with_their_graph() -> None:
    total, values = LossSum({"a": Constant(0.5, 3.0), "b": Constant(2.0, 7.0)})(ONE, None, {})
    assert total.item() == 0.5 * 3 + 2 * 7
    assert numbers(values) == {"a": 3.0, "b": 7.0}
    assert total.requires_grad
    assert [torch.autograd.grad(value, ONE.logits)[0].item() for value in values.values()] == [3.0, 7.0]


def test_real_terms_are_summed_with_their_weights() -> None:
    student, teacher = Features(torch.randn(4, 3)), Features(torch.randn(4, 3))
    batch = {"labels": torch.tensor([0, 1, 2, 0])}
    terms = {"ce": CrossEntropy(0.3, label_smoothing=0.1), "logits": LogitsKL(1.7, temperature=2.0)}
    total, values = LossSum(terms)(student, teacher, batch)
    torch.testing.assert_close(total, 0.3 * values["ce"] + 1.7 * values["logits"])
    torch.testing.assert_close(values["ce"], F.cross_entropy(student.logits, batch["labels"], label_smoothing=0.1))
    torch.testing.assert_close(values["logits"], functional.logits_kl(student.logits, teacher.logits, 2.0))


NEVER = {"before": 0, "after": 0}


@pytest.mark.parametrize(
    "terms",
    [{}, {"a": Constant(0.0, 1.0), "b": Constant(0, 1.0)}, {"a": Constant(1.0, 1.0, NEVER), "b": Constant(0.0, 1.0)}],
)
def test_nothing_to_learn_from_is_refused(terms: dict[str, LossTerm]) -> None:
    with pytest.raises(UserError, match=re.escape(f"loss={sorted(terms)}: no term has a weight above 0")):
        LossSum(terms)


def test_a_term_that_is_never_above_zero_is_left_out_altogether() -> None:
    terms = {"off": LogitsKL(0.0), "on": Constant(0.1, 1.0), "never": Hidden(3.0, schedule=NEVER)}
    loss = LossSum(terms)
    assert [name for name, _ in loss.items()] == list(loss.terms) == list(loss.weights) == ["on"]
    assert not loss.needs_teacher
    assert numbers(loss(ONE, None, {})[1]) == {"on": 1.0}


NOT_NUMBERS = [float("nan"), float("inf"), "much", None, True]


@pytest.mark.parametrize("weight", [-0.1, *NOT_NUMBERS])
@pytest.mark.parametrize("term", [CrossEntropy, LogitsKL, Hidden, MiniLM, RelationalKD])
def test_weight_is_a_finite_number_of_at_least_zero(term: Callable[..., LossTerm], weight: object) -> None:
    with pytest.raises(UserError, match=f"weight={weight} of "):
        term(weight=weight)


@pytest.mark.parametrize("temperature", [0, -1.0, *NOT_NUMBERS])
@pytest.mark.parametrize("term", [LogitsKL, DecoupledKD, Dist, StandardizedKL])
def test_temperature_is_above_zero(term: Callable[..., LossTerm], temperature: float) -> None:
    with pytest.raises(UserError, match=f"temperature={temperature}"):
        term(temperature=temperature)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, *NOT_NUMBERS])
@pytest.mark.parametrize("term", [CrossEntropy, HardLabel])
def test_label_smoothing_is_below_one(term: Callable[..., LossTerm], smoothing: float) -> None:
    with pytest.raises(UserError, match=f"label_smoothing={smoothing}"):
        term(label_smoothing=smoothing)


@pytest.mark.parametrize("multiplier", [-0.1, *NOT_NUMBERS])
@pytest.mark.parametrize("term", [Hidden, PatientKD, VariationalInformation])
def test_multiplier_of_the_learning_rate_is_at_least_zero(term: Callable[..., LossTerm], multiplier: object) -> None:
    with pytest.raises(UserError, match=f"lr_multiplier={multiplier}: must be a finite number >= 0"):
        term(lr_multiplier=multiplier)
    assert (term().lr_multiplier, term(lr_multiplier=0).lr_multiplier, term(lr_multiplier=7).lr_multiplier) == (1, 0, 7)


def test_needs_the_teacher_only_where_a_term_does() -> None:
    assert not LossSum({"ce": CrossEntropy()}).needs_teacher
    assert LossSum({"ce": CrossEntropy(), "logits": LogitsKL()}).needs_teacher


def test_taps_are_listed_once_in_order_of_the_terms() -> None:
    loss = LossSum({"a": Constant(1.0, 1.0), "b": Constant(1.0, 1.0), "c": Attention()})
    loss.terms["a"].links = [Link("layer2", "layer4"), Link("layer1", "layer2")]
    loss.terms["b"].links = [Link("layer2", "layer2")]
    loss.terms["c"].links = [Link("layer1", "layer2")]
    student, teacher = loss.taps()
    assert student == ["layer2", "layer1", "layer1.query", "layer1.key"]
    assert teacher == ["layer4", "layer2", "layer2.query", "layer2.key"]


# Tasks


@pytest.mark.parametrize("term", [DecoupledKD, Dist, StandardizedKL, HardLabel, LogitsKL])
def test_a_term_that_is_not_for_the_task_is_refused_with_alternatives(term: Callable[..., LossTerm]) -> None:
    with pytest.raises(UserError) as caught:
        LossSum({"ce": CrossEntropy(), "mine": term()}, task="regression")
    alternatives = "mse" if term is LogitsKL else "logits, mse"
    tasks = "multiclass and multilabel" if term is LogitsKL else "multiclass"
    message = f"loss term 'mine' is for {tasks} and the task is regression: take one of {alternatives}"
    assert str(caught.value) == message


def test_terms_that_are_for_every_task() -> None:
    for task in ("multiclass", "multilabel", "regression"):
        terms = {"ce": CrossEntropy(), "mse": LogitsMSE(), "hidden": Hidden(), "rkd": RelationalKD()}
        loss = LossSum(terms, task)
        assert {term.task for _, term in loss.items()} == {task}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_labels_of_a_multilabel_task_are_learnt_by_binary_cross_entropy(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).to(dtype)
    for smoothing in (0.0, 0.2):
        loss = LossSum({"ce": CrossEntropy(label_smoothing=smoothing)}, "multilabel")
        targets = labels.float() * (1 - smoothing) + smoothing / 2
        expected = F.binary_cross_entropy_with_logits(logits, targets)
        torch.testing.assert_close(loss(Features(logits), None, {"labels": labels})[0], expected)


def test_numbers_of_a_regression_are_learnt_by_squared_error() -> None:
    predictions, labels = torch.randn(5, 3), torch.randn(5, 3)
    loss = LossSum({"ce": CrossEntropy(2.0)}, "regression")
    total, values = loss(Features(predictions), None, {"labels": labels})
    torch.testing.assert_close(values["ce"], F.mse_loss(predictions, labels))
    torch.testing.assert_close(total, 2 * values["ce"])
    flat = loss(Features(predictions[:, :1]), None, {"labels": labels[:, 0]})[1]["ce"]
    torch.testing.assert_close(flat, (predictions[:, 0] - labels[:, 0]).square().mean())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_logits_of_a_multilabel_task_are_compared_label_by_label(divergence: Any) -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    loss = LossSum({"logits": LogitsKL(temperature=3.0, divergence=divergence)}, "multilabel")
    p, q = torch.sigmoid(teacher / 3), torch.sigmoid(student / 3)
    if divergence == "reverse":
        p, q = q, p
    middle = (p + q) / 2 if divergence == "jensen_shannon" else q

    def binary(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()

    expected = 9 * (binary(p, middle) + binary(q, middle)) / (2 if divergence == "jensen_shannon" else 1)
    torch.testing.assert_close(loss(Features(student), Features(teacher), {})[0], expected)


# Schedules


def test_weight_now_follows_the_schedule() -> None:
    term = CrossEntropy(2.0, schedule={"before": 0, "after": 3, "start": 0.2, "end": 0.6})
    assert term.weight_now == 0
    loss = LossSum({"mse": LogitsMSE(1.0), "ce": term})
    seen = {}
    for done in (0, 0.2, 0.3, 0.4, 0.6, 0.9):
        loss.at(done)
        seen[done] = term.weight_now
    assert seen == pytest.approx({0: 0, 0.2: 0, 0.3: 1.5, 0.4: 3, 0.6: 6, 0.9: 6})
    assert loss.weights == {"mse": 1.0, "ce": 6.0}


def test_a_switch_drops_a_term_and_its_value() -> None:
    loss = LossSum({"early": Constant(2.0, 3.0, OFF_AT_HALF), "late": Constant(5.0, 7.0, ON_AT_HALF)})
    for done, name, total in ((0.0, "early", 6), (0.499, "early", 6), (0.5, "late", 35), (0.999, "late", 35)):
        loss.at(done)
        value, values = loss(ONE, None, {})
        assert loss.weights.keys() == values.keys() == {name}
        assert value.item() == total


class Unread(Constant):
    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        raise AssertionError("a term that is off was computed")


def test_a_term_that_is_off_is_not_computed() -> None:
    loss = LossSum({"on": Constant(1.0, 1.0), "off": Unread(1.0, 1.0, ON_AT_HALF)})
    assert numbers(loss(ONE, None, {})[1]) == {"on": 1.0}
    loss.at(0.5)
    with pytest.raises(AssertionError, match="a term that is off was computed"):
        loss(ONE, None, {})


@pytest.mark.parametrize(
    ("schedules", "time"),
    [
        ([ON_AT_HALF], "0"),
        ([{"before": 0}], "0"),
        ([OFF_AT_HALF], "50"),
        ([{"before": 1, "after": 0, "end": 0.75}], "75"),
        ([OFF_AT_HALF, {"before": 0, "start": 0.5, "end": 0.9}], "50"),
        ([OFF_AT_HALF, {"before": 0, "start": 0.503, "end": 0.503}], "50"),
        ([{"after": 0, "start": 0.3, "end": 0.301}, {"before": 0, "start": 0.302, "end": 0.5}], "30.1"),
        ([OFF_AT_HALF, {**OFF_AT_HALF, "start": 0.7, "end": 0.7}, NEVER], "70"),
    ],
)
def test_a_time_without_any_weight_is_refused(schedules: list[dict[str, Any]], time: str) -> None:
    terms = {"abc"[i]: Constant(1.0, 1.0, schedule) for i, schedule in enumerate(schedules)}
    with pytest.raises(UserError, match=f"all weights are 0 when {re.escape(time)} % of the steps are done"):
        LossSum(terms)


@pytest.mark.parametrize(
    "schedules",
    [
        [OFF_AT_HALF, ON_AT_HALF],
        [{"before": 1, "after": 0}],
        [{"before": 0}, {"before": 1, "after": 0}],
        [OFF_AT_HALF, {"before": 0, "start": 0.4, "end": 1}],
        [OFF_AT_HALF, None],
    ],
)
def test_terms_may_relieve_each_other(schedules: list[dict[str, Any] | None]) -> None:
    loss = LossSum({"abc"[i]: Constant(1.0, 1.0, schedule) for i, schedule in enumerate(schedules)})
    for step in range(1000):
        loss.at(step / 1000)
        assert loss.weights
        assert loss(ONE, None, {})[0] > 0


def test_temperature_follows_its_schedule() -> None:
    student, teacher = Features(torch.randn(4, 3)), Features(torch.randn(4, 3))
    loss = LossSum({"logits": LogitsKL(temperature=2.0, temperature_schedule={"before": 4, "after": 1})})
    for done, temperature in ((0.0, 8.0), (0.5, 5.0), (1.0, 2.0)):
        loss.at(done)
        expected = functional.logits_kl(student.logits, teacher.logits, temperature)
        torch.testing.assert_close(loss(student, teacher, {})[0], expected)
    assert loss.weights == {"logits": 1.0}


@pytest.mark.parametrize("schedule", [{"before": 0}, {"after": 0}])
def test_a_temperature_of_zero_is_refused_at_any_time(schedule: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="temperature_schedule has a factor of 0"):
        LogitsKL(temperature_schedule=schedule)


def test_a_schedule_that_is_none_is_refused_by_every_kind_of_term() -> None:
    for term in (CrossEntropy, LogitsKL, Hidden, AttentionTransfer, SimilarityPreserving):
        with pytest.raises(UserError, match=r"schedule=.*: is null, or has some of before"):
            term(schedule={"befor": 0})
    with pytest.raises(UserError, match="schedule=linear: is null"):
        LogitsKL(temperature_schedule="linear")  # type: ignore[arg-type]


# Projectors


def states(width: int, batch: int = 2) -> Features:
    return Features(torch.randn(batch, 3), {"layer1": torch.randn(batch, 4, width)}, torch.ones(batch, 4))


def maps(width: int, size: int = 4) -> Features:
    return Features(torch.randn(2, 3), {"layer1": torch.randn(2, width, size, size)})


def prepared(projector: str, student: Features, teacher: Features, **options: Any) -> Hidden:
    term = Hidden(projector=projector, **options)
    term.links = [Link("layer1", "layer1")]
    term.prepare(student, teacher, 10)
    return term


@pytest.mark.parametrize(("projector", "equal", "made"), [("auto", False, True), ("auto", True, False),
                                                          ("always", False, True), ("always", True, True),
                                                          ("never", True, False)])  # fmt: skip
@pytest.mark.parametrize("kind", [states, maps])
def test_a_projector_is_made_where_it_should(
    kind: Callable[[int], Features], projector: str, equal: bool, made: bool
) -> None:
    narrow, wide = 6, 6 if equal else 10
    term = prepared(projector, kind(narrow), kind(wide))
    assert bool(term.own) == made
    assert term.describe(term.links[0]) == ({states: "linear", maps: "1×1 convolution"}[kind] if made else "")
    if made:
        layer = term.own[term.links[0].key]
        weight: Any = layer.weight
        assert isinstance(layer, nn.Linear if kind is states else nn.Conv2d)
        assert tuple(weight.shape) == ((wide, narrow) if kind is states else (wide, narrow, 1, 1))
        assert sum(p.numel() for p in term.parameters()) == wide * narrow + wide


def test_a_projector_that_is_not_wanted_is_not_made_where_it_is_needed() -> None:
    message = "projector=never, and layer1 is 6 wide where the teacher's layer1 is 10; projector=auto makes a projector"
    for kind in (states, maps):
        with pytest.raises(ValueError, match=f"^{message}$"):
            prepared("never", kind(6), kind(10))


@pytest.mark.parametrize("projector", ["Auto", "yes", None, True])
@pytest.mark.parametrize("term", [Hidden, PatientKD])
def test_projector_is_one_of_three(term: Callable[..., LossTerm], projector: object) -> None:
    with pytest.raises(UserError, match=f"projector={projector}: there are auto, always, never"):
        term(projector=projector)


def test_the_value_is_that_of_the_projected_states() -> None:
    student, teacher = states(6), states(10)
    term = prepared("auto", student, teacher)
    layer: Any = term.own["layer1_from_layer1"]
    projected = student.hidden["layer1"] @ layer.weight.T + layer.bias
    torch.testing.assert_close(term(student, teacher, {}), (projected - teacher.hidden["layer1"]).square().mean())


def test_feature_maps_are_projected_pixel_by_pixel_and_compared_on_the_smaller_grid() -> None:
    student, teacher = maps(6, size=8), maps(10, size=4)
    term = prepared("auto", student, teacher)
    layer: Any = term.own["layer1_from_layer1"]
    pooled = F.avg_pool2d(student.hidden["layer1"], 2)
    projected = torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], pooled) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(term(student, teacher, {}), (projected - teacher.hidden["layer1"]).square().mean())


def test_the_value_is_a_mean_over_links() -> None:
    hidden = {f"layer{n}": torch.randn(2, 4, 6) for n in (1, 2)}
    student, teacher = (
        Features(torch.randn(2, 3), hidden),
        Features(torch.randn(2, 3), {"layer1": torch.zeros(2, 4, 6)}),
    )
    term = Hidden()
    term.links = [Link("layer1", "layer1"), Link("layer2", "layer1")]
    each = [tensor.square().mean() for tensor in hidden.values()]
    torch.testing.assert_close(term(student, teacher, {}), (each[0] + each[1]) / 2)


# What is decided when terms meet a pair


def text_pair() -> tuple[Tapped, Tapped, Batch]:
    return bert(2, 16), bert(4, 24, seed=1), next(iter(Text().loader("val", batch_size=2)))


def image_pair() -> tuple[Tapped, Tapped, Batch]:
    torch.manual_seed(0)
    networks = mobilenetv3_small_half(3, MEAN, STD), resnet10t(3, MEAN, STD)
    return *networks, next(iter(Images().loader("val", batch_size=2)))


def test_attach_tells_what_learns_from_what() -> None:
    student, teacher, batch = text_pair()
    length = batch["input_ids"].shape[1]
    loss = LossSum(
        {"ce": CrossEntropy(), "hidden": Hidden(), "attention": Attention(layers="top"), "rkd": RelationalKD()}
    )
    rows = loss.attach(student, teacher, batch, 24)
    assert rows == [
        Row("hidden", "layer2", "layer1", [2, length, 24], [2, length, 16], "linear", 24 * 16 + 24),
        Row("hidden", "layer4", "layer2", [2, length, 24], [2, length, 16], "linear", 24 * 16 + 24),
        Row("attention", "layer4", "layer2", [2, length, 24], [2, length, 16], "queries, keys; 2 heads", 0),
        Row("rkd", "pooled", "pooled", [2, 24], [2, 16], "", 0),
    ]
    assert loss.taps() == (
        ["layer1", "layer2", "layer2.query", "layer2.key", "pooled"],
        ["layer2", "layer4", "layer4.query", "layer4.key", "pooled"],
    )


def test_attach_tells_what_learns_from_what_in_cnns() -> None:
    student, teacher, batch = image_pair()
    terms = {"hidden": Hidden(layers=[["stage2", "stage1"]]), "vid": VariationalInformation(layers="top")}
    rows = LossSum(terms).attach(student, teacher, batch, 16)
    convolutions = 288 * 512 + 512 + 512 * 512 + 512
    assert rows == [
        Row("hidden", "stage2", "stage1", [2, 128, 4, 4], [2, 8, 8, 8], "1×1 convolution", 8 * 128 + 128),
        Row("vid", "stage4", "stage4", [2, 512, 1, 1], [2, 288, 1, 1], "predictor", convolutions + 512),
    ]


def test_terms_on_logits_have_no_rows_and_need_no_taps() -> None:
    student, teacher, batch = text_pair()
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})
    assert loss.attach(student, teacher, batch, 24) == []
    assert loss.taps() == ([], [])
    assert LossSum({"ce": CrossEntropy()}).attach(student, None, batch, 24) == []


@pytest.mark.parametrize("pair", [text_pair, image_pair])
@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_attach_leaves_the_networks_as_they_were(
    pair: Callable[[], tuple[Tapped, Tapped, Batch]], modes: tuple[bool, bool]
) -> None:
    *networks, batch = pair()
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    networks[0].watch(["pooled"])
    before = [fingerprint.of_weights(network) for network in networks]
    loss = LossSum({"ce": CrossEntropy(), "hidden": Hidden(), "rkd": RelationalKD()})
    loss.attach(networks[0], networks[1], batch, 24)
    assert [fingerprint.of_weights(network) for network in networks] == before
    for network, mode in zip(networks, modes, strict=True):
        assert {module.training for module in network.modules()} == {mode}
        assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert [list(network(batch).hidden) for network in networks] == [["pooled"], []]
    assert all(module.training for module in loss.modules())


def test_attach_leaves_the_networks_as_they_were_where_a_term_does_not_fit() -> None:
    student, teacher, batch = text_pair()
    with pytest.raises(UserError, match="projector=never"):
        LossSum({"hidden": Hidden(projector="never")}).attach(student, teacher.eval(), batch, 24)
    assert student.training
    assert not teacher.training
    assert student(batch).hidden == teacher(batch).hidden == {}


def test_watching_captures_what_the_terms_read() -> None:
    student, teacher, batch = text_pair()
    loss = LossSum({"ce": CrossEntropy(), "hidden": Hidden(layers="first"), "attention": Attention(layers="top")})
    loss.attach(student, teacher, batch, 24)
    loss.watch(student, teacher)
    mine, theirs = student(batch), teacher(batch)
    assert mine.hidden.keys() == {"layer1", "layer2", "layer2.query", "layer2.key"}
    assert theirs.hidden.keys() == {"layer1", "layer2", "layer4.query", "layer4.key"}
    total, values = loss(mine, theirs, batch)
    total.backward()
    assert values.keys() == {"ce", "hidden", "attention"}
    assert all(p.grad is not None for name, p in loss.named_parameters())
    assert [name for name, _ in loss.named_parameters()] == [
        f"terms.hidden.own.layer{n}_from_layer{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    ]


class Failing(Constant):
    def __init__(self, error: Exception) -> None:
        super().__init__(1.0, 1.0)
        self.error = error

    def forward(self, student: Features, teacher: Features | None, batch: Batch) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("so\nwide"), KeyError("so wide"), IndexError("so wide"), RuntimeError("so wide")]
)
def test_attach_explains_in_one_line_whatever_a_term_raises(error: Exception) -> None:
    student, _, batch = text_pair()
    with pytest.raises(UserError, match=r"^loss term 'mine' does not fit this pair: .*so wide") as caught:
        LossSum({"ce": CrossEntropy(), "mine": Failing(error)}).attach(student, None, batch, 24)
    assert "\n" not in str(caught.value)


def test_attach_leaves_a_bug_alone() -> None:
    student, _, batch = text_pair()
    with pytest.raises(AttributeError):
        LossSum({"mine": Failing(AttributeError("a bug"))}).attach(student, None, batch, 24)


@pytest.mark.parametrize(
    ("term", "pair", "says"),
    [
        (LogitsKL(), "labels", r"student \[2, 3\] and teacher \[2, 4\] differ in shape"),
        (Hidden(layers="middle"), "text", "layers=middle: no such layer map"),
        (Hidden(layers=[["layer9", "layer1"]]), "text", "the teacher has no tap 'layer9'"),
        (Hidden(layers=3), "text", "layers=3: no such layer map"),  # type: ignore[arg-type]
        (Hidden(projector="never"), "text", "projector=never, and layer1 is 16 wide where the teacher's layer2 is 24"),
        (Hidden(projector="never"), "image", "projector=never, and stage1 is 8 wide where the teacher's stage1 is 64"),
        (Attention(), "image", "it reads the hidden states .*; take one of attention_transfer, hidden, sp"),
        (MiniLM(), "image", "it reads the hidden states .*; take one of attention_transfer, hidden, sp"),
        (AttentionTransfer(), "text", "it reads the feature maps .*; take one of attention, hidden, sp"),
        (VariationalInformation(), "text", "it reads the feature maps .*; take one of hidden, pkd, attention"),
        (PatientKD(), "image", r"vectors .*, and there is no stage1\.cls; take one of hidden, attention_transfer, sp"),
        (Hidden(), "deeper", "layers=uniform: the student has 4 layers and the teacher 2; name the pairs"),
        (PatientKD(), "one", "layers=skip: leaves out the last layer, and the student has no other; take top"),
    ],
)  # fmt: skip
def test_attach_names_the_term_that_does_not_fit_and_what_to_do(term: LossTerm, pair: str, says: str) -> None:
    student, teacher, batch = image_pair() if pair == "image" else text_pair()
    if pair == "deeper":
        student, teacher = teacher, student
    elif pair == "one":
        student = bert(1, 16)
    elif pair == "labels":
        teacher = bert(2, 16, labels=4)
    with pytest.raises(UserError, match=rf"^loss term 'mine' does not fit this pair: .*{says}") as caught:
        LossSum({"ce": CrossEntropy(), "mine": term}).attach(student, teacher, batch, 24)
    assert "\n" not in str(caught.value)


def test_a_network_whose_layers_have_no_name_is_paired_by_hand() -> None:
    batch = next(iter(Images(size=2).loader("val", batch_size=2)))
    loss = LossSum({"hidden": Hidden(layers=[["out", "pixels"]])})
    rows = loss.attach(Linear(), Linear(seed=1), batch, 16)
    assert rows == [Row("hidden", "out", "pixels", [2, 3], [2, 12], "linear", 12 * 3 + 3)]
    with pytest.raises(UserError, match="layers=uniform: the student has no taps called layerN or stageN; name pairs"):
        LossSum({"hidden": Hidden()}).attach(Linear(), Linear(seed=1), batch, 16)
