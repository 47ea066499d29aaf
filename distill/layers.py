"""Layer maps: which layer of the student learns from which of the teacher's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("uniform", "skip", "first", "last", "top")


class Link(NamedTuple):
    """One tap of the student and the tap of the teacher that it learns from."""

    student: str
    teacher: str

    @property
    def key(self) -> str:
        """A name for modules that belong to the link."""
        return f"{self.student}_from_{self.teacher}".replace(".", "_")


LayerMap = str | Sequence[Sequence[str]]
"""A name of `NAMES`, or explicit pairs [teacher tap, student tap]."""


def resolve(
    layers: LayerMap, student: Sequence[str], teacher: Sequence[str], taps: Sequence[Sequence[str]]
) -> list[Link]:
    """Links of a layer map, for networks whose layers are these, in order of depth.

    With S layers in the student and T in the teacher, layer m of the student (from 1) learns from the teacher's layer

    * "uniform": m · T / S, rounded to the nearest, halves up, so that the last learns from the last (TinyBERT);
    * "skip": the same, without the last layers, which the logits teach already (PKD-skip);
    * "first": m;
    * "last": T − S + m;
    * "top": T, for the last layer of the student alone (MiniLM).

    Args:
        layers: one of these names, or pairs [teacher tap, student tap] of any taps.
        student, teacher: names of the layers.
        taps: all taps of the student, and of the teacher.

    Raises:
        ValueError: no such map; a tap that is not there, with those that are; or a map that has no layer to map, such
            as "skip" for a student of one layer, or "first" where the student is deeper than the teacher.
    """
    if isinstance(layers, Sequence) and not isinstance(layers, str) and layers:
        return [_link(pair, *taps) for pair in layers]
    s, t = len(student), len(teacher)
    if not (s and t):
        raise ValueError(
            f"layers={layers}: the {'teacher' if s else 'student'} has no taps called layerN or stageN; name pairs "
            "[[teacher tap, student tap]]"
        )
    if not isinstance(layers, str) or layers not in NAMES:
        raise ValueError(
            f"layers={layers}: no such layer map; there are {', '.join(NAMES)}, or pairs such as "
            f"[[{teacher[-1]},{student[-1]}]] (teacher first)"
        )
    if s > t:
        raise ValueError(
            f"layers={layers}: the student has {s} layers and the teacher {t}; name the pairs, such as "
            f"[[{teacher[-1]},{student[-1]}]] (teacher first)"
        )
    numbers = {
        "uniform": [(m, (2 * m * t + s) // (2 * s)) for m in range(1, s + 1)],
        "skip": [(m, (2 * m * t + s) // (2 * s)) for m in range(1, s)],
        "first": [(m, m) for m in range(1, s + 1)],
        "last": [(m, t - s + m) for m in range(1, s + 1)],
        "top": [(s, t)],
    }[layers]
    if not numbers:
        raise ValueError(f"layers={layers}: leaves out the last layer, and the student has no other; take top")
    return [Link(student[m - 1], teacher[n - 1]) for m, n in numbers]


def _link(pair: Sequence[str], student_taps: Sequence[str], teacher_taps: Sequence[str]) -> Link:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"layers: {pair} is not a pair [teacher tap, student tap]")
    for name, taps, who in ((pair[1], student_taps, "student"), (pair[0], teacher_taps, "teacher")):
        if name not in taps:
            close = difflib.get_close_matches(str(name), taps, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            shown = ", ".join(tap for tap in taps if "." not in tap)
            raise ValueError(f"layers: the {who} has no tap {name!r}; {guess}it has {shown}")
    return Link(pair[1], pair[0])
