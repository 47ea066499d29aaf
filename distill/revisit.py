"""A run folder opened again: measure its export once more, or write it once more."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from distill import fingerprint, stages, store
from distill.build import build
from distill.checkpoint import load_weights
from distill.data.base import DataSet
from distill.errors import UserError, one_line
from distill.exported import answers, load
from distill.fit import Settings
from distill.layout import EXPORT, checkpoint_of, config_of, export_of, formats, report_of
from distill.teacher import FrozenTeacher


def reopen(run: Path, document: dict[str, Any] | None) -> stages.Job:
    """The job of a run: its configuration and data, nothing logged.

    Raises:
        UserError: `run` is not a run folder, or its data are not those of its report.
    """
    cfg = config_of(run)
    data = build(cfg.data, DataSet)
    if document is not None and data.fingerprint != document["data"]["fingerprint"]:
        raise UserError(
            f"{run}: the data set {data.name} is no longer the one of the run (its fingerprint is another one): "
            "restore the files or package versions of then"
        )
    arguments = {str(key): value for key, value in cfg.trainer.items() if key != "smoke"}
    return stages.Job(cfg, data, Settings(run, cfg.seed, arguments, [], Console(), {}))


def export(run: Path, to: Path | None = None) -> tuple[Path, dict[str, float]]:
    """Write the export again from the checkpoint of the best epoch; report.json stays as it is.

    Args:
        to: another folder than the run's own `export/`.

    Returns:
        The folder, and format -> largest absolute difference of a logit from PyTorch's.

    Raises:
        UserError: no checkpoint, or one that cannot be read, does not fit, or is not the student of report.json.
    """
    path = checkpoint_of(run)
    document = report_of(run) if (run / "report.json").exists() else None
    job = reopen(run, document)
    student = stages.new_student(job)
    try:
        load_weights(student, path, "student.")
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be loaded ({one_line(error)}); train again") from error
    if document is not None and fingerprint.of_tensors(student.backbone.state_dict()) != document["student"]["digest"]:
        raise UserError(
            f"{path}: is not the student of report.json (its digest differs); use the checkpoint of that run"
        )
    folder = to or run / EXPORT
    return folder, stages.write_export(job, student, document, folder)


def evaluate(run: Path) -> dict[str, Any]:
    """Measure every format of the export on the test split again, beside what report.json says.

    Agreement with the teacher is measured where the teacher can be had without training it: from the store, or loaded
    as the run loaded it.

    Returns:
        run, data, examples; exports: [{format, path, accuracy, reported, agreement}], `reported` None for a format
        that the report does not have; reported_agreement: of the student itself; teacher: why there is no agreement,
        or None; differences: one line for each accuracy that is not the reported one. Accuracies are equal if as many
        examples are right.

    Raises:
        UserError: no export or report, a format of the report is missing, or the data have changed.
    """
    folder, document = export_of(run), report_of(run)
    files, reported = formats(folder), {entry["format"]: entry for entry in document["exports"]}
    if missing := [entry["path"] for name, entry in reported.items() if name not in files]:
        raise UserError(f"{run}: {missing[0]} is in report.json and not there; write it again: distill export {run}")
    job = reopen(run, document)
    teacher, reason = teacher_answers(job)
    entries, differences = [], []
    for name, path in files.items():
        said, labels = answers(load(path), job.data.loader("test", batch_size=128))
        accuracy = int((said == labels).sum()) / len(labels)
        expected = reported[name]["metrics"].get("accuracy") if name in reported else None
        if expected is not None and (wrong := round(abs(accuracy - expected) * len(labels))):
            differences.append(
                f"{name}: {accuracy:.4f} now, {expected:.4f} in report.json ({wrong} of {len(labels)} examples)"
            )
        agreement = None if teacher is None else int((said == teacher).sum()) / len(labels)
        shown = path.relative_to(run) if path.is_relative_to(run) else path
        entries.append(
            {"format": name, "path": str(shown), "accuracy": accuracy, "reported": expected, "agreement": agreement}
        )
    return {
        "run": document["run"]["name"],
        "data": job.data.name,
        "examples": job.data.sizes["test"],
        "exports": entries,
        "reported_agreement": document["student"]["metrics"]["agreement"],
        "teacher": reason,
        "differences": differences,
    }


def teacher_answers(job: stages.Job) -> tuple[Tensor | None, str | None]:
    """What the teacher says of each test example, classes [N]; or None, and why the teacher cannot be asked."""
    try:
        network, folder = stages.initial_teacher(job)
        if folder is not None:
            if not folder.exists():
                return None, f"the teacher is not in the store {job.cfg.store}"
            store.load_teacher(folder, network)
        recorded = torch.load(checkpoint_of(job.settings.folder), map_location="cpu", weights_only=True, mmap=True)
    except UserError as error:
        return None, str(error)
    if recorded["distill"]["teacher"] != fingerprint.of_weights(network):
        return None, "the teacher is no longer the one that the student was trained with"
    teacher = FrozenTeacher(network)
    said, _ = answers(lambda batch: teacher(dict(batch)).logits, job.data.loader("test", batch_size=128))
    return said, None
