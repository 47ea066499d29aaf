"""The stages of a run, each a function of the job."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from distill import fingerprint, store, tracking
from distill.build import build
from distill.callbacks.evaluation import Evaluation
from distill.callbacks.progress import StageProgress
from distill.callbacks.stacking import ProgressiveStacking
from distill.card import Card
from distill.data.base import DataSet, ImageData, TextData
from distill.errors import UserError
from distill.export import export_image, export_text
from distill.exported import answers, measure
from distill.features import Tapped, TappedImage, TappedText
from distill.fit import Schedule, Settings, alone, fit, interruptible, trainer
from distill.layout import EXPORT
from distill.losses import CrossEntropy, LossSum, Row
from distill.module import DistillModule
from distill.processes import once, processes, wait_for_all
from distill.resume import Progress
from distill.sharded import NAME as SHARDED
from distill.teacher import FrozenTeacher, as_in_training
from students.bert import start_from


@dataclass
class Job:
    """What the stages of one run have in common.

    Attributes:
        progress: how far the run is, written after each stage; None where that is not kept.
        teacher_says: [N] the teacher's class for each test example, once it was evaluated.
    """

    cfg: DictConfig
    data: DataSet
    settings: Settings
    progress: Progress | None = None
    teacher_says: torch.Tensor | None = None

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Print what begins, and add the time it takes to that of the stage."""
        self.say(f"[bold]{name}[/bold]  {title}")
        start = time.perf_counter()
        yield
        if self.progress is not None:
            seconds = self.progress.seconds
            seconds[name] = (seconds[name] or 0.0) + time.perf_counter() - start
            if processes()[0] == 0:  # not `once`: a stage may be the first process's alone
                self.progress.write()

    def say(self, text: str) -> None:
        self.settings.console.print(text, highlight=False, soft_wrap=True)


def teacher_source(teacher: DictConfig) -> str:
    """What a builder is told to load: "scratch", a name on the hub, or a path."""
    return str(teacher.hub if teacher.weights == "hub" else teacher.weights)


def data_set(cfg: DictConfig) -> DataSet:
    """The data of a configuration, in which `data.tokenizer: auto` becomes the teacher's own where its weights are
    loaded."""
    if cfg.data.get("tokenizer") == "auto":
        cfg.data.tokenizer = None if cfg.teacher.weights == "scratch" else teacher_source(cfg.teacher)
    return build(cfg.data, DataSet)


def transformer_layers(network: Tapped) -> nn.ModuleList:
    """The layers that progressive stacking switches on one after another."""
    layers = dict(network.backbone.named_modules()).get("bert.encoder.layer")
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            "stacking is for transformers: this teacher has no layers that can be skipped; set stacking=null"
        )
    return layers


def check_labels(network: Tapped, label_names: list[str]) -> None:
    """Raises UserError if a loaded classifier knows the names of its classes and they are not the data set's, in its
    order."""
    backbone: Any = network.backbone
    names = (
        list(backbone.config.id2label.values())
        if isinstance(network, TappedText)
        else backbone.pretrained_cfg.get("label_names")
    )
    named = names and not all(str(name).startswith("LABEL_") for name in names)
    if network.head_loaded and named and list(map(str, names)) != label_names:
        raise UserError(
            f"the loaded teacher's classes are {names} and those of the data {label_names}: its answers would be "
            "misread; set teacher.finetune=true to train a classifier for these"
        )


def train_teacher(job: Job, network: Tapped, schedule: Schedule) -> None:
    """Train the teacher on the labels alone; the network ends with the weights of its best epoch, or of the last one
    if stacked."""
    options = cast(dict[str, Any], OmegaConf.to_container(job.cfg.teacher.optim, resolve=True))
    # Only random layers start as identities.
    stacking = options["stacking"] if job.cfg.teacher.weights == "scratch" else None
    if stacking is not None and job.settings.trainer["strategy"] == SHARDED:
        raise UserError(
            f"trainer.strategy={SHARDED}: layers in shards can't be stacked; set teacher.optim.stacking=null"
        )
    callbacks = [ProgressiveStacking(transformer_layers(network), stacking)] if stacking is not None else []
    loss = LossSum({"ce": CrossEntropy(label_smoothing=options["label_smoothing"])}, job.data.task)
    scratch = job.settings.folder / "checkpoints" / "teacher"
    keep = "best" if stacking is None else "last"
    fit(
        network, loss, job.data, schedule, job.settings, stage="teacher", callbacks=callbacks, checkpoints=scratch,
        weights_only=True, keep=keep,
    )  # fmt: skip
    wait_for_all()  # until each process has read the weights
    if processes()[0] == 0:
        (scratch / "best.ckpt").unlink()
        scratch.rmdir()


def initial_teacher(job: Job) -> tuple[Tapped, Path | None]:
    """The teacher before any training here, and where the store keeps it once trained; None if it needs no training."""
    cfg = job.cfg.teacher
    pl.seed_everything(job.settings.seed, verbose=False)
    network = build(cfg.network, Tapped, weights=teacher_source(cfg), **job.data.network_facts)
    if cfg.finetune is not True and (cfg.finetune != "auto" or network.head_loaded):
        check_labels(network, job.data.label_names)
        return network, None
    key = fingerprint.of_values(
        {
            "initial": fingerprint.of_weights(network),
            "data": job.data.fingerprint,
            "recipe": OmegaConf.to_container(cfg.optim, resolve=True),
            "seed": job.settings.seed,
            "trainer": {
                name: job.settings.trainer[name] for name in ("precision", "devices", "accumulate_grad_batches")
            },
        }
    )
    return network, Path(job.cfg.store).expanduser() / "teachers" / key[:20]


def validation(job: Job, network: Tapped) -> dict[str, float]:
    """Accuracy of a network on the validation split, and that of always naming its most frequent class."""
    device = trainer(job.settings, **alone(job.settings)).strategy.root_device
    ask = as_in_training(FrozenTeacher(network).to(device), trainer(job.settings, **alone(job.settings)))
    said, labels = answers(lambda batch: ask(batch).logits, job.data.loader("val", batch_size=128))
    return {
        "accuracy": (said == labels).float().mean().item(),
        "majority": labels.bincount().max().item() / len(labels),
    }


def teacher_stage(job: Job, network: Tapped, folder: Path | None, schedule: Schedule) -> FrozenTeacher:
    """Load or train the teacher, and refuse to go on with one that has learnt nothing.

    A teacher that was trained here is stored under the fingerprint of its initial weights (which hold architecture,
    seed and what was loaded), the data and the recipe; the next run with the same fingerprint starts from it.

    Args:
        network, folder: from `initial_teacher`.

    Raises:
        UserError: on the validation split it is no better than always naming the most frequent class, and
            `teacher.allow_weak` is not set.
    """
    cfg = job.cfg.teacher
    with job.stage("teacher", f"{cfg.name}, weights: {cfg.weights}"):
        record: dict[str, Any] = {"name": cfg.name, "seed": job.settings.seed}
        known = folder is not None and once(folder.exists)
        if folder is not None and known:
            record |= store.load_teacher(folder, network)
            job.say(f"  reused from {folder}")
        elif folder is not None:
            train_teacher(job, network, schedule)
        score = record.get("validation") or once(lambda: validation(job, network))
        if folder is not None and not known and not job.cfg.trainer.smoke:
            record |= {"recipe": OmegaConf.to_container(cfg.optim, resolve=True), "validation": score}
            once(lambda: store.save_teacher(folder, network, record))
            job.say(f"  stored in {folder}")
        job.say(f"  validation accuracy {score['accuracy']:.4f} (most frequent class: {score['majority']:.4f})")
        if score["accuracy"] <= score["majority"] and not cfg.allow_weak:
            raise UserError(
                f"the teacher's validation accuracy {score['accuracy']:.4f} is no better than naming the most frequent "
                f"class ({score['majority']:.4f}): a student would learn nothing from it; train it longer "
                "(teacher.optim.epochs), or set teacher.allow_weak=true"
            )
    return FrozenTeacher(network)


def new_student(job: Job) -> Tapped:
    """A student from random weights with the run's seed."""
    pl.seed_everything(job.settings.seed, verbose=False)
    student = build(job.cfg.student.network, Tapped, **job.data.network_facts)
    if job.cfg.get("gradient_checkpointing"):
        student.recompute()
    return student


def start(job: Job, student: Tapped, teacher: Tapped) -> None:
    """Copy the teacher's layers that the pair names into the student.

    Raises:
        UserError: they do not fit.
    """
    if job.cfg.student.init_layers is not None:
        start_from(student, teacher, job.cfg.student.init_layers)


def attach(job: Job, loss: LossSum, student: Tapped, teacher: Tapped) -> None:
    """Connect the loss to the pair and print what learns from what, before anything is trained.

    Raises:
        UserError: a term, or the student's start from the teacher, does not fit the pair.
    """
    start(job, student, teacher)
    batch = next(iter(job.data.loader("val", batch_size=2)))
    rows = loss.attach(student, teacher if loss.needs_teacher else None, batch, job.data.sizes["train"])
    if rows:
        job.settings.console.print(layer_table(rows))


def layer_table(rows: list[Row]) -> Table:
    """What learns from what; shapes are those of one example."""
    table = Table("term", "teacher tap", "student tap", "shapes", "how", "parameters", title_justify="left")
    for row in rows:
        shapes = " → ".join("×".join(map(str, shape[1:])) for shape in (row.teacher_shape, row.student_shape))
        table.add_row(row.term, row.teacher, row.student, shapes, row.how, f"{row.parameters:,}")
    return table


def baseline_stage(job: Job, loss: LossSum, schedule: Schedule) -> Tapped | None:
    """The same student from the same seed and schedule on the labels alone; None where it is not wanted or would be
    the student itself."""
    if not job.cfg.baseline or not loss.needs_teacher:
        return None
    with job.stage("baseline", "the same student without the teacher"):
        network = new_student(job)
        term = dict(loss.items()).get("ce")
        smoothing = term.label_smoothing if isinstance(term, CrossEntropy) else 0.0
        alone = LossSum({"ce": CrossEntropy(label_smoothing=smoothing)}, job.data.task)
        checkpoints = job.settings.folder / "checkpoints" / "baseline"
        with network.compiled(bool(job.cfg.get("compile"))):
            fit(
                network,
                alone,
                job.data,
                schedule,
                job.settings,
                stage="baseline",
                views=job.data.views,
                checkpoints=checkpoints,
            )
    return network


def export_stage(job: Job, student: Tapped, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Write `export/`, check it against the student, and measure each format on the test split from its files alone."""
    folder = job.settings.folder / EXPORT
    with job.stage("export", "safetensors and ONNX"), job.settings.console.status("exporting and checking"):
        differences = write_export(job, student, document, folder)
        options = cast(dict[str, Any], OmegaConf.to_container(job.cfg.callbacks.evaluation, resolve=True))
        return measure(folder, differences, job.data.loader("test", batch_size=128), job.data.sample(), **options)


def write_export(job: Job, student: Tapped, document: dict[str, Any] | None, folder: Path) -> dict[str, float]:
    """Write the student as an export, with a model card from the report; format -> largest difference of a logit."""
    card, tolerance = card_of(job, document), job.cfg.export.tolerance
    if isinstance(job.data, TextData):
        return export_text(
            student.backbone, job.data.tokenizer, job.data.label_names, folder, card, tolerance=tolerance
        )
    assert isinstance(job.data, ImageData)
    assert isinstance(student, TappedImage)
    return export_image(
        student.backbone, job.data.label_names, student.mean.flatten().tolist(), student.std.flatten().tolist(),
        job.data.input_size, job.data.interpolation, folder, card, tolerance=tolerance,
    )  # fmt: skip


def card_of(job: Job, document: dict[str, Any] | None) -> Card:
    """The model card of the student; without figures where there is no report yet."""
    teacher, student = job.cfg.teacher.name, job.cfg.student.name
    summary = f"Distilled by distill from {teacher}; loss terms: {', '.join(job.cfg.loss)}."
    if document is None:
        return Card(name=f"{teacher}_{student}", summary=summary, dataset=job.data.name)
    return Card(
        name=document["run"]["name"],
        summary=summary,
        dataset=job.data.name,
        accuracy=document["student"]["metrics"]["accuracy"],
        figures={
            "test accuracy of the teacher": f"{document['teacher']['metrics']['accuracy']:.4f}",
            "parameters": f"{document['student']['params']:,}",
            "MACs": f"{document['student']['macs']:,}",
        },
    )


def evaluate(job: Job, network: Tapped, stage: str) -> Evaluation:
    """Measure a network on the test split; of several processes the first one does, and tells the others."""
    options = cast(dict[str, Any], OmegaConf.to_container(job.cfg.callbacks.evaluation, resolve=True))
    evaluation = Evaluation(job.data.sample(), len(job.data.label_names), job.teacher_says, **options)
    module = DistillModule(
        network, LossSum({"ce": CrossEntropy()}, job.data.task), stage=stage, num_labels=len(job.data.label_names)
    )
    progress = StageProgress(stage, job.settings.console)
    if job.settings.resumed:
        tracking.rewind(job.settings.loggers, stage, math.inf)

    def measured() -> tuple[dict[str, Any], torch.Tensor, float]:
        with interruptible():
            trainer(job.settings, [progress, evaluation], **alone(job.settings)).test(
                module, job.data.loader("test", batch_size=128), verbose=False
            )
        return evaluation.result, evaluation.predictions, evaluation.majority

    evaluation.result, evaluation.predictions, evaluation.majority = once(measured)
    return evaluation
