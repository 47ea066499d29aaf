"""Taps: what they capture, when, and from where."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import MEAN, STD, Linear, bert
from torch import Tensor, nn

from distill.features import TappedImage, TappedText

PIXELS = {"pixels": torch.arange(24.0).view(2, 3, 2, 2)}
TEXT = {"input_ids": torch.randint(1, 20, (2, 5)), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}


def test_unknown_path_names_the_closest_ones() -> None:
    backbone = nn.Sequential(nn.Linear(1, 1))
    backbone.add_module("blocks_last", nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"tap 'end': no module 'block_last' in Sequential; close matches: .*'blocks_last'"
    ):
        TappedText(backbone, {"end": "block_last"})


def test_unknown_tap_lists_the_taps_and_leaves_the_watched_ones() -> None:
    network = Linear()
    network.watch(["out"])
    with pytest.raises(ValueError, match="no tap 'oout' in Sequential; there are: pixels, out"):
        network.watch(["oout"])
    assert list(network(PIXELS).hidden) == ["out"]


def test_nothing_is_captured_unless_watched() -> None:
    network = Linear()
    assert network(PIXELS).hidden == {}
    assert not any(module._forward_hooks for module in network.modules())


def test_watched_places_give_their_outputs() -> None:
    network = Linear()
    network.watch(["out", "pixels"])
    features = network(PIXELS)
    torch.testing.assert_close(features.hidden["pixels"], PIXELS["pixels"].flatten(1))
    torch.testing.assert_close(features.hidden["out"], features.logits)
    assert features.mask is None


def test_watching_again_forgets_the_old_places() -> None:
    network = Linear()
    network.watch(["out", "pixels"])
    network.watch(["pixels"])
    assert list(network(PIXELS).hidden) == ["pixels"]
    assert sum(len(module._forward_hooks) for module in network.modules()) == 1
    network.watch([])
    assert network(PIXELS).hidden == {}


def test_nothing_stays_captured_between_calls() -> None:
    network = Linear()
    network.watch(["out"])
    first, second = network(PIXELS), network({"pixels": torch.zeros(2, 3, 2, 2)})
    assert network._captured == {}
    assert not torch.equal(first.hidden["out"], second.hidden["out"])


def test_nothing_stays_captured_after_an_exception() -> None:
    network = Linear()
    network.watch(["pixels"])
    with pytest.raises(RuntimeError, match="shapes"):
        network({"pixels": torch.zeros(2, 7)})
    assert network._captured == {}


def test_what_a_direct_call_of_the_backbone_captured_does_not_leak_into_the_next_features() -> None:
    network = Linear()
    network.watch(["out"])
    network.backbone(PIXELS["pixels"])
    seen = []
    network.logits = lambda _: seen.append(dict(network._captured)) or torch.zeros(2, 3)  # type: ignore
    network(PIXELS)
    assert seen == [{}]


def test_a_copy_captures_for_itself() -> None:
    network = Linear()
    network.watch(["out"])
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.backbone[1].weight.zero_()  # type: ignore
    assert not torch.equal(twin(PIXELS).hidden["out"], network(PIXELS).hidden["out"])
    assert network._captured == twin._captured == {}


class Seen(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)


def test_an_image_network_normalises_its_own_input() -> None:
    network = TappedImage(Seen(), {}, MEAN, STD)
    pixels = torch.rand(2, 3, 1, 1)
    expected = [
        [(value - m) / s for value, m, s in zip(row, MEAN, STD, strict=True)] for row in pixels.flatten(1).tolist()
    ]
    torch.testing.assert_close(network({"pixels": pixels}).logits, torch.tensor(expected))
    assert network.state_dict() == {}


def test_a_text_network_hands_the_mask_on_and_obeys_it() -> None:
    network = bert().eval()
    features = network(TEXT)
    assert features.mask is TEXT["attention_mask"]
    ids = TEXT["input_ids"].clone()
    ids[0, 3:] = (ids[0, 3:] + 1) % 20
    torch.testing.assert_close(network({**TEXT, "input_ids": ids}).logits, features.logits)
    ids[0, 2] = (ids[0, 2] + 1) % 20
    assert not torch.allclose(network({**TEXT, "input_ids": ids}).logits, features.logits)


def test_hidden_states_of_bert_are_those_of_transformers() -> None:
    network = bert(layers=3).eval()
    network.watch(["embeddings", *network.layers])
    theirs = network.backbone(**TEXT, output_hidden_states=True)
    features = network(TEXT)
    assert list(features.hidden) == ["embeddings", "layer1", "layer2", "layer3"]
    for mine, other in zip(features.hidden.values(), theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    torch.testing.assert_close(features.logits, theirs.logits, rtol=0, atol=0)
