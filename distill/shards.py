"""A table on the disk, in shards of rows: written whole or not at all, verified and mapped into memory when opened."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill import fingerprint
from distill.errors import UserError, one_line

FACTS = "cache.json"
Columns = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of one row."""


@dataclass(frozen=True)
class Shards:
    """Where a table is kept and what is in it; shard s holds rows [s·size, (s+1)·size).

    Attributes:
        folder: of `cache.json` and the shards, `00000.safetensors` and so on.
        rows: of the whole table.
        size: rows of a shard; the last one may be smaller.
        columns: what a row is made of.
    """

    folder: Path
    rows: int
    size: int
    columns: Columns

    def __len__(self) -> int:
        return math.ceil(self.rows / self.size)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def span(self, number: int) -> range:
        """Rows of a shard."""
        return range(number * self.size, min(self.rows, (number + 1) * self.size))

    def missing(self) -> list[int]:
        """Shards that are still to be written."""
        return [number for number in range(len(self)) if not self.path(number).exists()]

    def bytes_of(self, numbers: Sequence[int]) -> int:
        """Bytes of these shards, without headers of less than 1 kB each."""
        row = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.columns.values())
        return row * sum(len(self.span(number)) for number in numbers)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write `cache.json`, for people to read."""
        if not (self.folder / FACTS).exists():
            self._place(FACTS, (json.dumps(facts, indent=2) + "\n").encode())

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard beside its place, flush it to the disk and rename it.

        Raises:
            UserError: it can't be written, as on a full disk.
        """
        digest = fingerprint.of_tensors(tensors)
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._place(self.path(number).name, save(content, metadata={"sha256": digest}))

    def _place(self, name: str, content: bytes) -> None:
        part = self.folder / f".{name}.{secrets.token_hex(4)}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.folder / name)
            finally:
                for leftover in self.folder.glob(f".{name}.*.part"):  # also what killed processes left
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (self.folder / name).exists():
                return  # another run has just written the same and tidied up
            raise UserError(
                f"cache {self.folder / name} can't be written ({one_line(error)}): "
                f"{self.bytes_of(self.missing()):,} bytes are still needed; finished shards are kept, and the next run "
                "goes on from them: make room, or set store=FOLDER or cache=off"
            ) from error

    def open(self) -> Table:
        """Verify every shard and map it into memory.

        Raises:
            UserError: a shard is missing or damaged.
        """
        return Table([self._read(number) for number in range(len(self))], self.size)

    def _read(self, number: int) -> dict[str, Tensor]:
        path = self.path(number)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                recorded = (file.metadata() or {}).get("sha256")
            if fingerprint.of_tensors(tensors) != recorded:
                raise ValueError("the checksum does not match")
            found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            rows = len(self.span(number))
            if found != {name: (dtype, (rows, *shape)) for name, (dtype, shape) in self.columns.items()}:
                raise ValueError(f"it holds {found}")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"cache {path} is damaged ({one_line(error)}); delete that file to compute it again"
            ) from error
        return tensors


class Table:
    """Rows of opened shards.

    Args:
        parts: the columns of each shard, [rows of the shard, ...].
        size: rows of a shard.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], size: int) -> None:
        self.parts, self.size = parts, size

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        """Columns [B, ...] of rows [B]; only what these rows touch is read from the disk."""
        numbers, places = rows // self.size, rows % self.size
        found = {name: tensor.new_empty((len(rows), *tensor.shape[1:])) for name, tensor in self.parts[0].items()}
        for number in numbers.unique().tolist():
            here = (numbers == number).nonzero().squeeze(1)
            for name, tensor in self.parts[number].items():
                found[name][here] = tensor[places[here]]
        return found
