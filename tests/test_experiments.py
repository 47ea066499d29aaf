"""Every file in conf/experiment runs through all stages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from distill.app import CONF
from distill.run import run

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs(name: str, compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    options = ["student=micro", "trainer=smoke", "logger=csv", "baseline=false", "optim.epochs=2", "optim.batch_size=8"]
    cfg = compose(f"experiment={name}", *options)
    document = run(cfg, tmp_path, name=name, command="test")
    assert json.loads((tmp_path / "report.json").read_text()) == document
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for term in cfg.loss:
        assert any(row.get(f"student/train_{term}") for row in rows), term
    if name == "two_stage":
        rows = [row for row in rows if any(row[f"student/train_{term}"] for term in cfg.loss)]
        on = [{term for term in cfg.loss if row[f"student/train_{term}"]} for row in rows]
        assert on == [{"hidden", "attention"}] * 4 + [{"ce", "logits"}] * 4
