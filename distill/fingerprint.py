"""Fingerprints: what decides whether two things are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def of_values(values: Any) -> str:
    """sha256 over the canonical JSON of plain values (sorted keys, no white space)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of named tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_weights(module: nn.Module) -> str:
    """sha256 over all parameters and buffers of a module, also those that a checkpoint leaves out (a normalisation)."""
    return of_tensors({**dict(module.named_buffers()), **module.state_dict()})
