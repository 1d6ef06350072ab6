"""Named plans: the arguments of a call that a pipeline keeps in its config, and the schedulers that they run with."""

import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

import diffusers
from diffusers import SchedulerMixin

from pyrdiff.parts.checks import check_scheduler, is_number
from pyrdiff.parts.settings import did_you_mean

NOISE_PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
ALWAYS = {"stage_jump": "white"}  # plans in older folders may say what is no longer a choice


@dataclass(frozen=True)
class NamedPlan:
    """Arguments of a call; by "scheduler" or "refine_scheduler", the [class, settings] to run it with, or `None`."""

    arguments: dict = field(default_factory=dict)
    schedulers: dict = field(default_factory=dict)


def read_plan(
    plan: str | dict, plans: dict | None, arguments: tuple[str, ...], schedulers: tuple[str, ...]
) -> NamedPlan:
    """
    A plan by its name or as a dict, taken apart.

    Args:
        plan: What the user gave.
        plans: Those of the pipeline's config.
        arguments, schedulers: What a plan may set.

    Raises:
        ValueError: for an unknown name, or a plan that sets anything else.
    """
    if isinstance(plan, str):
        known = plans or {}
        if plan not in known:
            near = did_you_mean(plan, known)
            raise ValueError(f"plan={plan!r}: expected one of {sorted(known)}, or a dict of arguments{near}")
        plan = known[plan]
    if not isinstance(plan, dict):
        raise ValueError(f"plan={plan!r}: expected a name or a dict of arguments")
    plan = {name: value for name, value in plan.items() if (name, value) not in ALWAYS.items()}
    for name in plan:
        if name not in (*arguments, *schedulers):
            raise ValueError(f"plan has {name!r}: expected {arguments}, {', '.join(schedulers)}")
    return NamedPlan(
        {name: value for name, value in plan.items() if name in arguments},
        {name: value for name, value in plan.items() if name in schedulers},
    )


def given(arguments: NamedTuple) -> dict:
    """Those arguments of a call that are not their defaults."""
    defaults = arguments._field_defaults

    def left_out(name: str, value) -> bool:
        return value is defaults[name] or ((isinstance(value, str) or is_number(value)) and value == defaults[name])

    return {name: value for name, value in arguments._asdict().items() if not left_out(name, value)}


def check_not_beside_plan(plan: str | dict, arguments: NamedTuple, but: tuple[str, ...] = ()) -> None:
    """Refuses arguments that are given beside a plan, but those that may be."""
    for name, value in given(arguments).items():
        if name not in but:
            raise ValueError(f"plan={plan!r} with {name}={value!r}: expected one or the other")


def plan_scheduler(
    name: str, entry: object, process: SchedulerMixin, kept: tuple[str, ...] = (), fixed: dict | None = None
) -> SchedulerMixin:
    """
    A scheduler of diffusers over the same noise process; all else is its own default, or as set.

    Args:
        name: Of the plan's entry, for messages.
        entry: [class of diffusers, {setting: value}].
        process: The scheduler that the network was trained with.
        kept: Further settings that are taken over from it.
        fixed: Settings that a plan may not change.

    Raises:
        ValueError: for a class or a setting that it cannot take.
    """
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
        raise ValueError(f"{name} of the plan is {entry!r}: expected [class of diffusers, {{setting: value}}]")
    kind, settings, fixed = getattr(diffusers, str(entry[0]), None), entry[1], fixed or {}
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{name} of the plan is {entry[0]!r}: expected a scheduler of diffusers")
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    for setting in settings:
        if setting not in known - {*NOISE_PROCESS, *fixed}:
            raise ValueError(f"{name} of the plan sets {setting!r}: expected settings of {entry[0]}'s steps")
    taken = {key: process.config[key] for key in (*NOISE_PROCESS, *kept) if key in process.config}
    options = {key: value for key, value in {**taken, **fixed}.items() if key in known}
    try:
        scheduler = kind(**{**options, **settings})
    except Exception as error:  # whatever a constructor of diffusers makes of strange values
        raise ValueError(f"{name} of the plan: {entry[0]} does not take {settings}: {error}") from error
    check_scheduler(name, scheduler)
    return scheduler
