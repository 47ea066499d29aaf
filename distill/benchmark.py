"""Time exports side by side, so that their ratios are fair although the machine is not quiet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill import cost
from distill.exported import load, sample
from distill.layout import formats

ROUNDS = 10


def interleaved(
    calls: Sequence[Callable[[], object]], *, repeats: int, threads: int, warmup: int = 10
) -> list[list[list[float]]]:
    """Milliseconds of single calls, taken in turn: A B C, A B C, …

    Args:
        calls: forward passes.
        repeats: timed calls of each, spread over `ROUNDS` rounds (fewer where there are fewer repeats).
        threads: of PyTorch.
        warmup: calls of each before the first round; one more, untimed, begins each turn, since another network has
            been in the caches meanwhile.

    Returns:
        [call][round][repeat]
    """
    for call in calls:
        cost.call_times(call, warmup=warmup, repeats=1, threads=threads)
    rounds = min(ROUNDS, repeats)
    sizes = [repeats // rounds + (position < repeats % rounds) for position in range(rounds)]
    times: list[list[list[float]]] = [[] for _ in calls]
    for size in sizes:
        for call, taken in zip(calls, times, strict=True):
            taken.append(cost.call_times(call, warmup=1, repeats=size, threads=threads))
    return times


def speed(times: Sequence[Sequence[float]], first: Sequence[Sequence[float]]) -> float:
    """How many times as fast as `first`, both [round][repeat]: the median over the rounds of its median / ours."""
    return statistics.median(
        statistics.median(theirs) / statistics.median(ours) for ours, theirs in zip(times, first, strict=True)
    )


def benchmark(
    exports: Mapping[str, Path], *, threads: int = 1, batch: int = 1, repeats: int = 100
) -> list[dict[str, Any]]:
    """Latency and throughput on the CPU of every format of several exports, from their files alone.

    Args:
        exports: name -> export folder.
        batch: examples in a call, each of the largest shape that the export was made for.

    Returns:
        One entry a format: run, format, bytes (of the file with the weights), input (its shape), latency_ms (as in
        report.json), throughput (examples a second at the median) and speed (see `speed`; of the first entry, 1).
    """
    entries, calls = [], []
    for name, folder in exports.items():
        inputs = sample(folder, batch)
        for kind, path in formats(folder).items():
            exported = load(path, threads=threads)
            calls.append(partial(exported.run, exported.inputs(inputs)))
            shape = list(next(iter(inputs.values())).shape)
            entries.append({"run": name, "format": kind, "bytes": path.stat().st_size, "input": shape})
    times = interleaved(calls, repeats=repeats, threads=threads)
    for entry, taken in zip(entries, times, strict=True):
        found = cost.summary([ms for block in taken for ms in block], batch=batch, threads=threads)
        entry |= {"latency_ms": found.report(), "throughput": found.throughput, "speed": speed(taken, times[0])}
    return entries
