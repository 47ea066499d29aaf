"""Classify texts or image files with an export: its own library, and nothing of the run that made it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.exported import load_network
from distill.layout import WEIGHTS_FILE, image_file, is_export, library_of

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The answer to one input.

    Attributes:
        input: the text, or the path of the image.
        labels: most probable first.
        probabilities: of these labels, by softmax over all classes.
    """

    input: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def probability(self) -> float:
        return self.probabilities[0]


def predict(export_dir: Path, inputs: Sequence[str], top: int = 1) -> list[Prediction]:
    """Classify each input; one prediction for each, in order.

    Args:
        export_dir: an `export/` folder.
        inputs: texts, or paths of image files.
        top: how many labels to give, at most as many as there are.

    Raises:
        UserError: no export in the folder, or it cannot be read; no inputs; an image is missing or unreadable; `top`
            below 1.
    """
    folder = Path(export_dir)
    if not is_export(folder):
        raise UserError(
            f"no export in {folder}: it needs config.json and {WEIGHTS_FILE}; give the export/ folder of a finished run"
        )
    if top < 1:
        raise UserError(f"top={top}: at least one label is needed; use 1 or more")
    if not inputs:
        raise UserError("nothing to classify: no inputs were given; give texts or image files")
    try:
        network = load_network(folder)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the export in {folder}: {error}".splitlines()[0] + "; export again") from error
    labels, batches = (
        _text(folder, network, inputs) if library_of(folder) == "transformers" else _images(network, inputs)
    )
    with torch.no_grad():
        probabilities = torch.cat([logits.softmax(-1) for logits in batches])
    best = probabilities.topk(min(top, len(labels)))
    return [
        Prediction(text, tuple(labels[i] for i in indices), tuple(values))
        for text, indices, values in zip(inputs, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _text(folder: Path, network: Any, inputs: Sequence[str]) -> tuple[list[str], Iterator[Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def logits() -> Iterator[Tensor]:
        for start in range(0, len(inputs), BATCH):
            chunk = list(inputs[start : start + BATCH])
            encoded = tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")
            yield network(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits

    return [network.config.id2label[i] for i in range(network.config.num_labels)], logits()


def _images(network: Any, inputs: Sequence[str]) -> tuple[list[str], Iterator[Tensor]]:
    config = resolve_data_config(model=network)
    transform = create_transform(**config)
    mode = "L" if config["input_size"][0] == 1 else "RGB"

    def logits() -> Iterator[Tensor]:
        for start in range(0, len(inputs), BATCH):
            yield network(torch.stack([transform(read_image(path, mode)) for path in inputs[start : start + BATCH]]))

    return list(network.pretrained_cfg["label_names"]), logits()


def read_image(path: str, mode: str) -> Image.Image:
    """An image file in this PIL mode.

    Raises:
        UserError: there is no such file, or PIL cannot read it.
    """
    try:
        with Image.open(image_file(path)) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); give a PNG, JPEG or similar file") from error


def table(predictions: Sequence[Prediction]) -> Table:
    """One row an input: its labels with their probabilities, most probable first."""
    out = Table("input", "label", "probability", box=None)
    out.columns[2].justify = "right"
    for prediction in predictions:
        probabilities = "\n".join(f"{value:.3f}" for value in prediction.probabilities)
        out.add_row(Text(prediction.input), Text("\n".join(prediction.labels)), probabilities)
    return out
