"""Sizes and passes: whatever is asked for is reached, by no more than it takes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrdiff.upscaling.sizes import Goal, passes


@pytest.mark.parametrize("goal, size, wanted", [
    (Goal(3.3), (17, 31), (56, 102)),
    (Goal(1.5), (1, 40), (2, 60)),
    (Goal(4, width=1000), (768, 512), (1000, 667)),
    (Goal(4, height=1000), (768, 512), (1500, 1000)),
    (Goal(4, width=10), (4000, 16), (10, 1)),
    (Goal(4, 7, 9), (768, 512), (7, 9)),
])  # fmt: skip
def test_goals(goal, size, wanted):
    assert goal.of(size) == wanted


@given(
    factors=st.one_of(st.none(), st.sets(st.integers(2, 8), min_size=1, max_size=3)),
    needed=st.floats(1, 300, allow_nan=False),
)
def test_passes(factors, needed):
    found = passes(None if factors is None else sorted(factors), needed)
    assert math.prod(found) >= needed and all(factors is None or one in factors for one in found)
    if factors is None:
        assert len(found) == 1 and found[0] == max(2, math.ceil(needed))
        return
    fewer = itertools.product(factors, repeat=len(found) - 1)
    assert len(found) == 1 or all(math.prod(other) < needed for other in fewer)
    others = itertools.product(factors, repeat=len(found))
    assert math.prod(found) == min(math.prod(other) for other in others if math.prod(other) >= needed)
    assert found == sorted(found, reverse=True)
