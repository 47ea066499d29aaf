import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from random import Random

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from distill.data.batches import BucketBatches, TextSplit, padding, text_loader
from distill.data.sampler import EpochSampler
from distill.data.text import (
    LANGUAGES,
    SHARES,
    Cldr,
    balanced,
    capped,
    concept_phrases,
    split_of,
)
from distill.data.wordpiece import SPECIAL, PieceDropout, train_wordpiece
from distill.errors import UserError

Loader = DataLoader[dict[str, Tensor]]


@pytest.fixture(scope="module")
def cldr() -> Cldr:
    return Cldr()


def visits(loader: Loader, epoch: int = 0) -> list[list[int]]:
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [batch["index"].tolist() for batch in loader]


def test_no_phrase_and_no_concept_is_in_two_splits(cldr: Cldr) -> None:
    phrases = [phrase.casefold() for part in cldr.phrases.values() for phrase in part]
    assert len(set(phrases)) == len(phrases) == sum(cldr.sizes.values())
    split_by_phrase = {phrase.casefold(): split for split, part in cldr.phrases.items() for phrase in part}
    split_by_concept: dict[str, set[str]] = {}
    for concept, _, phrase in concept_phrases(LANGUAGES[: len(cldr.label_names)]):
        split_by_concept.setdefault(concept, set()).add(split_by_phrase[phrase.casefold()])
    assert len(split_by_concept) > 1000
    assert all(len(splits) == 1 for splits in split_by_concept.values())


def test_sizes_follow_shares(cldr: Cldr) -> None:
    total = sum(cldr.sizes.values())
    assert list(cldr.sizes) == ["train", "val", "test"]
    for split, share in SHARES.items():
        assert cldr.sizes[split] / total == pytest.approx(share, abs=0.03)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_split_depends_on_concept_and_seed_only() -> None:
    splits = [split_of(f"currencies {i}", 0) for i in range(5000)]
    assert {s: splits.count(s) / 5000 for s in SHARES} == pytest.approx(SHARES, abs=0.03)
    assert splits != [split_of(f"currencies {i}", 1) for i in range(5000)]
    few, many = Cldr(languages=3), Cldr(languages=6)
    where = {phrase: split for split, part in few.phrases.items() for phrase in part}
    common = [(phrase, split) for split, part in many.phrases.items() for phrase in part if phrase in where]
    assert len(common) > 1000
    assert all(where[phrase] == split for phrase, split in common)


def test_phrase_of_two_languages_is_left_out() -> None:
    rows = concept_phrases(["de", "nl", "en"])
    german = {phrase for _, language, phrase in rows if language == "de"}
    assert "Deutschland" in german
    assert "Israel" not in {phrase for _, _, phrase in rows}
    assert all(any(character.isalpha() for character in phrase) for phrase in german)


def test_labels_are_english_names_of_the_phrases_language(cldr: Cldr) -> None:
    assert cldr.label_names[:3] == ["English", "German", "French"]
    every = Cldr(languages=len(LANGUAGES), limit=1)
    assert len(set(every.label_names)) == len(LANGUAGES) == 32
    label = {}
    for split in SHARES:
        for batch in cldr.loader(split, batch_size=512):
            found = zip(batch["index"].tolist(), batch["labels"].tolist(), strict=True)
            label.update({cldr.phrases[split][i]: cldr.label_names[k] for i, k in found})
    assert label["Deutschland"] == "German"
    assert label["Allemagne"] == "French"
    assert label["Yhdysvallat"] == "Finnish"


def test_batch_is_documented_dict(cldr: Cldr) -> None:
    batch = next(iter(cldr.loader("train", batch_size=7, shuffle=True)))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index", "view"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (7, batch["attention_mask"].sum(1).max())
    assert batch["labels"].shape == batch["index"].shape == (7,)
    assert batch["view"].tolist() == [0] * 7


@pytest.mark.parametrize("split", SHARES)
def test_batches_say_what_the_tokenizer_says(cldr: Cldr, split: str) -> None:
    seen = []
    for batch in cldr.loader(split, batch_size=64):
        phrases = [cldr.phrases[split][i] for i in batch["index"]]
        expected = cldr.tokenizer(
            phrases, padding=True, truncation=True, max_length=cldr.max_length, return_tensors="pt"
        )
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(cldr.sizes[split]))


def test_max_length_cuts() -> None:
    cut = Cldr(languages=2, max_length=5)
    batches = list(cut.loader("test", batch_size=64))
    assert max(batch["input_ids"].shape[1] for batch in batches) == 5
    assert all((batch["input_ids"] == cut.tokenizer.sep_token_id).sum() == len(batch["index"]) for batch in batches)


def test_order_is_a_function_of_seed_and_epoch(cldr: Cldr) -> None:
    first, second = (cldr.loader("train", batch_size=64, shuffle=True, seed=3) for _ in range(2))
    assert visits(first, 1) != visits(first, 0)
    torch.manual_seed(99)
    assert visits(first, 1) == visits(second, 1)
    assert visits(cldr.loader("train", batch_size=64, shuffle=True, seed=4), 1) != visits(first, 1)
    assert sorted(chain.from_iterable(visits(first, 5))) == list(range(cldr.sizes["train"]))
    assert [len(batch) for batch in visits(first)].count(64) >= len(first) - 1


def test_shuffled_batches_are_not_visited_by_length(cldr: Cldr) -> None:
    loader = cldr.loader("train", batch_size=64, shuffle=True)
    widths = [batch["input_ids"].shape[1] for batch in loader]
    assert widths[:16] != sorted(widths[:16])


def test_reading_touches_no_global_random_state(cldr: Cldr) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    visits(cldr.loader("train", batch_size=256, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())


def test_padding_ratio_is_what_the_batches_hold_and_small(cldr: Cldr) -> None:
    loader = cldr.loader("train", batch_size=64, shuffle=True)
    masks = [batch["attention_mask"] for batch in loader]
    measured = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert loader.batch_sampler.padding_ratio == pytest.approx(measured)
    unbucketed = BucketBatches(loader.batch_sampler.lengths, EpochSampler(len(loader.dataset), shuffle=True), 64, 1)
    assert measured < 0.12 < unbucketed.padding_ratio / 2
    assert padding(loader) == (
        f"padding is {measured:.0%} of the positions in batches of 64; without length buckets it would be "
        f"{unbucketed.padding_ratio:.0%}"
    )
    assert padding(DataLoader([{"labels": torch.zeros(1)}])) is None


def test_bucket_batches_known_value() -> None:
    batches = BucketBatches([3, 1, 2, 9], EpochSampler(4, shuffle=False), 2)
    assert list(batches) == [[1, 2], [0, 3]]
    assert len(batches) == 2
    assert batches.padding_ratio == pytest.approx(1 - 15 / 22)


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers", "ignore:The number of training batches"
)
def test_lightning_sets_the_epoch(cldr: Cldr, tmp_path: Path) -> None:
    class Watcher(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.first: list[list[int]] = []

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.first.append(batch["index"].tolist())
            return self.weight**2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    watcher, loader = Watcher(), cldr.loader("train", batch_size=64, shuffle=True)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(watcher, loader)
    expected = cldr.loader("train", batch_size=64, shuffle=True)
    assert watcher.first == [visits(expected, 0)[0], visits(expected, 1)[0]]


def test_limit_is_balanced_and_keeps_the_vocabulary(cldr: Cldr) -> None:
    small = Cldr(limit=24)
    assert small.sizes == {"train": 24, "val": 24, "test": 24}
    assert small.tokenizer.get_vocab() == cldr.tokenizer.get_vocab()
    for split in SHARES:
        labels = next(iter(small.loader(split, batch_size=24)))["labels"]
        assert labels.bincount(minlength=12).tolist() == [2] * 12
        assert set(small.phrases[split]) <= set(cldr.phrases[split])
    assert balanced([("a", 0), ("b", 0), ("c", 1)], 2) == [("a", 0), ("c", 1)]


def test_examples_caps_each_language() -> None:
    rows = [(f"territories {i}", language, f"{language}{i}") for i in range(20) for language in ("de", "fr")]
    kept = capped(rows, 15)
    assert [sum(language == code for _, language, _ in kept) for code in ("de", "fr")] == [15, 15]
    assert len(capped(rows, None)) == 40
    data = Cldr(languages=3, examples=100)
    assert sum(data.sizes.values()) == 300


def test_vocabulary_sees_training_split_only(cldr: Cldr) -> None:
    again = train_wordpiece(cldr.phrases["train"], 1200, cldr.max_length)
    assert again.get_vocab() == cldr.tokenizer.get_vocab()
    characters = {c for phrase in cldr.phrases["train"] for c in phrase}
    pieces = set(cldr.tokenizer.get_vocab()) - set(SPECIAL)
    assert {c for piece in pieces for c in piece.removeprefix("##")} <= characters


def test_vocabulary_format(cldr: Cldr) -> None:
    assert len(cldr.tokenizer) == 1200
    assert cldr.tokenizer.pad_token_id == 0
    assert cldr.tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL
    assert sorted(cldr.tokenizer.get_vocab().values()) == list(range(1200))
    ids = cldr.tokenizer("Türkiye")["input_ids"]
    assert cldr.tokenizer.decode(ids, skip_special_tokens=True) == "Türkiye"


def test_saved_tokenizer_loads_by_itself_and_as_argument(cldr: Cldr, tmp_path: Path) -> None:
    cldr.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    phrases = cldr.phrases["test"]
    options = {"truncation": True, "max_length": cldr.max_length}
    assert loaded(phrases, **options)["input_ids"] == cldr.tokenizer(phrases, **options)["input_ids"]
    assert loaded.pad_token_id == 0
    given = Cldr(tokenizer=str(tmp_path), pieces=300)
    assert given.fingerprint == cldr.fingerprint


def test_fingerprint_covers_what_decides_an_example(cldr: Cldr) -> None:
    options = [{}, {"pieces": 900}, {"seed": 1}, {"max_length": 6}, {"languages": 5}, {"limit": 9}, {"examples": 300},
               {"max_length": 100}, {"piece_dropout": 0.3}]  # fmt: skip
    prints = [Cldr(**{"languages": 4, **option}).fingerprint for option in options]
    assert len(set(prints)) == len(prints)


def test_same_in_another_process(cldr: Cldr) -> None:
    code = "from distill.data.text import Cldr; print(Cldr().fingerprint)"
    environment = os.environ | {"PYTHONHASHSEED": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == cldr.fingerprint


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"languages": 1}, "languages=1"),
        ({"languages": 33}, "from 2 to 32"),
        ({"examples": 3}, "examples=3"),
        ({"pieces": 5}, "pieces=5"),
        ({"max_length": 2}, "max_length=2"),
        ({"limit": 0}, "limit=0"),
        ({"views": 0}, "views=0"),
        ({"views": 2.0}, "views=2.0"),
        ({"tokenizer": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_bad_argument_is_named(option: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Cldr(**option)
    assert "\n" not in str(error.value)


def test_bad_split_and_batch_size_are_named(cldr: Cldr) -> None:
    with pytest.raises(UserError, match="dev"):
        cldr.loader("dev", batch_size=8)
    with pytest.raises(UserError, match="batch_size=0"):
        text_loader(TextSplit([[1]], torch.tensor([0]), 0), batch_size=0)


def test_without_dropout_pieces_are_the_tokenizers_own(cldr: Cldr) -> None:
    cut = PieceDropout(cldr.tokenizer, 0.0, cldr.max_length)
    for phrases in cldr.phrases.values():
        own = cldr.tokenizer(phrases, truncation=True, max_length=cldr.max_length)["input_ids"]
        assert [cut(phrase, Random(0)) for phrase in phrases] == own


def test_other_pieces_make_the_same_text(cldr: Cldr) -> None:
    cut = PieceDropout(cldr.tokenizer, 0.5, 100)
    phrases = cldr.phrases["val"]
    ids = [cut(phrase, Random(i)) for i, phrase in enumerate(phrases)]
    own = cldr.tokenizer(phrases)["input_ids"]
    texts, same = (cldr.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (ids, own))
    assert texts == same
    assert sum(map(len, ids)) > 1.2 * sum(map(len, own))


def test_every_match_is_dropped_at_a_rate_close_to_one(cldr: Cldr) -> None:
    ids = PieceDropout(cldr.tokenizer, 1 - 1e-12, 100)("Türkiye", Random(0))
    assert cldr.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "T", *(f"##{c}" for c in "ürkiye"), "[SEP]"]


def test_augmentation_is_a_function_of_seed_epoch_and_index(cldr: Cldr) -> None:
    def rows(seed: int, epoch: int, augment: bool = True) -> dict[int, list[int]]:
        loader = cldr.loader("train", batch_size=50, shuffle=True, augment=augment, seed=seed)
        loader.batch_sampler.sampler.set_epoch(epoch)
        return {
            int(index): ids[mask.bool()].tolist()
            for batch in loader
            for index, ids, mask in zip(batch["index"], batch["input_ids"], batch["attention_mask"], strict=True)
        }

    first = rows(0, 0)
    assert rows(0, 0) == first
    assert rows(0, 1) != first
    assert rows(1, 0) != first
    assert rows(0, 0, augment=False) == rows(1, 1, augment=False) != first
    assert max(map(len, first.values())) <= cldr.max_length


def test_views_start_over_and_the_order_does_not() -> None:
    data = Cldr(languages=2, limit=30, views=3)
    loader = data.loader("train", batch_size=8, shuffle=True, augment=True, views=data.views)

    def rows(loader: Loader, epoch: int) -> dict[int, list[int]]:
        loader.batch_sampler.sampler.set_epoch(epoch)
        return {
            int(index): [int(view), *ids[mask.bool()].tolist()]
            for batch in loader
            for index, view, ids, mask in zip(*(batch[k] for k in ("index", "view", "input_ids", "attention_mask")))  # noqa: B905
        }

    shown = [rows(loader, epoch) for epoch in range(7)]
    assert shown[0] == shown[3] == shown[6]
    assert shown[1] == shown[4]
    assert all({row[0] for row in found.values()} == {epoch % 3} for epoch, found in enumerate(shown))
    pieces = [{index: row[1:] for index, row in found.items()} for found in shown]
    assert pieces[0] != pieces[1] != pieces[2] != pieces[0]
    assert visits(loader, 0) != visits(loader, 3)
    endless = data.loader("train", batch_size=8, shuffle=True, augment=True)
    assert rows(endless, 2) == shown[2]
    assert rows(endless, 3) != shown[3]
    assert {row[0] for row in rows(data.loader("train", batch_size=8, views=3), 2).values()} == {0}
