"""Factors that change in the course of a training."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from distill.errors import UserError
from distill.ramp import Ramp, is_number, ramp


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, {0: 1, 0.5: 1, 1: 1}),
        ({"before": 3, "after": 3}, {0: 3, 0.3: 3, 1: 3}),
        ({"before": 4, "after": 1}, {0: 4, 0.25: 3.25, 0.5: 2.5, 1: 1}),
        ({"before": 0}, {0: 0, 0.25: 0.25, 0.9: 0.9, 1: 1}),
        ({"before": 0, "end": 0.2}, {0: 0, 0.1: 0.5, 0.2: 1, 0.9: 1}),
        ({"before": 2, "after": 6, "start": 0.2, "end": 0.6}, {0: 2, 0.2: 2, 0.3: 3, 0.5: 5, 0.6: 6, 1: 6}),
        ({"before": 0, "start": 0.5, "end": 0.5}, {0: 0, 0.499999: 0, 0.5: 1, 1: 1}),
        ({"after": 0, "start": 0.5, "end": 0.5}, {0: 1, 0.499999: 1, 0.5: 0, 1: 0}),
        ({"before": 7, "start": 0, "end": 0}, {0: 1, 1: 1}),
        ({"before": 7, "start": 1, "end": 1}, {0: 7, 0.999: 7, 1: 1}),
        ({"before": 0, "shape": "cosine"}, {0: 0, 0.25: (1 - math.sqrt(0.5)) / 2, 0.5: 0.5, 1: 1}),
        (
            {"before": 4, "after": 2, "start": 0.2, "end": 0.8, "shape": "cosine"},
            {0: 4, 0.2: 4, 0.4: 4 - 2 * 0.25, 0.5: 3, 0.6: 4 - 2 * 0.75, 0.8: 2, 1: 2},
        ),
    ],
)
def test_known_values(schedule: dict[str, Any], expected: dict[float, float]) -> None:
    made = ramp(schedule)
    assert {done: made.at(done) for done in expected} == pytest.approx(expected)


def test_nothing_is_a_constant_factor_of_one() -> None:
    assert ramp(None) == ramp({}) == Ramp()
    assert {ramp(None).at(step / 10) for step in range(11)} == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_it_only_goes_one_way_and_stays_between_its_ends(shape: str) -> None:
    factors = [Ramp(5, 2, 0.1, 0.7, shape).at(step / 200) for step in range(201)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[-1]) == (5, 2)


def test_the_largest_factor() -> None:
    assert (Ramp(0, 0).largest, Ramp(0, 2).largest, Ramp(3, 0).largest) == (0, 2, 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *[({name: value}, f"{name}={value} in a schedule: a factor is a finite number >= 0")
          for name in ("before", "after") for value in (-0.1, math.nan, math.inf, "1", None, True)],
        *[({"start": start, "end": end}, f"start={start}, end={end} in a schedule: shares of all steps, with 0 <= ")
          for start, end in ((0.6, 0.5), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan), ("0", 1), (0, None))],
        ({"start": False}, "start=False, end=1.0 in a schedule: shares of all steps"),
        *[({"shape": shape}, f"shape={shape} in a schedule: there are linear, cosine")
          for shape in ("square", "Linear", None, 1)],
        ({"begin": 0}, "schedule={'begin': 0}: is null, or has some of before, after, start, end, shape"),
        ({"before": 0, 1: 2}, "schedule={'before': 0, 1: 2}: is null, or has some of before"),
        ("linear", "schedule=linear: is null, or has some of before"),
        ([0, 1], "schedule=[0, 1]: is null, or has some of before"),
        (0.5, "schedule=0.5: is null, or has some of before"),
        (False, "schedule=False: is null, or has some of before"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        ramp(wrong)


def test_what_a_number_is() -> None:
    assert all(is_number(value) for value in (0, -3, 0.5, 1e300))
    assert not any(is_number(value) for value in (True, False, None, "1", math.nan, math.inf, -math.inf, [1], 1j))


def test_a_schedule_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule=\{'start': 0.5\}: changes nothing"):
        ramp({"start": 0.5})
