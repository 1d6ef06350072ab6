"""The timesteps that a scheduler is asked to run."""

from collections.abc import Sequence

from pyrdiff.parts.settings import is_whole


def chosen_timesteps(
    num_inference_steps: int | None, timesteps: Sequence[int] | None, lowest: int, highest: int
) -> list[int] | None:
    """
    What `set_timesteps` of a scheduler was asked for: the chosen timesteps, or None for a number of steps.

    Args:
        num_inference_steps: A number of steps, at most as many as there are timesteps.
        timesteps: Descending whole numbers from `highest` to `lowest`.
        lowest, highest: The timesteps that the scheduler has.

    Raises:
        ValueError: unless exactly one of the two is given, and fits.
    """
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError(f"num_inference_steps={num_inference_steps}, timesteps={timesteps}: expected one of the two")
    if timesteps is None:
        most = highest - lowest + 1
        if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: expected a whole number from 1 to {most}")
        return None
    times = [int(time) for time in timesteps]
    descending = times == list(timesteps) and times == sorted(set(times), reverse=True)
    if not times or not descending or times[0] > highest or times[-1] < lowest:
        raise ValueError(f"timesteps={list(timesteps)}: expected descending whole numbers from {highest} to {lowest}")
    return times
