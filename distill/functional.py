"""The losses as pure functions: tensors in, a scalar out, computed in log-space and in fp32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision (fp16, bf16) as fp32; anything wider as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy with the hard labels, mean over the batch.

    Args:
        logits: [B, C].
        labels: [B], class indices.
        label_smoothing: share of the target spread evenly over the C classes, in [0, 1).
    """
    return F.cross_entropy(at_least_fp32(logits), labels, label_smoothing=label_smoothing)


def logits_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's distillation loss: T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch.

    The factor T² keeps the size of the gradient independent of T, which would otherwise shrink with 1 / T².

    Args:
        student, teacher: logits [B, C].
        temperature: T > 0, the same on both sides.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. The paper writes
    the cross entropy between the two softened distributions; the KL divergence differs from it by the entropy of the
    teacher, a constant for the student, and is zero where the two agree.
    """
    log_student = torch.log_softmax(at_least_fp32(student) / temperature, dim=-1)
    log_teacher = torch.log_softmax(at_least_fp32(teacher) / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
