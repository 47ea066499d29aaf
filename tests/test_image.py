from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data.augment import DRAWS, jitter, uniforms
from distill.data.image import Digits, image_loader, picture
from distill.data.sampler import EpochSampler
from distill.errors import UserError

Loader = DataLoader[dict[str, Tensor]]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def everything(loader: Loader, key: str, epoch: int = 0) -> Tensor:
    """One epoch's `key` by index of the example (or in order of visit for `index` itself)."""
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    index = torch.cat([batch["index"] for batch in batches])
    values = torch.cat([batch[key] for batch in batches])
    return values if key == "index" else values[index.argsort()]


def test_splits_are_disjoint_stratified_and_complete(digits: Digits) -> None:
    assert sum(digits.sizes.values()) == 1797
    assert digits.sizes["test"] >= 440
    pictures = []
    for split, size in digits.sizes.items():
        loader = digits.loader(split, batch_size=100)
        counts = everything(loader, "labels").bincount(minlength=10)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 6
        pictures.append(everything(loader, "pixels").flatten(1))
    assert len(torch.cat(pictures).unique(dim=0)) == 1797


def test_batch_is_documented_dict(digits: Digits) -> None:
    batch = next(iter(digits.loader("train", batch_size=5)))
    assert set(batch) == {"pixels", "labels", "index", "view"}
    assert batch["pixels"].shape == (5, *digits.input_size)
    assert batch["pixels"].dtype == torch.float32
    assert batch["labels"].dtype == batch["index"].dtype == batch["view"].dtype == torch.int64
    assert batch["view"].tolist() == [0] * 5
    assert batch["pixels"].min() >= 0
    assert 0.9 < batch["pixels"].max() <= 1
    assert digits.label_names == [str(n) for n in range(10)]


def test_constants_describe_the_training_split(digits: Digits) -> None:
    pixels = everything(digits.loader("train", batch_size=64), "pixels")
    assert pixels.mean(dim=(0, 2, 3)).tolist() == pytest.approx(digits.mean, abs=1e-3)
    assert pixels.std(dim=(0, 2, 3)).tolist() == pytest.approx(digits.std, abs=1e-3)


@pytest.mark.parametrize("size", [32, 64])
def test_pixels_are_what_timm_makes_of_the_png(size: int, tmp_path: Path) -> None:
    """Who feeds a PNG to the exported student through timm's preprocessing gives it what it was measured on."""
    data = Digits(size=size, limit=20)
    raw = load_digits()
    pictures = picture(raw.images)
    network = timm.create_model(
        "resnet10t",
        num_classes=10,
        pretrained_cfg_overlay={
            "input_size": data.input_size,
            "mean": data.mean,
            "std": data.std,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
        },
    )
    transform = create_transform(**resolve_data_config({}, model=network), is_training=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    fed = []
    for n, grey in enumerate(pictures):
        grey.save(tmp_path / f"{n}.png")
        with Image.open(tmp_path / f"{n}.png") as file:
            fed.append(transform(file.convert("RGB")))
    by_file = torch.stack(fed)
    batch = next(iter(data.loader("test", batch_size=20)))
    ours = (batch["pixels"] - mean) / std
    difference = (ours[:, None] - by_file[None]).abs().amax(dim=(2, 3, 4))
    match = difference.argmin(dim=1)
    assert difference.amin(dim=1).max() == 0
    assert torch.equal(torch.tensor(raw.target)[match], batch["labels"])


def test_order_is_a_function_of_seed_and_epoch(digits: Digits) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        return everything(digits.loader("val", batch_size=64, shuffle=shuffle, seed=seed), "index", epoch).tolist()

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(digits.sizes["val"]))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2, shuffle=False) == list(range(digits.sizes["val"]))


def test_augmentation_is_a_function_of_seed_epoch_and_index(digits: Digits) -> None:
    def pixels(seed: int, epoch: int, batch_size: int = 64, shuffle: bool = True) -> Tensor:
        loader = digits.loader("val", batch_size=batch_size, shuffle=shuffle, augment=True, seed=seed)
        return everything(loader, "pixels", epoch)

    first = pixels(0, 3)
    assert torch.equal(first, pixels(0, 3, batch_size=7, shuffle=False))
    assert not torch.equal(first, pixels(0, 4))
    assert not torch.equal(first, pixels(1, 3))
    plain = everything(digits.loader("val", batch_size=64), "pixels")
    assert (first != plain).flatten(1).any(dim=1).all()
    assert first.min() >= 0
    assert first.max() <= 1


def test_views_start_over_and_the_order_does_not() -> None:
    data = Digits(limit=20, views=2)
    loader = data.loader("train", batch_size=8, shuffle=True, augment=True, views=data.views)
    pixels = [everything(loader, "pixels", epoch) for epoch in range(4)]
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[1], pixels[3])
    assert (pixels[0] != pixels[1]).flatten(1).any(dim=1).all()
    assert [everything(loader, "view", epoch).unique().tolist() for epoch in range(4)] == [[0], [1], [0], [1]]
    assert everything(loader, "index", 0).tolist() != everything(loader, "index", 2).tolist()
    endless = data.loader("train", batch_size=8, shuffle=True, augment=True)
    assert torch.equal(everything(endless, "pixels", 1), pixels[1])
    assert not torch.equal(everything(endless, "pixels", 2), pixels[0])
    assert everything(endless, "view", 7).unique().tolist() == [7]
    plain = data.loader("train", batch_size=8, views=data.views)
    assert everything(plain, "view", 1).unique().tolist() == [0]


def test_loading_leaves_global_random_state_alone(digits: Digits) -> None:
    before = torch.get_rng_state()
    list(digits.loader("val", batch_size=64, shuffle=True, augment=True))
    assert torch.equal(before, torch.get_rng_state())


def test_uniforms_are_uniform_and_independent() -> None:
    index, zero = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    draws = uniforms(0, zero, index)
    assert draws.shape == (20_000, DRAWS)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean(0).tolist() == pytest.approx([0.5] * DRAWS, abs=0.01)
    assert draws.var(0).tolist() == pytest.approx([1 / 12] * DRAWS, abs=0.002)
    neighbours = [draws, uniforms(1, zero, index), uniforms(0, zero + 1, index)]
    correlation = torch.corrcoef(torch.cat(neighbours, dim=1).T) - torch.eye(3 * DRAWS)
    assert correlation.abs().max() < 0.04
    assert torch.corrcoef(torch.stack([draws[1:, 0], draws[:-1, 0]]))[0, 1].abs() < 0.04


def test_jitter_moves_pixels_as_its_parameters_say() -> None:
    pixels = torch.zeros(1, 1, 40, 40)
    pixels[..., 18:22, 18:22] = 1
    still = torch.full((1, DRAWS), 0.5)
    torch.testing.assert_close(jitter(pixels, still), pixels, atol=1e-5, rtol=0)
    shifted = still.clone()
    shifted[0, 4] = 0.0
    torch.testing.assert_close(jitter(pixels, shifted, shift=0.1), pixels.roll(4, dims=3), atol=1e-4, rtol=0)
    bigger = still.clone()
    bigger[0, 2:4] = 0.0
    assert jitter(pixels, bigger, scale=0.5).sum().item() == pytest.approx(4 * pixels.sum().item(), rel=0.02)


def test_fingerprint_covers_size_split_and_membership() -> None:
    data = Digits(limit=20)
    assert len(data.fingerprint) == 64
    assert Digits(limit=20).fingerprint == data.fingerprint
    assert Digits(limit=20, views=3).fingerprint == data.fingerprint
    stronger = Digits(limit=20)
    stronger.strength = {**Digits.strength, "degrees": 13.0}
    others = [Digits(limit=21), Digits(limit=20, size=40), Digits(limit=20, seed=1), stronger]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5
    same_pixels = Digits(limit=20)
    same_pixels._labels["val"] = same_pixels._labels["val"].roll(1)
    assert same_pixels.fingerprint != data.fingerprint


def test_limit_is_balanced_and_a_part_of_the_whole(digits: Digits) -> None:
    few = Digits(limit=20)
    assert few.sizes == {"train": 20, "val": 20, "test": 20}
    for split in few.sizes:
        batch = next(iter(few.loader(split, batch_size=20)))
        assert batch["labels"].bincount().tolist() == [2] * 10
        whole = everything(digits.loader(split, batch_size=500), "pixels")
        assert len(torch.cat([whole, batch["pixels"]]).flatten(1).unique(dim=0)) == len(whole)


def test_a_lone_last_example_is_left_out_of_shuffled_epochs_only() -> None:
    pixels, labels = torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64)
    assert [len(batch["labels"]) for batch in image_loader(pixels, labels, batch_size=4, shuffle=True)] == [4, 4]
    assert [len(batch["labels"]) for batch in image_loader(pixels, labels, batch_size=4)] == [4, 4, 1]
    assert [len(batch["labels"]) for batch in image_loader(pixels[:1], labels[:1], batch_size=4, shuffle=True)] == [1]


def test_sampler_does_not_share_an_order_between_neighbouring_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) != order(1, 0)
    assert len(order(2, 5)) == len(EpochSampler(50, shuffle=True))


@pytest.mark.parametrize("arguments", [{"size": 7}, {"size": 1000}, {"limit": 0}])
def test_bad_values_say_what_to_do(arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"=\d+: .*; give"):
        Digits(**arguments)


@pytest.mark.parametrize("views", [0, 1.5, "two", True])
def test_views_are_a_whole_number(views: Any) -> None:
    with pytest.raises(UserError, match=f"^views={views}: must be a whole number >= 1"):
        Digits(limit=20, views=views)
    assert Digits(limit=20, views=1).views == 1


def test_bad_loader_arguments_say_what_to_do(digits: Digits) -> None:
    with pytest.raises(UserError, match="choose one of train, val, test"):
        digits.loader("valid", batch_size=4)
    with pytest.raises(UserError, match="batch_size=0"):
        digits.loader("val", batch_size=0)
