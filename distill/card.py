"""The model card of an export: what it is, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCardData

TASKS = {"transformers": "text-classification", "timm": "image-classification"}

LOAD = {
    "transformers": """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
inputs = tokenizer(["some text"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    probabilities = network(**inputs).logits.softmax(-1)[0]
print(network.config.id2label[int(probabilities.argmax())], float(probabilities.max()))""",
    "timm": """import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

folder = "."  # this folder
network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = create_transform(**resolve_data_config(model=network))
pixels = transform(Image.open("image.png").convert("RGB")).unsqueeze(0)
with torch.no_grad():
    probabilities = network(pixels).softmax(-1)[0]
print(network.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))""",
}
ONNX = {
    "transformers": """import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
inputs = tokenizer(["some text"], padding=True, truncation=True, return_tensors="np")
[logits] = session.run(["logits"], {name: inputs[name] for name in ("input_ids", "attention_mask")})""",
    "timm": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
[logits] = session.run(["logits"], {"pixels": pixels.numpy()})  # pixels as the transform above gives them""",
}


@dataclass(frozen=True)
class Card:
    """What the writer of a model card has to say.

    Attributes:
        name: of the network, e.g. "bert-tiny".
        summary: a paragraph: what it was distilled from, and how.
        dataset: what it was trained and tested on.
        accuracy: on the test split, 0 to 1; None leaves the result out.
        figures: the rows of the results table, name -> value, in this order, printed as they are given.
        tags: more tags for the front matter.
    """

    name: str
    summary: str
    dataset: str
    accuracy: float | None = None
    figures: Mapping[str, str | int | float] = field(default_factory=dict)
    tags: Sequence[str] = ()


def front_matter(card: Card, library: str) -> str:
    """YAML front matter that the Hugging Face hub reads; `library` is "transformers" or "timm"."""
    task = TASKS[library]
    results = []
    if card.accuracy is not None:
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=card.dataset,
                dataset_name=card.dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=card.accuracy,
            )
        )
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["knowledge-distillation", "onnx", library, *card.tags],
        model_name=card.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def model_card(card: Card, library: str, label_names: Sequence[str]) -> str:
    """README.md of an export; `library` is "transformers" or "timm". Its code runs as it is in that folder."""
    parts = [front_matter(card, library) + f"\n# {card.name}", card.summary]
    if card.figures:
        rows = "\n".join(f"| {name} | {value} |" for name, value in card.figures.items())
        parts.append(f"## Measured\n\nData: {card.dataset}.\n\n| | |\n|---|---|\n{rows}")
    parts.append(f"## Labels\n\n{len(label_names)}: {', '.join(label_names)}")
    parts.append(f"## Use\n\nWith {library}:\n\n```python\n{LOAD[library]}\n```")
    parts.append(f"With ONNX Runtime:\n\n```python\n{ONNX[library]}\n```")
    return "\n\n".join(parts) + "\n"
