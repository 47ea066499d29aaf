"""Which term drives the student: raw values, shares of the loss and gradient norms, every so many steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor

from distill.errors import UserError
from distill.module import DistillModule

DOMINANT = 0.95


def gradient_norms(values: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Norm of the gradient of each value with respect to all parameters together; the graph stays as it is."""
    norms = {}
    for name, value in values.items():
        gradients: Sequence[Tensor | None] = ()
        if value.requires_grad:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


class Diagnostics(pl.Callback):
    """Every `every` steps, for each term of a loss with several terms, to the loggers:

    * `<stage>/share_<term>`: |weight · value| as a share of the sum over terms;
    * `<stage>/grad_<term>`: norm of the gradient of weight · value on the student's parameters (not on projectors).

    With several processes these are those of the first one's share of the batch; in shards there are no gradient norms.

    The raw values are logged as `<stage>/train_<term>`. One more backward pass a term and such step; nothing in the
    others. Says once which term holds more than 95 % of the sum of the gradient norms.

    Args:
        every: steps; 0 switches it off.

    Raises:
        UserError: not a whole number >= 0.
    """

    def __init__(self, every: int, console: Console) -> None:
        if not (type(every) is int and every >= 0):
            raise UserError(f"callbacks.diagnostics.every={every}: must be a whole number of steps >= 0; 0 is off")
        self.every, self.console = every, console
        self._warned = False

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        assert isinstance(module, DistillModule)
        # With accumulation the first micro-batch speaks for its step.
        first = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if not (self.every and len(module.values) > 1 and trainer.global_step % self.every == 0 and first):
            return
        weights = module.loss.weights
        weighted = {name: weights[name] * value for name, value in module.values.items()}
        sizes = {name: value.detach().abs().item() for name, value in weighted.items()}
        figures = {f"share_{name}": size / (sum(sizes.values()) or 1.0) for name, size in sizes.items()}
        parameters: list[Tensor] = [p for p in module.student.parameters() if p.requires_grad]
        sharded = module.device_mesh is not None  # then there is no gradient before the backward pass is over
        norms = {} if sharded else gradient_norms(weighted, parameters)
        figures |= {f"grad_{name}": norm for name, norm in norms.items()}
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{module.stage}/{name}": value for name, value in figures.items()}, step=trainer.global_step
            )
        if norms:
            self._warn(norms, trainer.global_step)

    def _warn(self, norms: dict[str, float], step: int) -> None:
        largest = max(norms, key=lambda name: norms[name])
        share = norms[largest] / (sum(norms.values()) or 1.0)
        if share > DOMINANT and not self._warned:
            self._warned = True
            self.console.print(
                f"  warning: term {largest} holds {share:.0%} of the gradient at step {step}, so the others hardly "
                f"count; lower loss.{largest}.weight or raise theirs",
                highlight=False,
                soft_wrap=True,
            )
