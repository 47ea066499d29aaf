"""BERT-base as a sequence classifier, from random or from loaded weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distill.errors import UserError, one_line
from distill.features import TappedText
from distill.hub import patient_only_if_reachable
from students.bert import bert, places


def bert_base(
    num_labels: int, vocab_size: int, pad_token_id: int, weights: str = "scratch", zero_init_residual: bool = True
) -> TappedText:
    """12 layers, 768 wide, 12 heads, 3072 in the feed-forward layers.

    Args:
        weights: "scratch" (random), or what `from_pretrained` takes: a hub name or a folder. With loaded weights the
            folder's own configuration decides the sizes, and a classifier for another number of labels is replaced by a
            new one.
        zero_init_residual: start every layer as the identity; see `students.bert.bert`. Random weights only.

    Raises:
        UserError: the weights can't be loaded, are not a BERT, or are for another vocabulary than the data's.
    """
    if weights == "scratch":
        return bert(
            num_labels, vocab_size, pad_token_id, layers=12, hidden_size=768, heads=12, intermediate_size=3072,
            zero_init_residual=zero_init_residual,
        )  # fmt: skip
    return load(weights, num_labels, vocab_size)


def load(weights: str, num_labels: int, vocab_size: int) -> TappedText:
    """A BERT from a hub name or a folder, through transformers' own loader, in fp32 whatever it was saved in.

    Every weight has to be there and to fit, but for the classifier and the pooler, which a model that was not trained
    to classify does not have: they start from random weights then, and `head_loaded` of the result is False.
    """
    here = Path(weights).expanduser().exists()
    name = str(Path(weights).expanduser()) if here else weights
    try:
        with nullcontext() if here else patient_only_if_reachable():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if not isinstance(config, BertConfig):
                raise UserError(f"teacher.weights={weights}: is a {config.model_type}, and this teacher is a bert")
            backbone, info = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=num_labels, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"teacher.weights={weights}: can't be loaded ({one_line(error)}); give a folder that "
            "from_pretrained can load"
        ) from error
    fresh = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost := sorted(key for key in fresh if not key.startswith(("classifier.", "bert.pooler."))):
        raise UserError(
            f"teacher.weights={weights}: {len(lost)} weights in it are missing or do not fit, the first is {lost[0]}"
        )
    if backbone.config.vocab_size < vocab_size:
        raise UserError(
            f"teacher.weights={weights}: has {backbone.config.vocab_size} pieces and the data's tokenizer {vocab_size};"
            f" use the teacher's own with data.tokenizer={weights}"
        )
    assert isinstance(backbone, BertForSequenceClassification)
    network = TappedText(backbone, places(backbone))
    network.head_loaded = not fresh
    return network
