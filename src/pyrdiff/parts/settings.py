"""Checks of the settings of networks and schedulers. Each raises `ValueError` with name, value and what is accepted."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches


def check_choices(settings: Mapping, choices: Mapping[str, Sequence]) -> None:
    """Each setting that `choices` names must have one of the values there."""
    for name, accepted in choices.items():
        if settings[name] not in accepted:
            raise ValueError(f"{name}={settings[name]!r}: expected one of {tuple(accepted)}")


def is_whole(value: object) -> bool:
    """True for a whole number, also one of numpy; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(settings: Mapping, *names: str, optional: bool = False) -> None:
    """Each of these settings must be a whole number from 1 up, or None if that is allowed."""
    for name in names:
        value = settings[name]
        if not (is_whole(value) and value >= 1 or optional and value is None):
            raise ValueError(f"{name}={value!r}: expected a whole number from 1 up{' or None' * optional}")


def check_positive(settings: Mapping, *names: str) -> None:
    """Each of these settings must be a finite number above 0."""
    for name in names:
        if not 0 < settings[name] < math.inf:
            raise ValueError(f"{name}={settings[name]}: expected a finite number above 0")


def checked_factors(factors: Sequence[int] | None) -> list[int] | None:
    """The setting `scale_factors` as a config keeps it: different whole numbers from 2 up, or None."""
    if factors is None:
        return None
    given = list(factors) if isinstance(factors, (list, tuple)) else []
    whole = all(is_whole(factor) and factor >= 2 for factor in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(f"scale_factors={factors}: expected different whole numbers from 2 up, or None")
    return given


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""
