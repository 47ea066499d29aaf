"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one line: what is wrong (with the value), why, and what to do. `train.py` and `distill` print it without a
    traceback and exit with status 1; everything else that is raised is a bug and keeps its traceback.
    """
