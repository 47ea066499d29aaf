"""Text: the embedded set of short phrases in many languages."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate
from random import Random

import torch
from babel import Locale
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from distill import fingerprint
from distill.data.base import TextData, checked_views
from distill.data.batches import TextSplit, text_loader
from distill.data.loading import checked_workers
from distill.data.wordpiece import PieceDropout, load_tokenizer, train_wordpiece
from distill.errors import UserError

LANGUAGES = [
    *("en", "de", "fr", "es", "it", "nl", "sv", "pl", "cs", "tr", "fi", "hu", "pt", "ro", "lt", "vi"),
    *("ga", "eu", "lv", "sq", "is", "et", "sl", "sw", "ca", "hr", "cy", "sk", "nb", "id", "af", "da"),
]
"""Codes in the order in which `Cldr(languages=N)` takes them; all in Latin script, so that no alphabet gives the
answer away."""
KINDS = ("territories", "languages", "scripts", "currencies")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def concept_phrases(languages: Sequence[str]) -> list[tuple[str, str, str]]:
    """(concept, language, phrase) for every phrase that belongs to one of `languages` only, letter case ignored.

    A concept is a kind and its code, such as "territories DE". A phrase that a language uses for several concepts is
    kept for the first in alphabetical order.
    """
    owners: dict[str, set[str]] = {}
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for language in languages:
        locale = Locale.parse(language)
        names = ((f"{kind} {code}", name) for kind in KINDS for code, name in getattr(locale, kind).items())
        for concept, name in sorted(names):
            phrase = unicodedata.normalize("NFC", " ".join(name.split()))
            key = phrase.casefold()
            if any(character.isalpha() for character in phrase):
                owners.setdefault(key, set()).add(language)
                found.setdefault((language, key), (concept, language, phrase))
    return [row for (_, key), row in found.items() if len(owners[key]) == 1]


def draw(*names: object) -> float:
    """A number in [0, 1) that depends on `names` only."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, names)).encode()).digest()[:6]) / 2**48


def split_of(concept: str, seed: int) -> str:
    """The split of a concept; independent of which other concepts there are."""
    place = draw(seed, concept)
    return next(
        split for split, bound in zip(SHARES, accumulate(SHARES.values()), strict=True) if place < round(bound, 9)
    )


class Cldr(TextData):
    """Short names of territories, languages, scripts and currencies from the Unicode CLDR (as in `babel`); tell their
    language.

    Split by concept (the territory DE, the currency EUR), so that no concept and no phrase is in two splits.

    Args:
        languages: how many of `LANGUAGES`, from the first, 2 to 32.
        examples: at most this many phrases a language, over all splits; None for all.
        pieces: size of the WordPiece vocabulary trained on the training split (the alphabet is always kept).
        max_length: phrases are cut to this many tokens, `[CLS]` and `[SEP]` included.
        tokenizer: folder of a tokenizer to use instead, as a pretrained teacher needs; `pieces` is then unused.
        piece_dropout: of the augmentation, which cuts a phrase into other pieces; see `wordpiece.PieceDropout`.
        seed: of the split. The default is the split that all results use.
        limit: at most this many examples a split, balanced over the classes; None for all.
        views, workers: see `DataSet`.

    Raises:
        UserError: a number is out of range, or `tokenizer` cannot be loaded.
    """

    name = "cldr"

    def __init__(
        self,
        languages: int = 12,
        examples: int | None = None,
        pieces: int = 1200,
        max_length: int = 24,
        tokenizer: str | None = None,
        piece_dropout: float = 0.2,
        seed: int = 0,
        limit: int | None = None,
        views: int | None = None,
        workers: int = 0,
    ) -> None:
        self.views, self.workers = checked_views(views), checked_workers(workers)
        check("languages", languages, 2, len(LANGUAGES))
        check("examples", examples, 10)
        check("pieces", pieces, 100)
        check("max_length", max_length, 4, 512)
        check("limit", limit, 1)
        if not 0 <= piece_dropout < 1:
            raise UserError(f"piece_dropout={piece_dropout}: out of range; give a number from 0 to below 1")
        codes = LANGUAGES[:languages]
        self.label_names = [Locale.parse("en").languages[code] for code in codes]
        self.max_length = max_length
        rows: dict[str, list[tuple[str, int]]] = {split: [] for split in SHARES}
        for concept, language, phrase in capped(concept_phrases(codes), examples):
            rows[split_of(concept, seed)].append((phrase, codes.index(language)))
        self.tokenizer: PreTrainedTokenizerBase
        if tokenizer is None:
            self.tokenizer = train_wordpiece([phrase for phrase, _ in rows["train"]], pieces, max_length)
        else:
            self.tokenizer = load_tokenizer(tokenizer, max_length)
        self._cut = PieceDropout(self.tokenizer, piece_dropout, max_length)
        self.phrases = {split: [phrase for phrase, _ in balanced(rows[split], limit)] for split in SHARES}
        self._splits = {split: self._tokenise(balanced(rows[split], limit)) for split in SHARES}
        self.sizes = {split: len(part) for split, part in self._splits.items()}

    def _tokenise(self, rows: Sequence[tuple[str, int]]) -> TextSplit:
        phrases = [phrase for phrase, _ in rows]
        tokens = self.tokenizer(phrases, truncation=True, max_length=self.max_length)["input_ids"]
        return TextSplit(tokens, torch.tensor([label for _, label in rows]), self.tokenizer.pad_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over tokens, labels, order and phrases of every split, class names, vocabulary and
        augmentation."""
        splits = {s: [self.phrases[s], part.tokens, part.labels.tolist()] for s, part in self._splits.items()}
        augmentation = [self._cut.rate, self._cut.max_length]
        return fingerprint.of_values([splits, self.label_names, self.tokenizer.get_vocab(), augmentation])

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        views: int | None = None,
    ) -> DataLoader[dict[str, Tensor]]:
        """See `text_loader`; `augment` cuts the phrases anew in every view."""
        if split not in SHARES:
            raise UserError(f"split={split!r}: no such split; choose one of {', '.join(SHARES)}")
        return text_loader(
            self._splits[split], batch_size=batch_size, shuffle=shuffle,
            retokenise=partial(cut_anew, self._cut, self.phrases[split]) if augment else None,
            seed=seed, views=views, workers=self.workers,
        )  # fmt: skip


def cut_anew(cut: PieceDropout, phrases: Sequence[str], index: int, random: Random) -> list[int]:
    """Other pieces of a phrase."""
    return cut(phrases[index], random)


def check(name: str, value: int | None, lowest: int, highest: int | None = None) -> None:
    """Raises UserError unless `value` is None or in range."""
    if value is not None and not (lowest <= value and (highest is None or value <= highest)):
        bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise UserError(f"{name}={value}: out of range; give a number {bounds}")


def capped(rows: Sequence[tuple[str, str, str]], examples: int | None) -> list[tuple[str, str, str]]:
    """`rows` (concept, language, phrase) with at most `examples` a language, chosen at random once for all."""
    counts: dict[str, int] = {}
    kept = []
    for concept, language, phrase in sorted(rows, key=lambda row: draw(row[1], row[0])):
        counts[language] = counts.get(language, 0) + 1
        if examples is None or counts[language] <= examples:
            kept.append((concept, language, phrase))
    return kept


def balanced(rows: Sequence[tuple[str, int]], limit: int | None) -> list[tuple[str, int]]:
    """The first `limit` of `rows` (phrase, label), taken in turn from each class; all of them if None."""
    counts: dict[int, int] = {}
    ranked = []
    for place, (_, label) in enumerate(rows):
        counts[label] = counts.get(label, 0) + 1
        ranked.append((counts[label], label, place))
    return [rows[place] for place in sorted(place for _, _, place in sorted(ranked)[:limit])]
