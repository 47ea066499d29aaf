"""Only what a place in the configuration calls for is built from it, and every configuration file can be built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger

from distill.app import CONF
from distill.build import bind, build, build_all, resolve
from distill.data.base import DataSet
from distill.errors import UserError
from distill.features import Tapped
from distill.losses import CrossEntropy, LogitsKL, LossTerm

KINDS: dict[str, type] = {
    "data": DataSet, "loss": LossTerm, "logger": Logger, "pair": Tapped, "model": Tapped, "callbacks": Callback,
}  # fmt: skip
GIVEN = {"weights", "num_labels", "vocab_size", "pad_token_id", "mean", "std", "folder", "name"}
"""What the stages add to a node: the data's facts, the teacher's source, and the run folder."""


def node(**content: Any) -> DictConfig:
    return OmegaConf.create(content)


def annotated(weight: float, more: float = 1.0, *_: Any, **__: Any) -> CrossEntropy:
    return CrossEntropy(weight + more)


def bare(_):  # type: ignore
    raise AssertionError("called")


def misleading() -> Tapped:
    raise AssertionError("called")


def unresolvable() -> Nowhere:  # type: ignore  # noqa: F821
    raise AssertionError("called")


def test_a_class_is_built_with_its_arguments() -> None:
    term = build(node(_target_="distill.losses.LogitsKL", weight=0.5, temperature=2), LossTerm)
    assert isinstance(term, LogitsKL)
    assert (term.weight, term.temperature) == (0.5, 2.0)


def test_a_function_is_built_if_it_says_what_it_gives() -> None:
    assert build(node(_target_=f"{__name__}.annotated"), LossTerm, weight=2, unused=3).weight == 3.0


def test_the_node_wins_over_what_is_given() -> None:
    assert build(node(_target_=f"{__name__}.annotated", weight=5), LossTerm, weight=2, more=0).weight == 5.0


def test_named_nodes_keep_their_names() -> None:
    nodes = {"a": node(_target_="distill.losses.CrossEntropy", weight=2), "b": node(_target_="distill.losses.LogitsKL")}
    assert {name: type(term) for name, term in build_all(nodes, LossTerm).items()} == {"a": CrossEntropy, "b": LogitsKL}


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "pathlib.Path.write_text", "builtins.eval", "subprocess.Popen"]
)
def test_what_could_do_harm_is_not_called(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"_target_={target}: is not a LossTerm"):
        build(node(_target_=target, command=f"touch {tmp_path}/harm"), LossTerm)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bare", "misleading", "node"])
def test_a_function_that_gives_something_else_is_not_called(name: str) -> None:
    with pytest.raises(UserError, match="is not a LossTerm, nor a function annotated to return one"):
        build(node(_target_=f"{__name__}.{name}"), LossTerm)


@pytest.mark.parametrize(
    "target", ["no.such.module", "distill.losses.Crossentropy", "x", "", f"{__name__}.unresolvable"]
)
def test_what_cannot_be_imported_is_refused_in_one_line(target: str) -> None:
    with pytest.raises(UserError, match="_target_") as caught:
        build(node(_target_=target), LossTerm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [3, None, "x", {}, {"weight": 1}, {"_target_": None}])
def test_a_node_without_a_target_is_refused(content: Any) -> None:
    cfg = OmegaConf.create({"ce": content})
    with pytest.raises(UserError, match="is not a LossTerm; give a node with `_target_`"):
        build(cfg.ce, LossTerm)


def test_an_argument_that_is_not_taken_is_named() -> None:
    with pytest.raises(
        UserError, match=r"distill\.losses\.logits\.LogitsKL takes no 'temprature'; it takes: weight, temperature"
    ):
        build(node(_target_="distill.losses.LogitsKL", temprature=4), LossTerm)


def test_an_argument_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"annotated needs weight$"):
        build(node(_target_=f"{__name__}.annotated"), LossTerm)


def targets(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if "_target_" in content:
            yield content
        for value in content.values():
            yield from targets(value)


def configured() -> list[Any]:
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        name = str(path.relative_to(CONF))
        found += [pytest.param(name.split("/")[0], each, id=f"{name}-{each['_target_']}") for each in targets(content)]
    return found


@pytest.mark.parametrize(("group", "content"), configured())
def test_every_configuration_file_fits_its_target(group: str, content: dict[str, Any]) -> None:
    arguments = {key: "?" if isinstance(value, str) and "${" in value else value for key, value in content.items()}
    target = resolve(content["_target_"], KINDS[group])
    assert bind(node(**arguments), KINDS[group], **dict.fromkeys(GIVEN))[0] is target


def test_configuration_files_were_found() -> None:
    groups = {parameter.values[0] for parameter in configured()}
    assert groups >= {"data", "loss", "logger", "pair", "model"}
    assert len(configured()) >= len(list(CONF.glob("pair/*.yaml"))) + len(list(CONF.glob("loss/*.yaml")))
