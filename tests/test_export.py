"""An export holds the same network, loads without this package, and never costs what was there before."""

from __future__ import annotations

import copy
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from exporting import (
    LABELS,
    MEAN,
    SIZE,
    STD,
    Exports,
    bert,
    cnn,
    image_batch,
    image_export,
    shared_exports,
    text_batch,
    text_export,
    tokenizer,
)
from PIL import Image
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from distill import export, exported
from distill.cost import weight_bytes
from distill.errors import UserError
from distill.exported import Exported, accuracy, load_native, load_network, load_onnx, measure, onnx_accuracy, verify

KINDS = {"text": (bert, text_export), "image": (cnn, image_export)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return shared_exports(tmp_path_factory)


def reference(kind: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits by the plain network, written out."""
    with torch.no_grad():
        if kind == "text":
            return bert().eval()(**batch).logits
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        return cnn().eval()((batch["pixels"] - mean) / std)


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    if kind == "text":
        return [text_batch(b, length) for b in (1, 3) for length in (4, 17)]
    return [image_batch(b) for b in (1, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_logits_of_the_network(exports: Exports, kind: str) -> None:
    folder = exports[kind]
    for answer in (load_native(folder), load_onnx(folder / "model.onnx")):
        for batch in batches(kind):
            expected = reference(kind, batch)
            assert expected.std() > 1e-2
            torch.testing.assert_close(answer(batch), expected, atol=1e-4, rtol=0)
    differences = exports.differences[kind]
    assert set(differences) == {{"text": "transformers", "image": "timm"}[kind], "onnx"}
    assert all(difference < 1e-4 for difference in differences.values())


def test_padding_does_not_change_the_answer(exports: Exports) -> None:
    answer = load_onnx(exports["text"] / "model.onnx")
    padded = text_batch(3, 17)
    alone = {key: value[-1:, :9] for key, value in padded.items()}
    assert alone["attention_mask"].all()
    torch.testing.assert_close(answer(padded)[-1:], answer(alone), atol=1e-5, rtol=0)
    unmasked = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    assert (answer(unmasked)[-1] - answer(padded)[-1]).abs().max() > 1e-2


def test_onnx_names_and_dimensions(exports: Exports) -> None:
    def shapes(kind: str) -> dict[str, list[int | str]]:
        session = onnxruntime.InferenceSession(str(exports[kind] / "model.onnx"), providers=["CPUExecutionProvider"])
        assert json.loads(session.get_modelmeta().custom_metadata_map["label_names"]) == LABELS
        return {tensor.name: tensor.shape for tensor in [*session.get_inputs(), *session.get_outputs()]}

    dims = ["batch", "length"]
    assert shapes("text") == {"input_ids": dims, "attention_mask": dims, "logits": ["batch", len(LABELS)]}
    assert shapes("image") == {"pixels": ["batch", *SIZE], "logits": ["batch", len(LABELS)]}


def test_labels_and_preprocessing_are_in_the_folder(exports: Exports) -> None:
    config = json.loads((exports["text"] / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert config["label2id"] == {label: i for i, label in enumerate(LABELS)}
    assert AutoTokenizer.from_pretrained(str(exports["text"])).model_max_length == 24
    config = json.loads((exports["image"] / "config.json").read_text())
    assert config["label_names"] == LABELS
    wanted = {
        "input_size": list(SIZE),
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    assert {key: config["pretrained_cfg"][key] for key in wanted} == wanted
    assert not {"tag", "license"} & set(config["pretrained_cfg"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_files_and_none_knows_this_machine(exports: Exports, kind: str) -> None:
    files = {path.name: path.read_bytes() for path in exports[kind].iterdir()}
    wanted = {"config.json", "model.safetensors", "model.onnx", "README.md"}
    assert set(files) - {"tokenizer.json", "tokenizer_config.json"} == wanted
    for name, content in files.items():
        assert b"site-packages" not in content, name
        assert str(Path(__file__).parents[1]).encode() not in content, name
    payload = weight_bytes(KINDS[kind][0]())
    assert payload < len(files["model.safetensors"]) < payload + 20_000


def test_the_network_is_not_touched_and_its_hooks_stay_behind(tmp_path: Path) -> None:
    network = cnn("mobilenetv3_small_050").to(memory_format=torch.channels_last).train()
    network.bn1.eval()
    calls: list[str] = []
    network.blocks[0].register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    network.blocks[1].register_forward_hook(lambda *_: calls.append("hook"))
    network(torch.randn(2, *SIZE)).sum().backward()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    calls.clear()
    differences = image_export(tmp_path / "export", network)
    assert not calls
    assert max(differences.values()) < 1e-3
    assert [module.training for module in network.modules()] == modes
    assert network.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    network(torch.randn(2, *SIZE))
    assert calls == ["pre-hook", "hook"]


def test_a_copy_shares_nothing_with_what_its_hooks_refer_to() -> None:
    class Owner:
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise AssertionError("the owner of a hook was copied")

        def hook(self, *_: object) -> None: ...

    network = nn.Sequential(nn.Linear(2, 2)).half()
    network[0].register_forward_hook(Owner().hook)
    clean = export.clean_copy(network)
    assert (len(clean[0]._forward_hooks), len(network[0]._forward_hooks)) == (0, 1)
    assert (clean[0].weight.dtype, network[0].weight.dtype) == (torch.float32, torch.float16)
    assert clean[0].weight.data_ptr() != network[0].weight.data_ptr()


def test_exporting_says_nothing(exports: Exports) -> None:
    assert exports.printed == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_export_leaves_the_old_one(
    tmp_path: Path, kind: str, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for path in exports[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def intact() -> bool:
        return {path.name: path.read_bytes() for path in folder.iterdir()} == before and list(tmp_path.iterdir()) == [
            folder
        ]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write the export .*export: .*untouched\)$"):
            KINDS[kind][1](folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert intact()

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_onnx", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KINDS[kind][1](folder)
    assert intact()


def test_an_exchange_that_fails_halfway_is_taken_back(
    tmp_path: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((exports["text"] / name).read_bytes())
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), export.replaced(folder) as new:
        (new / "file").write_text("new")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_export_replaces_the_old_one_whole(tmp_path: Path, exports: Exports) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((exports["image"] / name).read_bytes())
    (folder / "stale.onnx").write_text("of the old network")
    with export.replaced(folder) as new:
        assert (folder / "stale.onnx").exists()
        (new / "fresh").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["fresh"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_not_an_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an export"):
        text_export(tmp_path)
    with pytest.raises(UserError, match="not an export"):
        text_export(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [(LABELS[:-1], "3 label names for a network with 4 classes"), (["a", "b", "a", "c"], "'a' occurs twice")],
)
def test_label_names_must_fit(labels: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export.export_image(cnn(), labels, MEAN, STD, SIZE, "bilinear", tmp_path / "export", export.Card("", "", ""))
    with pytest.raises(UserError, match=message):
        export.export_text(bert(), tokenizer(), labels, tmp_path / "export", export.Card("", "", ""))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_verification_finds_another_network(exports: Exports, kind: str) -> None:
    other = KINDS[kind][0]().eval()
    assert max(verify(exports[kind], other, 1e-3).values()) < 1e-4
    bias = next(p for name, p in other.named_parameters() if name.endswith(("classifier.bias", "fc.bias")))
    with torch.no_grad():
        bias.copy_(torch.linspace(-100, 100, len(bias)) + bias)
    with pytest.raises(RuntimeError, match=r"logits differ by 100, more than the tolerance 0\.1"):
        verify(exports[kind], other, 1e-3)
    assert max(verify(exports[kind], other, 1.1).values()) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_small_logits_are_compared_absolutely(exports: Exports, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(value: float) -> Exported:
        return Exported(inputs=dict, run=lambda inputs: torch.full((len(next(iter(inputs.values()))), 2), value))

    monkeypatch.setattr("distill.exported.load", lambda path: constant(0.5 + 0.002))
    monkeypatch.setattr("distill.exported.torch_run", lambda network: constant(0.5).run)
    with pytest.raises(RuntimeError, match=r"logits differ by 0\.002, more than the tolerance 0\.001"):
        verify(exports[kind], KINDS[kind][0](), 1e-3)


def test_verification_refuses_what_is_not_a_number(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Exported(inputs=dict, run=lambda inputs: torch.full((len(inputs["input_ids"]), len(LABELS)), torch.nan))
    monkeypatch.setattr(exported, "load_onnx", lambda path, threads: broken)
    with pytest.raises(RuntimeError, match=r"onnx network disagrees.*differ by nan"):
        verify(exports["text"], bert().eval(), 1e-3)


def test_accuracy_counts_examples_not_batches() -> None:
    answer = Exported(inputs=dict, run=lambda inputs: inputs["logits"])
    logits, labels = torch.eye(3), torch.tensor([0, 1, 1])
    loader = [{"logits": logits[:2], "labels": labels[:2]}, {"logits": logits[2:], "labels": labels[2:]}]
    assert accuracy(answer, loader) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no examples"):
        accuracy(answer, [])


@pytest.mark.parametrize("kind", KINDS)
def test_report_entries(exports: Exports, kind: str) -> None:
    folder, native = exports[kind], {"text": "transformers", "image": "timm"}[kind]
    loader = [batch | {"labels": reference(kind, batch).argmax(-1)} for batch in batches(kind)]
    loader[0]["labels"] = (loader[0]["labels"] + 1) % len(LABELS)
    expected = 1 - 1 / sum(len(batch["labels"]) for batch in loader)
    assert onnx_accuracy(folder / "model.onnx", loader) == pytest.approx(expected)
    entries = measure(folder, {native: 0.0, "onnx": 1e-6}, loader, batches(kind)[0], warmup=1, repeats=3)
    assert [(entry["format"], entry["path"], entry["max_abs_diff"]) for entry in entries] == [
        (native, kind, 0.0),
        ("onnx", f"{kind}/model.onnx", 1e-6),
    ]
    for entry, file in zip(entries, ("model.safetensors", "model.onnx"), strict=True):
        assert entry["bytes"] == (folder / file).stat().st_size
        assert entry["metrics"] == {"accuracy": pytest.approx(expected)}
        assert 0 < entry["latency_ms"]["p50"] <= entry["latency_ms"]["p90"]
        assert {key: entry["latency_ms"][key] for key in ("batch", "threads", "device")} == {
            "batch": 1,
            "threads": 1,
            "device": "cpu",
        }


@pytest.mark.parametrize("kind", KINDS)
def test_model_card(exports: Exports, kind: str) -> None:
    _, front, body = (exports[kind] / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    task = {"text": "text-classification", "image": "image-classification"}[kind]
    assert (facts["library_name"], facts["pipeline_tag"]) == ({"text": "transformers", "image": "timm"}[kind], task)
    assert {"knowledge-distillation", "tests"} <= set(facts["tags"])
    [result] = facts["model-index"][0]["results"]
    assert facts["model-index"][0]["name"] == 'tiny: "one"'
    assert result["metrics"] == [{"type": "accuracy", "value": 0.25}]
    assert "| parameters | 1234 |" in body
    assert LABELS[-1] in body


OUTSIDE = """
import json, os, sys
sys.modules["distill"] = None
import timm, torch
from transformers import AutoModelForSequenceClassification
with torch.no_grad():
    text = AutoModelForSequenceClassification.from_pretrained("text").eval()
    image = timm.create_model("local-dir:image", pretrained=True).eval()
    ids = torch.tensor(json.load(sys.stdin))
    outside = text(input_ids=ids).logits.tolist(), image(torch.ones(1, 3, 32, 32)).tolist()
for kind in ("text", "image"):
    os.chdir(kind)
    for block in json.load(open("../blocks.json"))[kind]:
        exec(block)
    os.chdir("..")
print(json.dumps(outside))
"""


def test_loads_without_this_package(exports: Exports) -> None:
    """In another process and folder; then runs the code of both model cards as it stands."""
    root = exports["text"].parent
    Image.new("RGB", (40, 30), (200, 30, 90)).save(exports["image"] / "image.png")
    code = {
        kind: re.findall(r"```python\n(.*?)```", (exports[kind] / "README.md").read_text(), re.S) for kind in exports
    }
    assert {kind: len(blocks) for kind, blocks in code.items()} == {"text": 2, "image": 2}
    (root / "blocks.json").write_text(json.dumps(code))
    ids = [[2, 5, 6, 3]]
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", OUTSIDE],
            cwd=root,
            input=json.dumps(ids),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (exports["image"] / "image.png").unlink()
    assert done.returncode == 0, done.stderr
    *answers, outside = done.stdout.splitlines()
    with torch.no_grad():
        expected = bert().eval()(input_ids=torch.tensor(ids)).logits, cnn().eval()(torch.ones(1, *SIZE))
    for found, wanted in zip(json.loads(outside), expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=0)
    assert len(answers) == 2
    for answer in answers:
        label, probability = answer.rsplit(" ", 1)
        assert label in LABELS
        assert 1 / len(LABELS) <= float(probability) <= 1


def test_a_changed_architecture_is_refused(tmp_path: Path) -> None:
    """timm rebuilds a network from its name: layers that were swapped by hand would be lost."""
    network = cnn()
    network.maxpool = nn.Identity()
    with pytest.raises(RuntimeError, match="timm network disagrees"):
        image_export(tmp_path / "export", network)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shown", [True, False])
def test_transformers_progress_bars_are_restored(exports: Exports, shown: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        load_network(exports["text"])
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
