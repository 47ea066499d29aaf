"""What is measured after training, on a network whose every answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import Logger
from tiny import bert, settings
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill import cost
from distill.callbacks.evaluation import Evaluation
from distill.features import Batch, Tapped
from distill.fit import trainer
from distill.losses import CrossEntropy, LossSum
from distill.module import DistillModule

LABELS = [0, 0, 0, 1, 1, 2]
SAYS = [0, 0, 1, 1, 1, 0]
TEACHER = [0, 1, 1, 1, 0, 2]
# Class 0: 2 of 3 found, 1 wrong; class 1: 2 of 2 found, 1 wrong; class 2: never said.
F1 = [2 * 2 / (2 * 2 + 1 + 1), 2 * 2 / (2 * 2 + 1), 0.0]


class Memory(Logger):
    name = version = "memory"

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen |= {key: value for key, value in metrics.items() if key != "epoch"}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Says(Tapped):
    """Gives the first three of its inputs as logits; one matrix with 4 × 3 multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 3, bias=True), nn.BatchNorm1d(3)), {})
        nn.init.eye_(self.backbone[0].weight)  # type: ignore
        nn.init.zeros_(self.backbone[0].bias)  # type: ignore

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone(batch["pixels"])


def batches(order: list[int], size: int) -> Iterator[dict[str, Tensor]]:
    inputs = nn.functional.one_hot(torch.tensor(SAYS), 4).float()
    for start in range(0, len(order), size):
        index = torch.tensor(order[start : start + size])
        yield {"pixels": inputs[index], "labels": torch.tensor(LABELS)[index], "index": index}


def evaluated(
    folder: Path, order: list[int], size: int = 4, teacher: list[int] | None = TEACHER
) -> tuple[Evaluation, Memory]:
    memory, loader = Memory(), DataLoader(list(batches(order, size)), batch_size=None)  # type: ignore
    says = None if teacher is None else torch.tensor(teacher)
    evaluation = Evaluation({"pixels": torch.zeros(1, 4)}, 3, says, warmup=1, repeats=3)
    module = DistillModule(Says(), LossSum({"ce": CrossEntropy()}), stage="student", num_labels=3)
    trainer(settings(folder, [memory]), [evaluation]).test(module, loader, verbose=False)
    return evaluation, memory


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 0, 4, 2, 1]])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_metrics_are_known_values_in_any_order(order: list[int], size: int, tmp_path: Path) -> None:
    evaluation, _ = evaluated(tmp_path, order, size)
    metrics = evaluation.result["metrics"]
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["macro_f1"] == pytest.approx(sum(F1) / 3)
    assert metrics["agreement"] == pytest.approx(3 / 6)
    assert evaluation.predictions.tolist() == SAYS
    assert evaluation.majority == pytest.approx(3 / 6)


def test_without_a_teacher_there_is_no_agreement(tmp_path: Path) -> None:
    evaluation, memory = evaluated(tmp_path, [0, 1, 2, 3, 4, 5], teacher=None)
    assert "agreement" not in evaluation.result["metrics"]
    assert "student/agreement" not in memory.seen


def test_costs_are_those_of_the_backbone(tmp_path: Path) -> None:
    result = evaluated(tmp_path, [0, 1, 2, 3, 4, 5])[0].result
    assert result["params"] == 4 * 3 + 3 + 3 + 3
    assert result["macs"] == 4 * 3
    assert result["flops"] == 2 * result["macs"]
    assert result["bytes"] == 4 * (21 + 3 + 3) + 8
    latency = result["latency_ms"]
    assert (latency["batch"], latency["threads"], latency["device"]) == (1, 1, "cpu")
    assert 0 < latency["p50"] <= latency["p90"]
    assert result["throughput"] == pytest.approx(1000 / latency["p50"])


def test_everything_goes_to_the_loggers_under_the_stage(tmp_path: Path) -> None:
    evaluation, memory = evaluated(tmp_path, [0, 1, 2, 3, 4, 5])
    result = evaluation.result
    expected = {key: result[key] for key in ("params", "macs", "flops", "bytes", "throughput")} | result["metrics"]
    expected |= {"latency_p50_ms": result["latency_ms"]["p50"], "latency_p90_ms": result["latency_ms"]["p90"]}
    assert memory.seen == {f"student/{key}": float(value) for key, value in expected.items()}


def test_macs_of_a_text_network_are_those_of_its_sample() -> None:
    network = bert(2)
    ids = torch.full((1, 7), 1)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    module = DistillModule(network, LossSum({"ce": CrossEntropy()}), num_labels=3)
    measured = Evaluation(sample, 3, warmup=0, repeats=1).measure(module)
    length, width, wide = 7, 16, 32
    by_hand = 2 * (4 * length * width**2 + 2 * length * width * wide + 2 * length**2 * width) + width**2 + width * 3
    assert measured["macs"] == by_hand == cost.macs(network.backbone, **sample)
    assert measured["params"] == cost.parameters(network.backbone)
    assert measured["bytes"] == cost.weight_bytes(network.backbone)
