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
    """Which layers get gradients in each step, and whether validation skips any."""

    def __init__(self, network: TappedText) -> None:
        self.network = network
        self.trained: list[list[bool]] = []
        self.skipped: list[bool] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.trained.append([layer.output.dense.weight.grad is not None for layer in layers(self.network)])  # type: ignore

    def on_validation_batch_start(self, *args: Any) -> None:
        self.skipped.append(not plain(self.network))


def run(network: TappedText, folder: Path, *more: pl.Callback, stacking: list[tuple[float, int]], epochs: int) -> None:
    callbacks = [ProgressiveStacking(layers(network), stacking), *more]
    fit(
        network, LossSum({"ce": CrossEntropy()}), Text(train=8), schedule(epochs=epochs, batch_size=4),
        settings(folder), stage="teacher", callbacks=callbacks, checkpoints=folder,
    )  # fmt: skip


def test_layers_train_when_their_turn_comes(tmp_path: Path) -> None:
    network = bert(4)
    watch = Watch(network)
    run(network, tmp_path, watch, stacking=[(0, 1), (0.2, 2), (0.75, 4)], epochs=4)
    assert [sum(step) for step in watch.trained] == [1, 1, 2, 2, 2, 2, 4, 4]
    assert all(step == sorted(step, reverse=True) for step in watch.trained)
    assert watch.skipped == [True, True, True, False]


def test_nothing_remains_after_training(tmp_path: Path) -> None:
    network = bert(3)
    run(network, tmp_path, stacking=[(0, 1), (0.5, 3)], epochs=2)
    assert plain(network)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"student.{name}" for name in network.state_dict()}


def test_layers_that_are_left_out_keep_their_weights(tmp_path: Path) -> None:
    network = bert(3)
    seen: list[Tensor] = []

    class Copy(pl.Callback):
        def on_validation_start(self, *args: Any) -> None:
            seen.append(torch.stack([layer.output.dense.weight.detach().clone() for layer in layers(network)]))  # type: ignore

    start = torch.stack([layer.output.dense.weight.detach().clone() for layer in layers(network)])  # type: ignore
    run(network, tmp_path, Copy(), stacking=[(0, 1), (0.5, 3)], epochs=2)
    assert [torch.equal(a, b) for a, b in zip(start, seen[0], strict=True)] == [False, True, True]
    assert not any(torch.equal(a, b) for a, b in zip(start, seen[1], strict=True))


def test_nothing_remains_after_an_exception_in_training(tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert not plain(network)
            raise RuntimeError("in training")

    network = bert(3)
    with pytest.raises(RuntimeError, match="in training"):
        run(network, tmp_path, Fail(), stacking=[(0, 1), (0.5, 3)], epochs=1)
    assert plain(network)


def test_nothing_remains_when_training_stops_early(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = True

    network = bert(3)
    watch = Watch(network)
    run(network, tmp_path, Stop(), watch, stacking=[(0, 1), (0.75, 3)], epochs=2)
    assert watch.skipped == [True]
    assert plain(network)


WRONG: list[Any] = [
    [], [2, 2, 3], 3, [[0, 1]], [[0, 1], [0.5, 2]], [[0, 1], [0.5, 4]], [[0, 0], [0.5, 3]], [[0, 1.5], [0.5, 3]],
    [[0.1, 1], [0.5, 3]], [[0, 1], [1, 3]], [[0, 1], [0.6, 2], [0.5, 3]], [[0, 1], [0, 3]], [[0, 1], ["x", 3]],
    [[0, 1], [0.5, None]], [[0, 1, 2], [0.5, 3, 3]],
]  # fmt: skip


@pytest.mark.parametrize("stacking", WRONG, ids=str)
def test_a_schedule_that_makes_no_sense_is_refused(stacking: Any) -> None:
    with pytest.raises(UserError, match=r"stacking=.*: needs \[share of the steps, layers\] pairs"):
        ProgressiveStacking(layers(bert(3)), stacking)


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
