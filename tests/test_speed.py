"""What makes steps faster or smaller and may not change what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from tiny import Images, Linear, bert, schedule, settings
from torch import Tensor

from distill.errors import UserError
from distill.features import Batch, Features, Tapped
from distill.finite import FiniteLoss
from distill.fit import fit
from distill.losses import CrossEntropy, LossSum
from distill.precision import precision
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


def test_precision_is_what_is_asked_for() -> None:
    assert precision("16-mixed", "cpu") == "16-mixed"


@pytest.mark.parametrize(
    ("feature", "chosen"), [("amx_bf16", True), ("avx512_bf16", True), ("bf16", True), ("avx512_f", False)]
)
def test_a_processor_computes_in_bfloat16_if_it_can(
    feature: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: True, "sve_bf16": False})
    assert precision("auto", "cpu") == ("bf16-mixed" if chosen else "32-true")


def test_this_processor_is_asked() -> None:
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5] in ("flags", "Featu")), ""
    )
    native = bool({"amx_bf16", "avx512_bf16", "bf16", "svebf16"} & set(flags.split()))
    assert precision("auto", "cpu") == ("bf16-mixed" if native else "32-true")


@pytest.mark.parametrize("chosen", [True, False])
def test_a_gpu_computes_in_bfloat16_if_it_does_not_emulate_it(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: chosen or including_emulation)
    assert precision("auto", "gpu") == precision("auto", "auto") == ("bf16-mixed" if chosen else "32-true")


@pytest.mark.parametrize("kind", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_before_a_fused_optimiser_steps(kind: str, tmp_path: Path) -> None:
    norms: list[Tensor] = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            assert all(group["fused"] for group in optimizer.param_groups)

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))

    fit(
        Linear(), LossSum({"ce": CrossEntropy()}), Images(size=2), schedule(clip=0.01, batch_size=4),
        settings(tmp_path, precision=kind), stage="baseline", callbacks=[Norm()], checkpoints=tmp_path,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 0.01), rtol=1e-3, atol=0)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@gpu
def test_a_loss_on_a_gpu_is_looked_at_a_step_later() -> None:
    loss, one = FiniteLoss(), torch.tensor(1.0, device="cuda")
    loss.follow(one, {"ce": one}, {"ce": 1.0}, "step 0")
    loss.follow(one / 0, {"ce": one, "kd": one / 0}, {"ce": 1.0, "kd": 0.5}, "step 1")
    with pytest.raises(UserError, match=r"not finite at step 1: kd is inf \(weight 0\.5\), ce is 1 "):
        loss.follow(one, {"ce": one}, {"ce": 1.0}, "step 2")
    loss.follow(-one / 0, {"ce": -one / 0}, {"ce": 1.0}, "step 3")
    with pytest.raises(UserError, match="at step 3: ce is -inf"):
        loss.settle()
    loss.settle()


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
