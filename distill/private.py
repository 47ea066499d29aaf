"""Take absolute paths, which name users and machines, out of what gets published."""

import re
import shlex
from typing import Any

_PATH = r"(?:file://)?(?:/|~/|[A-Za-z]:\\)"
_EMBEDDED = re.compile(rf"(?<![\w.:/~\\]){_PATH}[^\s'\",;:=\[\](){{}}]+")
_WHOLE = re.compile(rf"((?:[+~]*[\w./@-]+=)?)({_PATH}[^=,\[\]{{}}]+)")


def without_paths(value: Any) -> Any:
    """A copy of plain data in which every absolute path is cut to its last component."""
    if isinstance(value, dict):
        return {
            key: _command(item) if key == "command" and isinstance(item, str) else without_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _command(command: str) -> str:
    given = words(command)
    cut = [_cut(word) for word in given]
    return command if cut == given else shlex.join(cut)


def _cut(text: str) -> str:
    def last(path: str) -> str:
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1]

    if whole := _WHOLE.fullmatch(text):
        return whole[1] + last(whole[2])
    return _EMBEDDED.sub(lambda match: last(match[0]), text)


def words(command: str) -> list[str]:
    """A shell command as its arguments; split at white space where its quotes do not match."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
