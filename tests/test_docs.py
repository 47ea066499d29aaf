"""What the documentation says is true of the code."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from distill import compare
from distill.app import CONF

ROOT = CONF.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")])
HELP = ROOT / "conf" / "hydra" / "help" / "distill.yaml"


def bash_blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)\n```$", page.read_text(), re.MULTILINE | re.DOTALL)


def train_commands(page: Path) -> list[list[str]]:
    """Arguments of every `python train.py …` in a page, up to a comment, a backtick or two spaces."""
    found = re.findall(r"python train\.py ((?:[^\s#`&]+ ?)+)", page.read_text())
    return [shlex.split(arguments) for arguments in found]


def test_two_commands_do_all_the_set_up() -> None:
    run, test = bash_blocks(ROOT / "README.md")
    install = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python "
    assert run == install + "train.py model=bert student=tiny"
    assert test == install + "-m pytest"


def test_the_gate_runs_the_commands_of_the_readme(tmp_path: Path) -> None:
    """With a venv, pip and pytest that only write down how they were called."""
    calls = tmp_path / "calls"
    stub = f'#!/bin/bash\necho "$(basename "$0") $*" >> {calls}\n'
    clone = tmp_path / "clone"
    for folder in (".venv/bin", ".ci", "bin"):
        (clone / folder).mkdir(parents=True)
    for name in ("README.md", ".ci/run"):
        (clone / name).write_text((ROOT / name).read_text())
    for program in (".venv/bin/pip", ".venv/bin/python", ".venv/bin/ruff", ".venv/bin/mypy", "bin/python3"):
        (clone / program).write_text(stub)
        (clone / program).chmod(0o755)
    path = f"{clone}/bin:/usr/bin:/bin"
    subprocess.run(["bash", str(clone / ".ci/run")], env={"PATH": path}, check=True, capture_output=True)
    made = calls.read_text().splitlines()
    assert made[:3] == [
        "python3 -m venv .venv",
        "pip install -q -e .[dev]",
        "python train.py model=bert student=tiny trainer=smoke",
    ]
    assert made[-1] == "python -m pytest"
    assert "python -m pytest -m slow" in made
    assert {call.split()[0] for call in made} >= {"ruff", "mypy"}


@pytest.mark.parametrize("page", [*PAGES, HELP], ids=lambda page: page.name)
def test_every_command_composes(page: Path, compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    for arguments in train_commands(page):
        words = [word for word in arguments if not word.startswith("-")]
        for word in words:
            key, _, value = word.partition("=")
            options = value.split(",") if "[" not in value else [value]
            for option in options:
                others = [other for other in words if other != word and ("," not in other or "[" in other)]
                compose(*others, f"{key}={option}")


def test_the_examples_of_the_help_are_found() -> None:
    assert len(train_commands(HELP)) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_page_of_the_losses_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    page = make.PAGE.read_text()
    assert make.updated(page) == page, "run: python docs/make.py"
    assert make.tables() == make.TABLES.read_text(), "run: python docs/make.py"
    assert make.timings() == make.TIMINGS.read_text(), "run: python docs/make.py"
    assert len(make.terms()) == len(list((CONF / "loss").glob("*.yaml")))


def test_result_tables_are_what_the_command_makes() -> None:
    results = ROOT / "results"
    assert list(results.glob("*.json")), "no results"
    assert compare.render(results).strip() in (results / "README.md").read_text()
    assert not compare.update_readme(ROOT / "README.md", compare.readme_table(results))
