import copy
import getpass
import io
import json
import math
import platform
import re
from pathlib import Path

import pytest
from rich.console import Console

from distill import report as reports
from distill.errors import UserError
from distill.schema import validate

EXAMPLE = Path(__file__).parent / "data" / "report.json"


@pytest.fixture
def report():
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


def set_path(report, path, value):
    *parents, last = path.split(".")
    for name in parents:
        report = report[int(name)] if isinstance(report, list) else report[name]
    report[last] = value


def test_ratios_known_values(report):
    assert reports.ratios(report["teacher"], report["student"]) == {
        "params": 10.0,
        "macs": 20.0,
        "bytes": 10.0,
        "latency_p50": 12.5,
    }


@pytest.mark.parametrize(
    ("teacher", "student", "baseline", "expected"),
    [
        (0.9, 0.85, 0.8, 0.5),
        (0.9, 0.9, 0.8, 1.0),
        (0.9, 0.8, 0.8, 0.0),
        (0.9, 0.95, 0.8, 1.5),
        (0.9, 0.7, 0.8, -1.0),
        (0.8, 0.85, 0.8, None),
        (0.7, 0.85, 0.8, None),
        (0.1 + 0.2, 0.5, 0.3, None),
        (0.9, 0.85, None, None),
    ],
)
def test_gap_closed_known_values(teacher, student, baseline, expected):
    assert reports.gap_closed(teacher, student, baseline) == (None if expected is None else pytest.approx(expected))


def test_the_example_is_valid_and_round_trips(report, tmp_path):
    reports.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


REQUIRED = [
    "schema",
    *(f"run.{key}" for key in ("name", "command", "seed", "smoke", "started", "seconds", "versions", "hardware")),
    *(f"run.seconds.{key}" for key in ("teacher", "cache", "baseline", "distill", "evaluate", "export")),
    *(f"data.{key}" for key in ("name", "fingerprint", "train", "val", "test", "classes")),
    *(
        f"{network}.{key}"
        for network in ("teacher", "student", "baseline")
        for key in ("name", "weights", "params", "macs", "flops", "bytes", "metrics.accuracy")
    ),
    *(f"student.latency_ms.{key}" for key in ("p50", "p90", "batch", "threads", "device")),
    "student.metrics.agreement",
    "student.digest",
    "baseline",
    *(f"ratios.{key}" for key in ("params", "macs", "bytes", "latency_p50")),
    "gap_closed",
    "loss",
    "exports",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_or_mistyped_field_is_named(report, path):
    wrong, missing = copy.deepcopy(report), report
    set_path(wrong, path, [object()] if path != "exports" else "none")
    with pytest.raises(UserError, match=rf"^report\.{path} "):
        validate(wrong)
    *parents, last = path.split(".")
    for name in parents:
        missing = missing[name]
    del missing[last]
    with pytest.raises(UserError, match=rf"^report\.{path} is missing"):
        validate(report)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema", 2, "report.schema is 2"),
        ("teacher.params", True, "report.teacher.params is bool"),
        ("teacher.params", 1.5, "report.teacher.params is float"),
        ("run.seed", None, "report.run.seed is null"),
        ("run.smoke", 1, "report.run.smoke is int"),
        ("student.metrics.accuracy", math.nan, "report.student.metrics.accuracy is nan"),
        ("student.metrics.top5", "high", "report.student.metrics.top5 is str"),
        ("exports.1.bytes", "big", r"report.exports\[1\].bytes is str"),
        ("loss.ce", {"weight": math.inf}, "report.loss.ce.weight is inf"),
        ("extra", [math.nan], r"report.extra\[0\] is nan"),
    ],
)
def test_wrong_values_are_named(report, path, value, named):
    set_path(report, path, value)
    with pytest.raises(UserError, match=named):
        validate(report)


def test_what_may_be_null_or_extra(report):
    report |= {"baseline": None, "gap_closed": None, "extra": {"kept": 1}}
    report["run"]["seconds"]["cache"] = None
    validate(report)


def test_something_else_than_a_report():
    with pytest.raises(UserError, match="report is list"):
        validate([])


def test_an_invalid_report_leaves_the_old_one(report, tmp_path):
    reports.write(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    report["gap_closed"] = math.nan
    with pytest.raises(UserError, match="gap_closed"):
        reports.write(report, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_failed_replacement_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    target.write_text("old", encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(reports.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        reports.replace(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_markdown_holds_what_a_reader_needs(report, tmp_path):
    (tmp_path / "curves.png").write_bytes(b"")
    report["teacher"]["name"] = "a|b"
    reports.write(report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[2].startswith("**bert_tiny reaches 0.7900")
    assert "![curves](curves.png)" in lines
    assert "| MACs (batch 1) | 1G | 50M | 50M | 20.0× |" in lines
    assert "| FLOPs (2 × MACs) | 2G | 100M | 100M | 20.0× |" in lines
    assert "| batch / threads / device | 1 / 1 / cpu | 1 / 1 / cpu | 1 / 1 / cpu |  |" in lines
    assert "| network | a\\|b | bert_tiny | bert_tiny |  |" in lines
    assert "| onnx-int8 | `export/model.int8.onnx` | 10.10 | – | – | – | – |" in lines
    assert "| **total** | 520.0 |" in lines
    for part in (report["run"]["command"], "Example CPU", "2.15.0", "fingerprint `ab12`".capitalize(), "cd34", "0.400"):
        assert part in text
    assert "None" not in text and "SMOKE" not in text


def test_a_smoke_run_says_so_first(report, tmp_path):
    report["run"]["smoke"] = True
    reports.write(report, tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("> **SMOKE RUN") and "NUMBERS MEAN NOTHING" in lines[2]
    assert "reaches" not in reports.verdict(report)


@pytest.mark.parametrize(
    ("teacher", "student", "baseline", "words"),
    [
        (0.82, 0.79, 0.69, r"brought \+10.00 points .* trained without the teacher: 77 % of the gap closed"),
        (0.82, 0.79, 0.78, r"brought \+1.00 points .*cannot tell this from chance\): 25 % of the gap"),
        (0.82, 0.69, 0.79, r"made it worse: -10.00 points .* the teacher\."),
        (0.82, 0.79, 0.79, "changed nothing"),
        (0.60, 0.79, 0.69, "the teacher does not beat that one, so there is no gap"),
        (0.82, 0.79, None, "No baseline was trained"),
    ],
)
def test_verdict(report, teacher, student, baseline, words):
    report["teacher"]["metrics"]["accuracy"] = teacher
    report["student"]["metrics"]["accuracy"] = student
    if baseline is None:
        report["baseline"] = None
    else:
        report["baseline"]["metrics"]["accuracy"] = baseline
    report["gap_closed"] = reports.gap_closed(teacher, student, baseline)
    validate(report)
    assert re.search(words, reports.verdict(report))
    assert reports.to_markdown(report)


def test_verdict_names_a_slower_student(report):
    report["ratios"]["latency_p50"] = 0.5
    assert "2.00× higher latency" in reports.verdict(report)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234, "1,234"), (12345, "12.35k"), (25_557_032, "25.56M"), (100_000_000, "100M"), (11_174_217_216, "11.17G")],
)
def test_count(value, text):
    assert reports.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.891, "0.89×"), (7.625, "7.62×"), (15.26, "15.3×"), (213.6, "214×")])
def test_times(value, text):
    assert reports.times(value) == text


def test_summary_shows_the_results(report):
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(reports.summary(report))
    text = " ".join(console.export_text().split())
    for part in ("bert_tiny", "0.7900", "0.8800", "20.0×", "40 % of the gap closed"):
        assert part in text


def test_versions_and_hardware_fit_the_contract_and_name_nobody(report):

    report["run"] |= {"versions": reports.versions(), "hardware": reports.hardware()}
    validate(report)
    assert report["run"]["versions"]["torch"]
    assert set(report["run"]["hardware"]) == {"cpu", "cores", "memory_gib", "accelerator", "os"}
    words = {str(value) for value in report["run"]["hardware"].values()}
    assert not words & {platform.node(), getpass.getuser()}
    assert not any("/" in word for word in words if not word.startswith("AMD"))
