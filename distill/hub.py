"""Asking the Hugging Face hub without waiting for it when it can't be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub import constants


@contextmanager
def patient_only_if_reachable(timeout: float = 5.0) -> Iterator[None]:
    """Within the block, an unreachable hub means: look only into the local cache, and fail at once without the file.

    Without this, the five retries of a request take over 20 s.

    Args:
        timeout: seconds in which the hub has to answer anything at all.
    """
    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            httpx.head(constants.ENDPOINT, timeout=timeout)
    except httpx.HTTPError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
