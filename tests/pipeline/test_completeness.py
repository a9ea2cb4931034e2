"""When a slice may be over, and what is told of readouts that it lacks."""

from __future__ import annotations

import pytest

from whorl.pipeline.completeness import SliceChanges
from whorl.pipeline.losses import AGAIN, OUT, STRAY, TWICE, Losses
from whorl.scan.integrity import Tally


@pytest.mark.parametrize(
    ("numbers", "left"),
    [
        ([0, 0, 1, 1, 2, 2], [0, 1]),
        ([0, 0, 7, 0, 0, 0], []),  # one damaged number
        ([0, 7, 0, 8, 0, 1, 1], [0]),
        ([0, 0, 1, 2, 2], [0, 1]),  # of a slice only one readout came
        ([0, 0, 1, 1, 0, 0, 1, 1, 2, 2], [0]),  # they take turns: nothing tells any more
        ([5], []),
    ],
    ids=str,
)
def test_two_readouts_in_a_row_change_the_slice(numbers: list[int], left: list[int]) -> None:
    changes, known, found = SliceChanges(), set[int](), []
    for number in numbers:
        found.append(changes.follow(number, number in known))
        known.add(number)
    assert [number for number in found if number is not None] == left


def test_a_loss_is_told_of_one_repetition_only() -> None:
    tally = Tally()
    losses = Losses(tally)
    for reason in (OUT, OUT, TWICE):  # the last is no loss
        tally.lose(reason, 3)
    tally.lose(OUT, 4)
    first = losses.sentence(3, missing=2, again=0, strays=0)
    assert first == "2 with a timepoint outside the train"
    losses.told(3)
    assert losses.sentence(3, missing=0, again=0, strays=0) == ""
    tally.lose(OUT, 3)
    assert losses.sentence(3, missing=1, again=0, strays=0) == "1 with a timepoint outside the train"


def test_strays_explain_what_nothing_else_does() -> None:
    losses = Losses(Tally())
    told = losses.sentence(0, missing=3, again=1, strays=5)
    assert told == f"1 {AGAIN}, 2 {STRAY.removesuffix(' were dropped')}"
    assert losses.sentence(0, missing=0, again=0, strays=5) == ""
