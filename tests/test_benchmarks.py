"""The scripts in benchmarks/ run, and both sides of a contest do the same work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ignore_lightning

from distill.app import CONF

FOLDER = CONF.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    ignore_lightning()
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_takes(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        assert any(f"from {name} import" in path.read_text() for path in FOLDER.glob("*.py")), "nobody uses it"
        return
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert f"python benchmarks/{name}.py --out" in capsys.readouterr().out


@pytest.fixture
def contest(tmp_path: Path) -> Any:
    module = importlib.import_module("contest")
    data = module.FullSize(False, 2, 4)
    return module.Contest(module.configured("mobilenet_v3_tiny"), data, 1, tmp_path)


def test_both_sides_train_on_every_batch_and_are_timed(contest: Any, tmp_path: Path) -> None:
    step = importlib.import_module("step")
    asked: list[int] = []
    contest.teacher.register_forward_hook(lambda *_: asked.append(1))
    stem = contest.student.backbone.conv_stem.weight
    start = stem.clone()
    for mode, calls in (("online", 2 * 2 * 4), ("cached", 0)):
        asked.clear()
        row = step.duel(contest, mode, 2, lambda: None)
        assert len(asked) == calls, "once a step and side where it is asked at all"
        assert row["steps"] == 2 * (4 - 2)
        for side in ("ours", "by_hand", "ratio"):
            assert 0 < row[side]["low_quartile"] <= row[side]["median"] <= row[side]["high_quartile"]
    assert not torch.equal(stem, start)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_step_of_ours_has_all_that_passes_between_two_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("contest")
    clock = iter([1.0, 4.0, 6.0, 9.0, 16.0, 20.0])  # end of ours, end of by hand, three times
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    turns = module.Turns(iter([0.25, 0.5, 0.75]))
    for _ in range(3):
        turns.on_train_batch_end()
    assert (turns.ours, turns.by_hand) == ([2.0, 7.0], [0.5, 0.75])


def test_one_step_of_ours_is_the_step_by_hand(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same learning rate, gradients alike mean weights alike."""
    monkeypatch.setattr("distill.module.warmup_cosine", lambda step, total, warmup: 1.0)
    start = {name: value.clone() for name, value in contest.student.state_dict().items()}
    found = []
    for train in (lambda: list(contest.by_hand(contest.student, "online")), lambda: contest.ours("online")):
        contest.student.load_state_dict(start)
        train()
        found.append({name: value.clone() for name, value in contest.student.state_dict().items()})
    assert not torch.equal(found[0]["backbone.conv_stem.weight"], start["backbone.conv_stem.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_examples_a_second_are_those_after_the_first_two_steps(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = importlib.import_module("throughput")
    monkeypatch.setattr(throughput, "WAYS", (("cached", False),))
    monkeypatch.setattr(contest, "ours", lambda mode: [0.0, 3.0, 5.0, 6.0, 7.0])
    row = throughput.measure(contest, 8, 3, lambda: None)["cached"]
    assert row == {"examples_per_second": 8.0, "rounds": [8.0] * 3, "seconds_of_first_steps": 5.0}
