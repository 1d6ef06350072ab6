"""Generation by the parallel trajectory (paper X): a structure, noise about it, and one network call from there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging

from pyrdiff.parts.checks import Generators, check_count, is_count
from pyrdiff.parts.images import ImageInput, read_images
from pyrdiff.parts.sampling import Images, SamplingPipeline
from pyrdiff.parts.settings import is_whole
from pyrdiff.parts.wrappers import network_takes, plain

logger = logging.get_logger(__name__)


@dataclass
class ParallelTrajectoryPipelineOutput(BaseOutput):
    """
    Args:
        images: The images, in the form asked for.
        structure: The structures that the rates followed, in the same form.
        trajectory: With `return_trajectory`, the states from noise to clean, a list with the images of each; they are
            clipped to [0, 1] but for "latent". Otherwise `None`.
        trajectory_steps: Their timesteps, descending.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    structure: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    trajectory: list | None = None
    trajectory_steps: list[int] | None = None


@dataclass(frozen=True)
class TrajectoryStart:
    """
    What a call begins with.

    Args:
        image: [B, C, H, W], clean in [epsilon, 1] at timestep 0, noisy at a later one; `None` for a draw.
        timestep: Of the image.
        latents: [B, Z] of the autoencoder, or `None`.
        rows: Number of images.
    """

    image: torch.Tensor | None
    timestep: int | None
    latents: torch.Tensor | None
    rows: int


def _check_setting(owner: str, config, name: str, expected, whose: str) -> None:
    if config[name] != expected:
        raise ValueError(f"{owner} has {name}={config[name]}: expected the {whose}'s {expected}")


class ParallelTrajectoryPipeline(SamplingPipeline, DiffusionPipeline):
    r"""
    Generates images in one network call, or refines them in a few; reconstructs and restores noisy ones.

    A latent is drawn from the autoencoder's prior and decoded to a structure, which sets every pixel's rate; noise is
    drawn about it, and the network says the clean image, from which the whole trajectory follows in closed form.

    Parameters:
        unet: A `ParallelTrajectoryUNet2DModel`.
        autoencoder: A `ScaleAutoencoder`; `None` for a network without structure, whose images grow from mid-gray.
        scheduler: A `PixelAwareScheduler`.
    """

    model_cpu_offload_seq = "autoencoder->unet"
    _optional_components = ["autoencoder"]
    NO_STRUCTURE = 0.5

    def __init__(self, unet: ModelMixin, autoencoder: ModelMixin | None, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, autoencoder=autoencoder, scheduler=scheduler)
        if not {"precondition", "prior_sample", "tied_noise"} <= set(dir(scheduler)):
            raise ValueError(f"scheduler={type(scheduler).__name__}: expected a PixelAwareScheduler")
        network, steps = plain(unet), scheduler.config.num_train_timesteps
        if not network_takes(network, "structure"):
            raise ValueError(f"unet={type(network).__name__}: expected a ParallelTrajectoryUNet2DModel")
        config = network.config
        if config.use_structure != (autoencoder is not None):
            have = "no" if autoencoder is None else "an"
            raise ValueError(
                f"unet has use_structure={config.use_structure}, with {have} autoencoder: expected both or none"
            )
        _check_setting("unet", config, "num_train_timesteps", steps, "scheduler")
        if autoencoder is None:
            if config.sample_size is None:
                raise ValueError("unet has sample_size=None: expected a size, where there is no autoencoder to say it")
            return
        _check_setting("autoencoder", plain(autoencoder).config, "epsilon", scheduler.config.epsilon, "scheduler")
        _check_setting("autoencoder", plain(autoencoder).config, "num_train_timesteps", steps, "scheduler")
        _check_setting("autoencoder", plain(autoencoder).config, "image_channels", config.image_channels, "unet")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_passes: int = 1,
        mode: Literal["structure", "paper"] | None = None,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list | None = None,
        timestep: int | None = None,
        latents: torch.Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        clip_sample: bool = True,
        reading: Literal["A", "B"] = "A",
        return_trajectory: bool = False,
        trajectory_steps: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ParallelTrajectoryPipelineOutput | tuple:
        r"""
        Args:
            batch_size: Number of images; with `image` or `latents`, theirs.
            num_passes: Network calls, evenly spaced over the timesteps; up to T, which is ancestral sampling.
            mode: "structure", or "paper" for algorithm 1 as printed, which diverges unless its noises are exact (a
                warning says so). By default the scheduler's.
            image: An image to start from, instead of a draw from the prior. With `timestep` 0 it is a clean one (PIL,
                numpy [H, W, C] or [B, H, W, C], or a tensor [B, C, H, W], in [0, 1]), of which only the structure is
                kept: the result is a variation of it, from noise of its own. With a later timestep it is the noisy
                sample x_i, a tensor [B, C, H, W], such as `scheduler.add_noise` makes it, and is restored.
            timestep: Of `image`, a whole number in [0, T]; needed with it.
            latents: [B, Z] of the autoencoder, instead of a draw from its prior.
            timesteps: Of the passes, instead of `num_passes`: descending whole numbers from T, or from the image's
                timestep. A later last pass leaves less blur and, of a network that is hardly trained, more noise.
            eta: Share of fresh noise between passes, in [0, 1]; by default the scheduler's. In mode "paper" the factor
                on algorithm 1's noise.
            clip_sample: Whether each clean estimate is clipped to [epsilon, 1]; not in mode "paper".
            reading: Of algorithm 1's line 9, see `PixelAwareScheduler.step_paper`.
            return_trajectory: Whether to return the states at `trajectory_steps` as well, at no further network call.
            trajectory_steps: Whole numbers in [1, T] up to the first timestep; by default all of them.
            generator: One generator, or one an image: an image does not depend on the others then.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in the scheduler's [epsilon, 1], not clipped.
            return_dict: Whether to return a `ParallelTrajectoryPipelineOutput` or a tuple (images, structure,
                trajectory, trajectory_steps).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each pass, the latents
                being the state that it led to; may return changed tensors. Setting `pipeline._interrupt = True` ends
                the run.

        Raises:
            ValueError: for arguments out of range, before any network call.
        """
        scheduler, device = self.scheduler, self._execution_device
        mode = scheduler.config.mode if mode is None else mode
        first = len(scheduler) if timestep in (None, 0) else timestep
        self._check_call(batch_size, mode, image, timestep, latents)
        scheduler._check_eta(scheduler.config.eta if eta is None else eta)
        scheduler._check_reading(reading)
        times = self._times(num_passes, timesteps, first)
        steps = self._trajectory_steps(return_trajectory, trajectory_steps, first)
        start = self._start(batch_size, image, timestep, latents)
        self._check_request(start.rows, generator, output_type, callback_on_step_end_tensor_inputs)
        if mode == "paper" and len(times) > 1:
            raise ValueError(f"num_passes={len(times)} in mode='paper': expected 1")

        states = []
        with self._running(len(times), callback_on_step_end, callback_on_step_end_tensor_inputs) as run:
            structure = self._structure(start, generator, device)
            if mode == "paper":
                sample, states = self._algorithm_1(start, structure, reading, eta, steps, generator)
                sample, passes = run.after_step(first, sample), []
            else:
                sample, passes = self._begin(start, structure, generator), zip(times, [*times[1:], 0], strict=True)
            for time, next_time in run.going(passes):
                inner = [step for step in steps if next_time < step <= time]
                clean, noises = self._pass(sample, time, structure, inner, clip_sample)
                if inner:
                    states += scheduler.trajectory(clean, noises, inner, structure)
                sample = scheduler.step(
                    clean, time, sample, structure, prev_timestep=next_time, eta=eta, generator=generator
                ).prev_sample
                sample = run.after_step(time, sample)

        output = ParallelTrajectoryPipelineOutput(
            images=self._to_output(sample, output_type),
            structure=self._to_output(structure, output_type),
            trajectory=[self._to_output(state, output_type) for state in states] if steps else None,
            trajectory_steps=steps[: len(states)] or None,
        )
        if not return_dict:
            return (output.images, output.structure, output.trajectory, output.trajectory_steps)
        return output

    def _begin(self, start: TrajectoryStart, structure: torch.Tensor, generator: Generators) -> torch.Tensor:
        """Noise about the structure, or the noisy image."""
        if start.image is None or start.timestep == 0:
            return self.scheduler.prior_sample(structure, generator=generator)
        return start.image.to(structure.device, torch.float32)

    def _pass(
        self, sample: torch.Tensor, time: int, structure: torch.Tensor, inner: list[int], clip_sample: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One network call: the clean estimate, and the noises at the `inner` steps, if there are any."""
        scheduler = self.scheduler
        network_input, skip, scale = scheduler.precondition(sample, time, structure)
        heads = inner if plain(self.unet).config.head != "tied" and inner else None
        output = self._network(network_input, time, structure, heads)
        clean = skip + scale * output.sample.float()
        clean = clean.clamp(scheduler.config.epsilon, 1) if clip_sample else clean
        if not inner:
            return clean, None
        noises = output.noises
        if noises is None:
            noises = scheduler.tied_noise(sample, clean, time, inner, structure)
        return clean, noises.float()

    def _network(self, sample, timestep, structure, steps=None):
        """The network's output; a network without structure is not given one."""
        arguments = {"structure": structure.to(plain(self.unet).dtype)} if plain(self.unet).config.use_structure else {}
        return self.unet(sample.to(plain(self.unet).dtype), timestep, steps=steps, **arguments)

    def _structure(self, start: TrajectoryStart, generator: Generators, device: torch.device) -> torch.Tensor:
        """What the rates follow, [B, C, H, W] in [epsilon, 1]: of the image, of the latents, or of a draw."""
        if self.autoencoder is None:
            shape = (start.rows, plain(self.unet).config.image_channels, *self._size())
            return torch.full(shape, self.NO_STRUCTURE, device=device)
        dtype, latents = plain(self.autoencoder).dtype, start.latents
        if start.image is not None:
            latents = self.autoencoder.encode(start.image.to(device, dtype), start.timestep)[0]
        elif latents is None:
            latents = self.autoencoder.sample_prior(start.rows, generator=generator)
        structure = self.autoencoder.decode(latents.to(device, dtype)).float()
        return self._from_scale(structure) if plain(self.autoencoder).config.output == "scale" else structure

    def _from_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """The image whose x_delta this is (eq. 7 solved for x_0), kept in [epsilon, 1]."""
        config = self.scheduler.config
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (-scale.log() / config.gamma - config.floor).clamp(config.epsilon, 1)

    def _algorithm_1(
        self,
        start: TrajectoryStart,
        structure: torch.Tensor,
        reading: str,
        eta: float | None,
        steps: list[int],
        generator: Generators,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Algorithm 1 as printed: one call of each network, then line 9 for all j. Returns sample and states."""
        scheduler, timestep = self.scheduler, start.timestep
        sample = start.image.to(structure.device, torch.float32)
        every = list(range(1, timestep + 1))
        if plain(self.unet).config.target == "noise":  # line 5
            noises = self._network(sample, timestep, scheduler.image_scale(structure), every).noises.float()
        else:
            network_input, skip, scale = scheduler.precondition(sample, timestep, structure)
            clean = skip + scale * self._network(network_input, timestep, structure).sample.float()
            noises = scheduler.tied_noise(sample, clean, timestep, every, structure)
        gain = (structure.amax() * scheduler.config.gamma / 2).exp().item()
        logger.warning(
            "mode='paper' integrates algorithm 1 of the paper as printed: no prediction depends on the state, so what "
            f"a step adds is divided by sqrt(alpha_bar) in the end, here up to {gain:.2g} times at a pixel, and the "
            "result is mostly noise unless the predictions are exact. mode='structure' generates"
        )
        if not steps:
            return scheduler.collapse(noises, sample, structure, reading, eta, generator), []  # lines 6 to 12
        states = []
        for step in range(timestep, 0, -1):
            states += [sample] if step in steps else []
            sample = scheduler.step_paper(noises[step - 1], step, sample, structure, reading, eta, generator)
        return sample, states

    def _to_output(self, images: torch.Tensor, output_type: str) -> Images:
        """Images [B, C, H, W] in [epsilon, 1] in the form that was asked for."""
        if output_type == "latent":
            return images
        return self._in_unit_range(self.scheduler.from_range(images).clamp(0, 1), output_type)

    def _size(self) -> tuple[int, int]:
        """(height, width) of what is generated."""
        config = plain(self.unet).config if self.autoencoder is None else plain(self.autoencoder).config
        size = config.sample_size
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def _times(self, num_passes: int, timesteps: Sequence[int] | None, start: int) -> list[int]:
        """The timesteps of the passes, descending from the start."""
        if not is_count(num_passes) or num_passes > start:
            raise ValueError(f"num_passes={num_passes!r}: expected a whole number from 1 to {start}")
        if timesteps is None:
            return [round(start * k / num_passes) for k in range(num_passes, 0, -1)]
        if num_passes != 1:
            raise ValueError(f"num_passes={num_passes}, timesteps={list(timesteps)}: expected one of the two")
        times = list(timesteps) if isinstance(timesteps, Sequence) else [timesteps]
        good = all(is_whole(time) for time in times)
        if not good or times != sorted(set(times), reverse=True) or times[:1] != [start] or times[-1] < 1:
            raise ValueError(f"timesteps={times}: expected descending whole numbers from {start} to 1 or more")
        return times

    def _trajectory_steps(self, wanted: bool, steps: Sequence[int] | None, start: int) -> list[int]:
        """The steps to return, descending."""
        if not wanted:
            if steps is not None:
                raise ValueError("trajectory_steps without return_trajectory=True: expected both")
            return []
        if steps is None:
            steps = range(1, start + 1)
        steps = list(steps) if isinstance(steps, Sequence) else [steps]
        good = all(is_whole(step) and 1 <= step <= start for step in steps)
        if not steps or not good or len(set(steps)) < len(steps):
            raise ValueError(f"trajectory_steps={steps}: expected different whole numbers from 1 to {start}")
        return sorted(steps, reverse=True)

    def _check_call(self, batch_size, mode, image, timestep, latents) -> None:
        total = len(self.scheduler)
        check_count("batch_size", batch_size)
        if mode not in ("structure", "paper"):
            raise ValueError(f"mode={mode!r}: expected 'structure' or 'paper'")
        if timestep is not None and not (is_whole(timestep) and 0 <= timestep <= total):
            raise ValueError(f"timestep={timestep!r}: expected a whole number from 0 to {total}")
        if (image is None) != (timestep is None):
            raise ValueError(
                f"image {'without' if timestep is None else 'missing with'} timestep: expected both or none"
            )
        if mode == "paper":
            if not timestep:
                raise ValueError(
                    "mode='paper' needs a noisy image and its timestep from 1 up: algorithm 1 starts from a sample of "
                    "the forward process and defines no other start; expected both, or mode='structure'"
                )
            if self.autoencoder is None:
                raise ValueError("mode='paper' needs an autoencoder, which estimates the image scale")
        elif plain(self.unet).config.target != "clean":
            raise ValueError(
                "mode='structure': this unet predicts noises only; expected mode='paper', as it was trained"
            )
        if latents is not None:
            self._check_latents(latents, image)

    def _check_latents(self, latents: torch.Tensor, image: ImageInput | None) -> None:
        if image is not None or self.autoencoder is None:
            raise ValueError("latents: expected none beside image, or without an autoencoder")
        size = plain(self.autoencoder).config.latent_dim
        fits = isinstance(latents, torch.Tensor) and latents.ndim == 2 and latents.shape[1] == size
        if not fits or not len(latents) or not latents.isfinite().all():
            raise ValueError(f"latents: got {getattr(latents, 'shape', type(latents))}; expected numbers [B, {size}]")

    def _start(
        self, batch_size: int, image: ImageInput | None, timestep: int | None, latents: torch.Tensor | None
    ) -> TrajectoryStart:
        """The image as a tensor [B, C, H, W]: a clean one in [epsilon, 1], a noisy one as it is."""
        if image is None:
            return TrajectoryStart(None, None, latents, batch_size if latents is None else len(latents))
        channels, size = plain(self.unet).config.image_channels, self._size()
        if timestep > 0 and not isinstance(image, torch.Tensor):
            raise ValueError(
                f"image of type {type(image).__name__} at timestep={timestep}: expected a tensor [B, C, H, W]"
            )
        given = read_images(image, channels, any_range=timestep > 0)
        height, width = given.shape[2:]
        if (height, width) != size:
            raise ValueError(f"image is {height}x{width}: expected {size[0]}x{size[1]}, the size of what is generated")
        if timestep == 0:
            given = self.scheduler.to_range(given.float().clamp(0, 1))
        return TrajectoryStart(given, timestep, None, len(given))
