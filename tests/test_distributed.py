"""Two real processes against one: the same gradients, weights and files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import together
import torch
from omegaconf import DictConfig
from tiny import Images, Text
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from distill import report
from distill.app import CONF
from distill.data.loading import rebatched
from distill.errors import UserError
from distill.processes import Share, check_batch, share
from distill.run import run

HERE = Path(__file__).parent
SMOKE = ["model=mobilenet_v3", "student=tiny", "trainer=smoke", "trainer.accelerator=cpu", "logger=csv"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def python(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = [CONF.parent, HERE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def of_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr("distill.processes.processes", lambda: (rank, world))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rest", range(8))
def test_shares_are_equal_and_together_the_batch(rest: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = BatchSampler(SequentialSampler(range(16 + rest)), 8, drop_last=False)
    shares = []
    for rank in range(world):
        of_rank(monkeypatch, rank, world)
        shares.append(list(Share(batches, world)))
        assert len(Share(batches, world)) == len(shares[-1])
    sizes = [8 // world, 8 // world] + [rest // world] * (rest >= 2 * world)
    assert [[len(part) for part in own] for own in shares] == [sizes] * world
    seen = sorted(row for own in shares for part in own for row in part)
    assert seen == list(range(world * sum(sizes)))


@pytest.mark.parametrize("data", [Text(train=24), Images(train=16, size=4)], ids=["text", "images"])
def test_a_share_follows_the_epochs_of_the_loader(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(loader: Any, epoch: int) -> list[list[int]]:
        loader.batch_sampler.sampler.set_epoch(epoch)
        return [batch["index"].tolist() for batch in loader]

    for epoch in (0, 3):
        whole = batches(data.loader("train", batch_size=8, shuffle=True), epoch)
        for rank in range(2):
            of_rank(monkeypatch, rank, 2)
            assert batches(share(data.loader("train", batch_size=8, shuffle=True), 2), epoch) == [
                rows[rank::2] for rows in whole
            ]
    loader = data.loader("train", batch_size=8)
    assert share(loader, 1) is loader


def test_a_share_keeps_how_a_loader_puts_its_batches_together() -> None:
    examples: Any = [{"index": i} for i in range(8)]
    loader: Any = DataLoader(examples, batch_size=4, collate_fn=lambda rows: [row["index"] for row in rows])
    assert list(rebatched(loader, [[3, 1], [0]])) == [[3, 1], [0]]
    assert share(loader, 2).collate_fn is loader.collate_fn


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size=15: .* 2 processes .* such as 16"):
        check_batch(15, 2, "optim.batch_size")
    with pytest.raises(UserError, match=r"batch_size=3: .* such as 4"):
        share(Text().loader("train", batch_size=3), 4)
    with pytest.raises(UserError, match="3 examples are too few for 2 processes"):
        share(Text(train=3).loader("train", batch_size=8), 2)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.batch_size=15", *TWO], r"optim\.batch_size=15"),
        (["teacher.optim.batch_size=15", *TWO], r"teacher\.optim\.batch_size=15"),
        (["trainer.devices=2", "trainer.strategy=fsdp"], r"trainer\.strategy=fsdp: .* use fsdp2"),
        (["trainer.devices=2", "trainer.strategy=ddp_spawn"], "use ddp"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_seen_before_anything_is_started_or_written(
    overrides: list[str], says: str, compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        run(compose(*SMOKE, *overrides), tmp_path, name="a", command="b")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes tells of the trainings in together.py."""
    folder = tmp_path_factory.mktemp("both")
    result = python(*TORCHRUN, HERE / "together.py", folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


EQUAL = [name for name in together.CASES if name != "contrastive"]


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_train_as_one(case: str, both: list[dict[str, Any]], tmp_path: Path) -> None:
    one, (first, second) = together.CASES[case](tmp_path, {}), (told[case] for told in both)
    for kind, tolerance in (("gradients", 2e-6), ("weights", 1e-6)):
        torch.testing.assert_close(first[kind], second[kind], rtol=0, atol=0)
        torch.testing.assert_close(first[kind], one[kind], rtol=1e-5, atol=tolerance)
    assert first["scores"] == second["scores"] == pytest.approx(one["scores"])
    batches = [sorted(a + b) for a, b in zip(first["indices"], second["indices"], strict=True)]
    assert batches == [sorted(batch) for batch in one["indices"]]


def test_the_teacher_is_not_wrapped_and_with_fsdp2_each_process_holds_half(both: list[dict[str, Any]]) -> None:
    student = sum(p.numel() for p in together.bert().parameters())
    projectors = 3 * (16 * 24 + 24)
    assert [told["plain"]["held"] for told in both] == [student] * 2
    assert student < both[0]["projector"]["held"] <= student + projectors
    whole, halves = both[0]["projector"]["held"], [told["sharded"]["held"] for told in both]
    assert sum(halves) == whole
    assert max(halves) < 0.52 * whole
    teacher = sum(p.numel() for p in together.bert(3, 24).parameters())
    assert [told["sharded"]["taught"] for told in both] == [teacher] * 2
    shares = [told["teacher_too"]["taught"] for told in both]
    assert sum(shares) == teacher
    assert max(shares) < 0.52 * teacher


def test_the_cache_is_written_once(both: list[dict[str, Any]]) -> None:
    first, second = (told["stored"] for told in both)
    assert (first["wrote"], second["wrote"]) == ([0, 2, 4], [1, 3, 5])
    assert first["asked"] + second["asked"] == len(first["table"]) == 40
    assert torch.equal(first["table"], second["table"])


def test_each_process_has_a_memory_of_its_own(both: list[dict[str, Any]]) -> None:
    first, second = (told["contrastive"] for told in both)
    assert [len(batch) for batch in sorted(first["indices"], key=len)] == [2, 2, 4, 4, 4, 4]
    mine, theirs = ({i for batch in told["indices"] for i in batch} for told in (first, second))
    labels = next(tensor for name, tensor in first["weights"].items() if name.endswith("labels"))
    assert {i for i in range(21) if labels[i] >= 0} == mine  # the first process writes the checkpoint
    assert theirs - mine


def test_plain_ddp_says_what_to_do_about_parameters_without_a_gradient(both: list[dict[str, Any]]) -> None:
    assert both[0]["refused"] == both[1]["refused"]
    assert "set trainer.strategy=ddp_find_unused_parameters_true" in both[0]["refused"]


def shape(value: Any) -> Any:
    """A report without its figures."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


def record(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Columns of metrics.csv, and which of them are filled in each row; steps with their number."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list(rows[0]), [
        [name + (value if name == "step" else "") for name, value in row.items() if value] for row in rows
    ]


def written(root: Path) -> tuple[dict[str, Any], tuple[list[str], list[list[str]]]]:
    """Report and record of the one run in a folder."""
    (path,) = root.glob("runs/*/*/report.json")
    document = json.loads(path.read_text())
    report.validate(document)
    assert len(list(root.glob("runs/*/*"))) == 1
    return document, record(path.parent)


@pytest.mark.slow
def test_the_whole_job_in_two_processes_is_one_run(tmp_path: Path) -> None:
    commands = {
        "one": [CONF.parent / "train.py", *SMOKE],
        "two": [CONF.parent / "train.py", *SMOKE, *TWO],
        "torchrun": [*TORCHRUN, CONF.parent / "train.py", *SMOKE, *TWO],
        "sharded": [CONF.parent / "train.py", *SMOKE, "trainer.devices=2", "trainer.strategy=fsdp2"],
    }
    told = {}
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        result = python(*command, cwd=tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("run folder: ") == 2
        told[name] = written(tmp_path / name)
    document, (columns, rows) = told["one"]
    for name in ("two", "torchrun"):
        assert shape(told[name][0]) == shape(document)
        assert told[name][1] == (columns, rows)
    assert shape(told["sharded"][0]) == shape(document)
    assert set(columns) - set(told["sharded"][1][0]) == {"student/grad_ce", "student/grad_logits"}


@pytest.mark.slow
def test_a_mistake_that_two_processes_see_is_one_line(tmp_path: Path) -> None:
    result = python(CONF.parent / "train.py", *SMOKE, *TWO, "teacher.allow_weak=false", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the teacher's validation accuracy ")
    assert result.stderr.count("\n") == 1
    result = python(CONF.parent / "train.py", "-m", *SMOKE, *TWO, "seed=0,1", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        "error: trainer.devices: in a sweep Lightning can't start the processes of a job; use a launcher that does "
        "(hydra/launcher=submitit_slurm with tasks_per_node), or one run after the other without -m\n"
    )


@pytest.mark.slow
def test_a_sweep_of_four_trains_its_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs at a time where the extra `sweep` is installed, else one after the other."""
    parallel = find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "store"))
    sweep = ["-m", *(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if parallel else [])]
    short = ["data.limit=32", "optim.epochs=1", "teacher.optim.epochs=1", "teacher.allow_weak=true", "baseline=false"]
    options = ["model=mobilenet_v3", "student=small,tiny", "optim.lr=0.001,0.002", "logger=csv", "cache=on"]
    result = python(CONF.parent / "train.py", *sweep, *options, *short, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    jobs = sorted(tmp_path.glob("runs/sweep/*/*/report.json"))
    documents = [json.loads(job.read_text()) for job in jobs]
    assert [job.parent.name for job in jobs] == ["0", "1", "2", "3"]
    assert len({document["student"]["digest"] for document in documents}) == 4
    assert len({json.dumps(document["teacher"]["metrics"]) for document in documents}) == 1
    assert len(list(tmp_path.glob("store/teachers/*"))) == len(list(tmp_path.glob("store/cache/*"))) == 1
    assert not list(tmp_path.glob("store/**/.*"))
