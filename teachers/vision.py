"""timm classifiers as tapped networks, with random or loaded weights: teachers and students of both CNN families."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict

from distill.errors import UserError
from distill.features import TappedImage
from distill.hub import patient_only_if_reachable

LOAD_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What the loaders raise for weights that are absent, damaged, unsafe or of another network."""


def taps(stages: Sequence[str], pooled: str) -> dict[str, str]:
    """Taps `stage1`, `stage2`, … at these modules, in order of depth: feature maps [B, D, H, W]; and `pooled`: what
    the classifier reads [B, D]."""
    return {**{f"stage{i}": path for i, path in enumerate(stages, start=1)}, "pooled": pooled}


def network(
    architecture: str,
    places: Mapping[str, str],
    num_labels: int,
    mean: Sequence[float],
    std: Sequence[float],
    weights: str = "scratch",
) -> TappedImage:
    """A timm classifier.

    Args:
        architecture: timm's name, without a tag.
        places: taps, see `Tapped`.
        mean, std: of the data, per channel in units of [0, 1] pixels; for random weights: loaded ones bring their own.
        weights: "scratch" for random ones; a folder that timm's `local-dir:` loads (config.json, model.safetensors); a
            state dict (.safetensors, or anything else that `torch.load(weights_only=True)` reads), taken to want the
            normalisation of the architecture's published weights, since it does not say; or OWNER/NAME, a timm
            repository on the Hugging Face hub. Every weight has to be there and to fit. A classifier for another number
            of labels is replaced by a new one.

    Returns:
        The network; `head_loaded` says whether its classifier is the loaded one.

    Raises:
        UserError: the weights can't be read or reached, or belong to another architecture.
    """
    if weights == "scratch":
        return TappedImage(timm.create_model(architecture, num_classes=num_labels), places, mean, std)
    path = Path(weights).expanduser()
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?", weights):
        raise UserError(f"teacher.weights={weights}: no such file or folder; give scratch, hub, or an existing path")
    try:
        backbone = _from_file(architecture, path) if path.is_file() else _from_timm(weights, path)
    except LOAD_ERRORS as error:
        raise UserError(f"teacher.weights={weights}: {_reason(error)}; give weights of a {architecture}") from error
    found = backbone.pretrained_cfg["architecture"]
    if found != architecture:
        raise UserError(f"teacher.weights={weights}: is a {found}; this teacher is a {architecture}")
    head_loaded = backbone.num_classes == num_labels
    if not head_loaded:
        backbone.reset_classifier(num_labels)
    tapped = TappedImage(backbone, places, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
    tapped.head_loaded = head_loaded
    return tapped


def _from_timm(weights: str, path: Path) -> Any:
    """From a folder or the hub, with the classifier and everything else exactly as they are there."""
    if path.is_dir():
        return timm.create_model(f"local-dir:{path}", pretrained=True)
    with patient_only_if_reachable():
        return timm.create_model(f"hf-hub:{weights}", pretrained=True)


def _from_file(architecture: str, path: Path) -> Any:
    """From a state dict; the classifier's weight tells the number of classes."""
    state = load_state_dict(str(path), weights_only=True)
    head = f"{timm.get_pretrained_cfg_value(architecture, 'classifier')}.weight"
    if head not in state:
        raise ValueError(f"holds no {head}")
    backbone = timm.create_model(architecture, num_classes=len(state[head]))
    backbone.load_state_dict(state)
    return backbone


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[1:2] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[:1])
    return f"can't be loaded ({reason if len(reason) <= 160 else reason[:160] + '…'})"
