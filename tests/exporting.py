"""Tiny networks for the tests of exports."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from distill.card import Card
from distill.export import export_image, export_text

LABELS = ["dansk", "eesti", "føroyskt", 'o\'zbek: "q"']
MEAN, STD, SIZE = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), (3, 32, 32)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "some", "text", "sea", "land", "##s", "North", "north"]
CARD = Card(
    name='tiny: "one"',
    summary="A network for tests.",
    dataset="made-up",
    accuracy=0.25,
    figures={"parameters": 1234, "accuracy": "0.250"},
    tags=["tests"],
)


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
        num_labels=len(LABELS),
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=False)


def cnn(name: str = "resnet10t") -> Any:
    """With BatchNorm statistics and a classifier that make the logits differ between inputs."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=len(LABELS))
    with torch.no_grad():
        nn.init.normal_(network.get_classifier().weight)
        network.train()(torch.randn(8, *SIZE))
    return network


def text_export(folder: Path, network: nn.Module | None = None, **kwargs: Any) -> dict[str, float]:
    return export_text(network or bert(), tokenizer(), LABELS, folder, CARD, **kwargs)


def image_export(folder: Path, network: nn.Module | None = None, **kwargs: Any) -> dict[str, float]:
    return export_image(network or cnn(), LABELS, MEAN, STD, SIZE, "bilinear", folder, CARD, **kwargs)


def text_batch(batch: int, length: int, seed: int = 1) -> dict[str, Tensor]:
    """Random pieces [batch, length]; the last example ends at the middle."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, (length + 1) // 2 :] = 0
    return {"input_ids": torch.randint(len(WORDS), (batch, length), generator=generator), "attention_mask": mask}


def image_batch(batch: int, seed: int = 1) -> dict[str, Tensor]:
    return {"pixels": torch.rand(batch, *SIZE, generator=torch.Generator().manual_seed(seed))}


class Exports(dict[str, Path]):
    """The exports that tests only read, by kind; with what the exports returned and what they printed."""

    differences: dict[str, dict[str, float]]
    printed: str


_shared = Exports()


def shared_exports(factory: pytest.TempPathFactory) -> Exports:
    """Made once a session, from networks in training mode with hooks, the CNN in channels_last."""
    if not _shared:
        root = factory.mktemp("exports")
        text, image = bert().train(), cnn().train().to(memory_format=torch.channels_last)
        for network in (text, image):
            network.register_forward_hook(lambda *_: 1 / 0)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            _shared.differences = {
                "text": text_export(root / "text", text),
                "image": image_export(root / "image", image),
            }
        _shared.printed = printed.getvalue()
        _shared.update({kind: root / kind for kind in ("text", "image")})
    return _shared
