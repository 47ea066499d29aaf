"""The command `distill` on run folders: a real export of each kind, and a hand-made run of ResNet-10-T on digits."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import Exports, shared_exports
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from distill import benchmark, cli, compare, fingerprint, revisit, stages, store
from distill.app import CONF
from distill.exported import answers, load_native, measure
from distill.features import Tapped

REPORT = json.loads((Path(__file__).parent / "data" / "report.json").read_text(encoding="utf-8"))
HEAVY = ("torch", "transformers", "timm", "onnxruntime", "pytorch_lightning", "wandb", "matplotlib", "sklearn")


def distill(*arguments: str | Path, cwd: Path, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; importing one of `blocked` fails there."""
    code = f"import sys; sys.modules |= dict.fromkeys({blocked!r}); from distill.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return shared_exports(tmp_path_factory)


@pytest.fixture(scope="module")
def original(compose: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train.py` would have written, without training: its teacher is in the store, its student is untrained."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    cfg = compose("model=resnet50", "student=tiny", "trainer=smoke", "data.limit=40")
    cfg.teacher.network._target_ = "students.resnet.resnet10t"
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), run / "config.yaml")
    job = revisit.reopen(run, None)
    teacher, folder = stages.initial_teacher(job)
    assert folder is not None
    enliven(teacher, job, noise=0.5)
    store.save_teacher(folder, teacher, {})
    student = stages.new_student(job)
    enliven(student, job, noise=0.0)
    state = {f"student.{name}": value for name, value in student.state_dict().items()} | {"loss.p": torch.ones(2)}
    (run / "checkpoints").mkdir()
    facts = {"teacher": fingerprint.of_weights(teacher)}
    torch.save({"state_dict": state, "distill": facts}, run / "checkpoints" / "best.ckpt")
    report = json.loads(json.dumps(REPORT))
    report["data"]["fingerprint"] = job.data.fingerprint
    report["student"]["digest"] = fingerprint.of_tensors(student.backbone.state_dict())
    differences = stages.write_export(job, student, report, run / "export")
    loader = job.data.loader("test", batch_size=7)
    report["exports"] = measure(run / "export", differences, loader, job.data.sample(), warmup=0, repeats=1)
    (run / "report.json").write_text(json.dumps(report))
    return run


def enliven(network: Tapped, job: stages.Job, noise: float) -> None:
    """Make the logits differ between examples: random weights of the classifier, BatchNorm statistics of the data."""
    torch.manual_seed(1)
    weight = network.backbone.get_classifier().weight
    with torch.no_grad():
        weight.normal_().add_(noise * torch.randn_like(weight))
        for _ in range(5):
            network.train()(next(iter(job.data.loader("train", batch_size=40))))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def change_report(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    report = json.loads((run / "report.json").read_text())
    change(report)
    (run / "report.json").write_text(json.dumps(report))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def answered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"]["distill"] == f"{cli.main.__module__}:{cli.main.__qualname__}"


def test_help_shows_an_example_of_every_command_and_needs_nothing_heavy(tmp_path: Path) -> None:
    shown = distill("--help", cwd=tmp_path, blocked=(*HEAVY, "hydra", "omegaconf", "rich"))
    assert (shown.returncode, shown.stderr) == (0, "")
    commands = cli.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert len(commands) == 6
    for name in commands:
        assert f"\n  distill {name} RUN" in shown.stdout
        assert f"\n    {name}" in shown.stdout


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.metadata, "version", {"distill": "9.8.7"}.__getitem__)
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, "distill 9.8.7\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["COMMAND", "distill --help"]),
        (["train"], ["'train'", "predict"]),
        (["predict", "none", "text"], ["none: no such folder"]),
        (["predict", "empty", "text"], ["empty: is neither a run folder", "config.yaml"]),
        (["predict", "unfinished", "text"], ["unfinished: has no export/", "distill export unfinished"]),
        (["predict", "image", "none.png"], ["none.png: no such image file"]),
        (["predict", "image", "x", "--top", "0"], ["--top", "0 is not a whole number >= 1"]),
        (["predict", "image"], ["INPUT", "distill predict --help"]),
        (["evaluate", "none"], ["none: no such folder"]),
        (["evaluate", "note"], ["note: is not a folder"]),
        (["evaluate", "unfinished"], ["unfinished: has no export/"]),
        (["evaluate", "image"], ["image/report.json: cannot be read"]),
        (["benchmark", "image", "none"], ["none: no such folder"]),
        (["benchmark", "image", "--threads", "many"], ["--threads", "many"]),
        (["export", "none"], ["none: no such folder"]),
        (["export", "image"], ["image: is not a run folder (no config.yaml)"]),
        (["export", "broken"], ["broken/config.yaml: cannot be read"]),
        (["export", "other"], ["other/config.yaml: is not the configuration of a run (no data)"]),
        (["export", "unfinished"], ["unfinished: has no checkpoints/best.ckpt"]),
        (["compare", "none"], ["none: cannot be read"]),
        (["compare", "smoke"], ["smoke/report.json: is a smoke run"]),
        (["results", "image", "--name", "../x"], ["--name ../x"]),
        (["results", "image"], ["--name"]),
        (["results", "image", "--name", "x"], ["README.md: no such file"]),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_at_once(
    arguments: list[str], says: list[str], exports: Exports, original: Path, tmp_path: Path
) -> None:
    for name in ("empty", "unfinished", "broken", "other", "smoke"):
        (tmp_path / name).mkdir()
    (tmp_path / "note").write_text("")
    (tmp_path / "image").symlink_to(exports["image"])
    shutil.copy(original / "config.yaml", tmp_path / "unfinished")
    (tmp_path / "broken" / "config.yaml").write_text("a: [")
    (tmp_path / "other" / "config.yaml").write_text("a: 1\n")
    smoke = REPORT | {"run": REPORT["run"] | {"smoke": True}}
    (tmp_path / "smoke" / "report.json").write_text(json.dumps(smoke))
    before = sorted(tmp_path.rglob("*"))
    result = distill(*arguments, cwd=tmp_path, blocked=HEAVY)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_is_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
    monkeypatch.setattr(cli, "predict", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", str(tmp_path), "x"])
    assert end.value.code == 130


def test_a_reader_who_leaves_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    code = f"from distill.cli import main; main(['compare', {str(tmp_path)!r}, '--json'])"
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF.parent, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


def test_predict_text(exports: Exports, tmp_path: Path) -> None:
    result = distill("predict", exports["text"], "some [red] text", "north", "--top", "2", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["input", "label", "probability"]
    assert [line.startswith(start) for line, start in zip(lines[1::2], (" some [red] text", " north"), strict=True)]
    assert all(line == line.rstrip() and not set(line) & set("│─━\x1b") for line in lines)
    assert len(lines) == 5
    for line in lines[1:]:
        assert 0 < float(line.split()[-1]) < 1


def test_predict_images_as_json(original: Path, tmp_path: Path) -> None:
    for name, grey in (("dark.png", 10), ("light.png", 240)):
        Image.new("L", (8, 8), grey).save(tmp_path / name)
    result = distill("predict", original, "dark.png", "light.png", "--json", "--top", "99", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    first, second = json.loads(result.stdout)
    assert (first["input"], second["input"]) == ("dark.png", "light.png")
    assert sorted(first["labels"]) == list("0123456789")
    assert first["probabilities"] == sorted(first["probabilities"], reverse=True)
    assert sum(second["probabilities"]) == pytest.approx(1)
    assert first["probabilities"] != second["probabilities"]


def test_evaluate_finds_what_the_report_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answered(capsys, "evaluate", run, "--json"))
    report = json.loads((run / "report.json").read_text())
    job = revisit.reopen(run, report)
    teacher, folder = stages.initial_teacher(job)
    assert folder is not None
    store.load_teacher(folder, teacher)
    loader = job.data.loader("test", batch_size=40)
    said, labels = answers(load_native(run / "export"), loader)
    with torch.no_grad():
        theirs, _ = answers(lambda batch: teacher.eval()(batch).logits, loader)
    agreement = (said == theirs).float().mean().item()
    assert (found["differences"], found["teacher"], found["examples"]) == ([], None, 40)
    assert [entry["format"] for entry in found["exports"]] == ["timm", "onnx"]
    for entry, recorded in zip(found["exports"], report["exports"], strict=True):
        assert entry["accuracy"] == entry["reported"] == recorded["metrics"]["accuracy"]
        assert entry["accuracy"] == pytest.approx((said == labels).float().mean().item())
        assert entry["agreement"] == pytest.approx(agreement)
    assert 0 < agreement < 1
    shown = answered(capsys, "evaluate", run)
    assert f"{found['exports'][0]['accuracy']:.4f}" in shown
    assert "export/model.onnx" in shown


def test_answers_come_in_the_order_of_the_examples() -> None:
    loader = [
        {"labels": torch.tensor(labels), "index": torch.tensor(index)}
        for labels, index in (([3, 0], [2, 0]), ([1], [1]))
    ]
    said, labels = answers(lambda batch: torch.nn.functional.one_hot(batch["labels"], 4), loader)
    assert said.tolist() == labels.tolist() == [0, 1, 3]


def test_evaluate_says_where_the_report_is_not_true(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_more_right(report: dict[str, Any]) -> None:
        report["exports"][1]["metrics"]["accuracy"] += 1 / 40

    change_report(run, one_more_right)
    assert "onnx: " in (line := refused(capsys, "evaluate", run))
    assert "(1 of 40 examples)" in line
    assert "timm" not in line


def test_evaluate_knows_other_data_and_missing_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export" / "model.onnx").unlink()
    assert "export/model.onnx is in report.json and not there" in refused(capsys, "evaluate", run)
    config = OmegaConf.load(run / "config.yaml")
    config.data.limit = 39
    OmegaConf.save(config, run / "config.yaml")
    assert "digits is no longer the one of the run" in refused(capsys, "export", run)


def test_agreement_needs_the_very_teacher(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"distill": {"teacher": "another"}}, path)
    assert "no longer the one that the student was trained with" in answered(capsys, "evaluate", run)
    config = OmegaConf.load(run / "config.yaml")
    config.store = str(tmp_path / "elsewhere")
    OmegaConf.save(config, run / "config.yaml")
    assert "the teacher is not in the store" in answered(capsys, "evaluate", run)


def test_export_writes_the_same_files_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = answered(capsys, "export", run, "--to", tmp_path / "again")
    assert printed.splitlines()[-1] == f"export: {tmp_path / 'again'}"
    names = sorted(path.name for path in (run / "export").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (run / "export" / name).read_bytes(), name


def test_export_of_a_run_without_a_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    (run / "report.json").unlink()
    answered(capsys, "export", run)
    assert (run / "export" / "model.safetensors").read_bytes() == weights
    assert "accuracy" not in (run / "export" / "README.md").read_text()


class Call:
    """Pickled, it calls `os.mkdir` where it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_export_executes_nothing_and_checks_the_student(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, readme = run / "checkpoints" / "best.ckpt", (run / "export" / "README.md").stat().st_mtime_ns
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"harmful": Call(tmp_path / "made")}, path)
    assert "best.ckpt: cannot be loaded" in refused(capsys, "export", run)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Call(tmp_path / "made")))
    assert (tmp_path / "made").exists()
    path.write_bytes(b"PK\x03\x04 and no more")
    assert "best.ckpt: cannot be loaded" in refused(capsys, "export", run)
    next(value for name, value in checkpoint["state_dict"].items() if name.endswith("conv1.weight"))[0, 0, 0, 0] += 1
    torch.save(checkpoint, path)
    assert "is not the student of report.json" in refused(capsys, "export", run)
    del checkpoint["state_dict"]["student.backbone.fc.bias"]
    torch.save(checkpoint, path)
    assert "best.ckpt: cannot be loaded" in refused(capsys, "export", run)
    assert (run / "export" / "README.md").stat().st_mtime_ns == readme


def test_export_leaves_a_folder_that_is_no_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    assert "is not an export" in refused(capsys, "export", run, "--to", tmp_path / "mine")
    assert (tmp_path / "mine" / "note").read_text() == "keep"


def test_timed_calls_are_taken_in_turn() -> None:
    called: list[str] = []
    calls = [lambda: called.append("A"), lambda: called.append("B")]
    times = benchmark.interleaved(calls, repeats=12, threads=1, warmup=2)
    assert [[len(block) for block in taken] for taken in times] == [[2, 2, *[1] * 8]] * 2
    assert "".join(called) == "AAA" + "BBB" + "AAABBB" * 2 + "AABB" * 8
    assert [len(taken) for taken in benchmark.interleaved(calls, repeats=3, threads=1)] == [3, 3]


def test_speed_is_not_fooled_by_a_machine_that_gets_slower() -> None:
    first = [[2.0 * slow] * 3 for slow in range(1, 11)]
    second = [[1.0 * slow, 50.0, 1.0 * slow] for slow in range(1, 11)]
    second[0] = [90.0, 90.0, 90.0]
    assert benchmark.speed(second, first) == pytest.approx(2)
    assert benchmark.speed(first, first) == 1


def test_benchmark(exports: Exports, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("benchmark", exports["text"], run, "--batch", "2", "--repeats", "4")
    found = json.loads(answered(capsys, *arguments, "--json"))
    assert [(entry["run"], entry["format"]) for entry in found] == [
        (str(folder), kind) for folder, native in ((exports["text"], "transformers"), (run, "timm"))
        for kind in (native, "onnx")
    ]  # fmt: skip
    assert [entry["input"] for entry in found] == [[2, 24]] * 2 + [[2, 3, 32, 32]] * 2
    assert found[0]["speed"] == 1
    for entry in found:
        latency = entry["latency_ms"]
        assert (latency["batch"], latency["threads"], latency["device"]) == (2, 1, "cpu")
        assert 0 < latency["p50"] <= latency["p90"]
        assert entry["throughput"] == pytest.approx(2000 / latency["p50"])
    assert found[2]["bytes"] == (run / "export" / "model.safetensors").stat().st_size
    shown = answered(capsys, *arguments)
    assert "2×3×32×32" in shown
    assert "batch 2, 1 CPU thread," in shown


def save_seeds(folder: Path, *seeds: int) -> list[Path]:
    runs = [folder / f"seed{seed}" for seed in seeds]
    for seed, path in zip(seeds, runs, strict=True):
        path.mkdir(parents=True)
        report = json.loads(json.dumps(REPORT))
        report["run"]["seed"] = seed
        report["student"]["metrics"]["accuracy"] = 0.5 + 0.1 * seed
        (path / "report.json").write_text(json.dumps(report))
    return runs


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = save_seeds(tmp_path, 0, 1)
    (row,) = json.loads(answered(capsys, "compare", *runs, "--json"))
    assert row["accuracy"]["student"]["mean"] == pytest.approx(0.55)
    assert answered(capsys, "compare", *runs) == compare.to_markdown(compare.compare(runs))


def test_compare_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = save_seeds(tmp_path, 0, 1)
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "100"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    shown = answered(capsys, "compare", *runs)
    assert "\x1b[" in shown
    assert "0.5500 ± 0.0707" in shown
    assert "gap closed" in shown


def test_results_writes_the_file_and_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"# Mine\n\n{compare.BEGIN}\n{compare.END}\n\nrest\n")
    runs = save_seeds(tmp_path / "runs", 0, 1, 2)
    printed = answered(capsys, "results", *runs[:2], "--name", "first")
    assert printed.splitlines() == ["results/first.json", "results/README.md", "README.md"]
    answered(capsys, "results", runs[2], "--name", "second")
    answered(capsys, "results", runs[2], "--name", "third")
    page, readme = Path("results/README.md").read_text(), Path("README.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Results", "### first", "### second", "### third",
    ]  # fmt: skip
    assert compare.render("results") in page
    assert readme.startswith(f"# Mine\n\n{compare.BEGIN}\n| ")
    assert readme.endswith(f"{compare.END}\n\nrest\n")
    assert (readme.count("0.5500 ± 0.0707"), readme.count("0.7000")) == (1, 1)
    assert "###" not in readme
