"""Silence for third-party chatter that says nothing to the user of a run."""

from __future__ import annotations

import logging
import os
import warnings

from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Keep warnings and notices of libraries about their own affairs off the terminal; errors stay."""
    for name in ("pytorch_lightning", "lightning_fabric", "torch.onnx", "onnxscript", "onnx_ir", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for module in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
        warnings.filterwarnings("ignore", module=module)
