"""A table on the disk: what was written comes back, or the damaged file is named."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import shards
from distill.errors import UserError
from distill.shards import Shards

ROWS, SIZE = 22, 5
COLUMNS = {"logits": (torch.float32, (3,)), "tail": (torch.float16, ()), "places": (torch.int32, (2,))}
HEADER = 1000


def table(rows: int = ROWS) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(-999, 999, (rows, *shape), generator=draw).to(dtype)
        for name, (dtype, shape) in COLUMNS.items()
    }


def written(folder: Path) -> Shards:
    made = Shards(folder, ROWS, SIZE, COLUMNS)
    for number in range(len(made)):
        made.write(number, {name: values[made.span(number)] for name, values in table().items()})
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_rows_come_back_wherever_they_are(tmp_path: Path) -> None:
    made = written(tmp_path / "a" / "b")
    assert names(made.folder) == [f"0000{number}.safetensors" for number in range(5)]
    assert [len(made.span(number)) for number in range(5)] == [5, 5, 5, 5, 2]
    opened = made.open()
    for rows in (torch.arange(ROWS), torch.randperm(ROWS), torch.tensor([21, 0, 0, 7]), torch.tensor([], dtype=int)):
        found = opened[rows]
        assert found.keys() == COLUMNS.keys()
        assert all(torch.equal(found[name], values[rows]) for name, values in table().items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    opened = written(tmp_path).open()
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(tmp_path / f"0000{number}.safetensors") in mapped for number in range(5))
    assert len(opened.parts) == 5


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    made = Shards(tmp_path, ROWS, SIZE, COLUMNS)
    assert made.missing() == [0, 1, 2, 3, 4]
    expected = made.bytes_of(made.missing())
    assert expected == ROWS * (3 * 4 + 2 + 2 * 4)
    written(tmp_path)
    assert made.missing() == []
    for number in range(5):
        assert 0 <= made.path(number).stat().st_size - made.bytes_of([number]) < HEADER


def test_facts_are_written_once_for_people(tmp_path: Path) -> None:
    made = Shards(tmp_path / "new", ROWS, SIZE, COLUMNS)
    made.describe({"views": 2, "data": "abc"})
    made.describe({"views": 3})
    assert json.loads((tmp_path / "new" / "cache.json").read_text()) == {"views": 2, "data": "abc"}
    assert names(tmp_path / "new") == ["cache.json"]


def refused(made: Shards, number: int, match: str = "") -> None:
    path = re.escape(str(made.path(number)))
    with pytest.raises(UserError, match=rf"^cache {path} is damaged \(.*{match}.*\); delete that file") as caught:
        made.open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [-1, -30, 3, 20])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int) -> None:
    made = written(tmp_path)
    flip(made.path(3), place)
    refused(made, 3)


@pytest.mark.parametrize("keep", [0, 40, 200, -1])
def test_a_truncated_shard_is_noticed(tmp_path: Path, keep: int) -> None:
    made = written(tmp_path)
    made.path(1).write_bytes(made.path(1).read_bytes()[:keep])
    refused(made, 1)
    made.path(1).unlink()
    refused(made, 1, "No such file")
    assert made.missing() == [1]


def test_a_shard_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    made = written(tmp_path)
    made.path(4).write_bytes(made.path(0).read_bytes())
    refused(made, 4, "it holds")


def test_a_file_that_we_did_not_write_is_refused(tmp_path: Path) -> None:
    made = written(tmp_path)
    save_file(load_file(made.path(2)), made.path(2))
    refused(made, 2, "checksum")


def test_what_a_killed_process_left_is_tidied_up(tmp_path: Path) -> None:
    for name in (".00002.safetensors.abc.part", ".00009.safetensors.abc.part", ".cache.json.x.part"):
        (tmp_path / name).write_bytes(b"half")
    made = written(tmp_path)
    made.describe({})
    assert names(tmp_path)[0] == ".00009.safetensors.abc.part"
    assert len(names(tmp_path)) == 7


def test_two_runs_may_write_the_same_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes first, and takes our half-written file for a leftover."""
    made, real = Shards(tmp_path, ROWS, SIZE, COLUMNS), os.fsync
    rows = {name: values[:5] for name, values in table().items()}

    def slow(file: int) -> None:
        monkeypatch.setattr(shards.os, "fsync", real)
        made.write(0, rows)

    monkeypatch.setattr(shards.os, "fsync", slow)
    made.write(0, rows)
    assert names(tmp_path) == ["00000.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of 64 kB, or where nothing can be mounted, one that says so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        real = os.fsync

        def full(file: int) -> None:
            if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > 64_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file)

        monkeypatch.setattr(shards.os, "fsync", full)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_finished_shards(small_disk: Path) -> None:
    columns = {"logits": (torch.float32, (100,))}
    made = Shards(small_disk / "cache", 50, 10, columns)
    rows = torch.randn(50, 100)

    def write() -> None:
        for number in made.missing():
            made.write(number, {"logits": rows[made.span(number)]})

    (small_disk / "other").write_bytes(b"x" * 52_000)
    with pytest.raises(UserError, match="No space left on device") as caught:
        write()
    kept = len(made) - len(made.missing())
    assert 1 <= kept <= 3
    assert names(made.folder) == [f"0000{number}.safetensors" for number in range(kept)]
    message = str(caught.value)
    assert str(made.path(kept)) in message
    assert f"{(50 - 10 * kept) * 400:,} bytes are still needed" in message
    assert "the next run goes on" in message and "\n" not in message
    first = made.path(0).stat().st_mtime_ns
    (small_disk / "other").unlink()
    write()
    assert made.path(0).stat().st_mtime_ns == first
    assert torch.equal(made.open()[torch.arange(50)]["logits"], rows)


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/abc/00000\.safetensors can't be written \(.*Not a directory"):
        written(tmp_path / "file" / "abc")
