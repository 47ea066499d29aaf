"""The precision that the hardware computes in by itself."""

from __future__ import annotations

import torch

BFLOAT16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
"""What processors call their instructions for bfloat16 matrices: Intel's tiles, AVX-512, and Arm's two."""


def precision(wanted: str, accelerator: str) -> str:
    """The trainer's precision; "auto" is bf16-mixed where what trains computes bfloat16 itself, and 32-true elsewhere.

    Without such instructions bfloat16 is emulated, and several times slower than float32.

    Args:
        accelerator: as the trainer's; all but "cpu" is a GPU where there is one.
    """
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in BFLOAT16)
    return "bf16-mixed" if native else "32-true"
