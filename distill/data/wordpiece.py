"""Tokenizers: a WordPiece vocabulary trained on the spot, or one from a folder."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from distill.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece(phrases: Sequence[str], pieces: int, max_length: int) -> BertTokenizer:
    """A WordPiece tokenizer in BERT's format that keeps case and accents, with at most `pieces` pieces; `[PAD]` has id 0.

    Every character of `phrases` is a piece, even where that makes more than `pieces`. The trainer numbers characters inside words in
    the order of a hash table, differently in each process, and breaks ties between merges by number; handed over as special tokens
    they have fixed numbers, so that the vocabulary depends on the phrases only.
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


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"tokenizer={folder!r}: cannot be loaded ({reason}); give a folder that holds one") from error
