"""A run that was interrupted goes on, to what it would have been."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import Images, Text, bert, cnn, schedule, settings
from torch import Tensor

from distill.app import CONF
from distill.errors import UserError
from distill.fit import fit
from distill.losses import Contrastive, CrossEntropy, LogitsKL, LossSum
from distill.resume import FILE, Progress, interrupted
from distill.teacher import FrozenTeacher
from distill.tracking import RecordLogger

TRAIN = CONF.parent / "train.py"


class Stop(pl.Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


def train(folder: Path, text: bool, resumed: bool = False, stop: int | None = None) -> dict[str, Tensor]:
    """Weights after five epochs, with dropout or augmentation, projections and a memory of the loss."""
    data: Any = Text() if text else Images()
    student, teacher = (bert(), bert(3, 24, seed=1)) if text else (cnn(), cnn(seed=1))
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})
    if text:
        loss = LossSum({"ce": CrossEntropy(), "crd": Contrastive(negatives=8, embedding=4)})
    loss.attach(student, teacher, next(iter(data.loader("val", batch_size=2))), data.sizes["train"])
    loss.watch(student, teacher)
    shared = replace(settings(folder, [RecordLogger(folder)]), resumed=resumed)
    plan, stops = schedule(epochs=5, augment=not text), [] if stop is None else [Stop(stop)]
    module = fit(
        student, loss, data, plan, shared, stage="student", teacher=FrozenTeacher(teacher), callbacks=stops,
        checkpoints=folder / "checkpoints",
    )  # fmt: skip
    shared.loggers[0].save()
    return dict(module.state_dict())


def record(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [
        {name: value for name, value in row.items() if "latency" not in name and "throughput" not in name}
        for row in rows
    ]


@pytest.mark.parametrize("stop", [0, 3])
@pytest.mark.parametrize("text", [True, False], ids=["text", "images"])
def test_an_interrupted_training_ends_with_the_same_weights_and_record(text: bool, stop: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", text)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", text, stop=stop)
    assert (tmp_path / "parts" / "checkpoints" / "last.ckpt").exists() == (stop > 0)
    parts = train(tmp_path / "parts", text, resumed=True)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    rows = record(tmp_path / "whole")
    assert record(tmp_path / "parts") == rows
    assert sum("student/val_accuracy" in row for row in rows) == 5
    again = train(tmp_path / "parts", text, resumed=True)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert record(tmp_path / "parts") == rows, "nothing is left to train"


def test_without_the_state_of_the_random_numbers_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", True, stop=3)
    monkeypatch.setattr("distill.checkpoint.RandomState.on_train_start", lambda *_: None)
    parts = train(tmp_path / "parts", True, resumed=True)
    assert not torch.equal(parts["student.backbone.classifier.weight"], whole["student.backbone.classifier.weight"])


def test_a_checkpoint_of_another_teacher_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, False, stop=3)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["distill"]["teacher"] = "0" * 64
    torch.save(checkpoint, path)
    with pytest.raises(
        UserError, match=r"last\.ckpt: was made with another teacher \(sha256 000000000000… and now None"
    ):
        train(tmp_path, False, resumed=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt: can't be read .* start a new run without resume$"):
        train(tmp_path, False, resumed=True)


RUN = [
    "model=mobilenet_v3", "student=tiny", "data.limit=40", "data.size=32", "teacher.optim.epochs=1",
    "teacher.allow_weak=true", "optim.epochs=12", "optim.batch_size=16", "callbacks.evaluation.repeats=3",
    "callbacks.evaluation.warmup=1", "trainer.log_every_n_steps=1", "logger=csv",
]  # fmt: skip


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(TRAIN), *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen[str], path: Path) -> None:
    """kill -9 as soon as a file is there."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finished(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(start(*RUN, f"hydra.run.dir={whole}", cwd=tmp_path))
    kill_when(start(*RUN, f"hydra.run.dir={parts}", cwd=tmp_path), parts / "checkpoints" / "baseline" / "last.ckpt")
    assert json.loads((parts / FILE).read_text())["resumed"] == 0
    kill_when(start(f"resume={parts}", cwd=tmp_path), parts / "checkpoints" / "last.ckpt")
    assert not (parts / "report.json").exists()
    out = finished(start("resume=parts", cwd=tmp_path))
    assert "  reused from " in out
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (whole, parts))
    assert two["student"]["digest"] == one["student"]["digest"]
    for network in ("teacher", "baseline", "student"):
        assert two[network]["metrics"] == one[network]["metrics"]
    assert (one["run"]["resumed"], two["run"]["resumed"]) == (0, 2)
    assert two["run"]["command"] == one["run"]["command"].replace("whole", "parts")
    assert set(two["run"]["seconds"]) == set(one["run"]["seconds"])
    assert None not in two["run"]["seconds"].values()
    trained = [[row for row in record(folder) if "teacher/train_loss" not in row and "teacher/val_accuracy" not in row]
               for folder in (whole, parts)]  # fmt: skip
    assert trained[0] == trained[1]
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"], "resuming makes no other run folder"

    again = start("resume=parts", cwd=tmp_path)
    assert again.communicate()[1].startswith("error: resume=parts: that run is finished")
    assert again.returncode == 1


def made(folder: Path, **changes: Any) -> Path:
    """A run folder as one that was just started leaves it."""
    folder.mkdir()
    keys = ("data", "teacher", "student", "loss", "trainer", "callbacks", "export", "seed", "store")
    (folder / "config.yaml").write_text("".join(f"{key}: 1\n" for key in keys))
    Progress(**{"name": "a", "command": "b", "started": "c", "folder": str(folder), **changes}).write()
    return folder


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    assert interrupted(str(run), [f"resume={run}"])[1].resumed == 1
    with pytest.raises(UserError, match=r"^resume=.*run goes on with the configuration of that run, and seed=3 would"):
        interrupted(str(run), [f"resume={run}", "seed=3"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        interrupted(str(tmp_path / "nowhere"), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: is not a run folder"):
        interrupted(str(tmp_path / "empty"), [])
    moved = run.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"moved: that run was started in .*run; move the folder back to go on$"):
        interrupted(str(moved), [])
    (moved / FILE).write_text("{")
    with pytest.raises(UserError, match=r"its progress\.json can't be read .*; start a new run without resume$"):
        interrupted(str(moved), [])
    (moved / "report.json").write_text("{}")
    with pytest.raises(UserError, match="that run is finished"):
        interrupted(str(moved), [])
