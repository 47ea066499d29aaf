"""Checkpoints are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from distill.checkpoint import AtomicCheckpointIO, load_weights


def write_for_ever(path: Path, told: int) -> NoReturn:
    torch.set_num_threads(1)
    for step in count():
        AtomicCheckpointIO().save_checkpoint({"step": step, "state": torch.full((100_000,), float(step))}, path)
        os.write(told, f"{step} ".encode())
    raise AssertionError


def test_what_is_saved_is_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"step": step}, path)
        assert torch.load(path, weights_only=True) == {"step": step}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(_: Any, file: Any) -> None:
        file.write(b"half of it")
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "file" / "last.ckpt")


def test_bytes_are_on_the_disk_before_the_old_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed = tmp_path / "last.ckpt", []
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    monkeypatch.setattr("os.fsync", lambda _: flushed.append(torch.load(path, weights_only=True)))
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert flushed == [{"step": 1}]


def test_a_kill_while_writing_never_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for pause in range(20):
        hears, told = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(path, told)
        os.close(told)
        with os.fdopen(hears, "rb") as pipe:
            said = pipe.read(2)
            time.sleep(pause / 2000)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said += pipe.read()
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["step"] >= int(said.split()[-1])
        assert torch.equal(checkpoint["state"], torch.full((100_000,), float(checkpoint["step"])))
    AtomicCheckpointIO().save_checkpoint({"step": 0}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Dangerous:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "more": Dangerous()}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "last.ckpt")


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1, 1)}}, tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="bias"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "last.ckpt")
