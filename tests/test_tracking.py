"""The record of a run, and a mirror of it that can't stop the run."""

from __future__ import annotations

import csv
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny import Images, Linear, schedule, settings

from distill.errors import UserError
from distill.fit import fit
from distill.losses import CrossEntropy, LossSum
from distill.tracking import MirrorLogger, RecordLogger, csv_logger, finish, wandb_logger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, loggers: list[Any], stage: str = "student", epochs: int = 2) -> None:
    fit(
        Linear(), LossSum({"ce": CrossEntropy()}), Images(size=2), schedule(epochs=epochs), settings(folder, loggers),
        stage=stage, checkpoints=folder / "checkpoints",
    )  # fmt: skip


def test_the_record_is_one_file_in_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    logger = csv_logger(tmp_path)
    logger.log_hyperparams({"a": 1})
    train(tmp_path, [logger])
    finish([logger], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]
    losses = [row["student/train_loss"] for row in rows(tmp_path) if row["student/train_loss"]]
    accuracies = [row["student/val_accuracy"] for row in rows(tmp_path) if row["student/val_accuracy"]]
    assert (len(losses), len(accuracies)) == (4, 2)


def test_stages_share_the_record_and_nothing_is_lost(tmp_path: Path) -> None:
    logger = csv_logger(tmp_path)
    train(tmp_path, [logger], "teacher", epochs=1)
    train(tmp_path, [logger], "student", epochs=1)
    finish([logger], {})
    found = rows(tmp_path)
    assert sum(bool(row["teacher/train_loss"]) for row in found) == 2
    assert sum(bool(row["student/train_loss"]) for row in found) == 2


def test_a_second_logger_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    for step, metrics in enumerate([{"a": 1.0}, {"b": 2.0}, {"a": 3.0, "b": 4.0}]):
        logger = RecordLogger(tmp_path)
        logger.log_metrics(metrics, step)
        logger.save()
    assert rows(tmp_path) == [
        {"a": "1.0", "b": "", "step": "0"}, {"a": "", "b": "2.0", "step": "1"}, {"a": "3.0", "b": "4.0", "step": "2"},
    ]  # fmt: skip


def test_the_same_key_at_the_same_step_is_kept_for_each_stage(tmp_path: Path) -> None:
    logger = RecordLogger(tmp_path)
    for stage in ("teacher", "baseline", "student"):
        logger.log_metrics({f"{stage}/accuracy": 0.5}, step=0)
    logger.save()
    assert [[key for key, value in row.items() if value == "0.5"] for row in rows(tmp_path)] == [
        ["teacher/accuracy"], ["baseline/accuracy"], ["student/accuracy"],
    ]  # fmt: skip


def test_the_mirror_is_a_run_folder_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert isinstance(address, str) or address[0] in ("127.0.0.1", "::1", "localhost"), f"network: {address}"
        local(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror = wandb_logger(tmp_path, "tiny")
    mirror.log_hyperparams({"seed": 0, "loss": {"ce": {"weight": 1.0}}})
    train(tmp_path, [mirror], epochs=1)
    mirror.run.log({"own": 1})
    finish([mirror], {"student/accuracy": 0.5})
    assert mirror.failed is None
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("run-*.wandb")
    wanted = (b"student/train_loss", b"student/val_accuracy", b"student/accuracy", b"tiny", b"distill")
    for _ in range(100):  # `finish` of W&B may return a moment before its own process has written everything
        if missing := [text for text in wanted if text not in record.read_bytes()]:
            time.sleep(0.1)
    assert not missing


class Broken:
    """A W&B run of which everything raises."""

    id = "broken"

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("W&B is\naway")


@pytest.mark.parametrize("when", ["init", "log"])
def test_a_failure_of_wandb_is_one_line_and_the_training_goes_on(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> Any:
        if when == "init":
            raise wandb.Error("W&B is\naway")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    mirror, record = wandb_logger(tmp_path, "tiny"), csv_logger(tmp_path)
    mirror.log_hyperparams({"seed": 0})
    train(tmp_path, [record, mirror])
    finish([record, mirror], {"student/accuracy": 0.5})
    kind = "Error" if when == "init" else "ConnectionError"
    line = f"warning: W&B is off for the rest of this run ({kind}: W&B is away); metrics.csv goes on\n"
    assert capsys.readouterr().err == line
    assert sum(bool(row["student/train_loss"]) for row in rows(tmp_path)) == 4


def test_ctrl_c_is_no_failure_of_wandb(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MirrorLogger(tmp_path, "tiny").guard(stop)


@pytest.mark.parametrize("mode", ["disabled", "shared", "on", ""])
def test_another_mode_is_refused(mode: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"logger\.wandb\.mode={mode}: there are offline and online"):
        wandb_logger(tmp_path, "tiny", mode=mode)


def test_a_record_forgets_what_is_going_to_be_logged_again(tmp_path: Path) -> None:
    def logger() -> RecordLogger:
        return RecordLogger(tmp_path)

    record = logger()
    for step in range(6):
        record.log_metrics({"student/train_loss": 1.0 + step}, step)
        record.log_metrics({"teacher/train_loss": 2.0 + step}, step)
    record.log_metrics({"student/accuracy": 0.5, "student/params": 7.0}, 0)
    record.log_metrics({"teacher/accuracy": 0.75, "teacher/params": 9.0}, 0)
    record.save()
    path = tmp_path / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",")])  # cut off by a kill
    logger().rewind("student", 4)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    assert [row["student/train_loss"] for row in rows if row["student/train_loss"]] == ["1.0", "2.0", "3.0", "4.0"]
    assert len([row for row in rows if row["teacher/train_loss"]]) == 6
    assert not any(row["student/params"] or row["teacher/params"] for row in rows)
    again = logger()
    again.log_metrics({"student/train_loss": 9.0}, 4)
    again.save()
    assert path.read_text().splitlines()[-1].split(",")[names.index("student/train_loss")] == "9.0"


def test_there_may_be_no_record_yet(tmp_path: Path) -> None:
    RecordLogger(tmp_path).rewind("student", 0)
    assert not (tmp_path / "metrics.csv").exists()
