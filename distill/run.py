"""The whole job: teacher → cache → baseline → distil → evaluate → export → report."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger
from rich.console import Console

from distill import fingerprint, plots, report, stages, tracking
from distill.build import build_all
from distill.cache_stage import Options, cache_obstacle, cache_stage, demand, obstacle
from distill.callbacks.diagnostics import Diagnostics
from distill.data.batches import padding
from distill.fit import Schedule, Settings, check_trainer, fit
from distill.losses import LossSum, LossTerm
from distill.precision import precision
from distill.processes import check_batch, connected, once, processes
from distill.quiet import quiet
from distill.resume import Progress


def run(cfg: DictConfig, folder: Path, *, name: str, command: str, earlier: Progress | None = None) -> dict[str, Any]:
    """Run every stage, write the run folder, and return the report.

    Of several processes each one goes through all stages, and the first one writes.

    Args:
        cfg: the composed configuration; `conf/config.yaml` is its table of contents.
        folder: the run folder; it exists and is empty, or has an `earlier` start of this run. Of several processes,
            that of the first one counts.
        name: of the run, "<model>_<student>".
        command: how to run it again, for the report.
        earlier: how far that start came.

    Raises:
        UserError: the configuration asks for something that does not exist or does not fit.
    """
    with ExitStack() as block:
        return stage_by_stage(cfg, folder, name, command, earlier, block)


def stage_by_stage(
    cfg: DictConfig, folder: Path, name: str, command: str, earlier: Progress | None, block: ExitStack
) -> dict[str, Any]:
    """See `run`; the processes are connected until `block` ends."""
    quiet()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    schedule = Schedule(**cfg.optim)
    teacher_schedule = Schedule(
        **{k: v for k, v in cfg.teacher.optim.items() if k not in ("label_smoothing", "stacking")}
    )
    arguments = {str(key): value for key, value in cfg.trainer.items() if key != "smoke"}
    arguments["precision"] = precision(arguments["precision"], arguments["accelerator"])
    worker = check_trainer(arguments)
    check_batch(schedule.batch_size, worker.world_size, "optim.batch_size")
    check_batch(teacher_schedule.batch_size, worker.world_size, "teacher.optim.batch_size")
    options = Options(**cfg.cache)
    data = stages.data_set(cfg)
    loss = LossSum(build_all(cfg.loss, LossTerm), data.task)
    if loss.needs_teacher:
        demand(options, obstacle(options, data, schedule.augment, {}))  # before anything is written
    console = Console()
    diagnostics = Diagnostics(console=console, **cfg.callbacks.diagnostics)

    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    block.enter_context(connected(worker))
    first, folder = processes()[0] == 0, once(lambda: folder)
    console.quiet = not first
    loggers = list(build_all(cfg.logger, Logger, folder=folder, name=name).values()) if first else []
    progress = earlier or Progress(name, command, started, str(folder.resolve()))
    if first:
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        progress.write()
    for logger in loggers:
        logger.log_hyperparams(config)
    settings = Settings(folder, cfg.seed, arguments, loggers, console, {"config": config}, resumed=earlier is not None)
    job = stages.Job(cfg, data, settings, progress)
    job.say(f"[bold]{name}[/bold]  run folder: {folder}")
    sizes = " + ".join(f"{count:,} {split}" for split, count in data.sizes.items())
    job.say(f"data  {data.name}: {sizes} examples, {len(data.label_names)} classes")
    if saved := padding(data.loader("train", batch_size=schedule.batch_size, shuffle=True, seed=cfg.seed)):
        job.say(f"  {saved}")

    teacher_network, kept = stages.initial_teacher(job)
    student = stages.new_student(job)
    stages.attach(job, loss, student, teacher_network)
    cache_obstacle(job, loss, teacher_network, schedule, options)
    teacher = stages.teacher_stage(job, teacher_network, kept, teacher_schedule)
    settings.provenance["teacher"] = fingerprint.of_weights(teacher.network)
    stages.start(job, student, teacher.network)
    answers = cache_stage(job, teacher, loss, student, schedule, options)
    baseline = stages.baseline_stage(job, loss, schedule)
    with job.stage("distill", " + ".join(f"{term.weight:g} {key}" for key, term in loss.items())):
        loss.watch(student, teacher.network)
        with student.compiled(cfg.compile), teacher.network.compiled(cfg.compile):
            fit(
                student,
                loss,
                data,
                schedule,
                settings,
                stage="student",
                teacher=answers,
                shard_teacher=cfg.teacher.shard,
                views=data.views,
                callbacks=[diagnostics],
                checkpoints=folder / "checkpoints",
            )
        student.watch([])
        teacher.network.watch([])
    with job.stage("evaluate", "on the test split"):
        evaluated = stages.evaluate(job, teacher.network, "teacher")
        teacher_result, job.teacher_says = evaluated.result, evaluated.predictions
        baseline_result = stages.evaluate(job, baseline, "baseline").result if baseline is not None else None
        student_result = stages.evaluate(job, student, "student").result

    def accuracy(result: dict[str, Any]) -> float:
        return float(result["metrics"]["accuracy"])

    document: dict[str, Any] = {
        "schema": 1,
        "run": {
            "name": name,
            "command": command,
            "seed": cfg.seed,
            "smoke": cfg.trainer.smoke,
            "started": progress.started,
            "seconds": progress.seconds,
            "resumed": progress.resumed,
            "versions": report.versions(),
            "hardware": report.hardware(),
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint, **data.sizes, "classes": len(data.label_names)},
        "teacher": {"name": cfg.teacher.name, "weights": str(cfg.teacher.weights), **teacher_result},
        "student": {
            "name": cfg.student.name,
            "weights": "distilled",
            **student_result,
            "digest": fingerprint.of_tensors(student.backbone.state_dict()),
        },
        "baseline": baseline_result and {"name": cfg.student.name, "weights": "undistilled", **baseline_result},
        "ratios": report.ratios(teacher_result, student_result),
        "gap_closed": report.gap_closed(
            accuracy(teacher_result), accuracy(student_result), accuracy(baseline_result) if baseline_result else None
        ),
        "loss": {key: {k: v for k, v in node.items() if k != "_target_"} for key, node in config["loss"].items()},
    }
    document["exports"] = once(lambda: stages.export_stage(job, student, document))
    if first:
        finish(document, settings)
        progress.finish()
    return document


def finish(document: dict[str, Any], settings: Settings) -> None:
    """Write plots, report.json and report.md, end the loggers, and print the summary."""
    flat = {
        f"{network}/{metric}": value
        for network in ("teacher", "baseline", "student")
        for metric, value in ((document[network] or {}).get("metrics") or {}).items()
    }
    tracking.finish(settings.loggers, flat | {f"ratios/{key}": value for key, value in document["ratios"].items()})
    if (settings.folder / "metrics.csv").exists():
        plots.curves(settings.folder / "metrics.csv", settings.folder / "curves.png")
        plots.terms(settings.folder / "metrics.csv", list(document["loss"]), settings.folder / "terms.png")
    plots.tradeoff(document, settings.folder / "tradeoff.png")
    report.write(document, settings.folder)
    settings.console.print(report.summary(document))
    settings.console.print(f"run folder: {settings.folder}", highlight=False, soft_wrap=True)
