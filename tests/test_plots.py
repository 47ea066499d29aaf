import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from distill import plots
from distill import report as reports
from distill.errors import UserError

EXAMPLE = Path(__file__).parent / "data" / "report.json"
COLUMNS = "epoch,step,teacher/train_loss,teacher/val_accuracy,student/train_loss,student/val_accuracy\n"


@pytest.fixture
def report():
    return json.loads(EXAMPLE.read_text(encoding="utf-8"))


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        COLUMNS
        + "0,10,1.5,,,\n0,5,2.5,,,\n0,10,,0.5,,\n1,20,1.0,,,\n1,20,,0.6,,\n"
        + "0,5,,,3.5,\n0,5,,,3.0,\n0,10,,,nan,\n0,10,,,,0.25\n",
        encoding="utf-8",
    )
    return path


def is_picture(path):
    picture = imread(path)
    return picture.ndim == 3 and min(picture.shape[:2]) > 300 and np.ptp(picture) > 0


def test_read_metrics_by_stage_sorted_and_without_empty_cells(metrics):
    losses = plots.read_metrics(metrics, "train_loss")
    assert list(losses) == ["teacher", "student"]
    np.testing.assert_array_equal(losses["teacher"], ([5, 10, 20], [2.5, 1.5, 1.0]))
    np.testing.assert_array_equal(losses["student"], ([5], [3.0]))
    np.testing.assert_array_equal(plots.read_metrics(metrics, "val_accuracy")["teacher"], ([10, 20], [0.5, 0.6]))


def test_moving_average_known_values():
    np.testing.assert_allclose(plots.moving_average(np.array([1.0, 2.0, 6.0, 4.0]), 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(plots.moving_average(np.array([1.0, 2.0]), 1), [1.0, 2.0])


def test_curves_draws_what_there_is(metrics, tmp_path):
    plots.curves(metrics, tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")


@pytest.mark.parametrize(
    "rows",
    [
        "0,1,,,,0.5\n",
        "".join(f"0,{step},,,{1000 / (step + 1)},\n" for step in range(300)),
        "0,1,,,0.0,\n0,2,,,-1.0,\n",
    ],
    ids=["one accuracy", "long and log", "not positive"],
)
def test_curves_of_odd_runs(rows, tmp_path):
    (tmp_path / "metrics.csv").write_text(COLUMNS + rows, encoding="utf-8")
    plots.curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [(COLUMNS, "train at least one step"), (COLUMNS + "0,1,high,,,\n", "could not convert"), (None, "No such file")],
)
def test_curves_of_something_else(text, words, tmp_path):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        plots.curves(path, tmp_path / "curves.png")


TERMS = "step," + ",".join(f"student/{kind}_{name}" for kind in ("train", "share", "grad") for name in ("ce", "kd"))


def term_rows(steps, value):
    """As `Diagnostics` and the training log them: values every step, shares and norms every other one."""
    lines = [TERMS]
    for step in range(steps):
        lines.append(f"{step},{value},{2 * value},,,,")
        if step % 2 == 0:
            lines.append(f"{step},,,0.25,0.75,{1 / (step + 1)},{value}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (term_rows(6, 0.5), ["ce", "kd"]),
        (term_rows(300, 0.5), ["ce", "kd"]),
        (term_rows(6, -0.5), ["ce", "kd"]),
        (term_rows(1, 0), ["ce", "kd"]),
        (term_rows(6, 0.5), ["kd"]),
        (term_rows(6, 0.5), ["ce", "off", "kd"]),
        (term_rows(6, 0.5), [*(f"off{n}" for n in range(40)), "kd"]),
    ],
    ids=["short", "long", "negative", "one step", "one term", "a term that was off", "many terms"],
)
def test_terms_draws_what_there_is(text, names, tmp_path):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    assert plots.terms(tmp_path / "metrics.csv", names, tmp_path / "terms.png") is True
    assert is_picture(tmp_path / "terms.png")


def test_terms_draws_each_term_in_each_panel_and_names_it_once(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, _: saved.append(figure))
    text = term_rows(6, 0.5).replace("student/grad_kd", "student/grad_kd,student/train_first") + "0,,,,,,,3.0\n"
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    plots.terms(tmp_path / "metrics.csv", ["first", "ce", "kd"], tmp_path / "terms.png")
    values, shares, norms = saved[0].axes
    assert [tuple(line.get_ydata()) for line in values.lines] == [(3.0,), (0.5,) * 6, (1.0,) * 6]
    assert [tuple(line.get_ydata()) for line in shares.lines] == [(0.25,) * 3, (0.75,) * 3]
    assert [tuple(line.get_ydata()) for line in norms.lines] == [(1.0, 1 / 3, 0.2), (0.5,) * 3]
    assert shares.get_ylim() == (0, 1)
    assert (values.get_yscale(), shares.get_yscale(), norms.get_yscale()) == ("log", "linear", "log")
    legends = [axes.get_legend() for axes in saved[0].axes if axes.get_legend()]
    assert [text.get_text() for legend in legends for text in legend.texts] == ["first", "ce", "kd"]
    styles = [
        [(line.get_label(), line.get_color(), line.get_linestyle()) for line in axes.lines] for axes in saved[0].axes
    ]
    assert styles[0][1:] == styles[1] == styles[2]
    assert len({style[1:] for style in styles[0]}) == 3


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (COLUMNS + "0,1,1.0,,2.0,\n", ["ce"]),
        (TERMS + "\n", ["ce", "kd"]),
        (TERMS + "\n0,1.0,2.0,,,,\n", ["ce", "kd"]),
        (TERMS + "\n0,1.0,2.0,0.5,0.5,nan,nan\n", ["ce", "kd"]),
        (term_rows(6, 0.5), ["other"]),
        (term_rows(6, 0.5), []),
        (term_rows(6, 0.5).replace("student/", "teacher/"), ["ce", "kd"]),
    ],
    ids=["one term", "no steps", "diagnostics off", "not finite", "other terms", "no terms", "not the student's"],
)
def test_terms_draws_nothing_where_there_is_nothing(text, names, tmp_path):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    assert plots.terms(tmp_path / "metrics.csv", names, tmp_path / "terms.png") is False
    assert not (tmp_path / "terms.png").exists()


def change(report, networks):
    for key, (accuracy, macs, latency) in networks.items():
        report[key]["metrics"]["accuracy"], report[key]["macs"] = accuracy, macs
        report[key]["latency_ms"]["p50"] = latency
    report["ratios"] = reports.ratios(report["teacher"], report["student"])
    return report


@pytest.mark.parametrize(
    "networks",
    [
        {},
        {"teacher": (0.9, 10**9, 10.0), "baseline": (0.9, 10**9, 10.0), "student": (0.9, 10**9, 10.0)},
        {"teacher": (0.5, 10**11, 900.0), "baseline": (0.9, 10**5, 0.01), "student": (1.0, 10**5, 0.012)},
    ],
    ids=["no baseline", "all equal", "far apart"],
)
def test_tradeoff(report, networks, tmp_path):
    report = change(report, networks)
    if not networks:
        report["baseline"] = None
    plots.tradeoff(report, tmp_path / "tradeoff.png")
    assert is_picture(tmp_path / "tradeoff.png")


@pytest.mark.parametrize("accuracies", [(0.82, 0.77, 0.79), (0.9312, 0.9305, 0.9309), (0.9, 0.9, 0.9), (0.7, 0.9, 0.8)])
def test_tradeoff_labels_do_not_overlap(report, accuracies, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, _: saved.append(figure))
    names = ("teacher", "baseline", "student")
    macs = (4 * 10**9, 18 * 10**8, 18 * 10**8)
    plots.tradeoff(
        change(report, {n: (a, m, t) for n, a, m, t in zip(names, accuracies, macs, (14.4, 15.9, 16.2), strict=True)}),
        tmp_path / "tradeoff.png",
    )
    figure = saved[0]
    plots.FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text()]
        assert len(boxes) == 4
        assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
        assert not any(a.overlaps(b) for a, b in pairs)


def test_spread_known_values():
    assert plots.spread({"a": 0.1, "b": 0.9}, 0.2) == {"a": 0.1, "b": 0.9}
    assert plots.spread({"a": 0.5, "b": 0.5}, 0.2) == pytest.approx({"a": 0.4, "b": 0.6})
    assert plots.spread({"c": 0.6, "a": 0.45, "b": 0.5}, 0.2) == pytest.approx(
        {"a": 0.31666667, "b": 0.51666667, "c": 0.71666667}
    )
