"""Where things are in a run folder and in an export. Imports nothing heavy, so that mistakes are answered at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXPORT, CHECKPOINT = "export", "checkpoints/best.ckpt"
WEIGHTS_FILE, ONNX_FILE = "model.safetensors", "model.onnx"


def library_of(folder: Path) -> str | None:
    """The library that loads the folder, by its config.json: "transformers", "timm", or None."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "timm" if "pretrained_cfg" in config else "transformers" if "model_type" in config else None
    except (OSError, ValueError, TypeError):
        return None


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export: its weights, and a config.json of a known library."""
    return (folder / WEIGHTS_FILE).is_file() and library_of(folder) is not None


def formats(export: Path) -> dict[str, Path]:
    """Format -> the file with its weights, for each that is there: the library's own, then "onnx"."""
    files = {str(library_of(export)): export / WEIGHTS_FILE, "onnx": export / ONNX_FILE}
    return {name: path for name, path in files.items() if path.is_file()}


def existing(folder: Path) -> Path:
    """The folder itself.

    Raises:
        UserError: it is not there, or is not a folder.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; give the run folder that train.py printed")
    return folder


def export_of(folder: Path) -> Path:
    """The export of a run folder, or the folder itself if it is an export.

    Raises:
        UserError: no such folder, or no export in it.
    """
    if is_export(existing(folder)):
        return folder
    if is_export(folder / EXPORT):
        return folder / EXPORT
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: has no {EXPORT}/ with an export; finish the run, or write it with: distill export {folder}"
        )
    raise UserError(
        f"{folder}: is neither a run folder (no config.yaml) nor an export; give the folder that train.py printed"
    )


def config_of(run: Path) -> DictConfig:
    """The resolved configuration of a run folder.

    Raises:
        UserError: no such folder, or its config.yaml is missing, damaged or not that of a run.
    """
    from omegaconf import DictConfig, OmegaConf

    path = existing(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: is not a run folder (no config.yaml); give the folder that train.py printed")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); run train.py again") from error
    needed = ("data", "teacher", "student", "loss", "trainer", "callbacks", "export", "seed", "store")
    if not isinstance(config, DictConfig) or (missing := [key for key in needed if key not in config]):
        raise UserError(
            f"{path}: is not the configuration of a run (no {missing[0] if config else 'keys'}); run train.py again"
        )
    return config


def report_of(run: Path) -> dict[str, Any]:
    """The validated report.json of a run folder.

    Raises:
        UserError: no such folder, or no report of schema 1 in it.
    """
    from distill.compare import read
    from distill.schema import validate

    report = read(existing(run) / "report.json")
    try:
        validate(report)
    except UserError as error:
        raise UserError(f"{run / 'report.json'}: {error}") from None
    return report


def checkpoint_of(run: Path) -> Path:
    """The checkpoint with the student's best epoch.

    Raises:
        UserError: there is none.
    """
    path = existing(run) / CHECKPOINT
    if not path.is_file():
        raise UserError(
            f"{run}: has no {CHECKPOINT}: the student was not trained yet, or it was deleted; run train.py again"
        )
    return path


def image_file(path: str) -> str:
    """The path itself.

    Raises:
        UserError: there is no such file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such image file; this export classifies images, so give paths of image files")
    return path
