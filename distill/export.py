"""Write a trained network as a folder that others can load without this package.

    export/  model.safetensors  config.json  README.md  model.onnx  and, for text, the tokenizer's files

A BERT loads with `AutoModelForSequenceClassification` and `AutoTokenizer` `.from_pretrained(folder)`, a CNN with
`timm.create_model("local-dir:FOLDER", pretrained=True)`. Nothing in the folder needs unpickling. A folder appears under
its name only after what was written has been loaded again and compared with the network.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.export import Dim

from distill.card import Card, model_card
from distill.errors import UserError
from distill.exported import quiet_transformers, verify
from distill.layout import ONNX_FILE, is_export

TOLERANCE = 1e-3
"""Largest difference of an exported format's logits from PyTorch's, fp32 on the CPU; see `exported.verify`."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SOURCE_FACTS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""What timm's configuration says of an architecture's published checkpoint, and would be wrong of other weights."""


def export_text(
    backbone: Any,
    tokenizer: Any,
    label_names: Sequence[str],
    folder: Path,
    card: Card,
    *,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Export a transformers sequence classifier and its tokenizer; see `_export` for what is common to both kinds.

    `model.onnx` takes `input_ids` and `attention_mask`, int64 [batch, length], both dimensions free, and gives `logits`
    [batch, C]. The tokenizer truncates to what the network's position embeddings can hold.
    """
    network, labels = clean_copy(backbone), check_labels(label_names, backbone.config.num_labels)
    network.config.id2label = dict(enumerate(labels))
    network.config.label2id = {label: i for i, label in enumerate(labels)}
    network.config.problem_type = "single_label_classification"
    network.config._name_or_path = ""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, network.config.max_position_embeddings)

    def write(into: Path) -> None:
        with quiet_transformers():
            network.save_pretrained(into)
            tokenizer.save_pretrained(into)
        ids = torch.ones(2, 3, dtype=torch.long)
        batch, length = Dim("batch"), Dim("length")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        write_onnx(_Logits(network), inputs, {name: {0: batch, 1: length} for name in inputs}, into / ONNX_FILE, labels)
        (into / "README.md").write_text(model_card(card, "transformers", labels), encoding="utf-8")

    return _export(network, folder, write, tolerance)


def export_image(
    backbone: Any,
    label_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    input_size: Sequence[int],
    interpolation: str,
    folder: Path,
    card: Card,
    *,
    crop_pct: float = 1.0,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Export a timm classifier; see `_export` for what is common to both kinds.

    `model.onnx` takes `pixels`, float32 [batch, *input_size], normalised as timm's transform gives them, with a free
    batch, and gives `logits` [batch, C].

    Args:
        mean, std: per channel, in units of [0, 1] pixels.
        input_size: (channels, height, width).
        crop_pct: part of the resized image that the centre crop keeps.
    """
    network, labels = clean_copy(backbone), check_labels(label_names, backbone.num_classes)
    network.pretrained_cfg = {k: v for k, v in dict(backbone.pretrained_cfg).items() if k not in SOURCE_FACTS}
    preprocessing = {
        "input_size": tuple(input_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }

    def write(into: Path) -> None:
        save_for_hf(
            network,
            str(into),
            model_config={"label_names": labels},
            safe_serialization=True,
            data_config=preprocessing,
        )
        inputs = {"x": torch.zeros(2, *input_size)}
        write_onnx(network, inputs, {"x": {0: Dim("batch")}}, into / ONNX_FILE, labels, names=["pixels"])
        (into / "README.md").write_text(model_card(card, "timm", labels), encoding="utf-8")

    return _export(network, folder, write, tolerance)


def _export(network: nn.Module, folder: Path, write: Any, tolerance: float) -> dict[str, float]:
    """Write into a hidden sibling folder, verify what was written there, and only then put it in the place of `folder`.

    The network that the caller holds is not touched: not its mode, device, memory format or hooks.

    Returns:
        format ("transformers" or "timm", and "onnx") -> largest absolute difference of its logits from PyTorch's.

    Raises:
        UserError: the label names do not fit; `folder` holds something that is not an export; it cannot be written (no
            space).
        RuntimeError: an exported format disagrees with PyTorch by more than `tolerance`. In every case what was there
            stays.
    """
    try:
        with replaced(Path(folder)) as into:
            write(into)
            return verify(into, network, tolerance)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write the export {folder}: {reason}; "
            "make room or choose another folder (what was there is untouched)"
        ) from error


class _Logits(nn.Module):
    """A sequence classifier as a function of two tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def clean_copy(module: nn.Module) -> Any:
    """A copy without hooks, in eval mode, fp32, on the CPU, in the default memory format; `module` is not touched."""
    hooks: dict[int, Any] = {id(child.__dict__[name]): OrderedDict() for child in module.modules() for name in HOOKS}
    copied = copy.deepcopy(module, hooks)
    return copied.cpu().float().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def check_labels(label_names: Sequence[str], classes: int) -> list[str]:
    """The names as a list.

    Raises:
        UserError: there is not one name for each of the network's classes, or two are the same.
    """
    labels = [str(name) for name in label_names]
    if len(labels) != classes:
        raise UserError(f"{len(labels)} label names for a network with {classes} classes; give one name a class")
    if len(set(labels)) != len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise UserError(f"label name {twice!r} occurs twice: names are keys in the export; make them differ")
    return labels


def write_onnx(
    network: nn.Module,
    inputs: dict[str, Tensor],
    dynamic: dict[str, dict[int, Any]],
    path: Path,
    label_names: Sequence[str],
    names: Sequence[str] | None = None,
) -> None:
    """Write fp32 ONNX with the output `logits`, the label names as metadata (JSON) and no paths of this machine.

    Args:
        inputs: example inputs by argument name of `forward`; dimensions that are free must not be 1.
        dynamic: argument name -> dimension -> its name.
        names: names of the ONNX inputs, where they differ from those of the arguments.
    """
    with warnings.catch_warnings():
        # Two inputs share the dimensions `batch` and `length`; the exporter says so once for each.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        program = torch.onnx.export(
            network,
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic,
            input_names=list(names or inputs),
            output_names=["logits"],
        )
    if program is None:
        raise RuntimeError(f"the ONNX exporter returned nothing for {type(network).__name__}")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props["label_names"] = json.dumps(list(label_names), ensure_ascii=False)
    program.save(path)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `folder`; it takes its place if the block succeeds, else it is removed.

    Files are on the disk before the exchange. The exchange is two renames; if the second fails the first is taken back.

    Raises:
        UserError: `folder` exists and is neither empty nor an export: it would be lost.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not is_export(folder):
        raise UserError(
            f"{folder} is there and is not an export: it would be replaced as a whole; choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    new, old = workspace / "new", workspace / "old"
    try:
        new.mkdir()
        yield new
        for path in [*new.rglob("*"), new]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
