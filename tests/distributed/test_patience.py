"""When a unit is taken to hang."""

from __future__ import annotations

import pytest

from raydfkd.distributed.patience import LEAST_S, TIMES, Patience


def test_nobody_is_taken_to_hang_while_no_unit_has_got_on():
    assert not Patience().is_over(1e9)


def test_units_that_get_on_quickly_may_stand_still_for_a_while_all_the_same():
    patience = Patience()
    patience.saw(0.1)
    assert not patience.is_over(LEAST_S)
    assert patience.is_over(LEAST_S + 1)


def test_patience_follows_from_the_longest_silence_and_doubles():
    patience = Patience()
    for silence in (1.0, 100.0, 5.0):
        patience.saw(silence)
    assert not patience.is_over(TIMES * 100.0)
    assert patience.is_over(TIMES * 100.0 + 1)
    patience.double()
    assert not patience.is_over(2 * TIMES * 100.0)
    assert patience.is_over(2 * TIMES * 100.0 + 1)


@pytest.mark.parametrize("steps_s", [200.0, 20000.0])
def test_units_whose_steps_become_slow_are_made_in_the_end(steps_s):
    patience, num_ended = Patience(), 0
    patience.saw(1.0)
    while patience.is_over(steps_s / 2):  # its worker is ended after twice the time
        patience.double()
        num_ended += 1
    assert num_ended < 12
