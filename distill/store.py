"""The store of trained teachers: found again by fingerprint, written whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distill import fingerprint
from distill.errors import UserError, one_line

WEIGHTS, RECORD = "model.safetensors", "record.json"


def save_teacher(folder: Path, network: nn.Module, record: dict[str, Any]) -> None:
    """Write weights and record into a folder that appears complete; one that is there already wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, part / WEIGHTS)
        (part / RECORD).write_text(json.dumps(record | {"sha256": fingerprint.of_weights(network)}, indent=2) + "\n")
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_teacher(folder: Path, network: nn.Module) -> dict[str, Any]:
    """Load stored weights into the network and return the record.

    Raises:
        UserError: the stored weights are damaged (their sha256 is not the recorded one).
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        network.load_state_dict(load_file(folder / WEIGHTS))
        if fingerprint.of_weights(network) != record["sha256"]:
            raise ValueError("the checksum does not match")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"stored teacher {folder} is damaged ({one_line(error)}); delete that folder to train it again"
        ) from error
    return record
