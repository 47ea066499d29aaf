"""`train.py` as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.app import CONF

TRAIN = CONF.parent / "train.py"


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=bert", "student=huge"], ["huge", "micro, small, tiny"]),
        (["model=mobilenet_v3", "student=micro"], ["mobilenet_v3_micro", "bert_tiny", "mobilenet_v3_tiny"]),
        (["loss=[ce,logit]"], ["logit", ", ".join(sorted(path.stem for path in CONF.glob("loss/*.yaml")))]),
        (["loss.logits.wieght=3"], ["loss.logits.wieght", "did you mean loss.logits.weight?"]),
        (["++loss.logits.wieght=3"], ["loss.logits.wieght", "did you mean loss.logits.weight?"]),
        (["++teacher.optim={epoch: 3}"], ["teacher.optim.epoch", "did you mean teacher.optim.epochs?"]),
        (["+anything=1"], ["anything", "seed"]),
        (["modle=bert"], ["modle", "did you mean model?"]),
        (["data=nosuch"], ["nosuch", "cldr", "digits"]),
        (["teacher.weights=/no/such"], ["teacher.weights=/no/such", "scratch", "hub"]),
        (["optim.lr=[1"], ["optim.lr=[1"]),
        (["optim.epochs=many"], ["epochs=many", "whole number"]),
        (["loss.logits.temperature=0"], ["temperature=0", "> 0"]),
        (["loss.ce._target_=os.system"], ["os.system", "not a LossTerm"]),
        (
            ["loss.ce.schedule={before: 0}", "loss.logits.weight=0"],
            ["all weights are 0 when 0 % of the steps are done"],
        ),
        (["callbacks.diagnostics.every=-1"], ["callbacks.diagnostics.every=-1", "0 is off"]),
        (["trainer.precision=8"], ["Lightning", "8"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: list[str], says: list[str], tmp_path: Path) -> None:
    result = train(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["++x=1"], ["data=nosuch"], ["teacher.weights=/no/such"]])
def test_a_mistake_does_not_touch_a_folder_that_was_there(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    assert train(*arguments, f"hydra.run.dir={tmp_path}/mine", cwd=tmp_path).returncode == 1
    assert (tmp_path / "mine" / "note").read_text() == "keep"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loss=[ce,attention]"], ["loss term 'attention' ", "take one of attention_transfer, hidden, sp"]),
        (["student.init_layers=uniform"], ["init_layers=uniform", "student.init_layers=null"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_what_does_not_fit_the_pair_is_refused_before_the_teacher_is_trained(
    arguments: list[str], says: list[str], tmp_path: Path
) -> None:
    result = train("model=mobilenet_v3", "trainer=smoke", "logger=csv", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in says), result.stderr
    assert "teacher  " not in result.stdout


def test_help_needs_no_torch_and_shows_groups_options_and_examples(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "for name in ('torch', 'transformers', 'timm', 'pytorch_lightning', 'wandb'): sys.modules[name] = None\n"
        f"import runpy; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert shown.count("python train.py ") >= 5
    for group in CONF.glob("*/*.yaml"):
        assert group.stem in shown
    for key in ("temperature: ", "weights: scratch", "baseline: ", "stacking:"):
        assert key in shown
    assert not list(tmp_path.iterdir())
