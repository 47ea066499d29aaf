"""The pictures of a run: how the stages trained, what the loss terms did, and what was paid for what was gained."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from distill.errors import UserError
from distill.report import count, times
from distill.schema import NETWORKS

# Okabe and Ito's palette, told apart with the common colour blindnesses; shape and dash repeat it for print in grey.
STYLE = {"teacher": ("#0072B2", "s", "-"), "baseline": ("#E69F00", "^", "--"), "student": ("#009E73", "o", "-")}
Series = dict[str, tuple[np.ndarray, np.ndarray]]


def read_metrics(metrics_csv: str | Path, metric: str) -> Series:
    """stage → (steps [N], values [N]) of `<stage>/<metric>`, sorted by step; the last row of a repeated step wins.

    Cells that are empty or not finite are left out, and so is a stage without any value.
    """
    try:
        with Path(metrics_csv).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"metrics {metrics_csv}: {error.strerror}; give the metrics.csv of a run folder") from None
    out: Series = {}
    for stage in NETWORKS:
        cells = [(row.get("step"), row.get(f"{stage}/{metric}")) for row in rows]
        try:
            points = {int(float(step)): float(value) for step, value in cells if step and value}
        except ValueError as error:
            raise UserError(f"metrics {metrics_csv}: {error}; give the metrics.csv of a run folder") from None
        kept = sorted((step, value) for step, value in points.items() if math.isfinite(value))
        if kept:
            steps, values = np.array(kept).T
            out[stage] = (steps, values)
    return out


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` (odd) neighbours, [N] → [N]; at the ends over the neighbours that exist."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def curves(metrics_csv: str | Path, path: str | Path) -> None:
    """Draw training loss and validation accuracy by step for the stages found in a Lightning CSVLogger file."""
    losses, accuracies = read_metrics(metrics_csv, "train_loss"), read_metrics(metrics_csv, "val_accuracy")
    if not losses and not accuracies:
        raise UserError(
            f"metrics {metrics_csv}: no <stage>/train_loss or <stage>/val_accuracy in it; train at least one step"
        )
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage, (steps, values) in losses.items():
        colour, marker, dash = STYLE[stage]
        width = 2 * (len(values) // 50) + 1
        if width > 1:
            left.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        left.plot(
            steps,
            moving_average(values, width),
            dash,
            color=colour,
            label=stage,
            marker=marker if len(values) < 12 else None,
        )
    for stage, (steps, values) in accuracies.items():
        colour, marker, dash = STYLE[stage]
        right.plot(steps, values, dash, color=colour, label=stage, marker=marker, markersize=5)
    everything = np.concatenate([values for _, values in losses.values()]) if losses else np.ones(1)
    if everything.min() > 0 and everything.max() > 20 * everything.min():
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if everything.max() < 100 * everything.min() else (1,)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
    for axes, title, series in (
        (left, "Training loss, each stage its own terms", losses),
        (right, "Validation accuracy", accuracies),
    ):
        _dress(axes, title, "step")
        if series:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="0.4")
    _save(figure, path)


TERM_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
TERM_DASHES = ("-", "--", ":", "-.")


def terms(metrics_csv: str | Path, names: Sequence[str], path: str | Path) -> bool:
    """Draw raw value, share of the loss and gradient norm of each term of the student's loss by step.

    Returns:
        Whether there was something to draw: nothing is where a loss has one term, or diagnostics were off.
    """
    panels = {
        "train": "Value of each term, unweighted",
        "share": "Share of the weighted loss",
        "grad": "Gradient norm on the student, weighted",
    }
    series = {
        (kind, name): read_metrics(metrics_csv, f"{kind}_{name}").get("student") for kind in panels for name in names
    }
    if not any(values for (kind, _), values in series.items() if kind == "grad"):
        return False
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for number, name in enumerate(names):
            if (points := series[kind, name]) is None:
                continue
            steps, values = points
            width = 2 * (len(values) // 50) + 1 if kind == "train" else 1
            axes.plot(
                steps,
                moving_average(values, width),
                TERM_DASHES[number // len(TERM_COLOURS) % len(TERM_DASHES)],
                color=TERM_COLOURS[number % len(TERM_COLOURS)],
                label=name,
                marker="o" if len(values) < 12 else None,
                markersize=4,
            )
        if kind == "share":
            axes.set_ylim(0, 1)
        elif min((v.min() for (k, _), p in series.items() if k == kind and p for v in p[1:]), default=0) > 0:
            axes.set_yscale("log")
        _dress(axes, title, "step")
    # From all panels: a term that is alone in its stage of the training has values and no gradient norms.
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    shown = [name for name in names if name in lines]
    axes.legend([lines[name] for name in shown], shown, frameon=False)
    _save(figure, path)
    return True


def tradeoff(report: dict[str, Any], path: str | Path) -> None:
    """Draw test accuracy against MACs and against median latency (log scale), with the ratio teacher / student."""
    networks = {key: report[key] for key in NETWORKS if report[key] is not None}
    ms = report["student"]["latency_ms"]
    threads = f"{ms['threads']} thread{'s' if ms['threads'] > 1 else ''}"
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    macs = {key: float(network["macs"]) for key, network in networks.items()}
    latency = {key: float(network["latency_ms"]["p50"]) for key, network in networks.items()}
    accuracy = {key: float(network["metrics"]["accuracy"]) for key, network in networks.items()}
    low, high = min(accuracy.values()), max(accuracy.values())
    room = max(high - low, 0.01)
    left.set_ylim(low - 0.45 * room, high + 0.2 * room)
    left.set_ylabel("test accuracy")
    _scatter(left, macs, accuracy, report["ratios"]["macs"], ("fewer", "more"))
    _scatter(right, latency, accuracy, report["ratios"]["latency_p50"], ("faster", "slower"))
    _dress(left, "Accuracy and computation", "MACs at batch 1 (log)")
    _dress(right, "Accuracy and latency", f"p50 latency in ms (log): batch {ms['batch']}, {threads}, {ms['device']}")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if report["run"]["smoke"]:
        figure.suptitle("smoke run: the numbers mean nothing", color="#D55E00")
    _save(figure, path)


def _scatter(axes: Axes, xs: dict[str, float], ys: dict[str, float], ratio: float, words: tuple[str, str]) -> None:
    """Points, their labels pushed apart where they would touch, and the ratio on a measuring line below."""
    axes.set_xscale("log")
    low, high = min(xs.values()), max(xs.values())
    span = max(math.log10(high / low), 0.6)
    middle = (math.log10(low) + math.log10(high)) / 2
    axes.set_xlim(10 ** (middle - 0.75 * span), 10 ** (middle + 0.75 * span))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1.2 else (1, 3) if span < 2 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    bottom, top = axes.get_ylim()
    centre = math.sqrt(xs["teacher"] * xs["student"])
    digits = 3 if top - bottom > 0.03 else 4
    heights = spread({key: (y - bottom) / (top - bottom) for key, y in ys.items()}, 0.1)
    for key, x in xs.items():
        colour, marker, _ = STYLE[key]
        axes.plot(x, ys[key], marker, color=colour, markersize=9, zorder=3)
        right = x <= centre
        axes.annotate(
            f"{key} {ys[key]:.{digits}f}",
            (x, ys[key]),
            (22 if right else -22, (heights[key] - (ys[key] - bottom) / (top - bottom)) * 190),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 4},
        )
    line = bottom + 0.08 * (top - bottom)
    axes.annotate("", (xs["student"], line), (xs["teacher"], line), arrowprops={"arrowstyle": "->", "color": "0.35"})
    text = f"{times(max(ratio, 1 / ratio))} {words[0] if ratio >= 1 else words[1]}"
    axes.annotate(text, (centre, line), (0, 4), textcoords="offset points", ha="center", va="bottom", color="0.25")


def spread(heights: dict[str, float], distance: float) -> dict[str, float]:
    """Heights with neighbours at least `distance` apart: order kept, each crowd spread about its own mean."""
    order = sorted(heights, key=lambda key: heights[key])
    groups: list[list[str]] = []

    def centre(group: list[str]) -> float:
        return sum(heights[key] for key in group) / len(group)

    for key in order:
        groups.append([key])
        while (
            len(groups) > 1
            and centre(groups[-1]) - centre(groups[-2]) < distance * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return {
        key: centre(group) + (i - (len(group) - 1) / 2) * distance for group in groups for i, key in enumerate(group)
    }


def _dress(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path)
