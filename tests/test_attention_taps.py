"""Attention maps from the query and key projections of a BERT: what they are, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import bert
from torch import Tensor
from transformers import BertForSequenceClassification

from distill.features import Features, TappedText
from distill.losses import Attention, CrossEntropy, LossSum, LossTerm

LONG, ROWS = 64, 2


def loud(layers: int, width: int, seed: int) -> TappedText:
    """A BERT without dropout whose attention is far from uniform, in eval mode."""
    network = bert(layers, width, seed=seed, dropout=0.0)
    with torch.no_grad():
        for values in network.parameters():
            if values.ndim == 2:
                values.mul_(25)
    return network.eval()


def examples(length: int = 8, padded: bool = True) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([length, 5]) if padded else torch.tensor([length, length])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, 20, (ROWS, length), generator=draw) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2]), "index": torch.arange(ROWS)}


def attached(term: LossTerm, student: TappedText, teacher: TappedText) -> LossSum:
    """With the networks' taps switched on."""
    loss = LossSum({"term": term})
    loss.attach(student, teacher, examples(), examples=ROWS)
    loss.watch(student, teacher)
    return loss


def probabilities(term: Attention, features: Features, layer: str) -> Tensor:
    assert term.comparison == "probabilities_mse" and features.mask is not None
    return term.maps(features, layer, features.mask)


@pytest.mark.parametrize("linked", [1, 2, 3])
@pytest.mark.parametrize("compare", ["scores_mse", "probabilities_mse", "kl"])
def test_the_gradient_ends_at_the_queries_and_keys_of_the_linked_layer(linked: int, compare: str) -> None:
    student, teacher = loud(3, 16, 0), loud(4, 24, 1)
    loss = attached(Attention(1.0, layers=[["layer4", f"layer{linked}"]], compare=compare), student, teacher)
    with torch.no_grad():
        answers = teacher(examples())
    value = loss(student(examples()), answers, examples())[0]
    assert value > 1e-3
    value.backward()
    reached = {name for name, p in student.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    below = {f"bert.encoder.layer.{i}." for i in range(linked - 1)} | {"bert.embeddings."}
    inside = {f"bert.encoder.layer.{linked - 1}.attention.self.{part}.weight" for part in ("query", "key")}
    assert inside <= reached
    assert all(any(name.startswith(prefix) for name in reached) for prefix in below)
    # A key's bias moves all scores of a query alike, which a softmax takes away up to rounding.
    biases = {name.replace(".weight", ".bias") for name in inside}
    assert all(name.startswith(tuple(below)) for name in reached - inside - biases)
    assert not any(p.grad is not None for p in teacher.parameters())


def test_networks_that_are_equal_have_nothing_to_learn() -> None:
    student, teacher = loud(3, 16, 0), loud(3, 16, 0)
    loss = attached(Attention(), student, teacher)
    assert loss(student(examples()), teacher(examples()), examples())[0] == 0


def test_exactly_the_linked_queries_and_keys_are_captured() -> None:
    student, teacher = loud(2, 16, 0), loud(4, 24, 1)
    attached(Attention(layers="uniform"), student, teacher)
    mine, theirs = student(examples()), teacher(examples())
    assert set(mine.hidden) == {"layer1.query", "layer1.key", "layer2.query", "layer2.key"}
    assert set(theirs.hidden) == {"layer2.query", "layer2.key", "layer4.query", "layer4.key"}
    student.watch([])
    assert student(examples()).hidden == {}


def test_sdpa_stays_the_forward_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = loud(2, 16, 0), loud(4, 24, 1)
    loss = attached(Attention(), student, teacher)
    calls: list[int] = []
    original = F.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args[0].shape[1])
        return original(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for network, layers in ((student, 2), (teacher, 4)):
        config: Any = network.backbone.config
        assert config._attn_implementation == "sdpa"
        calls.clear()
        network(examples())
        assert calls == [2] * layers
    mine, theirs = student(examples()), teacher(examples())
    calls.clear()
    loss(mine, theirs, examples())
    assert calls == []


def test_attention_dropout_does_not_reach_the_maps() -> None:
    student, teacher = loud(2, 16, 0), loud(2, 16, 1)
    term = Attention(layers=[["layer1", "layer1"]], compare="probabilities_mse")
    loss = attached(term, student, teacher)
    backbone: Any = student.backbone
    for layer in backbone.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.9
    student.watch([*loss.taps()[0], "layer1"])
    still = student(examples())
    student.train()
    dropped = [student(examples()) for _ in range(2)]
    assert not torch.allclose(dropped[0].hidden["layer1"], dropped[1].hidden["layer1"], atol=1e-2)
    assert not torch.allclose(dropped[0].hidden["layer1"], still.hidden["layer1"], atol=1e-2)
    for features in dropped:
        for tap in ("layer1.query", "layer1.key"):
            torch.testing.assert_close(features.hidden[tap], still.hidden[tap], rtol=0, atol=0)
        maps = [probabilities(term, each, "layer1") for each in (features, still)]
        torch.testing.assert_close(*maps, rtol=0, atol=0)


@pytest.mark.parametrize("heads", ["each", "mean"])
def test_the_maps_are_those_of_eager_attention(heads: str) -> None:
    network, layers = loud(3, 16, 0), ["layer1", "layer2", "layer3"]
    term = Attention(layers=[[layer, layer] for layer in layers], compare="probabilities_mse", heads=heads)
    attached(term, network, loud(3, 16, 1))
    features = network(examples())
    config: Any = type(network.backbone.config)(**network.backbone.config.to_diff_dict())
    config._attn_implementation = "eager"
    eager: Any = BertForSequenceClassification(config).eval()
    eager.load_state_dict(network.backbone.state_dict())
    batch = {key: examples()[key] for key in ("input_ids", "attention_mask")}
    output = eager(**batch, output_attentions=True)
    torch.testing.assert_close(output.logits, features.logits, rtol=1e-4, atol=1e-5)
    assert len(output.attentions) == len(layers)
    for layer, expected in zip(layers, output.attentions, strict=True):
        assert expected.shape == (ROWS, 2, 8, 8) and expected[0].max() > 2 / 8, (
            "nearly uniform attention proves nothing"
        )
        wanted = expected if heads == "each" else expected.mean(dim=1, keepdim=True)
        torch.testing.assert_close(probabilities(term, features, layer), wanted, rtol=1e-4, atol=1e-6)


def square_bytes(loss: LossSum, student: TappedText, teacher: TappedText, length: int) -> int:
    """Bytes that a training step keeps for its backward pass in tensors with L · L numbers an example or more."""
    batch, kept = examples(length, padded=False), {}

    def keep(values: Tensor) -> Tensor:
        if values.numel() >= ROWS * length**2 and values.shape[-2:] == (length, length):
            storage = values.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    with torch.no_grad():
        answers = teacher(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        total, _ = loss(student(batch), answers, batch)
    assert total.requires_grad  # and holds what was kept, so that no address is used twice
    return sum(kept.values())


@pytest.mark.parametrize("compare", ["scores_mse", "probabilities_mse", "kl"])
def test_memory_grows_with_the_linked_layers_alone(compare: str) -> None:
    student, teacher = loud(3, 16, 0), loud(4, 24, 1)
    figures = []
    for count in range(3):
        pairs = [[f"layer{i + 2}", f"layer{i + 1}"] for i in range(count)]
        term = Attention(layers=pairs, compare=compare) if count else CrossEntropy()
        figures.append(square_bytes(attached(term, student, teacher), student, teacher, LONG))
    maps = ROWS * 2 * LONG**2 * 4
    assert figures[0] == 0
    assert maps <= figures[1] <= 4 * maps
    assert figures[2] == 2 * figures[1]
