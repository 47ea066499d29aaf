"""What a network costs: parameters, multiply-accumulates, bytes, time. Each is defined where it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """Number of scalars in all parameters, trainable or not; a parameter that is used twice counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers in their present dtype: the payload of the module's weights file.

    A tensor that is used twice counts once; buffers that a module rebuilds by itself (non-persistent ones) are not
    stored.
    """
    stored = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def macs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of the convolution, linear and matmul layers (attention included) in one forward pass.

    Counted at the given input, batch and padding included, in eval mode and without gradients; the modes of all
    submodules are restored. FLOPs are twice this number. Biases, normalisation, activations and softmax do not count.
    Forward hooks run, and
    what they compute counts: pass the plain backbone. Works on the meta device, where it costs nothing, if the forward
        does.

    Source: `torch.utils.flop_counter`, which counts two operations for a multiply-accumulate and sees fused attention.
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*args, **kwargs)
    finally:
        for child, training in modes:
            child.training = training
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of single calls.

    Attributes:
        p50_ms, p90_ms: median and 90th percentile of one call, in milliseconds.
        batch: examples in a call.
        threads: CPU threads that a call may use.
        device: type of the device that does the work.
    """

    p50_ms: float
    p90_ms: float
    batch: int
    threads: int
    device: str

    @property
    def throughput(self) -> float:
        """Examples a second at the median time, calls one after another."""
        return 1000 * self.batch / self.p50_ms

    def report(self) -> dict[str, float | int | str]:
        """The `latency_ms` entry of report.json."""
        return {
            "p50": self.p50_ms,
            "p90": self.p90_ms,
            "batch": self.batch,
            "threads": self.threads,
            "device": self.device,
        }


def summary(times: Sequence[float], *, batch: int, threads: int, device: str = "cpu") -> Latency:
    """The `Latency` of calls that took these times, in milliseconds."""
    p50, p90 = np.percentile(times, [50, 90])
    return Latency(float(p50), float(p90), batch, threads, device)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use this many CPU threads within one operation; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latency(
    fn: Callable[[], object],
    *,
    batch: int = 1,
    warmup: int = 10,
    repeats: int = 50,
    threads: int = 1,
    device: str | torch.device = "cpu",
) -> Latency:
    """Time single calls of `fn`, without gradients, one after another.

    Args:
        fn: does one forward pass on inputs that are already on the device.
        batch: how many examples one call handles; only recorded, and used for the throughput.
        warmup: calls before the first timed one.
        repeats: timed calls.
        threads: CPU threads of PyTorch during the measurement; other runtimes (ONNX Runtime) fix theirs when they are
            built.
        device: where `fn` does its work; a CUDA device is synchronised before and after every timed call.

    Raises:
        ValueError: `repeats`, `threads` or `batch` is below 1, or `warmup` is below 0.
    """
    if min(repeats, threads, batch) < 1 or warmup < 0:
        raise ValueError(f"{repeats=}, {threads=}, {batch=} must be at least 1 and {warmup=} at least 0")
    times = call_times(fn, warmup=warmup, repeats=repeats, threads=threads, device=device)
    return summary(times, batch=batch, threads=threads, device=torch.device(device).type)


def call_times(
    fn: Callable[[], object], *, warmup: int, repeats: int, threads: int = 1, device: str | torch.device = "cpu"
) -> list[float]:
    """Milliseconds of each of `repeats` calls after `warmup` others; the arguments are those of `latency`."""
    device = torch.device(device)
    wait: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times = []
    with torch_threads(threads), torch.no_grad():
        for _ in range(warmup):
            fn()
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            fn()
            wait()
            times.append(1000 * (time.perf_counter() - start))
    return times
