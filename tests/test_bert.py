"""BERT: shapes of students, layers taken over from a teacher, and teachers loaded from folders."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import Linear, bert, cnn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, DistilBertConfig

from distill.errors import UserError
from students.bert import bert as build_bert
from students.bert import start_from
from teachers.bert import bert_base, load

BATCH = {
    "input_ids": torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved classifier: 3 labels, 20 pieces, 2 layers."""
    bert().backbone.save_pretrained(tmp_path)  # type: ignore
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def put(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_student_has_the_shape_it_was_asked_for() -> None:
    network = build_bert(5, 30, 1, layers=3, hidden_size=24, heads=4, intermediate_size=40, dropout=0.2)
    config: Any = network.backbone.config
    assert (config.num_labels, config.vocab_size, config.pad_token_id) == (5, 30, 1)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 4)
    assert (config.intermediate_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (40, 0.2, 0.2)
    network.watch(network.places)
    features = network.eval()(BATCH)
    assert features.logits.shape == (2, 5)
    layers = ["layer1", "layer2", "layer3"]
    inside = [f"{layer}.{part}" for layer in layers for part in ("query", "key", "value")]
    first = [f"{layer}.cls" for layer in layers]
    assert list(network.places) == ["embeddings", *layers, "pooled", *first, *inside]
    assert features.hidden.keys() == network.places.keys()
    assert network.layers == layers
    assert network.heads == features.heads == 4
    vectors = ["pooled", *first]
    assert {tuple(features.hidden[name].shape) for name in vectors} == {(2, 24)}
    assert {tuple(value.shape) for name, value in features.hidden.items() if name not in vectors} == {(2, 4, 24)}
    for layer in layers:
        state = features.hidden[f"{layer}.cls"]
        torch.testing.assert_close(state, features.hidden[layer][:, 0], rtol=0, atol=0)
        assert state.untyped_storage().nbytes() == 2 * 24 * 4, "the other tokens do not stay alive with it"
    assert not network.head_loaded


def test_the_teacher_is_bert_base() -> None:
    with torch.device("meta"):
        teacher = bert_base(2, 30522, 0)
    assert sum(p.numel() for p in teacher.parameters()) == 109_483_778
    assert teacher.layers == [f"layer{i}" for i in range(1, 13)]
    assert len(teacher.places) == 1 + 12 + 1 + 4 * 12
    assert teacher.heads == 12


def test_pooled_is_what_the_classifier_reads() -> None:
    network = bert().eval()
    network.watch(["pooled", "layer2"])
    features = network(BATCH)
    backbone: Any = network.backbone
    torch.testing.assert_close(backbone.classifier(features.hidden["pooled"]), features.logits)
    first = features.hidden["layer2"][:, 0]
    torch.testing.assert_close(torch.tanh(backbone.bert.pooler.dense(first)), features.hidden["pooled"])


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(UserError, match="hidden_size=10 is not a multiple of heads=3"):
        build_bert(2, 20, 0, layers=1, hidden_size=10, heads=3, intermediate_size=8)


def own(network: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("start", "layers"),
    [
        ([0, 2], [0, 2]),
        ([3, 1], [3, 1]),
        ([2, 2], [2, 2]),
        ((0, 3), [0, 3]),
        (OmegaConf.create([0, 3]), [0, 3]),
        ("uniform", [1, 3]),
        ("first", [0, 1]),
        ("last", [2, 3]),
    ],
)
def test_a_student_starts_from_exactly_the_layers_asked_for(start: Any, layers: list[int]) -> None:
    teacher, student = bert(4, seed=1), bert(2, seed=2)
    theirs = own(teacher)
    start_from(student, teacher, start)
    for name, value in own(student).items():
        parts = name.split(".")
        if "layer" in parts:
            place = parts.index("layer") + 1
            parts[place] = str(layers[int(parts[place])])
        assert torch.equal(value, theirs[".".join(parts)]), name
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, theirs[name]) for name, value in own(teacher).items())


def test_a_student_as_deep_as_its_teacher_starts_as_its_copy() -> None:
    teacher = bert(3, seed=1).eval()
    for start in ("uniform", "first", "last", [0, 1, 2]):
        student = bert(3, seed=2).eval()
        start_from(student, teacher, start)
        torch.testing.assert_close(student(BATCH).logits, teacher(BATCH).logits, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [1, 4, 6])
def test_a_student_of_any_depth_starts_from_the_embeddings_alone(depth: int) -> None:
    teacher, student = bert(4, seed=1), bert(depth, seed=2)
    before, theirs = own(student), own(teacher)
    start_from(student, teacher, "embeddings")
    copied = {name for name, value in own(student).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in copied} == {"embeddings"}
    embeddings = {name: value for name, value in own(student).items() if "embeddings" in name}
    assert all(torch.equal(value, theirs[name]) for name, value in embeddings.items())
    assert {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")} <= copied


@pytest.mark.parametrize(
    ("start", "says"),
    [
        *[(numbers, f"init_layers={numbers}: need 2 numbers from 0 to 3, or one of uniform, first, last, embeddings")
          for numbers in ([0], [0, 1, 2], [0, 4], [-1, 0], [], [0, 1.0], ["0", "1"], [True, False], 2, 0.5)],
        *[(name, f"init_layers={name}: there are uniform, first, last, embeddings, and numbers such as [0,6]")
          for name in ("skip", "top", "every", "0,1", "")],
    ],
)  # fmt: skip
def test_layers_that_are_not_there_are_refused(start: Any, says: str) -> None:
    student = bert(2)
    before = own(student)
    with pytest.raises(UserError, match=re.escape(says)):
        start_from(student, bert(4, seed=1), start)
    assert all(torch.equal(value, before[name]) for name, value in own(student).items())


@pytest.mark.parametrize("start", ["uniform", "first", "last"])
def test_a_student_deeper_than_its_teacher_has_to_name_the_layers(start: str) -> None:
    with pytest.raises(UserError, match=rf"init_layers={start}: .*the student has 3 layers and the teacher 2"):
        start_from(bert(3), bert(2), start)
    student, teacher = bert(3), bert(2, seed=1)
    start_from(student, teacher, [0, 0, 1])
    assert torch.equal(
        own(student)["bert.encoder.layer.2.output.dense.weight"],
        own(teacher)["bert.encoder.layer.1.output.dense.weight"],
    )


@pytest.mark.parametrize("start", [[0, 1], "uniform", "embeddings"])
def test_other_shapes_are_refused_and_nothing_is_copied(start: Any) -> None:
    student = bert(2, width=16)
    before = own(student)
    for teacher, name in ((bert(4, width=24), "hidden_size"), (long_bert(), "max_position_embeddings")):
        with pytest.raises(UserError, match=rf"init_layers=.*{name} of the student is .*, of the teacher .*null"):
            start_from(student, teacher, start)
    assert all(torch.equal(value, before[name]) for name, value in own(student).items())


@pytest.mark.parametrize("start", [[0], "uniform", "embeddings"])
def test_only_berts_start_from_layers(start: Any) -> None:
    for pair in ((bert(), cnn("mobilenetv3_small_050")), (cnn("mobilenetv3_small_050"), bert()), (Linear(), Linear())):
        with pytest.raises(UserError, match=r"init_layers=.*: only a BERT starts from a teacher's layers; use .*null"):
            start_from(*pair, start)


def long_bert() -> Any:
    network: Any = bert(2)
    config = BertConfig(**{**network.backbone.config.to_dict(), "max_position_embeddings": 600})
    network.backbone = BertForSequenceClassification(config)
    return network


def test_a_folder_brings_its_classifier_where_the_number_of_labels_fits(folder: Path) -> None:
    network = load(str(folder), 3, 20)
    assert network.head_loaded
    torch.testing.assert_close(network.eval()(BATCH).logits, bert().eval()(BATCH).logits, rtol=0, atol=0)


def test_another_number_of_labels_gets_a_new_classifier(folder: Path) -> None:
    network = load(str(folder), 4, 20)
    assert not network.head_loaded
    assert network.eval()(BATCH).logits.shape == (2, 4)
    theirs = bert().backbone.state_dict()
    mine = network.backbone.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items() if not name.startswith("classifier."))


def test_a_language_model_gets_a_new_pooler_and_classifier(tmp_path: Path) -> None:
    BertForMaskedLM(bert().backbone.config).save_pretrained(tmp_path)
    assert not load(str(tmp_path), 3, 20).head_loaded


def test_half_precision_weights_are_trained_in_fp32(tmp_path: Path) -> None:
    bert().backbone.half().save_pretrained(tmp_path)  # type: ignore
    assert {p.dtype for p in load(str(tmp_path), 3, 20).parameters()} == {torch.float32}


def refused(source: object, match: str, labels: int = 3, pieces: int = 20) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(str(source), labels, pieces)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"teacher.weights={source}: ")


@pytest.mark.parametrize("labels", [3, 4])
def test_missing_weights_are_refused(folder: Path, labels: int) -> None:
    state = weights(folder)
    del state["bert.encoder.layer.1.output.dense.weight"]
    put(folder, state)
    refused(folder, r"missing or do not fit, the first is bert\.encoder\.layer\.1\.output\.dense\.weight", labels)


@pytest.mark.parametrize("labels", [3, 4])
def test_weights_of_another_shape_are_refused(folder: Path, labels: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 25}))
    refused(folder, r"missing or do not fit, the first is bert\.embeddings\.word_embeddings\.weight", labels)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    DistilBertConfig().save_pretrained(tmp_path)
    refused(tmp_path, "is a distilbert, and this teacher is a bert")


def test_more_pieces_than_embeddings_are_refused(folder: Path) -> None:
    refused(folder, "has 20 pieces and the data's tokenizer 21", pieces=21)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_a_damaged_folder_is_refused(folder: Path, name: str, damage: str) -> None:
    content = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x00\xff" * 90}[damage]
        )
    refused(folder, "can't be loaded")


def test_foreign_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')\n")
    refused(tmp_path, "can't be loaded")


def test_an_unreachable_hub_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(*args: object, **_: object) -> None:
        asked.append(args)
        raise httpx.ConnectError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", unreachable)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited to ask again"))
    start = time.perf_counter()
    refused("nobody/nothing", "can't be loaded")
    assert len(asked) == 1
    assert time.perf_counter() - start < 5
