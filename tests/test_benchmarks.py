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
    rows = step.interleaved(contest, step.SIDES, 2, step.steps, lambda: None)
    assert len(asked) == 2 * 2 * 4, "online alone, and once a step"
    assert {side: row["count"] for side, row in rows.items()} == dict.fromkeys(step.SIDES, 2 * (4 - 2))
    assert all(0 < row["low_quartile"] <= row["median"] <= row["high_quartile"] for row in rows.values())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_ratios_are_ours_to_by_hand() -> None:
    step = importlib.import_module("step")
    medians = {"by_hand online": 4.0, "ours online": 5.0, "by_hand alone": 1.0, "ours cached": 1.25}
    found = step.ratios({side: {"median": median} for side, median in medians.items()})
    assert found == {"cached": 1.25, "online": 1.25, "ceiling": 4.0, "gain": pytest.approx(0.8)}
    assert step.ratios({"by_hand alone": {"median": 2.0}, "ours cached": {"median": 3.0}}) == {"cached": 1.5}


def test_one_step_of_ours_is_the_step_by_hand(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same learning rate, gradients alike mean weights alike."""
    monkeypatch.setattr("distill.module.warmup_cosine", lambda step, total, warmup: 1.0)
    start = {name: value.clone() for name, value in contest.student.state_dict().items()}
    found = []
    for side in (contest.by_hand, contest.ours):
        contest.student.load_state_dict(start)
        side("online")
        found.append({name: value.clone() for name, value in contest.student.state_dict().items()})
    assert not torch.equal(found[0]["backbone.conv_stem.weight"], start["backbone.conv_stem.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_examples_a_second_are_those_after_the_first_two_steps(contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = importlib.import_module("throughput")
    monkeypatch.setattr(throughput, "WAYS", (("cached", False),))
    monkeypatch.setattr(contest, "ours", lambda mode: [0.0, 3.0, 5.0, 6.0, 7.0])
    row = throughput.measure(contest, 8, 3, lambda: None)["cached"]
    assert row == {"examples_per_second": 8.0, "rounds": [8.0] * 3, "seconds_of_first_steps": 5.0}
