"""The store gives back what was put into it, or says which part of it is damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import Linear, cnn
from torch import nn

from distill import fingerprint, store
from distill.errors import UserError


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    store.save_teacher(tmp_path / "teachers" / "abc", Linear(seed=1), {"name": "one"})
    return tmp_path / "teachers" / "abc"


def test_a_teacher_comes_back_with_its_record(tmp_path: Path) -> None:
    first, second = cnn(seed=1), cnn(seed=2)
    assert fingerprint.of_weights(first) != fingerprint.of_weights(second)
    store.save_teacher(tmp_path / "a" / "b", first, {"name": "resnet", "seed": 1})
    record = store.load_teacher(tmp_path / "a" / "b", second)
    assert (record["name"], record["seed"]) == ("resnet", 1)
    assert record["sha256"] == fingerprint.of_weights(second) == fingerprint.of_weights(first)
    assert files(tmp_path) == ["a/b/model.safetensors", "a/b/record.json"]


def refused_teacher(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=rf"^stored teacher {re.escape(str(folder))} is damaged \(.*{match}") as caught:
        store.load_teacher(folder, Linear())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [-1, -50, 3, 20])
def test_a_flipped_bit_of_a_teacher_is_noticed(teacher: Path, place: int) -> None:
    flip(teacher / "model.safetensors", place)
    refused_teacher(teacher, "")


@pytest.mark.parametrize("name", ["model.safetensors", "record.json"])
@pytest.mark.parametrize("keep", [0, 40])
def test_a_truncated_teacher_is_noticed(teacher: Path, name: str, keep: int) -> None:
    path = teacher / name
    path.write_bytes(path.read_bytes()[:keep])
    refused_teacher(teacher, "")


def test_a_teacher_without_a_file_is_noticed(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    refused_teacher(teacher, r"model\.safetensors")


@pytest.mark.parametrize("record", [[], {}, "x", None])
def test_a_record_that_is_none_is_noticed(teacher: Path, record: object) -> None:
    (teacher / "record.json").write_text(json.dumps(record))
    refused_teacher(teacher, "")


def test_a_teacher_of_another_shape_is_noticed(teacher: Path) -> None:
    with pytest.raises(UserError, match="size mismatch"):
        store.load_teacher(teacher, Linear(labels=4))


def test_the_first_of_two_teachers_stays(teacher: Path) -> None:
    store.save_teacher(teacher, Linear(seed=2), {"name": "two"})
    assert store.load_teacher(teacher, Linear())["name"] == "one"
    assert files(teacher.parent) == ["abc/model.safetensors", "abc/record.json"]


def test_the_first_stays_also_when_it_appears_during_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "abc", fingerprint.of_weights

    def slow(network: nn.Module) -> str:
        monkeypatch.setattr(fingerprint, "of_weights", real)
        store.save_teacher(folder, Linear(seed=1), {"name": "one"})
        return real(network)

    monkeypatch.setattr(fingerprint, "of_weights", slow)
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    store.save_teacher(folder, Linear(seed=2), {"name": "two"})
    assert store.load_teacher(folder, Linear())["name"] == "one"
    assert files(tmp_path) == ["abc/model.safetensors", "abc/record.json"]


def failing(_: Any, path: Path, **__: Any) -> None:
    Path(path).write_bytes(b"half")
    raise OSError("No space left on device")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "save_file", failing)
    with pytest.raises(OSError, match="No space"):
        store.save_teacher(tmp_path / "teachers" / "abc", Linear(), {})
    assert [path.name for path in tmp_path.rglob("*")] == ["teachers"]


def test_a_failed_rename_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        store.save_teacher(tmp_path / "abc", Linear(), {})
    assert files(tmp_path) == []
