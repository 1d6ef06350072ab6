"""Ways of sampling a network: schedulers of diffusers in diffusers' own loop, in parallel, or in pyramids of ours."""

import copy
import hashlib
import inspect
import json

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from pyrdiff import PyramidalPipeline
from pyrdiff.parts.noise_windows import check_noise
from pyrdiff.parts.plans import NOISE_PROCESS
from pyrdiff.plan import clipping

# [class of diffusers, changed settings], as plans of pipelines have them
DDPM, DDIM = ["DDPMScheduler", {}], ["DDIMScheduler", {}]
DPM, UNIPC = ["DPMSolverMultistepScheduler", {}], ["UniPCMultistepScheduler", {}]
SDE = ["DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}]


def top_level(pipeline):
    """The highest level of a pipeline, in a plan that fits however few training steps."""
    return pipeline.lay_out({"num_inference_steps": 2, "refine_steps": 2, "refine_strength": 1.0})[-1]


def scheduler_like(base: SchedulerMixin, kind: str, changes: dict) -> SchedulerMixin:
    """A scheduler of diffusers over the noise process of `base`; all else is its class's default, or as changed."""
    scheduler_class = getattr(diffusers, kind)
    known = inspect.signature(scheduler_class.__init__).parameters
    for name in changes:
        if name not in known:
            raise ValueError(f"{kind}: {name}={changes[name]!r}: expected one of {sorted(known)}")
    process = {key: base.config[key] for key in NOISE_PROCESS if key in base.config and key in known}
    return scheduler_class(**{**process, **changes})


def build_scheduler(settings: dict, base: SchedulerMixin) -> SchedulerMixin:
    """As `scheduler_like`, by {"_class_name": class, setting: value}, and clipping the clean estimate."""
    changes = dict(settings)
    kind = changes.pop("_class_name")
    return scheduler_like(base, kind, {**clipping(kind), **changes})


class Sampler:
    """One arm on one network: `sampler(count, generator)` gives float [count, C, H, W] in [-1, 1], not clipped."""

    def __init__(self, arm: dict, base, network):
        self.loop, self.arguments, self.network = arm["loop"], dict(arm["arguments"]), network
        self.shape = (base.unet.config.in_channels, *top_level(base).network_size)
        if self.loop == "saved":
            self.pipeline = copy.copy(base)
            self.pipeline.unet = network
            schedulers = [base.scheduler, base.refine_scheduler]
        else:
            named = [arm["scheduler"], arm.get("refine_scheduler")]
            schedulers = [part and build_scheduler(part, base.scheduler) for part in named]
            self.pipeline = PyramidalPipeline(network, *schedulers)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = schedulers[0]
        configs = [part and {k: v for k, v in part.config.items() if k[0] != "_"} for part in schedulers]
        self.settings = {
            "loop": self.loop,
            "schedulers": [part and type(part).__name__ for part in schedulers],
            "spacings": [part and part.get("timestep_spacing") for part in configs],
            "changed": [arm.get("scheduler"), arm.get("refine_scheduler")],
            "arguments": self.arguments,
        }
        # Of everything the images depend on, beside weights, seed and precision.
        whole = json.dumps([self.settings, configs], default=str, sort_keys=True)
        self.key = hashlib.sha256(whole.encode()).hexdigest()[:16]

    def __call__(self, count: int, generator):
        if self.loop == "stock":
            return stock_images(self.network, self.scheduler, (count, *self.shape), generator, **self.arguments)
        if self.loop == "parallel":
            return parallel_images(self.network, self.scheduler, (count, *self.shape), generator, **self.arguments)
        return self.pipeline(count, generator=generator, output_type="latent", **self.arguments).images

    def expected_calls(self) -> list[tuple[tuple[int, int], int]]:
        """
        Network calls by size, before a run; of the parallel loop a guess. Raises `ValueError` for too many steps, or
        more noise than the network was trained for at that size.
        """
        if self.loop in ("stock", "parallel"):
            calls, most = self.arguments["num_inference_steps"], self.scheduler.config.num_train_timesteps
            if calls > most:
                raise ValueError(f"num_inference_steps={calls}: expected at most {most}, the training steps")
            check_noise(self.network.config, most, [(tuple(self.shape[1:]), most - 1)])
            return [(self.shape[1:], calls * (3 if self.loop == "parallel" else 1))]
        known = inspect.signature(self.pipeline.plan).parameters
        plan = self.pipeline.plan(**{key: value for key, value in self.arguments.items() if key in known})
        return [(level.network_size, len(level.timesteps)) for level in plan.levels]


def stock_images(network, scheduler, shape, generator, num_inference_steps: int):
    """The loop of diffusers' `DDPMPipeline`, with any scheduler."""
    scheduler.set_timesteps(num_inference_steps)  # on the CPU, as there
    images = randn_tensor(shape, generator=generator, device=network.device) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for timestep in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(images, timestep), timestep, return_dict=False)[0].float()
        images = scheduler.step(prediction, timestep, images, **extra, return_dict=False)[0]
    return images


def parallel_images(network, scheduler, shape, generator, num_inference_steps: int, window: int, tolerance: float):
    """
    DDIM's trajectory by Picard iteration over a sliding window of `window` steps (Shih et al. 2023, *Parallel Sampling
    of Diffusion Models*, algorithm 1): fewer calls one after the other, more images through the network. A point is
    taken as found once a sweep moves no image of the batch by more than `tolerance` of that step's noise.
    """
    scheduler.set_timesteps(num_inference_steps, device=network.device)
    times = scheduler.timesteps
    variances = torch.stack([scheduler._get_variance(int(t)) for t in times.cpu()]).float()
    variances = variances.clamp(min=variances[variances > 0].min()).to(network.device)  # the last step's is 0
    path = randn_tensor(shape, generator=generator, device=network.device).repeat(len(times) + 1, 1, 1, 1, 1)
    begin = 0
    while begin < len(times):
        end = min(begin + window, len(times))
        block = path[begin:end]
        repeated = times[begin:end].repeat_interleave(shape[0])
        prediction = network(block.flatten(0, 1), repeated, return_dict=False)[0].float()
        stepped = scheduler.batch_step_no_noise(prediction, repeated, block.flatten(0, 1)).reshape(block.shape)
        found = path[begin] + (stepped - block).cumsum(0)
        moved = (found - path[begin + 1 : end + 1]).square().mean((2, 3, 4)).amax(1)
        wrong = (moved > tolerance**2 * variances[begin:end]).tolist()
        path[begin + 1 : end + 1] = found
        path[end + 1 :] = path[end]
        begin += max(1, wrong.index(True) if True in wrong else end - begin)  # the first is exact in any case
    return path[-1]


class Calls:
    """Counts the images that go through a network, by size."""

    def __init__(self, network):
        self.images: dict[tuple[int, int], int] = {}
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network, arguments, named) -> None:
        sample = arguments[0] if arguments else named["sample"]
        size = tuple(sample.shape[-2:])
        self.images[size] = self.images.get(size, 0) + sample.shape[0]
