"""The processes and the number format of a run, from its flags and from what `accelerate config` says."""

import os

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from pyrdiff.machine import set_up_gpu
from pyrdiff.parts.settings import did_you_mean

from .settings import TrainingSettings

NOT_SUPPORTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def accelerator_for(settings: TrainingSettings) -> Accelerator:
    """
    The accelerator of a run. Flags count more than the environment that `accelerate launch` makes.

    Raises:
        ValueError: for DeepSpeed, FSDP, Megatron-LM, a number format or a tracker that trainings cannot use.
    """
    for name in NOT_SUPPORTED:
        if parse_flag_from_env(name):
            raise ValueError(f"{name}={os.environ[name]}: expected plain data parallelism; see accelerate config")
    trackers = [*map(str, LOGGER_TYPE_TO_CLASS), "all"]
    if settings.report_to not in (None, *trackers):
        near = did_you_mean(settings.report_to, trackers)
        raise ValueError(f"report_to={settings.report_to!r}: expected one of {trackers}{near}")
    set_up_gpu(training=True)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        # As a plugin, since accelerate takes the plain number from its environment if it is there, too.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        log_with=settings.report_to,
        project_dir=settings.output_dir,
    )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):  # that accelerate config says
        raise ValueError(f"mixed_precision={accelerator.mixed_precision!r}: expected no, fp16 or bf16")
    if settings.report_to and not accelerator.log_with:
        raise ValueError(f"report_to={settings.report_to!r}: expected a tracker that is installed")
    return accelerator
