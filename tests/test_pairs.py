"""Every pair in `conf/pair`, through the whole job."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from distill import fingerprint, report
from distill.app import CONF
from distill.exported import load_network
from distill.run import run

PAIRS = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
FIRST = {pair.rpartition("_")[0]: pair for pair in reversed(PAIRS)}
"""One pair for each teacher; the others are slow tests."""


def overrides(pair: str) -> list[str]:
    model, _, student = pair.rpartition("_")
    return [f"model={model}", f"student={student}", "trainer=smoke"]


def loss_nodes(folder: Path) -> dict[str, Any]:
    """The loss of the configuration that a run wrote down, without the names of classes."""
    config = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    return {
        name: {key: value for key, value in node.items() if key != "_target_"} for name, node in config["loss"].items()
    }


@pytest.fixture(scope="session")
def smoke(compose: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a smoke run of a pair; each pair runs once a session."""
    done: dict[str, Path] = {}

    def folder(pair: str) -> Path:
        if pair not in done:
            done[pair] = tmp_path_factory.mktemp(pair)
            run(
                compose(*overrides(pair)), done[pair], name=pair, command="python train.py " + " ".join(overrides(pair))
            )
        return done[pair]

    return folder


each_pair = pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=[] if pair in FIRST.values() else [pytest.mark.slow]) for pair in PAIRS]
)


@each_pair
def test_the_run_folder_is_complete(pair: str, smoke: Callable[[str], Path]) -> None:
    folder = smoke(pair)
    document = json.loads((folder / "report.json").read_text())
    report.validate(document)
    assert document["run"]["smoke"] is True
    assert document["run"]["name"] == pair
    assert document["baseline"] is not None
    assert all(seconds > 0 for seconds in document["run"]["seconds"].values())
    assert document["teacher"]["params"] > document["student"]["params"] == document["baseline"]["params"]
    assert document["loss"] == loss_nodes(folder)
    assert {name: sorted(node) for name, node in document["loss"].items()} == {
        "ce": ["label_smoothing", "schedule", "weight"],
        "logits": ["divergence", "schedule", "temperature", "temperature_schedule", "weight"],
    }
    for name in ("config.yaml", "metrics.csv", "report.md", "curves.png", "terms.png", "tradeoff.png"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("best.ckpt", "last.ckpt", "baseline/best.ckpt"):
        assert (folder / "checkpoints" / name).is_file(), name
    assert not (folder / "checkpoints" / "teacher").exists()
    assert list(folder.glob("wandb/offline-run-*/*.wandb")), "no offline W&B run"


@each_pair
def test_the_export_is_the_student_and_nothing_else(pair: str, smoke: Callable[[str], Path]) -> None:
    folder = smoke(pair)
    document = json.loads((folder / "report.json").read_text())
    assert {entry["format"] for entry in document["exports"]} >= {"onnx"}
    for entry in document["exports"]:
        assert (folder / entry["path"]).exists()
        assert entry["max_abs_diff"] <= 1e-3
        assert entry["metrics"]["accuracy"] == document["student"]["metrics"]["accuracy"]
    network = load_network(folder / "export")
    assert sum(p.numel() for p in network.parameters()) == document["student"]["params"]
    weights = load_file(folder / "export" / "model.safetensors")
    assert set(weights) == set(network.state_dict())
    assert fingerprint.of_tensors(weights) == document["student"]["digest"]
    session = onnxruntime.InferenceSession(str(folder / "export" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]


@each_pair
def test_the_checkpoint_holds_no_teacher(pair: str, smoke: Callable[[str], Path]) -> None:
    checkpoint = torch.load(smoke(pair) / "checkpoints" / "best.ckpt", weights_only=True)
    document = json.loads((smoke(pair) / "report.json").read_text())
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student"}
    moments = [m for s in checkpoint["optimizer_states"] for p in s["state"].values() for m in p.values() if m.ndim]
    assert sum(m.numel() for m in moments) == 2 * document["student"]["params"]
    assert checkpoint["distill"]["config"]["seed"] == 0
    assert len(checkpoint["distill"]["teacher"]) == 64


def test_stages_that_are_not_needed_are_null_in_the_report(compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    document = run(compose(*overrides("mobilenet_v3_tiny"), "loss=[ce]", "logger=csv"), tmp_path, name="a", command="b")
    assert json.loads((tmp_path / "report.json").read_text()) == document
    assert document["baseline"] is None
    assert {stage for stage, seconds in document["run"]["seconds"].items() if seconds is None} == {"cache", "baseline"}


TWO_STAGES = [
    "loss=[ce,logits,hidden,rkd]",
    "loss.hidden.schedule={before: 1, after: 0, start: 0.5, end: 0.5}",
    "loss.logits.schedule={before: 0, after: 1, start: 0.5, end: 0.5}",
]


def test_a_loss_on_layers_with_a_schedule_goes_through_the_whole_job(
    compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    cfg = compose(*overrides("mobilenet_v3_tiny"), *TWO_STAGES, "logger=csv", "baseline=false", "optim.batch_size=8")
    document = run(cfg, tmp_path, name="a", command="b")
    assert json.loads((tmp_path / "report.json").read_text()) == document
    assert document["loss"] == loss_nodes(tmp_path)
    assert document["loss"]["hidden"]["schedule"] == {"before": 1, "after": 0, "start": 0.5, "end": 0.5}
    assert document["loss"]["rkd"]["layers"] == [["pooled", "pooled"]]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("ce", "hidden", "logits", "rkd")
    steps = {name: [int(row["step"]) for row in rows if row[f"student/train_{name}"]] for name in names}
    assert steps == {"ce": [0, 1, 2, 3], "hidden": [0, 1], "logits": [2, 3], "rkd": [0, 1, 2, 3]}
    state = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"student", "loss"}
    assert sum(p.numel() for p in load_network(tmp_path / "export").parameters()) == document["student"]["params"]
