"""Loss terms and their weighted sum.

A term is a thin class around a function of `distill.functional`. To add one: write the function, the class, and
`conf/loss/<name>.yaml` with its `_target_`, `weight` and parameters.
"""

from distill.losses.attention import Attention, AttentionTransfer, MiniLM, MiniLMv2
from distill.losses.base import TASKS, LossSum, LossTerm, Row
from distill.losses.hidden import Hidden, PatientKD, VariationalInformation
from distill.losses.layer import LayerTerm, ProjectedTerm
from distill.losses.logits import (
    CrossEntropy,
    DecoupledKD,
    Dist,
    HardLabel,
    LogitsKL,
    LogitsMSE,
    StandardizedKL,
)
from distill.losses.relation import Contrastive, ProbabilisticTransfer, RelationalKD, SimilarityPreserving

__all__ = [
    "TASKS",
    "Attention",
    "AttentionTransfer",
    "Contrastive",
    "CrossEntropy",
    "DecoupledKD",
    "Dist",
    "HardLabel",
    "Hidden",
    "LayerTerm",
    "LogitsKL",
    "LogitsMSE",
    "LossSum",
    "LossTerm",
    "MiniLM",
    "MiniLMv2",
    "PatientKD",
    "ProbabilisticTransfer",
    "ProjectedTerm",
    "RelationalKD",
    "Row",
    "SimilarityPreserving",
    "StandardizedKL",
    "VariationalInformation",
]
