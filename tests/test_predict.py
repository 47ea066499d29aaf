"""Predictions from an export folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exporting import LABELS, MEAN, STD, Exports, bert, cnn, shared_exports, tokenizer
from PIL import Image
from rich.console import Console

from distill.errors import UserError
from distill.predict import Prediction, predict, table


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return shared_exports(tmp_path_factory)


def test_text(exports: Exports) -> None:
    texts = ["some text", "seas", "North land " * 40, *["north sea"] * 40]
    answers = predict(exports["text"], texts, top=3)
    assert [answer.input for answer in answers] == texts
    for text, answer in zip(texts[:4], answers, strict=False):
        inputs = tokenizer()(text, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            expected = bert().eval()(**inputs).logits.softmax(-1)[0].topk(3)
        assert answer.labels == tuple(LABELS[i] for i in expected.indices)
        assert answer.probabilities == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert (answers[0].label, answers[0].probability) == (answers[0].labels[0], answers[0].probabilities[0])
    assert len({answer.probability for answer in answers[:4]}) == 4


def test_images(exports: Exports, tmp_path: Path) -> None:
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "noise.png")
    Image.new("L", (50, 20), 120).save(tmp_path / "grey.jpg")
    first, second = predict(exports["image"], [str(tmp_path / "noise.png"), str(tmp_path / "grey.jpg")], top=99)
    inputs = (pixels.permute(2, 0, 1)[None] / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with torch.no_grad():
        expected = cnn().eval()(inputs).softmax(-1)[0]
    assert dict(zip(first.labels, first.probabilities, strict=True)) == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-4
    )
    assert first.probabilities == tuple(sorted(first.probabilities, reverse=True))
    assert second.input == str(tmp_path / "grey.jpg")
    assert sum(second.probabilities) == pytest.approx(1)


def test_mistakes_are_named(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    (tmp_path / "note.png").write_text("not an image")
    for name, message in (("bad.png", "cannot be read"), ("note.png", "cannot be read"), ("none.png", "no such image")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            predict(exports["image"], [str(tmp_path / name)])
    for wrong in (tmp_path, tmp_path / "missing", tmp_path / "note.png"):
        with pytest.raises(UserError, match="no export in"):
            predict(wrong, ["some text"])
    with pytest.raises(UserError, match="top=0"):
        predict(exports["text"], ["some text"], top=0)
    with pytest.raises(UserError, match="no inputs"):
        predict(exports["text"], [])


@pytest.mark.parametrize("kind", ["text", "image"])
def test_damaged_weights_are_named(exports: Exports, tmp_path: Path, kind: str) -> None:
    for path in exports[kind].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"^cannot read the export in .*; export again$") as error:
        predict(tmp_path, ["some text"])
    assert "\n" not in str(error.value)


def test_the_table_shows_text_as_it_is() -> None:
    console = Console(width=60, force_terminal=False)
    with console.capture() as capture:
        console.print(table([Prediction("[red]sea[/blue]", ("dansk", "eesti"), (0.75, 0.2))]))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines == [["input", "label", "probability"], ["[red]sea[/blue]", "dansk", "0.750"], ["eesti", "0.200"]]
