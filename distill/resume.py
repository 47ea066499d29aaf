"""A run that is not finished, and what its folder says of it. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.layout import config_of
from distill.schema import STAGES

if TYPE_CHECKING:
    from omegaconf import DictConfig

FILE = "progress.json"


@dataclass
class Progress:
    """`progress.json`, which is in a run folder from the start of a run until it has a report.

    Attributes:
        name, command, started: as in report.json.
        folder: where the run was started, since checkpoints name each other by it.
        seconds: wall-clock time by stage, of what was finished; None for a stage that was not.
        resumed: how often the run was continued.
    """

    name: str
    command: str
    started: str
    folder: str
    seconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    resumed: int = 0

    def write(self) -> None:
        from distill.report import replace

        replace(Path(self.folder) / FILE, json.dumps(asdict(self), indent=2) + "\n")

    def finish(self) -> None:
        (Path(self.folder) / FILE).unlink(missing_ok=True)


def interrupted(folder: str, overrides: list[str]) -> tuple[DictConfig, Progress]:
    """The configuration and the progress of the run in a folder.

    Args:
        overrides: what the user gave; nothing but the folder.

    Raises:
        UserError: no run folder, one of a run that is finished, one that was moved, or other overrides.
    """
    if others := [item for item in overrides if not item.startswith("resume=")]:
        raise UserError(
            f"resume={folder} goes on with the configuration of that run, and {others[0]} would change it; leave it out"
        )
    run = Path(folder).expanduser()
    cfg = config_of(run)
    if (run / "report.json").exists():
        raise UserError(f"resume={folder}: that run is finished (it has a report.json); start a new one without resume")
    try:
        progress = Progress(**json.loads((run / FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"resume={folder}: its {FILE} can't be read ({error}); start a new run without resume"
        ) from error
    if Path(progress.folder) != run.resolve():
        raise UserError(f"resume={folder}: that run was started in {progress.folder}; move the folder back to go on")
    progress.resumed += 1
    return cfg, progress
