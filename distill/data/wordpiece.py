"""Tokenizers: a WordPiece vocabulary trained on the spot, or one from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from distill.errors import UserError, one_line
from distill.hub import patient_only_if_reachable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece(phrases: Sequence[str], pieces: int, max_length: int) -> BertTokenizer:
    """A WordPiece tokenizer in BERT's format that keeps case and accents, with at most `pieces` pieces; `[PAD]` has id
    0.

    Every character of `phrases` is a piece, even where that makes more than `pieces`. The trainer numbers characters
    inside words in
    the order of a hash table, differently in each process, and breaks ties between merges by number; handed over as
    special tokens they have fixed numbers, so that the vocabulary depends on the phrases only.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = " ".join(map(tokenizer.normalizer.normalize_str, phrases))
    inner = {f"##{c}" for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text) for c in word[1:]}
    trainer = trainers.WordPieceTrainer(
        vocab_size=pieces, special_tokens=[*SPECIAL, *sorted(inner)], show_progress=False
    )
    tokenizer.train_from_iterator(phrases, trainer)
    return BertTokenizer(
        vocab=tokenizer.get_vocab(), do_lower_case=False, strip_accents=False, model_max_length=max_length
    )


class PieceDropout:
    """Random segmentations of a phrase: the same text in other, mostly shorter pieces, as augmentation.

    WordPiece takes the longest piece that matches. Here each match of more than one character is passed over with
    probability `rate`, so that the next shorter one is tried. With rate 0 the result is the tokenizer's own.

    Source: Hiraoka, "MaxMatch-Dropout: Subword Regularization for WordPiece" (COLING 2022).

    Args:
        tokenizer: a WordPiece tokenizer in BERT's format.
        rate: in [0, 1).
        max_length: of the result, special tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float, max_length: int) -> None:
        self.rate, self.max_length = rate, max_length
        self.vocab = tokenizer.get_vocab()
        self.longest = max(map(len, self.vocab))
        self.normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
        self.words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
        self.start, self.end, self.unknown = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id

    def __call__(self, phrase: str, random: Random) -> list[int]:
        """Ids of a phrase, `[CLS]` and `[SEP]` included."""
        ids = [piece for word, _ in self.words(self.normalise(phrase)) for piece in self._pieces(word, random)]
        return [self.start, *ids[: self.max_length - 2], self.end]

    def _pieces(self, word: str, random: Random) -> list[int]:
        pieces: list[int] = []
        begin = 0
        while begin < len(word):
            prefix = "##" if begin else ""
            for end in range(min(len(word), begin + self.longest), begin, -1):
                piece = self.vocab.get(prefix + word[begin:end])
                if piece is not None and (end == begin + 1 or random.random() >= self.rate):
                    break
            else:
                return [self.unknown]
            pieces.append(piece)
            begin = end
        return pieces


def load_tokenizer(source: str, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a name on the hub, set to cut at `max_length` tokens.

    Raises:
        UserError: there is none.
    """
    here = Path(source).expanduser()
    name = str(here) if here.exists() else source
    try:
        with nullcontext() if here.exists() else patient_only_if_reachable():
            return AutoTokenizer.from_pretrained(name, model_max_length=max_length)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer={source!r}: cannot be loaded ({one_line(error)}); give a folder that holds one"
        ) from error
