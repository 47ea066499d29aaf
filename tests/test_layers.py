"""Layer maps: which layer of the student learns from which of the teacher's."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distill.layers import NAMES, Link, resolve

PARTS = ("query", "key", "value")


def depth(count: int) -> list[str]:
    return [f"layer{n}" for n in range(1, count + 1)]


def taps(count: int) -> list[str]:
    """As BERT has them."""
    return ["embeddings", *depth(count), "pooled", *(f"{layer}.{part}" for layer in depth(count) for part in PARTS)]


def resolved(layers: Any, student: int, teacher: int) -> list[Link]:
    return resolve(layers, depth(student), depth(teacher), [taps(student), taps(teacher)])


def numbers(layers: str, student: int, teacher: int) -> dict[int, int]:
    """Layer of the student -> layer of the teacher."""
    return {int(mine[5:]): int(theirs[5:]) for mine, theirs in resolved(layers, student, teacher)}


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, {1: 3, 2: 6, 3: 9, 4: 12}),
        ("uniform", 6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}),
        ("uniform", 2, 12, {1: 6, 2: 12}),
        ("uniform", 1, 12, {1: 12}),
        ("uniform", 4, 4, {1: 1, 2: 2, 3: 3, 4: 4}),
        ("uniform", 2, 5, {1: 3, 2: 5}),
        ("uniform", 3, 4, {1: 1, 2: 3, 3: 4}),
        ("uniform", 5, 12, {1: 2, 2: 5, 3: 7, 4: 10, 5: 12}),
        ("skip", 4, 12, {1: 3, 2: 6, 3: 9}),
        ("skip", 6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}),
        ("skip", 2, 2, {1: 1}),
        ("first", 4, 12, {1: 1, 2: 2, 3: 3, 4: 4}),
        ("last", 4, 12, {1: 9, 2: 10, 3: 11, 4: 12}),
        ("last", 4, 4, {1: 1, 2: 2, 3: 3, 4: 4}),
        ("top", 4, 12, {4: 12}),
        ("top", 1, 1, {1: 1}),
    ],
)
def test_maps_by_name(layers: str, student: int, teacher: int, expected: dict[int, int]) -> None:
    assert numbers(layers, student, teacher) == expected


@pytest.mark.parametrize("layers", NAMES)
def test_a_map_by_name_rises_on_both_sides_for_every_pair_of_depths(layers: str) -> None:
    for student in range(2 if layers == "skip" else 1, 13):
        for teacher in range(student, 25):
            found = numbers(layers, student, teacher)
            assert list(found) == sorted(found)
            assert list(found.values()) == sorted(set(found.values()))
            assert set(found.values()) <= set(range(1, teacher + 1))
            assert (student in found) == (layers != "skip")
            assert layers in ("skip", "first") or found[student] == teacher


def test_stages_are_mapped_by_name_too() -> None:
    stages = [f"stage{n}" for n in range(1, 5)]
    links = resolve("uniform", stages, stages, [[*stages, "pooled"]] * 2)
    assert links == [Link(stage, stage) for stage in stages]


def test_pairs_name_the_teacher_first_and_any_tap() -> None:
    pairs = [["layer12", "layer4"], ["pooled", "pooled"], ("layer7.value", "layer3.query"), ["embeddings", "layer1"]]
    assert resolved(pairs, 4, 12) == [
        Link(student="layer4", teacher="layer12"),
        Link(student="pooled", teacher="pooled"),
        Link(student="layer3.query", teacher="layer7.value"),
        Link(student="layer1", teacher="embeddings"),
    ]


def test_a_link_names_modules_without_dots_and_tells_links_apart() -> None:
    links = resolved([["layer12", "layer1"], ["layer1", "layer2"], ["layer1.key", "layer2.query"]], 2, 12)
    keys = [link.key for link in links]
    assert keys == ["layer1_from_layer12", "layer2_from_layer1", "layer2_query_from_layer1_key"]


def test_a_student_deeper_than_its_teacher_can_still_be_paired_by_hand() -> None:
    assert resolved([["layer1", "layer3"]], 3, 1) == [Link("layer3", "layer1")]


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "says"),
    [
        ("unifrom", 4, 12, "layers=unifrom: no such layer map; there are uniform, skip, first, last, top, or pairs such"
         " as [[layer12,layer4]] (teacher first)"),
        *[(name, 4, 3, f"layers={name}: the student has 4 layers and the teacher 3; name the pairs, such as"
           " [[layer3,layer4]] (teacher first)") for name in NAMES],
        ("skip", 1, 12, "layers=skip: leaves out the last layer, and the student has no other; take top"),
        ([["layer13", "layer4"]], 4, 12, "the teacher has no tap 'layer13'; did you mean layer3? it has"),
        ([["layer12", "layer5"]], 4, 12, "the student has no tap 'layer5'; did you mean layer"),
        ([["layer12", "poled"]], 4, 12, "the student has no tap 'poled'; did you mean pooled? it has embeddings, "
         "layer1, layer2, layer3, layer4, pooled"),
        ([["layer3.qurey", "layer3.key"]], 4, 12, "the teacher has no tap 'layer3.qurey'; did you mean layer3.query?"),
        ([["zzz", "layer1"]], 4, 3, "the teacher has no tap 'zzz'; it has embeddings, layer1, layer2, layer3, pooled"),
        ([[12, 4]], 4, 12, "the student has no tap 4; "),
        ([["layer12"]], 4, 12, "layers: ['layer12'] is not a pair [teacher tap, student tap]"),
        ([["layer1", "layer2", "layer3"]], 4, 12, "['layer1', 'layer2', 'layer3'] is not a pair"),
        (["layer12", "layer4"], 4, 12, "layers: layer12 is not a pair [teacher tap, student tap]"),
        ([12, 4], 4, 12, "layers: 12 is not a pair [teacher tap, student tap]"),
        ([], 4, 12, "layers=[]: no such layer map; there are uniform"),
        (None, 4, 12, "layers=None: no such layer map; there are uniform"),
        (3, 4, 12, "layers=3: no such layer map; there are uniform"),
    ],
)  # fmt: skip
def test_what_is_no_map_of_the_pair_is_refused(layers: Any, student: int, teacher: int, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        resolved(layers, student, teacher)
    assert "\n" not in str(caught.value)
