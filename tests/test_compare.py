import copy
import json
from pathlib import Path

import pytest

from distill import compare as comparing
from distill import report as reports
from distill.errors import UserError
from distill.private import without_paths

EXAMPLE = json.loads((Path(__file__).parent / "data" / "report.json").read_text(encoding="utf-8"))
README = f"# Title\n\n{comparing.BEGIN}\nold\n{comparing.END}\n\nrest\n"


def make(seed, teacher=0.82, baseline=0.77, student=0.79):
    report = copy.deepcopy(EXAMPLE)
    report["run"]["seed"] = seed
    report["run"]["command"] = f"python train.py model=bert student=tiny hydra.run.dir=runs/{seed} seed={seed}"
    for key, value in (("teacher", teacher), ("baseline", baseline), ("student", student)):
        if value is None:
            report[key] = None
        else:
            report[key]["metrics"]["accuracy"] = value
    report["gap_closed"] = reports.gap_closed(teacher, student, baseline)
    return report


def save(folder, *made):
    paths = [folder / f"run{position}" for position in range(len(made))]
    for report, path in zip(made, paths, strict=True):
        path.mkdir(parents=True)
        (path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return paths


THREE = (make(0, 0.80, 0.70, 0.75), make(1, 0.82, 0.72, 0.76), make(2, 0.84, 0.68, 0.74))


def test_one_row_over_seeds_has_known_values(tmp_path):
    slow = copy.deepcopy(THREE[2])
    slow["ratios"]["latency_p50"] = 12.5 * 8
    slow["run"]["seconds"] |= {"cache": None, "teacher": 80.0}
    (row,) = comparing.compare(save(tmp_path, *THREE[:2], slow))
    assert (row["teacher"], row["student"], row["n"], row["seeds"]) == ("bert", "bert_tiny", 3, [0, 1, 2])
    assert row["accuracy"]["teacher"] == pytest.approx({"mean": 0.82, "sd": 0.02, "n": 3})
    assert row["accuracy"]["baseline"] == pytest.approx({"mean": 0.70, "sd": 0.02, "n": 3})
    assert row["accuracy"]["student"] == pytest.approx({"mean": 0.75, "sd": 0.01, "n": 3})
    assert row["agreement"]["mean"] == pytest.approx(0.88)
    assert row["gap_closed"] == pytest.approx(0.05 / 0.12)
    assert row["ratios"] == pytest.approx({"params": 10, "macs": 20, "bytes": 10, "latency_p50": 25})
    assert row["seconds"]["cache"] == pytest.approx(20) and row["seconds"]["teacher"] == pytest.approx(280)
    assert row["seconds"]["total"] == pytest.approx((520 + 520 + 200) / 3)
    assert row["mixed"] == {}


def test_a_folder_and_its_report_are_the_same_source(tmp_path):
    (path,) = save(tmp_path, THREE[0])
    assert comparing.compare([path]) == comparing.compare([path / "report.json"])


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("teacher", "name", "resnet50"),
        ("teacher", "weights", "hub"),
        ("student", "name", "bert_small"),
        ("data", "name", "csv"),
        ("data", "fingerprint", "other"),
        ("loss", "logits", 0.9),
        ("loss", "hidden", 1.0),
        ("loss", "logits", {"weight": 0.5, "temperature": 4}),
    ],
)
def test_different_work_is_a_different_row(part, key, value):
    other = make(1)
    other[part][key] = value
    assert [row["n"] for row in comparing.rows([make(0), other])] == [1, 1]


def test_one_run_has_no_standard_deviation():
    (row,) = comparing.rows([make(0)])
    assert row["accuracy"]["student"] == {"mean": 0.79, "sd": None, "n": 1}
    assert "| 1 | 0.8200 | 0.7700 | 0.7900 | 0.40 |" in comparing.to_markdown([row])


def test_the_order_of_loss_terms_does_not_matter():
    other = make(1)
    other["loss"] = dict(reversed(other["loss"].items()))
    assert len(comparing.rows([make(0), other])) == 1


def test_gap_closed_uses_only_runs_with_a_baseline():
    (row,) = comparing.rows([make(0, 0.9, 0.7, 0.8), make(1, 0.9, None, 0.9)])
    assert row["accuracy"]["baseline"]["n"] == 1 and row["accuracy"]["student"]["n"] == 2
    assert row["gap_closed"] == pytest.approx(0.5)
    assert "0.7000 (n=1)" in comparing.to_markdown([row])


def test_no_baseline_and_no_gap_are_shown_as_such():
    without, above = comparing.rows([make(0, 0.9, None, 0.8)]), comparing.rows([make(0, 0.7, 0.8, 0.8)])
    assert without[0]["accuracy"]["baseline"] is None and without[0]["gap_closed"] is None
    assert above[0]["gap_closed"] is None
    assert "| 0.9000 | – | 0.8000 | – |" in comparing.to_markdown(without)


def test_what_is_mixed_is_shown():
    other = make(0, student=0.80)
    other["run"]["hardware"]["cpu"] = "Other CPU"
    other["run"]["versions"]["torch"] = "2.14.0"
    other["run"]["command"] += " optim.lr=0.1"
    other["student"]["latency_ms"]["threads"] = 2
    (row,) = comparing.rows([make(0), other])
    assert row["mixed"] == {
        "hardware cpu": ["Example CPU", "Other CPU"],
        "versions torch": ["2.15.0", "2.14.0"],
        "student latency threads": [1, 2],
        "settings": ["model=bert student=tiny", "model=bert optim.lr=0.1 student=tiny"],
        "repeated seeds": [0],
    }
    text = comparing.to_markdown([row])
    for part in (
        "**Mixed hardware**",
        "Other CPU",
        "**Mixed versions**",
        "torch 2.14.0",
        "repeated seeds: 0",
        "lr=0.1",
    ):
        assert part in text


def test_rows_from_different_machines_say_which():
    other = make(1)
    other["run"]["hardware"]["cpu"] = "Other CPU"
    other["student"]["name"] = "bert_small"
    text = comparing.to_markdown(comparing.rows([make(0), other]))
    assert "**Mixed hardware**, row 1: cpu Example CPU" in text and "**Mixed hardware**, row 2: cpu Other CPU" in text
    same = comparing.to_markdown(comparing.rows([make(0), make(1)]))
    assert "Hardware: cpu Example CPU, cores 2" in same and "Mixed" not in same


def test_markdown_has_mean_and_spread():
    text = comparing.to_markdown(comparing.rows(list(THREE)))
    assert (
        "| bert → bert_tiny | cldr | 0.5 ce + 0.5 logits | 3 | 0.8200 ± 0.0200 | 0.7000 ± 0.0200 | 0.7500 ± 0.0100"
        " | 0.42 | 10.0× | 20.0× | 10.0× | 12.5× | 520 |"
    ) in text.splitlines()


def test_json_round_trips():
    made = comparing.rows(list(THREE))
    assert json.loads(comparing.to_json(made)) == made


def test_refused_sources(tmp_path):
    smoke = make(0)
    smoke["run"]["smoke"] = True
    broken = make(0)
    del broken["student"]["digest"]
    smoke_run, broken_run, good = save(tmp_path, smoke, broken, make(0))
    (tmp_path / "half.json").write_text('{"schema": 1', encoding="utf-8")
    for paths, words in (
        ([good, smoke_run], "smoke run"),
        ([broken_run], r"report\.json: report\.student\.digest is missing"),
        ([tmp_path / "nowhere"], "cannot be read"),
        ([tmp_path / "half.json"], "is not JSON"),
        ([good, good / "report.json"], "given twice"),
        ([], "no report given"),
    ):
        with pytest.raises(UserError, match=words):
            comparing.compare(paths)
    with pytest.raises(UserError, match="smoke run"):
        comparing.collect([smoke_run], tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("/home/ann/runs/one", "one"),
        ("/home/ann b/one/", "one"),
        ("see /home/ann/x.ckpt, or /tmp/y", "see x.ckpt, or y"),
        ("file:///home/ann/x.csv", "x.csv"),
        ("~/data/x.csv", "x.csv"),
        (r"C:\Users\ann\x.csv", "x.csv"),
        ("hub: https://example.org/a/b", "hub: https://example.org/a/b"),
        ("runs/one/last.ckpt", "runs/one/last.ckpt"),
        ("batch 1/2, 3 / 4", "batch 1/2, 3 / 4"),
    ],
)
def test_absolute_paths_are_cut(text, cut):
    assert without_paths({"a": [text, 1, None]}) == {"a": [cut, 1, None]}


@pytest.mark.parametrize(
    ("command", "cut"),
    [
        ("python /home/ann/train.py hydra.run.dir=/tmp/a seed=1", "python train.py hydra.run.dir=a seed=1"),
        ("python train.py 'data.path=/home/ann b/x.csv'", "python train.py data.path=x.csv"),
        ("python train.py data.files=[/home/ann/a,/home/ann/b]", "python train.py 'data.files=[a,b]'"),
        ("python train.py loss=[ce,logits] data.sep='\\t'", "python train.py loss=[ce,logits] data.sep='\\t'"),
        ("python 'unbalanced /home/ann/x", "python ''\"'\"'unbalanced' x"),
    ],
)
def test_absolute_paths_in_commands_are_cut(command, cut):
    assert without_paths({"command": command}) == {"command": cut}


def test_collect_keeps_every_report_without_paths(tmp_path):
    private = make(0)
    private["run"]["command"] = "python train.py hydra.run.dir=/home/ann/runs/a seed=0"
    private["exports"][0]["path"] = "/home/ann/runs/a/export/model.onnx"
    out = comparing.collect(save(tmp_path / "in", private, make(1)), tmp_path / "results" / "bert.json")
    text = out.read_text(encoding="utf-8")
    recorded = json.loads(text)
    assert "ann" not in text and str(tmp_path) not in text
    assert recorded["name"] == "bert"
    assert recorded["rows"][0]["seeds"] == [0, 1]
    assert recorded["rows"][0]["hardware"] == [EXAMPLE["run"]["hardware"]]
    assert recorded["rows"][0]["versions"] == [EXAMPLE["run"]["versions"]]
    assert recorded["rows"][0]["commands"][0] == "python train.py hydra.run.dir=a seed=0"
    assert recorded["runs"][1] == make(1)
    assert comparing.compare([out]) == recorded["rows"]
    with pytest.raises(UserError, match=r"must end in \.json"):
        comparing.collect([out], tmp_path / "bert.md")


def test_render_makes_the_page_from_the_json_files(tmp_path):
    results = tmp_path / "results"
    comparing.collect(save(tmp_path / "b", *THREE), results / "second.json")
    comparing.collect(save(tmp_path / "a", make(5)), results / "first.json")
    text = comparing.render(results)
    assert text.index("### first") < text.index("### second")
    assert "0.7500 ± 0.0100" in text and "hydra.run.dir=runs/5 seed=5" in text


def test_render_refuses_edited_figures(tmp_path):
    out = comparing.collect(save(tmp_path / "in", *THREE), tmp_path / "results" / "bert.json")
    recorded = json.loads(out.read_text(encoding="utf-8"))
    recorded["rows"][0]["accuracy"]["student"]["mean"] += 0.01
    out.write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(UserError, match="do not follow from its runs"):
        comparing.render(out.parent)
    comparing.collect([out], out)
    assert "0.7500 ± 0.0100" in comparing.render(out.parent)


def test_render_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"no \*.json there"):
        comparing.render(tmp_path)


def test_update_readme_replaces_only_what_is_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    assert comparing.update_readme(readme, "| new |\n\n")
    assert readme.read_text(encoding="utf-8") == README.replace("old", "| new |")
    assert not comparing.update_readme(readme, "| new |")


@pytest.mark.parametrize("text", ["", comparing.BEGIN, README + comparing.END, f"{comparing.END}\n{comparing.BEGIN}\n"])
def test_update_readme_needs_its_markers(text, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="needs one"):
        comparing.update_readme(readme, "new")
    assert readme.read_text(encoding="utf-8") == text


def test_update_readme_needs_a_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        comparing.update_readme(tmp_path / "README.md", "new")
