"""Adding a term is one function, one class and one YAML file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.app import CONF

TRAIN = CONF.parent / "train.py"

TERM = '''
from torch import Tensor

from distill.features import Batch, Features
from distill.losses import LossTerm


def largest_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The largest difference of a logit, mean over the batch."""
    return (student - teacher).abs().amax(dim=-1).mean()


class Mine(LossTerm):
    def __init__(self, weight: float = 1.0, power: float = 1.0) -> None:
        super().__init__(weight)
        self.power = power

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        return largest_difference(student.logits, teacher.logits) ** self.power
'''
NODE = """
mine:
  _target_: my_terms.Mine
  weight: 0.5
  power: 2.0
"""
PAIR = ("model=mobilenet_v3", "student=tiny", "trainer=smoke", "logger=csv", "baseline=false")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with `my_terms.py` and `conf/loss/mine.yaml`."""
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text(NODE)
    (tmp_path / "my_terms.py").write_text(TERM)
    return tmp_path


def train(own: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRAIN), "--config-dir", str(own / "conf"), *PAIR, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(own)}
    return subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_term_of_ones_own_is_trained_with_logged_and_reported(own: Path) -> None:
    result = train(own, "loss=[ce,mine]", "loss.mine.weight=0.25", f"hydra.run.dir={own}/run")
    assert result.returncode == 0, result.stderr
    document = json.loads((own / "run" / "report.json").read_text())
    assert document["loss"]["mine"] == {"weight": 0.25, "power": 2.0}
    assert f"--config-dir {own}/conf" in document["run"]["command"]
    with (own / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def values(figure: str) -> list[float]:
        return [float(row[f"student/{figure}"]) for row in rows if row[f"student/{figure}"]]

    mine, ce, total = values("train_mine"), values("train_ce"), values("train_loss")
    assert len(mine) == len(total) == 2
    assert total == pytest.approx([0.25 * a + b for a, b in zip(mine, ce, strict=True)], rel=1e-4)
    assert all(norm > 0 for norm in values("grad_mine"))
    assert (own / "run" / "terms.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loss=[ce,mien]"], ["loss=mien", "logits, mine, "]),
        (["loss=[ce,mine]", "loss.mine.powr=3"], ["loss.mine.powr", "did you mean loss.mine.power?"]),
        (["loss=[ce,mine]", "++loss.mine.powr=3"], ["loss.mine.powr", "did you mean loss.mine.power?"]),
        (["loss=[ce,mine]", "+loss.mine.schedule={before: 0}"], ["loss.mine.schedule", "loss.mine.weight"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_with_it_is_one_line_that_knows_it(arguments: list[str], says: list[str], own: Path) -> None:
    before = sorted(own.rglob("*"))
    result = train(own, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert sorted(own.rglob("*")) == before
