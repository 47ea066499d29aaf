"""What the command `distill` prints: tables on a terminal, plain lines on a pipe, JSON on request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from distill import compare
from distill.report import times


def as_json(value: Any) -> None:
    """Print plain data as strict JSON, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def working(what: str) -> AbstractContextManager[Any]:
    """A spinner on the terminal while the block runs; nothing on a pipe."""
    return Console(stderr=True).status(what)


def table(made: Table) -> None:
    """Print a table; on a pipe without lines, colours, wrapping or blanks at the end of a line."""
    console = Console()
    if console.is_terminal:
        made.box = made.box or box.SIMPLE
        console.print(made)
        return
    made.box, plain = None, Console(width=10_000)
    with plain.capture() as capture:
        plain.print(made)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table with `left` columns aligned to the left and the others to the right; cells as they are, no markup."""
    made = Table()
    for position, name in enumerate(header):
        made.add_column(Text(name), justify="left" if position < left else "right")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def evaluation(found: dict[str, Any]) -> None:
    """What `revisit.evaluate` returned."""

    def score(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    header = ["format", "path", "accuracy", "in report.json", "agreement", "in report.json (student)"]
    rows = [
        [
            entry["format"],
            entry["path"],
            *map(score, (entry["accuracy"], entry["reported"], entry["agreement"], found["reported_agreement"])),
        ]
        for entry in found["exports"]
    ]
    print(f"{found['run']}: {found['examples']:,} test examples of {found['data']}")
    table(columns(header, rows, left=2))
    if found["teacher"]:
        print(f"No agreement: {found['teacher']}.")


def benchmark(found: Sequence[dict[str, Any]]) -> None:
    """What `benchmark.benchmark` returned."""
    conditions = found[0]["latency_ms"]
    header = ["run", "format", "MB", "input", "p50, ms", "p90, ms", "examples/s", "speed"]
    rows = [
        [
            entry["run"],
            entry["format"],
            f"{entry['bytes'] / 1e6:.2f}",
            "×".join(map(str, entry["input"])),
            *(f"{entry['latency_ms'][key]:.2f}" for key in ("p50", "p90")),
            f"{entry['throughput']:,.0f}",
            times(entry["speed"]),
        ]
        for entry in found
    ]
    table(columns(header, rows, left=2))
    print(
        f"batch {conditions['batch']}, {conditions['threads']} CPU thread{'s' * (conditions['threads'] > 1)}, "
        "measured in turn; speed: how many times as fast as the first line"
    )


def comparison(rows: list[dict[str, Any]]) -> None:
    """What `compare.compare` returned: a column for each row of it on a terminal, Markdown on a pipe."""
    console = Console()
    if not console.is_terminal:
        print(compare.to_markdown(rows), end="")
        return
    header, cells = compare.table(rows)
    table(columns([header[0], *(row[0] for row in cells)], list(zip(header, *cells, strict=True))[1:]))
    console.print(Markdown("\n".join(f"* {note}" for note in compare.notes(rows))))
