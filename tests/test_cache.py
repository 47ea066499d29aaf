"""The cached teacher is the teacher: the same losses step by step, under a key that everything changes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from caching import OPTIONS, QUIET, Counting, cached, contents, digest, images, network, teacher_of, text
from omegaconf import DictConfig, OmegaConf
from tiny import bert, schedule, settings
from torch import nn

from distill import cache_stage, fingerprint, plan, stages
from distill.app import CONF
from distill.cache import CachedTeacher, pack, unpack
from distill.cache_stage import Options, obstacle
from distill.data.image import Digits
from distill.data.text import Cldr
from distill.errors import UserError
from distill.fill import fill, processes
from distill.fit import fit, trainer
from distill.losses import CrossEntropy, LogitsKL, LossSum
from distill.losses.hidden import Hidden, PatientKD
from distill.losses.relation import RelationalKD
from distill.plan import Estimate, Pace, decide
from distill.resume import FILE, Progress
from distill.run import run
from distill.shards import Table
from distill.teacher import FrozenTeacher, Teacher, as_in_training


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def course(folder: Path, teacher: Teacher, data: Any, *terms: Any, augment: bool = True) -> list[float]:
    """Losses step by step of five shuffled epochs."""
    student, losses = network(data), Losses()
    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL(), **{f"term{i}": term for i, term in enumerate(terms)}})
    loss.attach(student, network(data, 2), next(iter(data.loader("val", batch_size=2))), 20)
    loss.watch(student, None)
    fit(
        student, loss, data, schedule(epochs=5, batch_size=8, lr=1e-4, augment=augment), settings(folder),
        stage="student", teacher=teacher, views=data.views, callbacks=[losses], checkpoints=folder,
    )  # fmt: skip
    return losses.seen


@pytest.mark.parametrize("make", [text, images])
def test_the_cache_trains_as_the_teacher_itself_and_swapped_rows_do_not(make: Any, tmp_path: Path) -> None:
    data = make()
    teacher = teacher_of(data)
    losses = course(tmp_path / "online", teacher, data)
    answers = cached(tmp_path / "cache", teacher, data)
    stored_losses = course(tmp_path / "stored", answers, data)
    assert len(losses) == 15
    assert stored_losses == pytest.approx(losses, rel=1e-4)
    half = cached(tmp_path / "cache", teacher, data, Options("on", "float16", None, 7))
    half_losses = course(tmp_path / "half", half, data)
    assert half_losses == pytest.approx(losses, rel=2e-3)
    assert {part["logits"].dtype for part in half.table.parts} == {torch.float16}

    second = answers.table[torch.arange(20, 40)]["logits"]
    swapped = second.clone()
    pair = [int(second[:, 0].argmax()), int(second[:, 0].argmin())]
    swapped[pair] = second[pair[::-1]]
    table = Table([{"logits": answers.table[torch.arange(20)]["logits"]}, {"logits": swapped}], 20)
    swapped_losses = course(tmp_path / "swapped", CachedTeacher(table, answers.contents), data)
    off = [abs(a - b) > 1e-3 * b for a, b in zip(swapped_losses, losses, strict=True)]
    assert [any(off[step : step + 3]) for step in range(0, 15, 3)] == [False, True, False, True, False]


@pytest.mark.parametrize("make", [text, images])
def test_batches_that_other_processes_build_ahead_are_the_same_and_so_is_the_cache(make: Any, tmp_path: Path) -> None:
    here, ahead = make(), make(workers=2)
    teacher = teacher_of(here)
    stored = [cached(tmp_path / str(data.workers), teacher, data) for data in (here, ahead)]
    assert digest(stored[0]) == digest(stored[1])
    runs = [course(tmp_path / "runs" / str(data.workers), stored[0], data) for data in (here, ahead)]
    assert runs[0] == runs[1]


def test_without_augmentation_there_is_one_view(tmp_path: Path) -> None:
    data = text(views=3)
    teacher = teacher_of(data)
    answers = cached(tmp_path / "cache", teacher, data, augment=False)
    assert sum(len(part["logits"]) for part in answers.table.parts) == 20
    losses = course(tmp_path / "online", teacher, data, augment=False)
    assert course(tmp_path / "stored", answers, data, augment=False) == pytest.approx(losses, rel=1e-4)


def test_vectors_are_stored_too_and_half_precision_is_close(tmp_path: Path) -> None:
    data = text()
    teacher = teacher_of(data)
    teacher.network.watch(["pooled"])
    losses = course(tmp_path / "online", teacher, data, RelationalKD())
    single = cached(tmp_path / "cache", teacher, data, widths={"pooled": 16})
    assert course(tmp_path / "single", single, data, RelationalKD()) == pytest.approx(losses, rel=1e-4)
    half = cached(tmp_path / "cache", teacher, data, Options("on", "float16", None, 7), widths={"pooled": 16})
    half_losses = course(tmp_path / "half", half, data, RelationalKD())
    assert half_losses == pytest.approx(losses, rel=2e-2)
    features = half({"index": torch.tensor([3]), "view": torch.tensor([1]), "attention_mask": torch.ones(1, 4)})
    assert (features.heads, features.mask is not None) == (2, True)
    assert features.logits.dtype == features.hidden["pooled"].dtype == torch.float32
    sizes = [sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors") if name in str(path)) for name in
             (single.contents.shards(tmp_path).folder.name, half.contents.shards(tmp_path).folder.name)]  # fmt: skip
    assert sizes[0] - sizes[1] == pytest.approx(40 * (2 + 16) * 2, abs=100)


def test_top_k_keeps_the_probabilities_of_the_largest() -> None:
    logits = 3 * torch.randn(50, 12, dtype=torch.float64).float()
    for k in (1, 4, 11):
        packed = pack(logits, torch.float32, k)
        assert {name: tuple(column.shape) for name, column in packed.items()} == {
            "values": (50, k), "indices": (50, k), "tail": (50,)
        }  # fmt: skip
        restored = unpack(packed, 12)
        top = logits.topk(k).indices
        before, after = logits.softmax(1), restored.softmax(1)
        torch.testing.assert_close(after.gather(1, top), before.gather(1, top))
        torch.testing.assert_close(restored.logsumexp(1), logits.logsumexp(1))
        rest = torch.ones(50, 12, dtype=torch.bool).scatter(1, top, False)
        flat = ((1 - before.gather(1, top).sum(1)) / (12 - k))[:, None].expand(50, 12)
        torch.testing.assert_close(after[rest], flat[rest], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(unpack(pack(logits, torch.float32, 11), 12), logits)


def test_top_k_is_stored_and_found(tmp_path: Path) -> None:
    data = images()
    teacher = teacher_of(data)
    whole, few = (cached(tmp_path, teacher, data, Options("on", "float32", k, 7)) for k in (None, 3))
    batch = {"index": torch.tensor([4, 0, 19]), "view": torch.tensor([1, 0, 1])}
    logits, kept = whole(batch).logits, few(batch).logits
    top = logits.topk(3).indices
    assert torch.equal(kept.gather(1, top), logits.gather(1, top))
    torch.testing.assert_close(kept, unpack(pack(logits, torch.float32, 3), 10))


def test_what_was_looked_up_travels_with_the_batch(tmp_path: Path) -> None:
    data = text()
    answers = cached(tmp_path, teacher_of(data), data, Options("on", "float16", 1, 7), widths={"pooled": 16})
    batch = next(iter(data.loader("train", batch_size=5, augment=True, views=2)))
    direct, looked_up = answers(batch), answers.look_up(batch)
    assert looked_up.keys() - batch.keys() == {
        "teacher.values",
        "teacher.indices",
        "teacher.tail",
        "teacher.tap.pooled",
    }
    moved = {name: tensor.to("meta") for name, tensor in looked_up.items()}
    assert answers(moved).logits.device == torch.device("meta")
    answers.table = None  # type: ignore[assignment]
    again = answers(looked_up)
    torch.testing.assert_close([again.logits, again.hidden], [direct.logits, direct.hidden], rtol=0, atol=0)


def test_training_looks_up_before_a_batch_goes_to_the_device(tmp_path: Path) -> None:
    data, seen = images(), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append("teacher.logits" in batch)

    loss = LossSum({"ce": CrossEntropy(), "logits": LogitsKL()})
    fit(
        network(data), loss, data, schedule(augment=True), settings(tmp_path), stage="student", callbacks=[Watch()],
        teacher=cached(tmp_path, teacher_of(data), data), views=2, checkpoints=tmp_path,
    )  # fmt: skip
    assert seen == [True] * 3


def changed(change: Callable[[Any], Any], made: Any) -> Any:
    change(made)
    return made


def one_label(data: Any) -> None:
    labels = data._labels["train"] if isinstance(data, Digits) else data._splits["train"].labels
    labels[3] = 1 - labels[3].clamp_max(1)


def one_pixel(data: Digits) -> None:
    data._pixels["train"][5, 0, 2, 2] += 1


def one_token(data: Cldr) -> None:
    data._splits["train"].tokens[5][1] += 1


class Stronger(Digits):
    strength = MappingProxyType({**Digits.strength, "shear": 0.16})


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        (images, lambda: changed(one_label, images())),
        (images, lambda: changed(one_pixel, images())),
        (images, lambda: Stronger(limit=20, views=2)),
        (images, lambda: images(views=3)),
        (text, lambda: changed(one_label, text())),
        (text, lambda: changed(one_token, text())),
        (text, lambda: text(piece_dropout=0.21)),
        (text, lambda: text(max_length=40)),
        (text, lambda: text(pieces=1100)),
    ],
    ids=["label", "pixel", "jitter", "views", "label", "token", "piece_dropout", "max_length", "tokenizer"],
)
def test_other_data_has_another_key(usual: Any, other: Any, tmp_path: Path) -> None:
    teacher = FrozenTeacher(bert())
    folders = [contents(teacher, data).shards(tmp_path).folder.name for data in (usual(), usual(), other())]
    assert folders[0] == folders[1] != folders[2]


def test_other_answers_have_another_key(tmp_path: Path) -> None:
    data, plain = images(), {"augment": False}

    def folder(change: Any = None, options: Options = OPTIONS, **changes: Any) -> str:
        teacher = teacher_of(data)
        if change is not None:
            with torch.no_grad():
                change(teacher.network)
        return contents(teacher, data, options, **changes).shards(tmp_path).folder.name

    def one_ulp(made: Any) -> None:
        weight = made.backbone.conv1[0].weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))

    def one_ulp_of_mean(made: Any) -> None:
        made.mean[0, 0] = torch.nextafter(made.mean[0, 0], torch.tensor(9.0))

    def one_ulp_of_statistics(made: Any) -> None:
        made.backbone.bn1.running_var[1] = torch.nextafter(torch.tensor(1.0), torch.tensor(9.0))

    def activation(made: Any) -> None:
        made.backbone.layer1[0].act1 = nn.SiLU()

    found = [
        folder(),
        folder(one_ulp),
        folder(one_ulp_of_mean),
        folder(one_ulp_of_statistics),
        folder(activation),
        folder(seed=1),
        folder(**plain),
        folder(precision="bf16-mixed"),
        folder(widths={"pooled": 512}),
        folder(options=Options("on", "float16", None, 7)),
        folder(options=Options("on", "float32", 3, 7)),
        folder(options=Options("on", "float32", None, 8)),
    ]
    assert len(set(found)) == len(found)
    assert folder() == found[0]
    assert folder(**plain, seed=1) == folder(**plain), "without augmentation the seed decides nothing"


def test_the_folder_says_what_it_holds_and_is_found_again(tmp_path: Path) -> None:
    data = images()
    teacher = teacher_of(data)
    what = contents(teacher, data)
    shards, counting = what.shards(tmp_path), Counting(teacher)
    assert len(shards) == 6
    shards_bytes = shards.bytes_of(range(6))
    said = fill(shards, what, counting, data, QUIET)
    assert said == "reused 0 of 6 shards (0 answers), computed 6 (40 answers)"
    facts = json.loads((shards.folder / "cache.json").read_text())
    assert facts == asdict(what)
    assert shards.folder == tmp_path / fingerprint.of_values(facts)[:20]
    assert facts["teacher"] == fingerprint.of_weights(teacher.network)
    assert (facts["data"], facts["examples"], facts["classes"], facts["views"]) == (data.fingerprint, 20, 10, 2)
    files = list(shards.folder.glob("*.safetensors"))
    assert shards_bytes == 40 * 10 * 4
    assert 0 < sum(path.stat().st_size for path in files) - shards_bytes < 1000 * len(files)
    shards.path(2).unlink()
    assert fill(shards, what, counting, data, QUIET) == "reused 5 of 6 shards (33 answers), computed 1 (7 answers)"
    assert counting.asked == 47


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    data = images()
    teacher = teacher_of(data)
    teacher.network.backbone.fc.weight.fill_(1e9)
    cached(tmp_path, teacher, data)
    with pytest.raises(UserError, match=r"not finite in float16.*cache\.dtype=float32"):
        cached(tmp_path, teacher, data, Options("on", "float16", None, 7))


def test_a_loader_that_shows_an_example_twice_is_a_bug(tmp_path: Path) -> None:
    data = images()

    class Twice(Digits):
        def loader(self, *args: Any, **options: Any) -> Any:
            loader = super().loader(*args, **options)
            plain: Any = loader.dataset
            plain.labels, fetch = plain.labels.clone(), plain.__getitems__
            loader.dataset.__class__ = type(
                "Wrong",
                (type(plain),),
                {"__getitems__": lambda self, i: fetch(i) | {"index": torch.zeros(len(i)).long()}},
            )
            return loader

    with pytest.raises(RuntimeError, match="each view and index once"):
        cached(tmp_path, teacher_of(data), Twice(limit=20, views=2))


HELPERS = (
    "import json, os, sys, time, torch; sys.path.insert(0, {!r}); from caching import *; folder = Path(sys.argv[1])"
)
KILLED = """
calls, real = 0, os.fsync
def slow(file):
    global calls
    calls += 1
    if calls == 4:  # cache.json and two shards are finished
        print("writing", flush=True)
        time.sleep(600)
    real(file)
os.fsync = slow
data = text()
cached(folder, teacher_of(data), data)
"""
SHARED = """
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=1, world_size=2)
data = text()
counting = Counting(teacher_of(data))
answers = cached(folder / "cache", counting, data)
print(json.dumps({"asked": counting.asked, "digest": digest(answers)}))
torch.distributed.destroy_process_group()
"""


def script(code: str, *arguments: Any) -> subprocess.Popen[str]:
    head = HELPERS.format(str(Path(__file__).parent))
    paths = os.pathsep.join([str(CONF.parent), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    with script(KILLED, tmp_path / "killed") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    data = text()
    what = contents(teacher_of(data), data)
    shards = what.shards(tmp_path / "killed")
    before = {path: path.stat().st_mtime_ns for path in shards.folder.iterdir()}
    assert shards.missing() == [2, 3, 4, 5]
    assert sum(path.name.startswith(".00002.safetensors.") for path in before) == 1

    counting = Counting(teacher_of(data))
    fill(shards, what, counting, data, QUIET, batch_size=6)
    assert counting.asked == 40 - 2 * 7
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if not path.name.startswith("."))
    whole = cached(tmp_path / "whole", teacher_of(data), data)
    assert content(shards.folder) == content(whole.contents.shards(tmp_path / "whole").folder)
    assert digest(CachedTeacher(shards.open(), what)) == digest(whole)


def test_two_processes_share_the_work_and_read_the_same(tmp_path: Path) -> None:
    data = text()
    alone, counting = cached(tmp_path / "alone", teacher_of(data), data), Counting(teacher_of(data))
    with script(SHARED, tmp_path) as other:
        group = torch.distributed
        group.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=2, timeout=timedelta(seconds=90)
        )
        try:
            mine = digest(cached(tmp_path / "cache", counting, data))
        finally:
            group.destroy_process_group()
        told = json.loads(other.communicate(timeout=90)[0])
    assert other.returncode == 0
    assert (counting.asked, told["asked"]) == (7 + 7 + 7, 7 + 7 + 5)
    assert mine == told["digest"] == digest(alone)
    assert processes() == (0, 1)


def estimated(**changes: Any) -> Estimate:
    usual = {"epochs": 4, "examples": 1000, "views": 2, "missing": 2000, "size": 80_000, "needed": 80_000}
    return Estimate(**{**usual, "free": 10**12, "processes": 1, "pace": Pace(0.02, 0.02), **changes})


def test_the_arithmetic_decides() -> None:
    chosen, why = decide("auto", estimated())
    assert chosen
    assert why == (
        "2,000 answers (1,000 examples × 2 views), 80,000 bytes, 2,000 answers to compute in about 0:00:40; "
        "4 epochs ask 4,000 times; the teacher is 50% of a step, and storing saves 25% of the time"
    )
    assert decide("auto", estimated(views=4, missing=4000))[0], "as often, and the next run gains"
    chosen, why = decide("auto", estimated(views=5, missing=4001))
    assert not chosen
    assert why.startswith(
        "it would ask the teacher more often than training does: 5,000 answers (1,000 examples × 5 vi"
    )
    chosen, why = decide("on", estimated(views=5, missing=5000, processes=2))
    assert chosen
    assert "5,000 answers to compute in about 0:00:50; 4 epochs" in why
    assert why.endswith("the teacher is 50% of a step, and storing costs 12% more time")
    assert decide("auto", estimated(missing=0, pace=None))[1].endswith("2 views), 80,000 bytes, all there")
    assert "1,000 examples × 1 view)" in str(estimated(views=1))


def test_a_disk_that_is_too_small_is_said() -> None:
    short = {"free": 80_000 + plan.SPARE}
    chosen, why = decide("auto", estimated(**short))
    assert not chosen
    assert why.startswith(f"there is no room: 80,000 bytes are needed and {short['free']:,} are free (2,000 answers")
    with pytest.raises(
        UserError, match=r"^cache=on is not possible: there is no room: 80,000 bytes .*; make room"
    ) as no:
        decide("on", estimated(**short))
    assert "\n" not in str(no.value)
    assert decide("on", estimated(free=0, needed=0, missing=0, pace=None))[0], "all is there already"
    assert plan.free_bytes(Path("/no/such/folder")) == plan.free_bytes(Path("/no"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"use": "yes"}, "cache.use=yes: there are auto, on, off"),
        ({"dtype": "bf16"}, "cache.dtype=bf16: there are float32"),
        ({"top_k": 0}, "cache.top_k=0: must be"),
        ({"top_k": True}, "cache.top_k=True"),
        ({"rows": None}, "cache.rows=None"),
        ({"rows": 1.5}, "cache.rows=1.5: must be a whole number >= 1"),
    ],
)
def test_an_option_out_of_range_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        Options(**{"use": "auto", "dtype": "float32", "top_k": None, "rows": 8192, **wrong})


def test_the_configuration_has_three_ways(compose: Callable[..., DictConfig]) -> None:
    usual = {"use": "auto", "dtype": "float32", "top_k": None, "rows": 8192}
    assert compose().cache == usual
    for use in ("auto", "on", "off"):
        assert compose(f"cache={use}").cache == {**usual, "use": use}
        assert compose(f"cache.use={use}").cache == {**usual, "use": use}
    assert (
        compose("data.views=3").data.views == compose("model=resnet50", "student=tiny", "data.views=3").data.views == 3
    )


def test_obstacles_are_named() -> None:
    data = images()
    assert obstacle(OPTIONS, data, True, {"pooled": (2, 16)}) is None
    deep = obstacle(OPTIONS, data, False, {"pooled": (2, 16), "layer4": (2, 9, 16)})
    assert deep == "the loss reads layer4 [2, 9, 16] of the teacher, and only logits and vectors [B, D] are stored"
    assert "data.views=K" in (obstacle(OPTIONS, images(views=None), True, {}) or "")
    assert obstacle(OPTIONS, images(views=None), False, {}) is None
    data.replayable = False
    assert "digits can't be replayed" in (obstacle(OPTIONS, data, True, {}) or "")
    assert obstacle(OPTIONS, data, False, {}) is None
    few: Any = SimpleNamespace(task="multilabel", label_names=["a", "b"], views=None, name="x")
    assert obstacle(OPTIONS, few, False, {}) is None
    assert "top_k=1 is for classes and the task is multilabel" in (
        obstacle(Options("on", "float32", 1, 7), few, False, {}) or ""
    )
    assert "top_k=10 is not below the number of classes 10" in (
        obstacle(Options("on", "float32", 10, 7), images(), False, {}) or ""
    )


class Stage:
    """The cache stage, of a job with tiny networks."""

    def __init__(self, folder: Path, data: Any, smoke: bool = False) -> None:
        self.store, self.run, self.data = folder / "store", folder / "run", data
        self.run.mkdir(parents=True, exist_ok=True)
        cfg = OmegaConf.create({"store": str(self.store), "trainer": {"smoke": smoke}})
        self.progress = Progress("a", "b", "c", str(folder))
        self.job = stages.Job(cfg, data, settings(self.run), self.progress)
        self.teacher, self.student = teacher_of(data), network(data)

    def __call__(self, *terms: Any, use: str = "auto", loss: LossSum | None = None, **changes: Any) -> Teacher | None:
        loss = loss or LossSum({"logits": LogitsKL(), **{f"term{i}": term for i, term in enumerate(terms)}})
        batch = next(iter(self.data.loader("val", batch_size=2)))
        loss.attach(self.student, self.teacher.network if loss.needs_teacher else None, batch, 20)
        options = Options(use, "float32", None, 7)
        return cache_stage.cache_stage(self.job, self.teacher, loss, self.student, schedule(**changes), options)

    @property
    def lines(self) -> list[str]:
        file: Any = self.job.settings.console.file
        return file.getvalue().splitlines()


def test_off_asks_the_teacher_in_every_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path, images())
    assert stage(use="off") is stage.teacher
    assert stage.lines == ["cache is off; the teacher runs in every step"]
    assert stage(loss=LossSum({"ce": CrossEntropy()}), use="on") is None
    assert stage.progress.seconds["cache"] is None
    assert not stage.store.exists()


@pytest.mark.parametrize("use", ["auto", "on"])
def test_it_stores_where_it_can_and_finds_it_again(use: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path, images())
    before = fingerprint.of_weights(stage.student)
    answers = stage(use=use, augment=True, epochs=3)
    assert isinstance(answers, CachedTeacher)
    loader = stage.data.loader("train", batch_size=20, augment=True, views=2)
    loader.sampler.set_epoch(3)
    batch = next(iter(loader))
    torch.testing.assert_close(answers(batch).logits, stage.teacher(batch).logits, rtol=1e-4, atol=1e-4)
    title, why, done = stage.lines
    assert title == "cache  what the teacher says of the training split"
    assert re.match(
        r"  stored: 40 answers \(20 examples × 2 views\), 1,600 bytes, 40 answers to compute in about 0:00:\d\d; "
        r"3 epochs ask 60 times; the teacher is \d+% of a step, and storing saves \d+% of the time$", why
    )  # fmt: skip
    folder = answers.contents.shards(stage.store / "cache").folder
    assert done == f"  reused 0 of 6 shards (0 answers), computed 6 (40 answers) in {folder}"
    assert stage(use=use, augment=True, epochs=3) is not None
    assert stage.lines[-2] == "  stored: 40 answers (20 examples × 2 views), 1,600 bytes, all there"
    assert stage.lines[-1].startswith("  reused 6 of 6 shards (40 answers), computed 0 (0 answers)")
    assert fingerprint.of_weights(stage.student) == before, "timing left the student alone"
    assert (stage.progress.seconds["cache"] or 0) > 0
    assert json.loads((tmp_path / FILE).read_text())["seconds"] == stage.progress.seconds


def test_auto_says_why_the_teacher_runs_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text(views=5)
    stage = Stage(tmp_path, data)
    assert stage(augment=True, epochs=4) is stage.teacher
    assert (
        "every step: it would ask the teacher more often than training does: 100 answers (20 examples × 5 views)"
        in (stage.lines[-1])
    )
    assert stage(Hidden(), augment=True, epochs=5) is stage.teacher
    assert "of it, for 5 epochs: the loss reads layer2 [2, " in stage.lines[-1]
    assert stage.teacher.network.watched == []
    data.views = None
    assert stage(augment=True) is stage.teacher
    assert stage.lines[-1].endswith(
        "augmentation is new in every epoch: data.views=K gives each example K augmented views"
    )
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 1000)
    assert stage() is stage.teacher
    assert "every step: there is no room: 160 bytes are needed and 1,000 are free (20 answers" in stage.lines[-1]
    with pytest.raises(UserError, match="cache=on is not possible: there is no room"):
        stage(use="on")
    assert not stage.store.exists()


def test_on_stores_even_if_it_costs_more_and_vectors_with_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, text(views=5))
    answers = stage(RelationalKD(), use="on", augment=True, epochs=1)
    assert isinstance(answers, CachedTeacher)
    assert answers.contents.taps == {"pooled": 16}
    assert stage.teacher.network.watched == []


def test_first_tokens_of_layers_are_stored_where_a_loss_reads_them(tmp_path: Path) -> None:
    stage = Stage(tmp_path, text())
    term = PatientKD(layers=[["layer1", "layer1"], ["layer2", "layer1"]])
    answers = stage(term, use="on", augment=True)
    assert isinstance(answers, CachedTeacher)
    assert answers.contents.taps == {"layer1.cls": 16, "layer2.cls": 16}
    stage.teacher.network.watch(answers.contents.taps)
    batch = next(iter(stage.data.loader("train", batch_size=20, augment=True, shuffle=True, views=2)))
    torch.testing.assert_close(answers(batch).hidden, stage.teacher(batch).hidden, rtol=1e-4, atol=1e-4)


def test_smoke_leaves_nothing_behind(tmp_path: Path) -> None:
    stage = Stage(tmp_path, images(), smoke=True)
    answers = stage(augment=True, epochs=2)
    assert answers is not None
    assert not stage.store.exists()
    assert list(stage.run.iterdir()) == []
    batch = next(iter(stage.data.loader("train", batch_size=20, augment=True, views=2)))
    torch.testing.assert_close(answers(batch).logits, stage.teacher(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [(["optim.augment=true"], "data.views=K"), (["loss=[ce,hidden]"], "the loss reads stage1 "),
     (["cache.top_k=10"], "top_k=10 is not below")],
)  # fmt: skip
def test_on_refuses_before_anything_is_trained(
    overrides: list[str], says: str, compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "teacher_stage", lambda *_: pytest.fail("the teacher was trained"))
    cfg = compose("model=mobilenet_v3", "student=tiny", "trainer=smoke", "logger=csv", "cache=on", *overrides)
    with pytest.raises(UserError, match=r"^cache=on is not possible: ") as caught:
        run(cfg, tmp_path, name="a", command="b")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert bool(list(tmp_path.iterdir())) == ("stage1" in says), "what needs no network is refused before any file"


def test_the_teacher_is_asked_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    data = text()
    teacher = teacher_of(data)
    worker = trainer(settings(tmp_path, precision="bf16-mixed"))
    batch = next(iter(data.loader("train", batch_size=20)))
    logits = as_in_training(teacher, worker)(batch).logits
    assert logits.dtype == torch.bfloat16
    exact = teacher(batch).logits
    assert not torch.equal(logits.float(), exact)
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)
    assert not math.isclose(0, float(exact.std()), abs_tol=0.1)
