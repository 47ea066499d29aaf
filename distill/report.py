"""The record of a run: report.json (schema 1) for programs, report.md for people, a table for the terminal.

A report is a plain dict whose contract is `distill.schema`. Every number in it was measured in the run or read from the
named teacher record: nothing here computes a result except `ratios` and `gap_closed`.
"""

import json
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.schema import NETWORKS, STAGES, validate

PACKAGES = ("torch", "torchvision", "transformers", "timm", "pytorch-lightning", "hydra-core", "onnxruntime", "distill")


def ratios(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, float]:
    """Teacher / student for params, macs, bytes and the p50 latency; 10 is a ten times smaller student."""
    out = {key: teacher[key] / student[key] for key in ("params", "macs", "bytes")}
    return out | {"latency_p50": teacher["latency_ms"]["p50"] / student["latency_ms"]["p50"]}


def gap_closed(teacher: float, student: float, baseline: float | None) -> float | None:
    """(student − baseline) / (teacher − baseline) on the test metric, higher being better.

    1: as good as the teacher; 0: no better than without it; negative: distillation made the student worse.
    None without a baseline, and where the teacher does not beat the baseline: there is no gap then, and the quotient
    has no meaning.
    """
    if baseline is None or teacher - baseline <= 1e-9:
        return None
    return (student - baseline) / (teacher - baseline)


def versions() -> dict[str, str | None]:
    """Installed version of Python and of each package a result depends on; None where a package is not installed."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def hardware() -> dict[str, str | float | int | None]:
    """cpu: model; cores: threads torch uses; memory_gib; accelerator: name or None; os. Nothing personal."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
    }


def write(report: dict[str, Any], folder: str | Path) -> None:
    """Validate, then write report.json and report.md into `folder`, each replaced as a whole.

    Plots (*.png) that are already there are shown in report.md; UserError as from `validate`.
    """
    validate(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plots = sorted(path.name for path in folder.glob("*.png"))
    replace(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    replace(folder / "report.md", to_markdown(report, plots))


def replace(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def count(value: float) -> str:
    """Four digits with k (10³), M (10⁶) or G (10⁹) from 10,000 on: `1,234`, `25.56M`, `11.17G`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):
            return f"{float(f'{value / size:.4g}'):g}{unit}"
    return f"{value:,.0f}"


def times(value: float) -> str:
    """A ratio: `7.62×`, `15.3×`, `214×`."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}×"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(report: dict[str, Any]) -> str:
    """What the compression cost and gained, in two sentences, bad news included."""
    if report["run"]["smoke"]:
        return "Smoke run: a few steps on a handful of examples, so the numbers mean nothing."
    teacher, student = report["teacher"], report["student"]
    t, s = teacher["metrics"]["accuracy"], student["metrics"]["accuracy"]
    gains = [
        f"{times(max(ratio, 1 / ratio))} {less if ratio >= 1 else more} {noun}"
        for ratio, less, more, noun in (
            (report["ratios"]["params"], "fewer", "more", "parameters"),
            (report["ratios"]["macs"], "fewer", "more", "MACs"),
            (report["ratios"]["latency_p50"], "lower", "higher", "latency"),
        )
    ]
    first = (
        f"{student['name']} reaches {s:.4f} test accuracy, its teacher {teacher['name']} {t:.4f},"
        f" with {gains[0]}, {gains[1]} and {gains[2]}."
    )
    if report["baseline"] is None:
        return f"{first} No baseline was trained, so what distillation itself brought is unknown."
    b, examples = report["baseline"]["metrics"]["accuracy"], report["data"]["test"]
    change = 100 * (s - b)
    worth = f"{change:+.2f} points against the same student trained without the teacher"
    if abs(change) < 1e-7:
        return f"{first} Distillation changed nothing: {worth}."
    if abs(change) < 100 * math.hypot(_margin(s, examples), _margin(b, examples)):
        worth += f" (one seed and {examples:,} test examples cannot tell this from chance)"
    if change < 0:
        return f"{first} Distillation made it worse: {worth}."
    if report["gap_closed"] is None:
        return f"{first} Distillation brought {worth}; the teacher does not beat that one, so there is no gap to close."
    return f"{first} Distillation brought {worth}: {100 * report['gap_closed']:.0f} % of the gap closed."


def _results(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    networks = [report[key] for key in NETWORKS]

    def row(label: str, cell: Callable[[dict[str, Any]], str], ratio: str = "") -> list[str]:
        return [label, *["–" if network is None else cell(network) for network in networks], ratio]

    def latency(network: dict[str, Any]) -> str:
        ms = network["latency_ms"]
        return f"{ms['p50']:.2f} / {ms['p90']:.2f}"

    def conditions(network: dict[str, Any]) -> str:
        ms = network["latency_ms"]
        return f"{ms['batch']} / {ms['threads']} / {ms['device']}"

    def throughput(network: dict[str, Any]) -> str:
        return f"{network['throughput']:.1f}" if "throughput" in network else "–"

    r = report["ratios"]
    metrics = {name for network in networks if network for name in network["metrics"]} - {"accuracy", "agreement"}

    def score(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda network: f"{network['metrics'][name]:.4f}" if name in network["metrics"] else "–"

    return ["", "teacher", "baseline", "student", "teacher / student"], [
        row("network", lambda network: str(network["name"])),
        row("weights", lambda network: str(network["weights"])),
        row("test accuracy", score("accuracy")),
        row("agreement", score("agreement")),
        *[row(f"test {name}", score(name)) for name in sorted(metrics)],
        row("parameters", lambda network: count(network["params"]), times(r["params"])),
        row("MACs (batch 1)", lambda network: count(network["macs"]), times(r["macs"])),
        row("FLOPs (2 × MACs)", lambda network: count(network["flops"]), times(r["macs"])),
        row("weights, MB", lambda network: f"{network['bytes'] / 1e6:.2f}", times(r["bytes"])),
        row("latency p50 / p90, ms", latency, times(r["latency_p50"])),
        row("throughput, 1/s", throughput),
        row("batch / threads / device", conditions),
    ]


def _margin(accuracy: float, examples: int) -> float:
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / max(examples, 1))


def to_markdown(report: dict[str, Any], plots: list[str] | None = None) -> str:
    """The report as Markdown; `plots` are file names beside it."""
    run, data, student = report["run"], report["data"], report["student"]
    accuracy = student["metrics"]["accuracy"]
    gap = "no meaning here" if report["gap_closed"] is None else f"{report['gap_closed']:.3f}"
    exports = [
        [
            export["format"],
            f"`{export['path']}`",
            f"{export['bytes'] / 1e6:.2f}",
            "–" if export["max_abs_diff"] is None else f"{export['max_abs_diff']:.2g}",
            f"{export['metrics']['accuracy']:.4f}" if "accuracy" in export["metrics"] else "–",
            *[
                f"{ms:.2f}" if isinstance(ms := export["latency_ms"].get(key), int | float) else "–"
                for key in ("p50", "p90")
            ],
        ]
        for export in report["exports"]
    ]
    header = ["format", "path", "MB", "max abs diff of logits", "test accuracy", "p50, ms", "p90, ms"]
    seconds = [
        [stage, "not run" if run["seconds"][stage] is None else f"{run['seconds'][stage]:.1f}"] for stage in STAGES
    ]
    total = sum(value for value in run["seconds"].values() if value is not None)
    facts = [[name, str(value)] for name, value in (run["versions"] | run["hardware"]).items() if value is not None]
    interval = (
        f"One run, seed {run['seed']}; on {data['test']:,} test examples the 95 % interval of an accuracy of"
        f" {accuracy:.4f} is about ±{_margin(accuracy, data['test']):.4f} (binomial)."
    )
    sections = [
        f"# {run['name']}",
        f"> **{verdict(report).upper()}**" if run["smoke"] else f"**{verdict(report)}**",
        markdown_table(*_results(report)),
        f"Gap closed, (student − baseline) / (teacher − baseline): {gap}. {interval}",
        *[f"![{Path(name).stem}]({name})" for name in plots or []],
        "## Exports",
        markdown_table(header, exports) if exports else "None.",
        "## Loss",
        markdown_table(["term", "weight"], [[name, _weight(value)] for name, value in report["loss"].items()]),
        "## Data",
        f"{data['name']}: {data['train']:,} train, {data['val']:,} validation, {data['test']:,} test examples,"
        f" {data['classes']} classes. Fingerprint `{data['fingerprint']}`.",
        "## Seconds",
        markdown_table(["stage", "seconds"], [*seconds, ["**total**", f"{total:.1f}"]]),
        "## Versions and hardware",
        markdown_table(["", "value"], facts),
        "## Run it again",
        f"```\n{run['command']}\n```",
        f"Started {run['started']}. sha256 over the student's weights: `{student['digest']}`.",
    ]
    return "\n\n".join(sections) + "\n"


def _weight(value: Any) -> str:
    """Weight and parameters of a term, without those that are not set."""
    if not isinstance(value, dict):
        return f"{value:g}"
    return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)


def summary(report: dict[str, Any]) -> Table:
    """The results table for the terminal, the verdict below it."""
    header, rows = _results(report)
    table = Table(title=report["run"]["name"], caption=verdict(report), caption_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return table
