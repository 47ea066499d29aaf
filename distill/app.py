"""The command `train.py`: Hydra's composition, with mistakes reported in one line and before anything heavy is
imported."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError, fail

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The configuration: inside the package when installed as a wheel, beside it in a source tree."""


def train() -> None:
    """Entry point. Exit status 0 on success, 1 on a user's mistake (one line on stderr), 130 on Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_task)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)


def _task(cfg: DictConfig) -> None:
    hydra_cfg = HydraConfig.get()
    folder, choices = Path(hydra_cfg.runtime.output_dir), hydra_cfg.runtime.choices
    try:
        preflight(cfg, list(hydra_cfg.overrides.task))
        if cfg.resume is not None:
            remove_if_empty(folder)  # Hydra makes one for each start
            go_on(str(cfg.resume), list(hydra_cfg.overrides.task))
            return
        from distill.run import run

        own = [source.path for source in hydra_cfg.runtime.config_sources if source.provider == "command-line"]
        options = ["--config-dir", *own] if own else []
        command = shlex.join(["python", "train.py", *options, *hydra_cfg.overrides.task])
        run(cfg, folder, name=f"{choices['model']}_{choices['student']}", command=command)
        remove_if_empty(
            folder
        )  # processes that torchrun or SLURM starts get one each, and all write to that of the first
    except (UserError, OmegaConfBaseException) as error:
        remove_if_empty(folder)
        fail(str(error).splitlines()[0])


def go_on(folder: str, overrides: list[str]) -> None:
    """Continue the run in a folder."""
    from distill.resume import interrupted

    cfg, progress = interrupted(folder, overrides)
    preflight(cfg, [])
    from distill.run import run

    run(cfg, Path(progress.folder), name=progress.name, command=progress.command, earlier=progress)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder and the parents that hold nothing else, as far up as the working directory."""
    for path in (folder, *folder.parents):
        if path == Path.cwd() or not path.is_dir() or any(path.iterdir()):
            return
        with suppress(OSError):  # another process was faster
            path.rmdir()


def keys(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of every key of a config, inner ones included."""
    if isinstance(cfg, DictConfig):
        for key in cfg:
            yield f"{prefix}{key!s}"
            if not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
                yield from keys(cfg._get_node(key), f"{prefix}{key!s}.")


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that no config file has: its closest match and what there is at its place."""
    place = key.rpartition(".")[0]
    while place and place not in known:
        place = place.rpartition(".")[0]
    here = [name for name in known if name.rpartition(".")[0] == place] or [name for name in known if "." not in name]
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.7) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.8
    )
    guess = f"did you mean {close[0]}? " if close else ""
    return f"no key {key!r}: {guess}known there: {', '.join(here)}"


def preflight(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse what can be seen to be wrong without importing torch.

    A key is unknown if it is not there when the same groups are composed without the user's additions (`+key=`,
    `++key=`).

    Raises:
        UserError: unknown key, or a path of weights that does not exist.
    """
    if any(item.startswith("+") for item in overrides):
        known = sorted(keys(hydra.compose("config", [item for item in overrides if not item.startswith(("+", "~"))])))
        for key in keys(cfg):
            if key not in known:
                raise UserError(unknown_key(key, known))
    weights = cfg.teacher.weights
    if weights not in ("scratch", "hub") and not Path(str(weights)).expanduser().exists():
        raise UserError(
            f"teacher.weights={weights}: no such file or folder; give scratch (train it here), "
            f"hub (load {cfg.teacher.hub}) or a path that exists"
        )


def explain(error: Exception, argv: list[str]) -> str:
    """One line for an error of Hydra or OmegaConf: what is wrong, why, and the options there are."""
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0].strip()
        return f"{error.override}: can't be read as key=value ({reason}); quote values with brackets or commas"
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if missing := re.search(r"Could not (?:find|load) '([\w/.-]+)'", text):
        group, _, option = missing[1].rpartition("/")
        options = sorted({path.stem for folder in folders(argv) for path in (folder / group).glob("*.yaml")})
        if group == "pair":
            return f"no pair {option!r}: this teacher has no such student; supported pairs: {', '.join(options)}"
        return f"{group}={option}: no such option; there are: {', '.join(options)}"
    if override := re.search(r"Could not override '([\w./@-]+)'", text):
        return unknown_key(override[1], known_keys(argv))
    if group := re.search(r"Could not override '([\w/]+)'\.\s*No match in the defaults list", text):
        groups = sorted({path.name for folder in folders(argv) for path in folder.iterdir() if path.is_dir()})
        return f"unknown group {group[1]!r}; there are: {', '.join(groups)}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def folders(argv: list[str]) -> list[Path]:
    """Where configuration files are: `conf/`, and the folder that `--config-dir` gives."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    own = parser.parse_known_args(argv)[0].config_dir
    return [CONF.resolve(), *([own.resolve()] if own is not None and own.is_dir() else [])]


def known_keys(argv: list[str]) -> list[str]:
    """Every key of the configuration with the user's choice of groups (options in `folders`) and none of the values."""
    conf, *own = folders(argv)
    groups = {path.parent.name for folder in (conf, *own) for path in folder.glob("*/*.yaml")}
    choices = [item for item in argv if item.partition("=")[0] in groups]
    search = [f"hydra.searchpath=['file://{folder}']" for folder in own]
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        return sorted({*keys(hydra.compose("config", [*choices, *search])), *groups})
