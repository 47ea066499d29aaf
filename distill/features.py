"""What a loss sees of a network: `Features`, and the modules that produce them from a batch.

After this point nothing knows about BERT or ResNet: networks differ in how they are fed and in where their layers are,
and both are settled here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """Outputs of one network for one batch.

    Attributes:
        logits: [B, C], before softmax.
        hidden: the watched taps by semantic name. Layers: [B, L, D] for text, [B, D, H, W] for images; `pooled`, what
            the classifier reads: [B, D]; `layerN.cls`, the first token's state after a layer: [B, D]; `layerN.query`,
            `.key` and `.value`, the projections of all heads: [B, L, D].
        mask: [B, L], 1 for real tokens and 0 for padding; None where there is no padding.
        heads: number of attention heads; None where there is no attention.
    """

    logits: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    heads: int | None = None


class Tapped(nn.Module):
    """A backbone with named places whose outputs can be watched.

    The backbone stays the ordinary transformers or timm module: it is what is trained and what is exported. Nothing is
    captured until `watch` is called, so that a run whose loss needs only logits keeps no activation alive.

    Args:
        backbone: the network.
        places: semantic name -> module path inside the backbone, in order of depth.

    Raises:
        ValueError: a path does not exist in the backbone; the message names the closest ones.
    """

    head_loaded: bool = False
    """Whether the classifier came with loaded weights (so that the network can be used without training)."""

    def __init__(self, backbone: nn.Module, places: Mapping[str, str]) -> None:
        super().__init__()
        modules = dict(backbone.named_modules())
        for name, path in places.items():
            if path not in modules:
                close = difflib.get_close_matches(path, modules, n=3, cutoff=0.3)
                raise ValueError(
                    f"tap {name!r}: no module {path!r} in {type(backbone).__name__}; close matches: {close}"
                )
        self.backbone = backbone
        self.places = dict(places)
        self.watched: list[str] = []
        self._captured: dict[str, Tensor] = {}
        self._running = False
        self._handles: list[Any] = []

    @property
    def layers(self) -> list[str]:
        """The taps that a layer map maps, in order of depth: those called `layerN` or `stageN`."""
        return [name for name in self.places if re.fullmatch(r"(layer|stage)\d+", name)]

    @property
    def heads(self) -> int | None:
        """Number of attention heads, or None where there is no attention."""
        return None

    def watch(self, names: Iterable[str]) -> None:
        """Capture the outputs of exactly these places from now on.

        Raises:
            ValueError: a name is not one of `places`; the message lists them.
        """
        wanted = list(names)
        if unknown := [name for name in wanted if name not in self.places]:
            raise ValueError(
                f"no tap {unknown[0]!r} in {type(self.backbone).__name__}; there are: {', '.join(self.places)}"
            )
        self.watched = wanted
        for handle in self._handles:
            handle.remove()
        self._handles = [
            self.backbone.get_submodule(self.places[name]).register_forward_hook(partial(self._capture, name))
            for name in wanted
        ]

    def _capture(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:  # not while the backward pass computes activations again
            self._captured[name] = self.part(name, output[0] if isinstance(output, tuple) else output)

    def part(self, name: str, output: Tensor) -> Tensor:
        """What a tap keeps of the output of its place: all of it."""
        return output

    @contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """Within the block the backbone runs through `torch.compile`, where that is wanted; taps work as ever.

        Names of parameters and what is exported stay as they are.
        """
        if wanted:
            self.backbone.compile()
        try:
            yield
        finally:
            self.backbone._compiled_call_impl = None  # what `compile` sets

    def recompute(self) -> None:
        """Keep no activations inside layers for the backward pass, but compute them again (gradient checkpointing).

        Raises:
            UserError: the network can't.
        """
        raise UserError(
            f"gradient_checkpointing=true: is for transformers, and {type(self.backbone).__name__} is none; set it to "
            "false"
        )

    def logits(self, batch: Batch) -> Tensor:
        """Run the backbone on a batch; returns logits [B, C]."""
        raise NotImplementedError

    def mask(self, batch: Batch) -> Tensor | None:
        """Mask of real tokens [B, L], or None where there is no padding."""
        return None

    def forward(self, batch: Batch) -> Features:
        self._captured.clear()
        self._running = True
        try:
            logits = self.logits(batch)
            return Features(logits, dict(self._captured), self.mask(batch), self.heads)
        finally:
            self._running = False
            self._captured.clear()


class TappedText(Tapped):
    """A transformers sequence classifier, fed with `input_ids` and `attention_mask` [B, L].

    Of places that are called `NAME.cls` the taps keep the first token alone.
    """

    def part(self, name: str, output: Tensor) -> Tensor:
        # A copy, or the states of all tokens would stay alive with it.
        return output[:, 0].contiguous() if name.endswith(".cls") else output

    @property
    def heads(self) -> int | None:
        config: Any = self.backbone.config
        return int(config.num_attention_heads)

    def recompute(self) -> None:
        backbone: Any = self.backbone
        backbone.config.use_cache = False  # of a decoder; transformers warns otherwise
        backbone.activation_checkpointing_enable()

    def logits(self, batch: Batch) -> Tensor:
        return self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def mask(self, batch: Batch) -> Tensor:
        return batch["attention_mask"]


class TappedImage(Tapped):
    """A timm classifier, fed with `pixels` [B, 3, H, W] in [0, 1]; runs in channels-last layout, which is faster.

    The network brings its own normalisation, so that a teacher and a student that were made for different ones read the
    same batch.

    Args:
        mean, std: per channel, in units of [0, 1] pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, places: Mapping[str, str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(backbone.to(memory_format=torch.channels_last), places)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def logits(self, batch: Batch) -> Tensor:
        pixels = (batch["pixels"] - self.mean) / self.std
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last))
