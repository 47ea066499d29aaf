"""Measures a network: what it gets right and what it costs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from distill import cost
from distill.features import Batch
from distill.module import DistillModule


class Evaluation(pl.Callback):
    """After `trainer.test`: accuracy, macro F1 and agreement, parameters, MACs, FLOPs, bytes, latency and throughput.

    Everything goes to the loggers as `<stage>/<figure>` and stays in `result` (keys as in report.json).

    Args:
        sample: batch of one, for MACs and latency.
        num_labels: C.
        teacher_predictions: [N] class by example index, for `agreement`, the share of test examples on which the
            network and the teacher say the same; None leaves it out.
        warmup, repeats, threads: of the latency; see `distill.cost.latency`.
    """

    def __init__(
        self,
        sample: Batch,
        num_labels: int,
        teacher_predictions: Tensor | None = None,
        warmup: int = 10,
        repeats: int = 100,
        threads: int = 1,
    ) -> None:
        self.sample, self.num_labels, self.teacher_predictions = sample, num_labels, teacher_predictions
        self.warmup, self.repeats, self.threads = warmup, repeats, threads
        self.result: dict[str, Any] = {}
        self.predictions = torch.empty(0)
        self.majority = 0.0
        self._outputs: list[dict[str, Tensor]] = []

    def on_test_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self._outputs.append(outputs)

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DistillModule)
        seen = {key: torch.cat([out[key] for out in self._outputs]) for key in ("logits", "labels", "index")}
        order = seen["index"].argsort()
        logits, labels = seen["logits"][order].float(), seen["labels"][order]
        self._outputs.clear()
        self.predictions = logits.argmax(-1).cpu()
        self.majority = labels.bincount().max().item() / len(labels)
        metrics = {
            "accuracy": multiclass_accuracy(logits, labels, self.num_labels, average="micro").item(),
            "macro_f1": multiclass_f1_score(logits, labels, self.num_labels, average="macro").item(),
        }
        if self.teacher_predictions is not None:
            metrics["agreement"] = (self.predictions == self.teacher_predictions).float().mean().item()
        self.result = {**self.measure(module), "metrics": metrics}
        figures = {**metrics, **{k: v for k, v in self.result.items() if isinstance(v, int | float)}}
        figures |= {f"latency_{k}_ms": self.result["latency_ms"][k] for k in ("p50", "p90")}
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{module.stage}/{key}": float(value) for key, value in figures.items()}, step=trainer.global_step
            )

    def measure(self, module: DistillModule) -> dict[str, Any]:
        """Params, MACs, FLOPs (2 × MACs), bytes, latency and throughput at batch 1, on the module's device."""
        network = module.student.eval()
        sample = {key: value.to(module.device) for key, value in self.sample.items()}
        latency = cost.latency(
            lambda: network(sample),
            warmup=self.warmup,
            repeats=self.repeats,
            threads=self.threads,
            device=module.device,
        )
        macs = cost.macs(network, sample)
        return {
            "params": cost.parameters(network.backbone),
            "macs": macs,
            "flops": 2 * macs,
            "bytes": cost.weight_bytes(network.backbone),
            "latency_ms": latency.report(),
            "throughput": latency.throughput,
        }
