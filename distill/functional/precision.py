"""Losses are computed in fp32 or better, whatever the networks run in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def at_least_fp32(value: object) -> object:
    """A half-precision tensor (fp16, bf16) as fp32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Give `function` its tensors in fp32 or wider, and switch autocast off inside.

    Under autocast a matrix product of fp32 tensors is computed in half precision again, where a product above 65,504
    is infinite in fp16.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device, enabled=False):
            return function(
                *(at_least_fp32(value) for value in args),  # type: ignore[arg-type]
                **{name: at_least_fp32(value) for name, value in kwargs.items()},  # type: ignore[arg-type]
            )

    return wrapped


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both have the same shape: torch would repeat the smaller one silently."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape")
