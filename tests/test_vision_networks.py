import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.models import save_for_hf

from distill.errors import UserError
from distill.features import TappedImage
from students.mobilenet import mobilenetv3_small, mobilenetv3_small_half
from students.resnet import resnet10t, resnet18
from teachers.mobilenet import mobilenetv3_large
from teachers.resnet import resnet50
from teachers.vision import network, taps

BUILDERS = [resnet50, mobilenetv3_large, resnet18, resnet10t, mobilenetv3_small, mobilenetv3_small_half]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
SMALL = "mobilenetv3_small_050"
PLACES = {"last": "blocks.5"}
OWN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def small(weights: str | Path, num_labels: int = 3) -> TappedImage:
    return network(SMALL, PLACES, num_labels, MEAN, STD, str(weights))


@pytest.fixture
def trained() -> torch.nn.Module:
    return timm.create_model(SMALL, num_classes=3, pretrained_cfg_overlay=OWN)


@pytest.fixture
def folder(trained: torch.nn.Module, tmp_path: Path) -> Path:
    save_for_hf(trained, str(tmp_path / "saved"), safe_serialization=True)
    return tmp_path / "saved"


def same(ours: torch.nn.Module, theirs: torch.nn.Module, but: str = "-") -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(
        torch.equal(mine[key], other[key]) for key in mine if not key.startswith(but)
    )


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_stages_are_where_the_resolution_halves(builder: Callable[..., TappedImage]) -> None:
    tapped = builder(7, MEAN, STD).eval()
    tapped.watch(tapped.places)
    features = tapped({"pixels": torch.rand(2, 3, 64, 64)})
    assert features.logits.shape == (2, 7)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    assert tapped.layers == stages
    assert list(features.hidden) == [*stages, "pooled"]
    assert [features.hidden[stage].shape[2:] for stage in stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert features.mask is features.heads is tapped.heads is None
    assert not tapped.head_loaded


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_pooled_is_what_the_classifier_reads(builder: Callable[..., TappedImage]) -> None:
    tapped = builder(7, MEAN, STD).eval()
    tapped.watch(["pooled"])
    features = tapped({"pixels": torch.rand(2, 3, 64, 64)})
    assert features.hidden["pooled"].shape == (2, tapped.backbone.head_hidden_size)
    classifier = tapped.backbone.get_classifier()  # type: ignore[operator]
    torch.testing.assert_close(classifier(features.hidden["pooled"]), features.logits)


def test_taps_are_numbered_stages_and_what_the_classifier_reads() -> None:
    assert taps(["a.0", "b"], "pool") == {"stage1": "a.0", "stage2": "b", "pooled": "pool"}


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(resnet50, resnet10t), (resnet50, mobilenetv3_small), (mobilenetv3_large, mobilenetv3_small_half)],
)
def test_stages_of_a_pair_match_at_any_input_size(
    teacher: Callable[..., TappedImage], student: Callable[..., TappedImage]
) -> None:
    shapes = []
    for builder in (teacher, student):
        tapped = builder(2, MEAN, STD).eval()
        tapped.watch(tapped.places)
        hidden = tapped({"pixels": torch.rand(1, 3, 40, 40)}).hidden
        shapes.append([hidden[stage].shape[2:] for stage in tapped.layers])
    assert shapes[0] == shapes[1] == [(10, 10), (5, 5), (3, 3), (2, 2)]


def test_scratch_takes_the_normalisation_of_the_data() -> None:
    tapped = small("scratch").eval()
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    torch.testing.assert_close(tapped({"pixels": pixels}).logits, tapped.backbone((pixels - mean) / std))


def test_folder_brings_weights_head_and_normalisation(folder: Path, trained: torch.nn.Module) -> None:
    tapped = small(folder)
    assert same(tapped.backbone, trained)
    assert tapped.head_loaded
    assert tapped.mean.flatten().tolist() == pytest.approx(OWN["mean"])
    assert tapped.std.flatten().tolist() == pytest.approx(OWN["std"])


def test_other_number_of_labels_gets_a_new_head(folder: Path, trained: torch.nn.Module) -> None:
    tapped = small(folder, num_labels=5)
    assert tapped.backbone.num_classes == 5
    assert tapped.backbone.classifier.weight.shape[0] == 5
    assert not tapped.head_loaded
    assert same(tapped.backbone, trained, but="classifier.")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dict_file(suffix: str, trained: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained.state_dict(), str(path))
    tapped = small(path)
    assert same(tapped.backbone, trained)
    assert tapped.head_loaded
    assert tapped.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(SMALL).mean)
    assert not small(path, num_labels=4).head_loaded


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_weights_that_do_not_fit_are_refused(kind: str, change: str, folder: Path) -> None:
    backbone = timm.create_model(SMALL, num_classes=3)
    state = backbone.state_dict()
    if change == "missing":
        del state["conv_stem.weight"]
    elif change == "extra":
        state["more.weight"] = torch.zeros(1)
    else:
        state["conv_head.weight"] = torch.zeros(2, 2, 1, 1)
    path = folder / "model.safetensors"
    save_file(state, path)
    wrong = {"missing": "conv_stem.weight", "extra": "more.weight", "shape": "conv_head.weight"}[change]
    for num_labels in (3, 5):
        with pytest.raises(UserError, match=re.escape(wrong)) as caught:
            small(folder if kind == "folder" else path, num_labels)
        assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="is a mobilenetv3_small_050; this teacher is a resnet50"):
        resnet50(3, MEAN, STD, str(folder))


def test_file_without_the_classifier_is_refused(trained: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in trained.state_dict().items() if not key.startswith("classifier")}, path)
    with pytest.raises(UserError, match=r"holds no classifier\.weight"):
        small(path)


class Dangerous:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return Path.mkdir, (Path("unpickled"),)  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"classifier.weight": Dangerous()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights_only=True blocked"):
        small(tmp_path / "weights.pth")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_file_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="weights"):
        small(path)


def test_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't be loaded .*config\.json"):
        small(tmp_path)


@pytest.mark.parametrize("weights", ["nowhere", "./no/such/folder", "/no/such.pth", "a/b/c"])
def test_path_that_is_not_there_is_refused(weights: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        small(weights)


def test_unreachable_hub_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def unreachable(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", unreachable)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited to ask again"))
    with pytest.raises(UserError, match=r"teacher\.weights=nobody/nothing: can't be loaded") as caught:
        small("nobody/nothing")
    assert len(asked) == 1
    assert constants.HF_HUB_OFFLINE is False
    assert "\n" not in str(caught.value)
