"""The store of trained teachers and of what they said: found again by fingerprint, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def save_logits(path: Path, logits: Tensor) -> None:
    """Write the teacher's logits [N, C], replacing the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({"logits": logits}, part, metadata={"sha256": fingerprint.of_tensors({"logits": logits})})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_logits(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The stored logits, or None if there are none yet.

    Raises:
        UserError: the file is damaged or of another shape than [N, C].
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            logits: Tensor = file.get_tensor("logits")
            recorded = file.metadata()["sha256"]
        if fingerprint.of_tensors({"logits": logits}) != recorded:
            raise ValueError("the checksum does not match")
        if tuple(logits.shape) != shape:
            raise ValueError(f"the shape is {tuple(logits.shape)} and has to be {shape}")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"stored logits {path} are damaged ({one_line(error)}); delete that file to compute them again"
        ) from error
    return logits
