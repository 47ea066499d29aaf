"""Losses on relations between examples, of one vector an example [B, D]; widths of the two networks may differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.functional.precision import full_precision


def _unit(vectors: Tensor) -> Tensor:
    """Divided by their lengths along the last dimension; zero vectors stay zero, and get no gradient.

    F.normalize divides the gradient of a zero vector by its eps, which makes it 10¹² times too large.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.masked_fill(lengths < 1e-12, torch.inf)


def _relative_distances(vectors: Tensor) -> Tensor:
    """Euclidean distances [B, B] in units of their mean over the pairs that differ."""
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / (distances > 0).sum().clamp_min(1)).clamp_min(1e-12)


@full_precision
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the relative distances of all pairs of examples, mean over the B² ordered pairs.

    Relates the examples of a batch to each other, so micro-batches do not add up to one batch.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), equations 6 to 9. As in the released code, the
    mean is over all B² pairs, those of an example with itself included.
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _angles(vectors: Tensor) -> Tensor:
    """Cosines [B, B, B] of the angle at each example between the directions to two others."""
    directions = _unit(vectors.unsqueeze(0) - vectors.unsqueeze(1))
    return directions @ directions.transpose(1, 2)


@full_precision
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the angles of all triplets of examples, mean over the B³ ordered triplets.

    Relates the examples of a batch to each other, so micro-batches do not add up to one batch. Needs memory for B³
    cosines and B² · D differences.

    Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), equations 10 to 12; the mean as in the
    released code.
    """
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """(G_student − G_teacher)², mean over the B² entries, with G the Gram matrix of the batch, its rows of length 1.

    Relates the examples of a batch to each other, so micro-batches do not add up to one batch.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019), equations 1 to 4.
    """
    grams = [_unit(x @ x.T) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().mean()


def _neighbours(vectors: Tensor) -> Tensor:
    """How likely each example picks each other one by cosine similarity: [B, B], rows sum to 1.

    Similarities are moved from [-1, 1] to [0, 1], and not left below 0 by rounding.
    """
    unit = _unit(vectors)
    similarity = ((unit @ unit.T + 1) / 2).clamp_min(0)
    return similarity / similarity.sum(dim=-1, keepdim=True)


@full_precision
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of who is whose neighbour in the batch, mean over the B² entries.

    Relates the examples of a batch to each other, so micro-batches do not add up to one batch.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018),
    equations 3 to 6 with the cosine kernel. As in the released code an example is its own neighbour too, the mean is
    over all entries (the paper sums), and a tiny number inside the logarithm keeps it finite.
    """
    p, q = _neighbours(teacher), _neighbours(student)
    return (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()


@full_precision
def crd(
    anchor: Tensor, positive: Tensor, negatives: Tensor, allowed: Tensor, log_noise: Tensor, temperature: float
) -> Tensor:
    """Contrast each anchor with its positive and with K negatives: −ln h(positive) − Σ over negatives of ln(1 − h),
    mean over the batch.

    h(v) = x / (x + noise), x = exp(anchor · v / τ), is the probability that v belongs to the same example.

    Args:
        anchor, positive: [B, E], of length 1.
        negatives: [K, E], of length 1, shared by all anchors.
        allowed: [B, K], whether a negative is one for this anchor.
        log_noise: scalar, ln(K · Z / M): M examples in all, Z the normaliser of x over them.
        temperature: τ.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (ICLR 2020), equations 10 to 19. The paper
    has noise = K / M; the released code divides x by Z, estimated from the first batch, as here. There each anchor
    draws negatives of its own; here they are shared by the batch, which needs B times less memory traffic.
    """
    same = (anchor * positive).sum(dim=-1) / temperature - log_noise
    other = anchor @ negatives.T / temperature - log_noise
    return (torch.where(allowed, -F.logsigmoid(-other), 0.0).sum(dim=-1) - F.logsigmoid(same)).mean()
