"""What a picture is enlarged to, and by which of a model's factors. Sizes are (width, height), as Pillow has them."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]


class Goal(NamedTuple):
    """`outscale` times as large, or a width, a height or both; one that is missing follows from the other."""

    outscale: float = 4
    width: int | None = None
    height: int | None = None

    def of(self, size: Size) -> Size:
        """The size that a picture of this size gets: rounded, and at least 1."""
        if self.width is None and self.height is None:
            return tuple(max(round(side * self.outscale), 1) for side in size)
        width, height = self.width, self.height
        if width is None:
            width = max(round(size[0] * height / size[1]), 1)
        if height is None:
            height = max(round(size[1] * width / size[0]), 1)
        return width, height


def passes(factors: Sequence[int] | None, needed: float) -> list[int]:
    """
    The factors to enlarge by, one after another, so that the sides become at least `needed` times as long: the smallest
    one that suffices, or the fewest that do, and of these the ones with the smallest product.

    Args:
        factors: Whole numbers from 2 up that the model was trained for; `None` if it takes any.
        needed: 1 or more.
    """
    if factors is None:
        return [max(math.ceil(needed), 2)]
    count = 1
    while max(factors) ** count < needed:
        count += 1
    enough = (
        chosen
        for chosen in itertools.combinations_with_replacement(sorted(factors, reverse=True), count)
        if math.prod(chosen) >= needed
    )
    return list(min(enough, key=math.prod))
