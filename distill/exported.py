"""Read an export with the ecosystem's loaders, and measure what was exported: agreement, accuracy, bytes, time.

Every format of an export is one `Exported`: a way to turn a batch into inputs, and a way to turn inputs into logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from distill.cost import latency, torch_threads
from distill.layout import formats, library_of

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """One format of an export, ready to answer.

    Attributes:
        inputs: batch (`input_ids` and `attention_mask`, or `pixels` in [0, 1]) -> what the network reads, by name;
            `pixels` are normalised here.
        run: inputs -> logits [B, C] on the CPU.
    """

    inputs: Callable[[Batch], dict[str, Any]]
    run: Callable[[dict[str, Any]], Tensor]

    def __call__(self, batch: Batch) -> Tensor:
        return self.run(self.inputs(batch))


def load_network(folder: Path) -> Any:
    """The network of an export by its own library, in eval mode on the CPU."""
    if library_of(folder) == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        ).eval()


def load_native(folder: Path) -> Exported:
    """The weights of an export, run by its own library."""
    return Exported(_inputs(folder), torch_run(load_network(folder)))


def load_onnx(path: Path, *, threads: int = 1) -> Exported:
    """An ONNX file of an export, run by ONNX Runtime on the CPU with this many threads."""
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = _inputs(path.parent)
    return Exported(
        inputs=lambda batch: {name: tensor.numpy() for name, tensor in tensors(batch).items()},
        run=lambda inputs: torch.from_numpy(session.run(["logits"], inputs)[0]),
    )


def load(path: Path, *, threads: int = 1) -> Exported:
    """One of the files of `formats`; `threads` are those of ONNX Runtime."""
    return load_onnx(path, threads=threads) if path.suffix == ".onnx" else load_native(path.parent)


def torch_run(network: Callable[..., Any]) -> Callable[[dict[str, Any]], Tensor]:
    """A network of either library as a function of its inputs by name."""

    @torch.no_grad()
    def run(inputs: dict[str, Any]) -> Tensor:
        logits: Tensor = network(inputs["pixels"]) if "pixels" in inputs else network(**inputs).logits
        return logits

    return run


def _inputs(folder: Path) -> Callable[[Batch], dict[str, Tensor]]:
    if library_of(folder) == "transformers":
        return lambda batch: {name: batch[name].cpu() for name in ("input_ids", "attention_mask")}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return lambda batch: {"pixels": (batch["pixels"].cpu() - mean) / std}


def probes(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Made-up batches of 1 and 3 examples; text of 4 and 17 pieces, of which the last example has padding."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    if library_of(folder) == "timm":
        for batch in (1, 3):
            yield {"pixels": torch.rand(batch, *config["pretrained_cfg"]["input_size"], generator=generator)}
        return
    for batch in (1, 3):
        for length in (4, 17):
            length = min(length, config["max_position_embeddings"])
            ids = torch.randint(config["vocab_size"], (batch, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[-1, length // 2 :] = 0
            yield {"input_ids": ids, "attention_mask": mask}


def verify(folder: Path, network: nn.Module, tolerance: float) -> dict[str, float]:
    """Compare the logits of every format in an export with those of the network it was made from.

    Args:
        network: plain backbone in eval mode, fp32 on the CPU.
        tolerance: largest difference that is accepted, as a share of the largest logit of the probe, or of 1 if that is
            larger: fp32 rounds relative to the size, and on made-up inputs logits of hundreds are no surprise.

    Returns:
        format -> largest absolute difference over batches of 1 and 3 examples (text: of 4 and 17 pieces, with and
        without padding).

    Raises:
        RuntimeError: a difference is above the tolerance or is not a number.
    """
    reference = Exported(_inputs(folder), torch_run(network))
    found = {}
    for name, path in formats(folder).items():
        exported = load(path)
        found[name] = 0.0
        for batch in probes(folder):
            right = reference(batch)
            difference, size = float((exported(batch) - right).abs().max()), max(1.0, float(right.abs().max()))
            if not difference <= tolerance * size:
                raise RuntimeError(
                    f"the exported {name} network disagrees with PyTorch: logits differ by {difference:.3g}, "
                    f"more than the tolerance {tolerance * size:.3g}; the export was not kept"
                )
            found[name] = max(found[name], difference)
    return found


def answers(exported: Callable[[Batch], Tensor], loader: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """What is said of each example, and what is right: classes [N] each, in the order of `index` if there is one."""
    said, labels, index = [], [], []
    for batch in loader:
        said.append(exported(batch).argmax(-1).cpu())
        labels.append(batch["labels"].cpu())
        index.append(batch.get("index", torch.zeros_like(batch["labels"])).cpu())
    if not said:
        raise ValueError("no examples to measure accuracy on")
    order = torch.cat(index).argsort(stable=True)
    return torch.cat(said)[order], torch.cat(labels)[order]


def accuracy(exported: Exported, loader: Iterable[Batch]) -> float:
    """Share of examples whose largest logit is at the label; `loader` gives batches with `labels` [B]."""
    said, labels = answers(exported, loader)
    return int((said == labels).sum()) / len(labels)


def sample(folder: Path, batch: int = 1) -> dict[str, Tensor]:
    """A batch of the largest shape that an export was made for: grey pixels, or unknown pieces without padding."""
    if library_of(folder) == "timm":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
        return {"pixels": torch.full((batch, *config["input_size"]), 0.5)}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ids = torch.full((batch, tokenizer.model_max_length), tokenizer.unk_token_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def onnx_accuracy(path: Path, loader: Iterable[Batch], *, threads: int = 1) -> float:
    """Accuracy of an ONNX file of an export, by ONNX Runtime."""
    return accuracy(load_onnx(path, threads=threads), loader)


def measure(
    folder: Path,
    differences: Mapping[str, float],
    loader: Iterable[Batch],
    example: Batch,
    *,
    warmup: int = 10,
    repeats: int = 50,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """The `exports` entries of report.json, measured on the CPU from the files of the export alone.

    Args:
        differences: what the export returned: format -> max_abs_diff.
        loader: gives the test split, in batches with `labels`.
        example: the batch whose forward pass is timed.
        threads: of PyTorch and of ONNX Runtime, for accuracy and for latency.

    Returns:
        One entry a format. `path` is relative to the folder that holds the export: the export itself for its own
        library, the file for ONNX; `bytes` is the size of the file with the weights.
    """
    native = str(library_of(folder))
    entries = []
    for name, difference in differences.items():
        file = formats(folder)[name]
        exported = load(file, threads=threads)
        inputs = exported.inputs(example)
        with torch_threads(threads):
            metrics = {"accuracy": accuracy(exported, loader)}
        timed = latency(
            partial(exported.run, inputs),
            batch=len(next(iter(example.values()))),
            warmup=warmup,
            repeats=repeats,
            threads=threads,
        )
        entries.append(
            {
                "format": name,
                "path": folder.name if name == native else f"{folder.name}/{file.name}",
                "bytes": file.stat().st_size,
                "max_abs_diff": difference,
                "metrics": metrics,
                "latency_ms": timed.report(),
            }
        )
    return entries


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars from transformers; their setting is restored."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
