"""Ranges never overlap and never leak, whatever the order they are taken and given back in."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from malora.kernels.arena import ALIGNMENT, Arena

CAPACITY = 40 * ALIGNMENT


class Ranges(RuleBasedStateMachine):
    """An arena beside a map of every unit of its memory."""

    starts = Bundle("starts")

    def __init__(self):
        super().__init__()
        self.arena = Arena(CAPACITY)
        self.owners = [None] * 40

    def longest_hole(self, owners=None):
        longest = length = 0
        for owner in self.owners if owners is None else owners:
            length = 0 if owner is not None else length + 1
            longest = max(longest, length)
        return longest

    @rule(target=starts, nbytes=st.integers(1, CAPACITY))
    def allocate(self, nbytes):
        units = -(-nbytes // ALIGNMENT)
        fits = self.longest_hole() >= units
        assert self.arena.fits([nbytes]) == fits
        start = self.arena.allocate(nbytes)
        assert (start is not None) == fits
        if start is None:
            return multiple()
        assert start % ALIGNMENT == 0
        first = start // ALIGNMENT
        assert self.owners[first : first + units] == [None] * units
        self.owners[first : first + units] = [start] * units
        return start

    @rule(start=consumes(starts))
    def free(self, start):
        units = self.owners.count(start)
        assert self.arena.free(start) == units * ALIGNMENT
        self.owners = [None if owner == start else owner for owner in self.owners]

    @rule(gone=st.sets(starts, max_size=4), nbytes=st.integers(1, CAPACITY))
    def would_fit(self, gone, nbytes):
        gone &= {owner for owner in self.owners if owner is not None}
        left = [None if owner in gone else owner for owner in self.owners]
        fits = self.longest_hole(left) >= -(-nbytes // ALIGNMENT)
        assert self.arena.fits([nbytes], gone) == fits

    @invariant()
    def counts(self):
        assert self.arena.used == sum(o is not None for o in self.owners) * ALIGNMENT


TestRanges = Ranges.TestCase
TestRanges.settings = settings(stateful_step_count=40)


def test_the_smallest_hole_that_fits_is_taken():
    arena = Arena(10 * ALIGNMENT)
    a, _, c, _ = (arena.allocate(units * ALIGNMENT) for units in (3, 1, 2, 1))
    arena.free(a)
    arena.free(c)
    assert arena.allocate(2 * ALIGNMENT) == c


def test_what_was_not_handed_out_is_not_taken_back():
    arena = Arena(CAPACITY)
    start = arena.allocate(5)
    with pytest.raises(KeyError):
        arena.free(start + ALIGNMENT)
    arena.free(start)
    with pytest.raises(KeyError):
        arena.free(start)
    with pytest.raises(ValueError, match="positive"):
        arena.allocate(0)
    assert Arena(ALIGNMENT - 1).allocate(1) is None
