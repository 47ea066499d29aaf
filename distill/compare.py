"""Several runs in one table: mean ± standard deviation over seeds, and the committed results made from it.

A source is a run folder, its report.json, or a results file written by `collect`. Reports are validated, smoke runs
refused, and absolute paths cut to their last component. What differs between the runs of a row besides the seed is
listed in `mixed`.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill import report as reports
from distill.errors import UserError
from distill.private import without_paths, words
from distill.schema import NETWORKS, STAGES, validate

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTE = (
    "Test accuracy: mean ± standard deviation over n seeds."
    " Gap closed: (student − baseline) / (teacher − baseline) of the means, – where there is none."
    " Ratios: teacher / student. Seconds: all stages of one run."
)
HEADING = """# Results

What runs measured: a JSON file for each experiment, with every report whole, and below the tables made from them.
`distill results RUN… --name NAME` writes both; no figure is edited by hand.
"""
RATIOS = ("params", "macs", "bytes", "latency_p50")


def compare(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row for each (teacher, its weights, student, data, loss terms), in the order first met.

    A row holds
    * teacher, weights, student, data, loss; n, seeds, commands; hardware and versions: the distinct ones;
    * accuracy{teacher, baseline, student} and agreement: {mean, sd, n}; sd with n − 1, None for one run; baseline None
      where no run has one;
    * gap_closed: of the means, over the runs that have a baseline; ratios: geometric mean of teacher / student;
    * seconds{stage…, total}: means; None for a stage that no run took;
    * mixed{field: distinct values}: what else differs (hardware, versions, settings, latency conditions, sizes) or
      repeats (seeds).
    """
    return rows(load(paths))


def load(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The validated reports of all sources.

    UserError for a missing or damaged file, a smoke run, or a report given twice.
    """
    found: list[dict[str, Any]] = []
    for source in map(Path, paths):
        path = source / "report.json" if source.is_dir() else source
        content = read(path)
        for report in (
            content["runs"] if isinstance(content, dict) and isinstance(content.get("runs"), list) else [content]
        ):
            try:
                validate(report)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            if report["run"]["smoke"]:
                raise UserError(f"{path}: is a smoke run: its numbers mean nothing; give real runs")
            report = without_paths(report)
            if report in found:
                raise UserError(f"{path}: this report was given twice: it would count as two seeds; name each run once")
            found.append(report)
    if not found:
        raise UserError("compare: no report given: nothing to compare; give run folders")
    return found


def read(path: Path) -> Any:
    """The JSON in a file; UserError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give the folder of a finished run") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}): give the folder of a finished run") from None


def rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `compare` for reports in memory."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for report in found:
        key = [report["teacher"]["name"], report["teacher"]["weights"], report["student"]["name"]]
        data = [report["data"]["name"], report["data"]["fingerprint"]]
        groups.setdefault(json.dumps([key, data, report["loss"]], sort_keys=True), []).append(report)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict[str, Any]]) -> dict[str, Any]:
    first, seeds = group[0], [report["run"]["seed"] for report in group]
    paired = [report for report in group if report["baseline"] is not None]

    def accuracy(key: str, over: list[dict[str, Any]] = group) -> dict[str, Any]:
        return _spread([report[key]["metrics"]["accuracy"] for report in over])

    gap = None
    if paired:
        gap = reports.gap_closed(*(accuracy(key, paired)["mean"] for key in ("teacher", "student", "baseline")))
    taken = {stage: [s for report in group if (s := report["run"]["seconds"][stage]) is not None] for stage in STAGES}
    seconds = {stage: statistics.fmean(values) if values else None for stage, values in taken.items()}
    return {
        "teacher": first["teacher"]["name"],
        "weights": first["teacher"]["weights"],
        "student": first["student"]["name"],
        "data": first["data"],
        "loss": first["loss"],
        "n": len(group),
        "seeds": seeds,
        "accuracy": {
            "teacher": accuracy("teacher"),
            "baseline": accuracy("baseline", paired) if paired else None,
            "student": accuracy("student"),
        },
        "agreement": _spread([report["student"]["metrics"]["agreement"] for report in group]),
        "gap_closed": gap,
        "ratios": {key: statistics.geometric_mean([report["ratios"][key] for report in group]) for key in RATIOS},
        "seconds": seconds | {"total": math.fsum(sum(values) for values in taken.values()) / len(group)},
        "commands": [report["run"]["command"] for report in group],
        "hardware": _distinct(report["run"]["hardware"] for report in group),
        "versions": _distinct(report["run"]["versions"] for report in group),
        "mixed": _mixed(group),
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    for value in values:
        if value not in out:
            out.append(value)
    return out


def _mixed(group: list[dict[str, Any]]) -> dict[str, list[Any]]:
    facts = [_facts(report) for report in group]
    names = _distinct(name for fact in facts for name in fact)
    values = {name: _distinct(fact.get(name) for fact in facts) for name in names}
    mixed = {name: different for name, different in values.items() if len(different) > 1}
    seeds = [report["run"]["seed"] for report in group]
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    return mixed | ({"repeated seeds": repeated} if repeated else {})


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    """What should be equal in runs that differ by their seed only."""
    out = {f"{part} {key}": value for part in ("hardware", "versions") for key, value in report["run"][part].items()}
    for key in NETWORKS:
        network = report[key] or {}
        out |= {f"{key} {field}": network.get(field) for field in ("weights", "params", "macs")}
        out |= {
            f"{key} latency {field}": network.get("latency_ms", {}).get(field)
            for field in ("batch", "threads", "device")
        }
    ignored = ("seed=", "hydra.", "resume=")
    settings = sorted(
        word for word in words(report["run"]["command"]) if "=" in word and not word.lstrip("+").startswith(ignored)
    )
    return out | {"settings": " ".join(settings)}


def to_json(rows: list[dict[str, Any]]) -> str:
    """The rows as strict JSON, indented."""
    return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table with notes: what ± means, the hardware and versions, and whatever was mixed."""
    header, cells = table(rows)
    return reports.markdown_table(header, cells) + "\n\n" + "\n".join(f"* {note}" for note in notes(rows)) + "\n"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The rows as header and cells."""
    header = [
        "teacher → student",
        "data",
        "loss",
        "n",
        "teacher",
        "baseline",
        "student",
        "gap closed",
        "params",
        "MACs",
        "bytes",
        "latency p50",
        "seconds",
    ]
    cells = [
        [
            f"{row['teacher']} → {row['student']}",
            row["data"]["name"],
            " + ".join(f"{_weight(value)} {name}" for name, value in row["loss"].items()),
            str(row["n"]),
            *[_accuracy(row["accuracy"][key], row["n"]) for key in NETWORKS],
            "–" if row["gap_closed"] is None else f"{row['gap_closed']:.2f}",
            *[reports.times(row["ratios"][key]) for key in RATIOS],
            f"{row['seconds']['total']:.0f}",
        ]
        for row in rows
    ]
    return header, cells


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What ± means, the hardware and versions, and whatever was mixed, in Markdown."""
    out = [
        NOTE,
        *_environment(rows, "hardware", ("cpu", "cores", "memory_gib", "accelerator", "os")),
        *_environment(rows, "versions", ("python", *reports.PACKAGES)),
    ]
    for position, row in enumerate(rows, 1):
        for field, values in row["mixed"].items():
            shown = " | ".join("none" if value is None else str(value) for value in values)
            out.append(f"**Mixed** in row {position} ({row['teacher']} → {row['student']}): {field}: {shown}.")
    return out


def _weight(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:g}"
    rest = ", ".join(f"{key} {item}" for key, item in value.items() if key != "weight" and item is not None)
    return f"{value.get('weight', 1):g}" + (f" ({rest})" if rest else "")


def _accuracy(value: dict[str, Any] | None, n: int) -> str:
    if value is None:
        return "–"
    spread = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    return f"{value['mean']:.4f}{spread}" + (f" (n={value['n']})" if value["n"] != n else "")


def _environment(rows: list[dict[str, Any]], part: str, order: tuple[str, ...]) -> list[str]:
    """One note where all rows share it, else one a variant, with the rows it belongs to."""
    variants = _distinct(item for row in rows for item in row[part])
    out = []
    for variant in variants:
        names = [name for name in dict.fromkeys((*order, *variant)) if variant.get(name) is not None]
        where = ", ".join(str(position) for position, row in enumerate(rows, 1) if variant in row[part])
        label = part.capitalize() if len(variants) == 1 else f"**Mixed {part}**, row {where}"
        out.append(f"{label}: " + ", ".join(f"{name} {variant[name]}" for name in names) + ".")
    return out


def collect(paths: Iterable[str | Path], out: str | Path) -> Path:
    """Write the results file `out` (*.json) and return it.

    "rows" has the figures with commands, seeds, hardware and versions; "runs" has every report whole.
    """
    out = Path(out)
    if out.suffix != ".json":
        raise UserError(f"results file {out}: must end in .json: `render` reads *.json; rename it")
    found = load(paths)
    content = {"schema": 1, "name": out.stem, "rows": rows(found), "runs": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    reports.replace(out, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return out


def render(results_dir: str | Path) -> str:
    """Markdown with a section for each results file in the folder, by name, made from the JSON files alone.

    UserError where a file's rows are not what its runs give: figures are never edited by hand.
    """
    sections = []
    for name, made in recorded(results_dir).items():
        commands = "\n".join(command for row in made for command in row["commands"])
        sections.append(f"### {name}\n\n{to_markdown(made)}\n```\n{commands}\n```\n")
    return "\n".join(sections)


def recorded(results_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Name of each results file in the folder -> its rows, made again from its runs; UserError as from `render`."""
    paths = sorted(Path(results_dir).glob("*.json"))
    if not paths:
        raise UserError(f"results {results_dir}: no *.json there: nothing to show; write one with collect")
    out = {}
    for path in paths:
        content = read(path)
        made = rows(load([path]))
        if not isinstance(content, dict) or not _same(content.get("rows"), made):
            raise UserError(
                f"{path}: its rows do not follow from its runs: edited, or made by another version; collect it again"
            )
        out[path.stem] = made
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else bool(a == b)


def update_readme(readme: str | Path, table: str) -> bool:
    """Put `table` between the results markers of `readme`; True if that changed the file.

    UserError unless each marker is there once, in order.
    """
    readme = Path(readme)
    before, after = around(readme)
    new = f"{before}{BEGIN}\n{table.strip()}\n{after}"
    if changed := new != readme.read_text(encoding="utf-8"):
        reports.replace(readme, new)
    return changed


def around(readme: Path) -> tuple[str, str]:
    """The text before the first marker of `readme`, and that from the second on; UserError as from `update_readme`."""
    if not readme.is_file():
        raise UserError(f"{readme}: no such file: the table goes into an existing one; give its path")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{readme}: needs one {BEGIN}, then one {END}: the table goes between; add the lines")
    return text[: text.index(BEGIN)], text[text.index(END) :]


def record(paths: Iterable[str | Path], name: str, results_dir: Path, readme: Path) -> list[Path]:
    """`collect` runs as `name`, then refresh the page of the results folder and the table in `readme`; the files.

    UserError before anything is written if `readme` has no place for a table or a run is no result.
    """
    around(readme)
    page = results_dir / "README.md"
    out = collect(paths, results_dir / f"{name}.json")
    if not page.exists():
        reports.replace(page, f"{HEADING}\n{BEGIN}\n{END}\n")
    update_readme(page, render(results_dir))
    update_readme(readme, readme_table(results_dir))
    return [out, page, readme]


def readme_table(results_dir: str | Path) -> str:
    """The rows of all results files in one table, for the README."""
    rows = _distinct(row for made in recorded(results_dir).values() for row in made)
    return f"{reports.markdown_table(*table(rows))}\n\n{NOTE}"
