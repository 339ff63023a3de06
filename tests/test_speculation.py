"""Guesses: what is guessed, and that wrong ones become rare."""

import numpy as np
import pytest

from smallgpt.speculation import Speculation


def eager(size: int, length: int) -> Speculation:
    """One that may guess `length` tokens at once."""
    speculation = Speculation(size)
    for _ in range(100):
        speculation.plain(1.0)
    speculation._length = length
    return speculation


def test_what_followed_last_time_is_guessed() -> None:
    assert eager(8, 8).propose([5, 6, 7, 8, 9, 5, 6, 7], 99) == [8, 9, 5, 6, 7, 8, 9, 5]
    assert eager(8, 3).propose([5, 6, 7, 8, 9, 5, 6, 7], 99) == [8, 9, 5]
    assert eager(8, 8).propose([5, 6, 7, 8, 9, 5, 6, 7], 2) == [8, 9]
    assert eager(8, 8).propose([5, 6, 7, 8, 9, 5, 6, 7], 0) == []
    assert eager(8, 8).propose([5, 6, 7, 8, 9, 5, 6, 7], -3) == []
    # The latest of two places, and three tokens before two.
    assert eager(8, 1).propose([4, 6, 7, 1, 4, 6, 7, 2, 4, 6, 7], 99) == [2]
    assert eager(8, 1).propose([4, 6, 7, 1, 5, 6, 7, 2, 4, 6, 7], 99) == [1]
    assert eager(8, 1).propose([4, 6, 7, 1, 5, 6, 7, 2, 9, 6, 7], 99) == [2]
    # A loop is guessed on and on.
    assert eager(4, 4).propose([1, 2, 2, 2], 99) == [2, 2, 2, 2]
    assert eager(4, 4).propose([1, 2, 1, 2, 1], 99) == [2, 1, 2, 1]
    for ids in ([], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]):
        assert eager(4, 4).propose(ids, 99) == []


def test_the_index_grows_with_the_text() -> None:
    draw = np.random.default_rng(0)
    speculation, ids = eager(3, 3), [int(draw.integers(4))]
    for _ in range(300):
        fresh = eager(3, 3)
        assert speculation.propose(ids, 99) == fresh.propose(list(ids), 99)
        ids.append(int(draw.integers(4)))
    assert speculation.propose([7, 8, 9, 7, 8], 99) == [9, 7, 8]  # another text: nothing is left of the first


def run(speculation: Speculation, steps: int, right: float, cost: float) -> tuple[int, float]:
    """Guess at every step with a share of `right` tokens: how often it guessed, and seconds lost in all."""
    draw = np.random.default_rng(1)
    ids = [1, 2, 3] * 5
    guesses, lost = 0, 0.0
    for _ in range(steps):
        guess = speculation.propose(ids, 99)
        if not guess:
            speculation.plain(1.0)
            continue
        guesses += 1
        accepted = int(np.cumprod(draw.random(len(guess)) < right).sum())
        speculation.checked(len(guess), accepted, 1 + cost * len(guess))
        lost += cost * len(guess) - accepted
    return guesses, lost


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5, 3.0])
def test_a_text_that_is_never_guessed_right(cost: float) -> None:
    speculation = Speculation(8)
    guesses, lost = run(speculation, 2000, right=0.0, cost=cost)
    assert 0 < guesses <= 6 + 2000 / 64
    assert lost <= 0.05 * 2000
    assert (speculation.proposed, speculation.accepted) == (2 * guesses, 0)


@pytest.mark.parametrize(("right", "cost"), [(0.1, 0.5), (0.3, 1.0), (0.5, 2.0), (0.9, 3.0)])
def test_guesses_that_cost_more_than_they_give(right: float, cost: float) -> None:
    guesses, lost = run(Speculation(8), 2000, right, cost)
    assert guesses > 0
    assert lost <= 0.05 * 2000


def test_guesses_that_are_right_grow_and_pay() -> None:
    speculation = Speculation(8)
    guesses, lost = run(speculation, 300, right=1.0, cost=0.2)
    assert guesses > 250
    assert lost < -1000
    assert speculation.accepted == speculation.proposed > 7 * guesses


def test_old_gains_do_not_pay_for_long_losses() -> None:
    speculation = Speculation(8)
    run(speculation, 500, right=1.0, cost=0.1)
    _, lost = run(speculation, 1000, right=0.2, cost=2.0)
    assert lost <= 10 + 0.05 * 3000


def test_nothing_is_guessed_before_a_plain_step_was_timed() -> None:
    speculation = Speculation(8)
    assert speculation.propose([1, 2, 3, 1, 2, 3], 99) == []
    assert Speculation(0).propose([1, 2, 3, 1, 2, 3], 99) == []
