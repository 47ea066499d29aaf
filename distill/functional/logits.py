"""Losses on logits. `student` and `teacher` are [B, C] before softmax; every result is a scalar."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.precision import full_precision, same_shape

Divergence = Literal["forward", "reverse", "jensen_shannon"]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), mean over the batch, of log-probabilities [B, C]; classes that both give no probability count 0."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@full_precision
def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy with the hard labels, mean over the batch.

    Args:
        logits: [B, C].
        labels: [B], class indices.
        label_smoothing: share of the target spread evenly over the C classes, in [0, 1).
    """
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


@full_precision
def binary_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of C independent yes-or-no labels, mean over batch and labels.

    Args:
        logits: [B, C], before the sigmoid.
        labels: [B, C], 0 or 1.
        label_smoothing: moves each target this share of the way to one half, in [0, 1).
    """
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets)


@full_precision
def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """(prediction − target)², mean over the batch and the C outputs.

    Args:
        predictions, targets: [B, C]; targets of a single output may also be [B].
    """
    return F.mse_loss(predictions, targets.to(predictions.dtype).reshape(predictions.shape))


@full_precision
def logits_kl(student: Tensor, teacher: Tensor, temperature: float, divergence: Divergence = "forward") -> Tensor:
    """T² · D(softmax(teacher / T), softmax(student / T)), mean over the batch.

    D is KL(teacher ‖ student) for "forward" (Hinton's loss: the student covers all that the teacher finds possible),
    KL(student ‖ teacher) for "reverse" (it keeps to what the teacher finds likely), or the Jensen-Shannon divergence,
    ½ KL(teacher ‖ m) + ½ KL(student ‖ m) with m their mean, at most T² · ln 2.

    The factor T² keeps the size of the gradient independent of T, which would otherwise shrink with 1 / T².

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2. The paper writes
    the cross entropy between the two softened distributions; the KL divergence differs from it by the entropy of the
    teacher, a constant for the student, and is zero where the two agree.
    """
    same_shape(student, teacher)
    log_student = torch.log_softmax(student / temperature, dim=-1)
    log_teacher = torch.log_softmax(teacher / temperature, dim=-1)
    if divergence == "forward":
        value = _kl(log_teacher, log_student)
    elif divergence == "reverse":
        value = _kl(log_student, log_teacher)
    else:
        log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2)
        value = (_kl(log_teacher, log_mean) + _kl(log_student, log_mean)) / 2
    return value * temperature**2


@full_precision
def binary_kl(student: Tensor, teacher: Tensor, temperature: float, divergence: Divergence = "forward") -> Tensor:
    """`logits_kl` for C independent yes-or-no labels: T² · D between the two Bernoulli distributions of a label, mean
    over batch and labels."""
    same_shape(student, teacher)
    no_or_yes = [torch.stack([torch.zeros_like(x), x], dim=-1).flatten(0, 1) for x in (student, teacher)]
    return logits_kl(no_or_yes[0], no_or_yes[1], temperature, divergence)


@full_precision
def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float) -> Tensor:
    """Decoupled distillation: T² · (α · TCKD + β · NCKD), mean over the batch.

    TCKD is the KL divergence between the two-way distributions (the label, everything else), NCKD the one between the
    distributions over the classes other than the label. Hinton's loss is TCKD + (1 − p_teacher(label)) · NCKD: where
    the teacher is sure, what it says of the other classes hardly counts. Here β sets what it counts.

    Args:
        labels: [B], class indices.
        alpha, beta: factors, >= 0; 1 and 8 in the paper's CIFAR-100 runs, where β depends on the pair.

    Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), equations 5 to 7. The released code takes the
    label out of NCKD by subtracting 1000 from its logit, and log of a probability for TCKD; here the label is left
    out and everything stays in log-space, which agrees up to rounding.
    """
    same_shape(student, teacher)
    classes = student.shape[-1]
    is_label = F.one_hot(labels, classes).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (label, rest) [B, 2], and of the other classes among themselves [B, C − 1]."""
        log_p = torch.log_softmax(logits / temperature, dim=-1)
        others = log_p[~is_label].view(len(labels), classes - 1)
        rest = torch.logsumexp(others, dim=-1, keepdim=True)
        return torch.cat([log_p[is_label].unsqueeze(-1), rest], dim=-1), others - rest

    (student_two, student_others), (teacher_two, teacher_others) = parts(student), parts(teacher)
    target, others = _kl(teacher_two, student_two), _kl(teacher_others, student_others)
    return (alpha * target + beta * others) * temperature**2


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation along the last dimension; 0 where one side is constant (where both are, rounding decides)."""
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    return F.cosine_similarity(x, y, dim=-1, eps=1e-8)


@full_precision
def dist(student: Tensor, teacher: Tensor, temperature: float, beta: float, gamma: float) -> Tensor:
    """DIST: T² · (β · inter + γ · intra), with p = softmax(logits / T).

    inter = mean over examples of 1 − the Pearson correlation of student and teacher across classes; intra = mean over
    classes of 1 − their correlation across the examples of the batch. A correlation asks for the teacher's relations,
    not for its very values.

    The inter part is a mean over examples; the intra part is not, since it relates the examples of a batch to each
    other, so micro-batches do not add up to one batch.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022), equations 6 to 10. The
    factor T² is in the released code, not in the paper; that code adds 1e-8 to the product of two norms, where here
    each norm is at least 1e-8.
    """
    same_shape(student, teacher)
    p, q = torch.softmax(student / temperature, dim=-1), torch.softmax(teacher / temperature, dim=-1)
    inter = 1 - _correlation(p, q).mean()
    intra = 1 - _correlation(p.T, q.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


@full_precision
def standardize(logits: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1 (unbiased, over C − 1; a constant row stays constant)."""
    spread = logits.std(dim=-1, keepdim=True)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (spread + 1e-7)


@full_precision
def logit_std(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's loss on standardised logits: T² · KL, mean over the batch.

    The student has to match how the teacher ranks and spaces the classes, not the size of its logits, which a small
    network may be unable to reach.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024), algorithm 1; T = 2 there, with a
    weight of 9. The released code is the same.
    """
    same_shape(student, teacher)
    return logits_kl(standardize(student), standardize(teacher), temperature)


@full_precision
def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """(student − teacher)², mean over batch and classes: the limit of Hinton's loss for high temperatures, up to a
    factor and to the mean of the logits.

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (NeurIPS 2014), equation 1 (there a sum over the
    classes, halved); Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation" (IJCAI 2021), equation 4.
    """
    same_shape(student, teacher)
    return F.mse_loss(student, teacher)


@full_precision
def hard_label(student: Tensor, teacher: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy with the class that the teacher finds likeliest, mean over the batch.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (ICML 2021),
    equation 3, hard-label distillation; the label smoothing is described below it.
    """
    same_shape(student, teacher)
    return F.cross_entropy(student, teacher.argmax(dim=-1), label_smoothing=label_smoothing)
