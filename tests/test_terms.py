"""What every loss term keeps to. Terms are those that `conf/loss` has: a new one is tested without being named here."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tiny import bert
from torch import Tensor, nn

from distill.app import CONF
from distill.build import build
from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.losses import TASKS, LossSum, LossTerm
from distill.teacher import FrozenTeacher

TERMS = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))
MODELS = {"text": "bert", "image": "mobilenet_v3"}
LABELS, EXAMPLES, BATCH = 5, 24, 12

each_term = pytest.mark.parametrize("name", TERMS)


class Stages(Tapped):
    """A CNN of four convolutions with strides, without batch normalisation."""

    def __init__(self, width: int, strides: tuple[int, ...]) -> None:
        widths = [3, width, 2 * width, 2 * width, 3 * width]
        layers: list[tuple[str, nn.Module]] = [
            (f"stage{i + 1}", nn.Sequential(nn.Conv2d(*widths[i : i + 2], 3, stride=strides[i], padding=1), nn.ReLU()))
            for i in range(4)
        ]
        backbone = nn.Sequential()
        for name, layer in [*layers, ("pooled", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))]:
            backbone.add_module(name, layer)
        backbone.add_module("head", nn.Linear(3 * width, LABELS))
        super().__init__(backbone, {name: name for name in ("stage1", "stage2", "stage3", "stage4", "pooled")})

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone(batch["pixels"])


def network(family: str, role: str, seed: int) -> Tapped:
    """A tiny network in eval mode whose weights are large enough for two seeds to differ in everything, and sure of its
    answers, as a trained one is."""
    shapes: dict[tuple[str, str], Callable[[], Tapped]] = {
        ("text", "student"): lambda: bert(2, 16, labels=LABELS, dropout=0.0),
        ("text", "teacher"): lambda: bert(4, 24, labels=LABELS, dropout=0.0),
        ("image", "student"): lambda: Stages(4, (2, 2, 2, 1)),
        ("image", "teacher"): lambda: Stages(6, (2, 2, 2, 2)),
    }
    torch.manual_seed(0)
    made = shapes[family, role]()
    torch.manual_seed(seed)
    with torch.no_grad():
        for values in made.parameters():
            scale = (2 / values[0].numel()) ** 0.5 if values.ndim >= 2 else 0.1
            values.add_(scale * torch.randn_like(values) * (10 if len(values) == LABELS else 1))
    return made.eval()


def examples(family: str, task: str = TASKS[0]) -> dict[str, Tensor]:
    """Inputs, labels and indices; texts of lengths 3 to 9."""
    draw = torch.Generator().manual_seed(5)
    labels = {
        "multiclass": torch.randint(LABELS, (BATCH,), generator=draw),
        "multilabel": torch.randint(2, (BATCH, LABELS), generator=draw),
        "regression": torch.randn(BATCH, LABELS, generator=draw),
    }[task]
    batch = {"labels": labels, "index": torch.randperm(EXAMPLES, generator=draw)[:BATCH]}
    if family == "image":
        return {**batch, "pixels": torch.rand(BATCH, 3, 32, 32, generator=draw)}
    mask = (torch.arange(9) < 3 + torch.arange(BATCH)[:, None] % 7).long()
    return {**batch, "input_ids": torch.randint(1, 20, (BATCH, 9), generator=draw) * mask, "attention_mask": mask}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Case:
    """A term that is attached to two tiny networks of a family."""

    family: str
    term: LossTerm
    loss: LossSum
    student: Tapped
    teacher: FrozenTeacher
    batch: dict[str, Tensor]

    def features(self, batch: Batch) -> tuple[Features, Features]:
        self.loss.watch(self.student, self.teacher.network)
        return self.student(batch), self.teacher(batch)

    def value(self, batch: Batch | None = None) -> Tensor:
        """The unweighted value; what the term draws at random is the same in every call."""
        batch = self.batch if batch is None else batch
        mine, theirs = self.features(batch)
        torch.manual_seed(3)
        return self.term(mine, theirs, batch)


Node = Callable[[str, str], DictConfig]
Fits = Callable[..., list[Case]]


@pytest.fixture(scope="module")
def node(compose: Callable[..., DictConfig]) -> Node:
    """What the configuration has for a term and a family, composed once a family."""
    composed: dict[str, DictConfig] = {}

    def of(name: str, family: str) -> DictConfig:
        if family not in composed:
            composed[family] = compose(f"model={MODELS[family]}", "student=tiny", f"loss=[{','.join(TERMS)}]")
        return composed[family].loss[name]

    return of


@pytest.fixture(scope="module")
def attach(node: Node) -> Callable[..., Case]:
    """Build a term from its YAML and attach it; a first batch in training mode fills what it remembers.

    `role` and `seed` are the student's; `own` is the seed of the term's own weights.
    """

    def attached(
        name: str,
        family: str,
        *,
        role: str = "student",
        dtype: torch.dtype = torch.float64,
        task: str = TASKS[0],
        seed: int = 1,
        own: int = 0,
    ) -> Case:
        with default_dtype(dtype):
            student, teacher = network(family, role, seed), network(family, "teacher", 2)
            term: LossTerm = build(node(name, family), LossTerm)
            case = Case(
                family, term, LossSum({name: term}, task), student, FrozenTeacher(teacher), examples(family, task)
            )
            torch.manual_seed(own)
            case.loss.attach(student, teacher, case.batch, EXAMPLES)
            assert term.training
            case.value()
        case.loss.eval()
        return case

    return attached


@pytest.fixture(scope="module")
def fits(attach: Callable[..., Case]) -> Fits:
    """The cases of a term in the families that it fits, at least one."""

    def cases(name: str, **options: Any) -> list[Case]:
        found = []
        for family in MODELS:
            try:
                found.append(attach(name, family, **options))
            except UserError as error:
                if "does not fit this pair" not in str(error):
                    raise
        assert found, f"{name} fits none of {', '.join(MODELS)}"
        return found

    return cases


def text(cases: list[Case]) -> Case:
    """The one for text; skips where the term is not for text."""
    found = [case for case in cases if case.family == "text"]
    return found[0] if found else pytest.skip("not for text")


def alternatives(term: LossTerm) -> list[str]:
    return term.alternatives.split(", ")


def test_terms_were_found() -> None:
    assert len(TERMS) == len(set(TERMS)) > 2


@each_term
def test_a_term_that_does_not_fit_says_what_does(
    name: str, attach: Callable[..., Case], node: Node, fits: Fits
) -> None:
    fitting = {case.family for case in fits(name)}
    for family in set(MODELS) - fitting:
        with pytest.raises(UserError, match=f"^loss term '{name}' does not fit this pair: ") as caught:
            attach(name, family)
        message, term = str(caught.value), build(node(name, family), LossTerm)
        assert "\n" not in message and not message.endswith("…")
        places = [tap for tap in network(family, "student", 0).places if "." not in tap]
        assert term.alternatives in message or ", ".join(places) in message, message
        assert any(family in {case.family for case in fits(other)} for other in alternatives(term)), family


@each_term
def test_alternatives_are_other_terms(name: str, fits: Fits) -> None:
    for case in fits(name):
        assert set(alternatives(case.term)) <= set(TERMS)


@each_term
def test_a_term_is_for_the_tasks_that_it_names_and_no_other(name: str, attach: Callable[..., Case], fits: Fits) -> None:
    for case in fits(name):
        for task in TASKS:
            if task in case.term.tasks:
                assert attach(name, case.family, task=task).value().isfinite()
                continue
            with pytest.raises(UserError, match=f"the task is {task}: take one of {case.term.alternatives}$") as caught:
                attach(name, case.family, task=task)
            assert "\n" not in str(caught.value)
            assert any(task in fits(other)[0].term.tasks for other in alternatives(case.term))


@each_term
def test_the_student_gets_a_gradient_and_the_teacher_none(name: str, fits: Fits) -> None:
    for case in fits(name):
        value = case.value()
        assert value.shape == () and value.requires_grad and value.isfinite()
        value.backward()
        gradients = [p.grad for p in case.student.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients), case.family
        assert all(p.grad is None for p in case.teacher.parameters()), case.family
        for parameter_name, p in case.term.named_parameters():
            assert p.grad is not None and p.grad.any(), parameter_name


@each_term
def test_padding_changes_nothing(name: str, fits: Fits) -> None:
    case = text(fits(name))
    longer = dict(case.batch)
    for key in ("input_ids", "attention_mask"):
        longer[key] = nn.functional.pad(case.batch[key], (0, 7))
    torch.testing.assert_close(case.value(longer), case.value(), rtol=1e-9, atol=1e-12)


def rows(batch: Batch, places: Tensor | slice) -> dict[str, Tensor]:
    return {key: values[places] for key, values in batch.items()}


@each_term
def test_the_order_of_a_batch_changes_nothing(name: str, fits: Fits) -> None:
    for case in fits(name):
        order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(case.value(rows(case.batch, order)), case.value(), rtol=1e-9, atol=1e-12)


@each_term
def test_micro_batches_average_to_the_batch_where_the_docstring_says_so(name: str, fits: Fits) -> None:
    for case in fits(name):
        said = " ".join((type(case.term).__doc__ or "").split()).lower()
        found = re.search(r"(not )?a mean over examples", said)
        assert found, f"{type(case.term).__name__} does not say whether it is a mean over examples"
        remembered = copy.deepcopy(case.loss.state_dict())
        parts = [case.value(rows(case.batch, slice(start, start + 4))) for start in range(0, BATCH, 4)]
        mean, whole = torch.stack(parts).mean(), case.value()
        if found[1]:
            assert abs(mean - whole) > 1e-3 * abs(whole), case.family
        else:
            torch.testing.assert_close(mean, whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(case.loss.state_dict(), remembered, rtol=0, atol=0)


def leaves(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    """The same numbers, changed, as new leaves that ask for gradients."""
    hidden = {name: change(states.detach()).requires_grad_() for name, states in features.hidden.items()}
    return replace(features, logits=change(features.logits.detach()).requires_grad_(), hidden=hidden)


def gradients_of(
    term: LossTerm, student: Features, teacher: Features, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and gradients of the leaves that it depends on."""
    torch.manual_seed(3)
    value = term(student, teacher, batch)
    named = {"logits": student.logits, **student.hidden}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return value.detach(), {tap: gradient for tap, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("precision", ["fp16-mixed", "bf16-mixed", "bf16-true"])
@each_term
def test_half_precision_features_of_ten_thousand_stay_finite(name: str, precision: str, fits: Fits) -> None:
    """Gradients too, wherever the one that the same numbers have in fp32 is small enough for the format."""
    dtype = torch.float16 if precision == "fp16-mixed" else torch.bfloat16
    for case in fits(name, dtype=torch.float32):

        def huge(values: Tensor) -> Tensor:
            return (values * 1e4 / values.abs().max()).to(dtype)

        mine, theirs = (leaves(features, huge) for features in case.features(case.batch))
        expected, wide = gradients_of(case.term, leaves(mine, Tensor.float), leaves(theirs, Tensor.float), case.batch)
        if precision == "bf16-true":
            case.term.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "bf16-true"):
            value, gradients = gradients_of(case.term.train(), mine, theirs, case.batch)
        assert value.dtype == torch.float32
        assert expected.isfinite() and value.isfinite(), case.family
        if not case.term.own:  # whose weights are in half precision
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        assert gradients.keys() == wide.keys() != set()
        for tap, gradient in gradients.items():
            assert gradient.dtype == dtype and wide[tap].isfinite().all(), tap
            fitting = wide[tap].abs() < torch.finfo(dtype).max / 2
            assert not gradient.isnan().any() and gradient[fitting].isfinite().all(), tap


@each_term
def test_a_text_without_any_token_stays_finite(name: str, fits: Fits) -> None:
    case = text(fits(name))
    mine, theirs = case.features(case.batch)
    assert mine.mask is not None
    mask = mine.mask.clone()
    mask[4] = 0
    mine, theirs = (replace(leaves(features, Tensor.clone), mask=mask) for features in (mine, theirs))
    value, gradients = gradients_of(case.term, mine, theirs, case.batch)
    assert value.isfinite() and gradients
    for tap, gradient in gradients.items():
        assert gradient.isfinite().all(), tap


def made_identities(term: LossTerm) -> bool:
    """Turn projectors into identities; False where the term has other modules of its own."""
    for module in term.own.values():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
        else:
            return False
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    return True


@each_term
def test_a_copy_of_the_teacher_is_the_best_student(name: str, attach: Callable[..., Case], fits: Fits) -> None:
    for case in fits(name):
        if not case.term.needs_teacher:
            pytest.skip("reads no teacher")

        def value(seed: int, family: str = case.family) -> Tensor:
            made = attach(name, family, role="teacher", seed=seed)
            if not made_identities(made.term):
                pytest.skip(f"{name} has random modules of its own between the networks")
            return made.value()

        least, *others = (value(seed) for seed in (2, 11, 12, 13))
        assert all(least < other for other in others), (case.family, least, others)


@each_term
def test_its_own_state_makes_the_round_trip(name: str, attach: Callable[..., Case], fits: Fits) -> None:
    for case in fits(name):
        fresh = attach(name, case.family, own=1)
        if case.term.state_dict():
            assert fresh.value() != case.value(), "the state of the term decides nothing"
        fresh.loss.load_state_dict(copy.deepcopy(case.loss.state_dict()))
        torch.testing.assert_close(fresh.value(), case.value(), rtol=0, atol=0)
