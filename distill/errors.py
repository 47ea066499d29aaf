"""What a user is meant to see of a mistake: one line, and exit status 1."""

import os
import sys
import time
from typing import NoReturn


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one line: what is wrong (with the value), why, and what to do. `train.py` and `distill` print it
    without a traceback and exit with status 1; everything else that is raised is a bug and keeps its traceback.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """What another library says went wrong, as part of the one line that the user sees."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= limit else reason[:limit] + "…"


def fail(message: str) -> NoReturn:
    """Print one line and end with status 1.

    Of several processes the first one speaks: the others wait a moment, for they end with it. One that still runs then
    has something of its own to say.
    """
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
