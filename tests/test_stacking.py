"""Progressive stacking: which layers train when, and that nothing of it remains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import Text, bert, schedule, settings
from torch import Tensor, nn

from distill.callbacks.stacking import ProgressiveStacking, skip_above
from distill.errors import UserError
from distill.features import TappedText
from distill.fit import fit
from distill.losses import CrossEntropy, LossSum

BATCH = {"input_ids": torch.randint(1, 20, (4, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3] * 2)}


def layers(network: TappedText) -> nn.ModuleList:
    return network.backbone.bert.encoder.layer  # type: ignore


def plain(network: TappedText) -> bool:
    return not any("forward" in vars(layer) for layer in layers(network))


class Watch(pl.Callback):
    """Which layers get gradients in each epoch, and which ones run in validation."""

    def __init__(self, network: TappedText) -> None:
        self.network = network
        self.trained: list[list[bool]] = []
        self.skipped: list[bool] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.trained.append([layer.output.dense.weight.grad is not None for layer in layers(self.network)])  # type: ignore

    def on_validation_batch_start(self, *args: Any) -> None:
        self.skipped.append(not plain(self.network))


def run(network: TappedText, folder: Path, *more: pl.Callback, stacking: list[int]) -> None:
    callbacks = [ProgressiveStacking(layers(network), stacking, len(stacking)), *more]
    fit(
        network, LossSum({"ce": CrossEntropy()}), Text(train=8), schedule(epochs=len(stacking)), settings(folder),
        stage="teacher", callbacks=callbacks, checkpoints=folder,
    )  # fmt: skip


def test_layers_train_when_their_turn_comes_and_validation_sees_all(tmp_path: Path) -> None:
    network = bert(4)
    watch = Watch(network)
    before = [layer.output.dense.weight.clone() for layer in layers(network)]  # type: ignore
    run(network, tmp_path, watch, stacking=[1, 2, 4])
    assert watch.trained == [[True, False, False, False], [True, True, False, False], [True] * 4]
    assert watch.skipped == [False] * 3
    assert plain(network)
    first = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert first.keys() == {f"student.{name}" for name in network.state_dict()}
    assert len(before) == 4


def test_layers_that_are_left_out_keep_their_weights(tmp_path: Path) -> None:
    network = bert(3)
    seen: list[Tensor] = []

    class Copy(pl.Callback):
        def on_validation_start(self, *args: Any) -> None:
            seen.append(torch.stack([layer.output.dense.weight.detach().clone() for layer in layers(network)]))  # type: ignore

    start = torch.stack([layer.output.dense.weight.detach().clone() for layer in layers(network)])  # type: ignore
    run(network, tmp_path, Copy(), stacking=[1, 3])
    assert [torch.equal(a, b) for a, b in zip(start, seen[0], strict=True)] == [False, True, True]
    assert not any(torch.equal(a, b) for a, b in zip(start, seen[1], strict=True))


def test_nothing_remains_after_an_exception_in_training(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert not plain(network)
            raise RuntimeError("in training")

    network = bert(3)
    with pytest.raises(RuntimeError, match="in training"):
        run(network, tmp_path, Fail(), stacking=[1, 3])
    assert plain(network)


@pytest.mark.parametrize(
    "stacking", [[1, 2], [1, 2, 2, 3], [1, 2, 4], [0, 2, 3], [-1, 2, 3], [1, 2, 2], [1.5, 2, 3], [None, 2, 3]]
)
def test_a_schedule_that_does_not_end_with_all_layers_is_refused(stacking: list[Any]) -> None:
    with pytest.raises(UserError, match="stacking=.* needs 3 numbers"):
        ProgressiveStacking(layers(bert(3)), stacking, 3)


def test_skipping_leaves_the_lower_layers_as_they_are_and_is_undone() -> None:
    deep = bert(4).eval()
    whole = deep(BATCH).logits
    skip_above(layers(deep), 2)
    shallow = bert(2).eval()
    shallow.load_state_dict(deep.state_dict(), strict=False)
    torch.testing.assert_close(deep(BATCH).logits, shallow(BATCH).logits)
    assert not torch.allclose(deep(BATCH).logits, whole)
    skip_above(layers(deep), 4)
    torch.testing.assert_close(deep(BATCH).logits, whole, rtol=0, atol=0)


@pytest.mark.parametrize("zero_init", [True, False])
def test_fresh_layers_are_identities_with_zero_init_and_only_then(zero_init: bool) -> None:
    deep = bert(12, zero_init_residual=zero_init).eval()
    for layer in layers(deep)[:2]:
        nn.init.normal_(layer.output.dense.weight, std=0.3)  # type: ignore
    whole = deep(BATCH).logits
    skip_above(layers(deep), 2)
    assert torch.allclose(deep(BATCH).logits, whole, rtol=1e-4, atol=1e-5) is zero_init
