import itertools

import pytest

from modmoe.distill.ranges import balanced_ranges, checked_ranges, even_ranges, stage_specs


def test_even_ranges_differ_by_one_block_at_most():
    assert even_ranges(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert even_ranges(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_balanced_ranges_have_the_smallest_largest_stage():
    sizes = [9, 1, 1, 1, 8, 2, 3]
    for count in range(1, 8):
        ranges = balanced_ranges(sizes, count)
        assert checked_ranges(ranges, 7) == ranges
        cuts = itertools.combinations(range(1, 7), count - 1)
        best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cut, 7))) for cut in cuts)
        assert max(sum(sizes[a:b]) for a, b in ranges) == best


@pytest.mark.parametrize("count", [0, 8])
def test_as_many_stages_as_blocks_at_most(count):
    with pytest.raises(ValueError, match=f"num_stages={count} must be between 1 and the number of blocks, 7"):
        even_ranges(7, count)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 2), (3, 5)], "stage 1 is the range 3..5.*must begin at block 2"),
        ([(0, 2), (1, 5)], "stage 1 is the range 1..5"),
        ([(0, 2), (2, 2), (2, 5)], "stage 1 is the range 2..2"),
        ([(0, 2), (2, 4)], "end at block 4 of 5"),
        ([(0, 2), (2, 6)], "end at block 6 of 5"),
    ],
)
def test_ranges_with_gaps_or_overlaps_are_refused(ranges, message):
    with pytest.raises(ValueError, match=message):
        checked_ranges(ranges, 5)


def test_specs_know_their_place():
    first, middle, last = stage_specs([(0, 1), (1, 4), (4, 5)], 16)
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert (middle.num_blocks, middle.input_width, middle.num_stages) == (3, 16, 3)
