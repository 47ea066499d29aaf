"""Every pair in `conf/pair` with every term in `conf/loss` that fits it: attached, and trained for two steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from tiny import settings
from torch import Tensor

from distill import fingerprint, stages
from distill.app import CONF
from distill.build import build, build_all
from distill.data.base import DataSet
from distill.errors import UserError
from distill.features import Tapped
from distill.fit import Schedule, fit
from distill.losses import LossSum, LossTerm
from distill.module import DistillModule, parameter_groups
from distill.teacher import FrozenTeacher

PAIRS = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
TERMS = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))

each_pair = pytest.mark.parametrize("pair", PAIRS)


@dataclass
class Meeting:
    """A student that has met its teacher, both with random weights."""

    cfg: DictConfig
    data: DataSet
    teacher: FrozenTeacher
    student: Tapped

    def loss(self, *names: str) -> LossSum:
        """Attached to the pair; raises UserError where a term does not fit."""
        made = LossSum(build_all({name: self.cfg.loss[name] for name in names}, LossTerm), self.data.task)
        batch = next(iter(self.data.loader("val", batch_size=2)))
        made.attach(self.student, self.teacher.network, batch, self.data.sizes["train"])
        return made

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why a term does not fit, by term; empty for one that fits."""
        found = dict.fromkeys(TERMS, "")
        for name in TERMS:
            try:
                self.loss(name)
            except UserError as error:
                found[name] = str(error)
        return found

    @property
    def fitting(self) -> list[str]:
        return [name for name, reason in self.reasons.items() if not reason]


@pytest.fixture(scope="module")
def meet(compose: Callable[..., DictConfig]) -> Callable[[str], Meeting]:
    """A pair by name; a teacher is made once."""
    teachers: dict[str, tuple[DataSet, FrozenTeacher]] = {}
    met: dict[str, Meeting] = {}

    def made(pair: str) -> Meeting:
        model, _, size = pair.rpartition("_")
        if pair not in met:
            chosen = [f"model={model}", f"student={size}", "trainer=smoke", "data.limit=8", "optim.batch_size=4"]
            cfg = compose(*chosen, f"loss=[{','.join(TERMS)}]")
            torch.manual_seed(0)
            if model not in teachers:
                data = stages.data_set(cfg)
                network = build(cfg.teacher.network, Tapped, weights="scratch", **data.network_facts)
                teachers[model] = data, FrozenTeacher(network)
            data, teacher = teachers[model]
            student = build(cfg.student.network, Tapped, **data.network_facts)
            if cfg.student.init_layers is not None:
                stages.start_from(student, teacher.network, cfg.student.init_layers)
            met.clear()  # one student at a time
            met[pair] = Meeting(cfg, data, teacher, student)
        return met[pair]

    return made


def test_pairs_and_terms_were_found() -> None:
    assert len(PAIRS) > 2 and len(TERMS) > 2


@each_pair
def test_a_term_fits_the_pair_or_names_what_does(pair: str, meet: Callable[[str], Meeting]) -> None:
    met = meet(pair)
    assert {"ce", "logits", "hidden", "sp", "rkd"} <= set(met.fitting)
    assert ("attention" if pair.startswith("bert") else "attention_transfer") in met.fitting
    for name, reason in met.reasons.items():
        if not reason:
            continue
        assert reason.startswith(f"loss term {name!r} does not fit this pair: ")
        assert "\n" not in reason and not reason.endswith("…"), reason
        if named := re.search(r"; take (?:one of )?([\w, ]+)$", reason):
            others = re.split(", | or ", named[1])
            assert set(others) <= set(TERMS) and set(others) & set(met.fitting), reason
        else:
            taps = [tap for tap in met.student.places if "." not in tap]
            assert reason.endswith("it has " + ", ".join(taps)), reason


class Watch(pl.Callback):
    """Values of the terms, step by step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        assert isinstance(module, DistillModule)
        self.seen.append({"loss": loss.item(), **{name: value.item() for name, value in module.values.items()}})


@each_pair
def test_all_terms_that_fit_train_together(pair: str, meet: Callable[[str], Meeting], tmp_path: Path) -> None:
    met, watch = meet(pair), Watch()
    student, teacher = met.student, met.teacher
    names, digest = set(student.backbone.state_dict()), fingerprint.of_weights(teacher.network)
    loss = met.loss(*met.fitting)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert before, "no term has parameters of its own"
    loss.watch(student, teacher.network)
    fit(
        student, loss, met.data, Schedule(**met.cfg.optim), settings(tmp_path), stage="student", teacher=teacher,
        callbacks=[watch], checkpoints=tmp_path / "checkpoints",
    )  # fmt: skip
    for network in (student, teacher.network):
        network.watch([])

    assert [set(values) for values in watch.seen] == [{"loss", *met.fitting}] * 2
    assert torch.tensor([list(values.values()) for values in watch.seen]).isfinite().all(), watch.seen
    assert fingerprint.of_weights(teacher.network) == digest
    assert set(student.backbone.state_dict()) == names

    checkpoint: Any = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    saved = {name.removeprefix("loss."): v for name, v in checkpoint["state_dict"].items() if name.startswith("loss.")}
    assert saved.keys() == before.keys()
    assert not [name for name in before if torch.equal(saved[name], before[name])], "not changed by training"
    torch.testing.assert_close(dict(loss.state_dict()), saved, rtol=0, atol=0)
    states = checkpoint["optimizer_states"][0]["state"]
    trained = [
        (p, isinstance(part, LossTerm))
        for part in (student, *(term for _, term in loss.items()))
        for group in parameter_groups(part, 0.0, 0.0)
        for p in group["params"]
    ]
    assert sorted(states) == list(range(len(trained)))
    assert sum(own for _, own in trained) == len(list(loss.parameters())) > 0
    for state, (p, own) in zip(states.values(), trained, strict=True):
        assert state["exp_avg"].shape == p.shape
        assert not own or state["exp_avg"].any(), "no gradient reached it"
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
