"""What makes steps faster or smaller and may not change what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tiny import bert
from torch import Tensor

from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.fit import precision
from distill.run import run
from students.resnet import resnet10t

TEXT = {"input_ids": torch.randint(1, 20, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
IMAGES = {"pixels": torch.rand(3, 3, 32, 32)}
TAPS = ["layer1", "layer2.query", "pooled"]


def step(network: Tapped, batch: Batch) -> tuple[Features, list[Tensor | None]]:
    """Features of a training step that reads logits and taps, and the gradients."""
    features = network.train()(batch)
    loss = features.logits.square().sum() + sum(states.square().mean() for states in features.hidden.values())
    loss.backward()
    return features, [p.grad for p in network.parameters()]


def test_recomputed_activations_give_the_same_gradients_and_taps_and_leave_nothing_behind() -> None:
    network = bert(dropout=0.0)
    network.watch(TAPS)
    twin = copy.deepcopy(network)
    twin.recompute()
    (expected, gradients), (found, others) = step(network, TEXT), step(twin, TEXT)
    assert list(found.hidden) == list(expected.hidden) == TAPS
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=0)
    torch.testing.assert_close(others, gradients, rtol=0, atol=0)
    assert twin._captured == {}


def kept(network: Tapped) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.train()(TEXT)
    return total


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    network = bert(4, dropout=0.0)
    twin = copy.deepcopy(network)
    twin.recompute()
    assert kept(twin) < kept(network) / 2


def test_a_cnn_does_not_recompute() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing=true: is for transformers, and ResNet is none"):
        resnet10t(3, (0.5,) * 3, (0.5,) * 3).recompute()


def test_compiled_networks_give_the_same_taps_and_gradients_and_are_themselves_afterwards() -> None:
    network = bert(1, dropout=0.0)
    network.watch(["layer1", "layer1.key"])
    twin = copy.deepcopy(network)
    with twin.compiled(True):
        assert twin.backbone._compiled_call_impl is not None
        found, others = step(twin, TEXT)
    expected, gradients = step(network, TEXT)
    assert twin.backbone._compiled_call_impl is None
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    assert list(twin.state_dict()) == list(network.state_dict())


def test_images_run_in_channels_last_layout() -> None:
    network = resnet10t(3, (0.5,) * 3, (0.5,) * 3)
    network.watch(["stage1"])
    states = network.eval()(IMAGES).hidden["stage1"]
    assert states.is_contiguous(memory_format=torch.channels_last)
    assert not states.is_contiguous()
    plain = copy.deepcopy(network.backbone).to(memory_format=torch.contiguous_format)
    pixels = (IMAGES["pixels"] - 0.5) / 0.5
    torch.testing.assert_close(network(IMAGES).logits, plain(pixels), rtol=1e-4, atol=1e-5)


def test_precision_is_what_is_asked_for_and_auto_is_bf16_only_on_a_gpu_that_has_it() -> None:
    assert precision("16-mixed") == "16-mixed"
    has = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision("auto") == ("bf16-mixed" if has else "32-true")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("pair", ["bert_tiny", "resnet50_small", "mobilenet_v3_small"])
def test_a_gpu_runs_all_stages(pair: str, compiled: str, compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    model, _, student = pair.rpartition("_")
    options = [f"model={model}", f"student={student}", "trainer=smoke", f"compile={compiled}", "logger=csv"]
    cfg = compose(*options, "trainer.accelerator=gpu", "trainer.precision=auto")
    document = run(cfg, tmp_path, name=pair, command="test")
    assert document["student"]["latency_ms"]["device"].startswith("cuda")
    assert all(export["max_abs_diff"] <= 1e-2 for export in document["exports"])
