"""Generation by the parallel trajectory (paper X): a structure, noise about it, and one network call from there."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging

from pyrdiff.parts.saving import StandaloneSaving

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


class ParallelTrajectoryPipeline(StandaloneSaving, DiffusionPipeline):
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
    _callback_tensor_inputs = ["latents"]
    NO_STRUCTURE = 0.5

    def __init__(self, unet: ModelMixin, autoencoder: ModelMixin | None, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, autoencoder=autoencoder, scheduler=scheduler)
        if not {"precondition", "prior_sample", "tied_noise"} <= set(dir(scheduler)):
            raise ValueError(f"scheduler={type(scheduler).__name__}: expected a PixelAwareScheduler")
        config = self._plain(unet).config
        if "structure" not in inspect.signature(self._plain(unet).forward).parameters:
            raise ValueError(f"unet={type(self._plain(unet)).__name__}: expected a ParallelTrajectoryUNet2DModel")
        if config.use_structure != (autoencoder is not None):
            have = "no" if autoencoder is None else "an"
            raise ValueError(
                f"unet has use_structure={config.use_structure}, with {have} autoencoder: expected both or none"
            )
        if config.num_train_timesteps != scheduler.config.num_train_timesteps:
            raise ValueError(
                f"unet has num_train_timesteps={config.num_train_timesteps}: expected the scheduler's "
                f"{scheduler.config.num_train_timesteps}"
            )
        if autoencoder is not None and autoencoder.config.epsilon != scheduler.config.epsilon:
            raise ValueError(
                f"autoencoder has epsilon={autoencoder.config.epsilon}: expected the scheduler's "
                f"{scheduler.config.epsilon}"
            )
        if autoencoder is None and config.sample_size is None:
            raise ValueError("unet has sample_size=None: expected a size, where there is no autoencoder to say it")
        if autoencoder is not None and autoencoder.config.num_train_timesteps != len(scheduler):
            raise ValueError(
                f"autoencoder has num_train_timesteps={autoencoder.config.num_train_timesteps}: expected the "
                f"scheduler's {len(scheduler)}"
            )
        if autoencoder is not None and autoencoder.config.image_channels != config.image_channels:
            raise ValueError(
                f"autoencoder has image_channels={autoencoder.config.image_channels}: expected the unet's "
                f"{config.image_channels}"
            )

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

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
        # 1. Check.
        scheduler = self.scheduler
        mode = scheduler.config.mode if mode is None else mode
        start = len(scheduler) if timestep in (None, 0) else timestep
        self._check_inputs(
            batch_size, mode, image, timestep, latents, generator, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        scheduler._check_eta(scheduler.config.eta if eta is None else eta)
        scheduler._check_reading(reading)
        times = self._times(num_passes, timesteps, start)
        steps = self._trajectory_steps(return_trajectory, trajectory_steps, start)
        given = None if image is None else self._image(image, timestep)
        rows = batch_size if given is None and latents is None else len(given if latents is None else latents)
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"generator has {len(generator)} entries: expected one, or one for each of {rows}")
        self._interrupt, self._num_timesteps = False, len(times)
        if mode == "paper":
            if len(times) > 1:
                raise ValueError(f"num_passes={len(times)} in mode='paper': expected 1")
            return self._paper(given, timestep, reading, eta, steps, generator, output_type, return_dict)

        # 2. The structure: of a latent, or of the image.
        device = self._execution_device
        structure = self._structure(rows, given, timestep, latents, generator, device)

        # 3. The start: noise about the structure, or the noisy image.
        if given is None or timestep == 0:
            sample = scheduler.prior_sample(structure, generator=generator)
        else:
            sample = given.to(device, torch.float32)
        times = [*times, 0]

        # 4. The passes: the clean estimate, the states that follow from it, and the step to the next pass.
        lowest, states = scheduler.config.epsilon, []
        with self.progress_bar(total=len(times) - 1) as progress:
            for index, (time, next_time) in enumerate(zip(times, times[1:], strict=False)):
                if self.interrupt:
                    continue
                inner = [step for step in steps if next_time < step <= time]
                network_input, skip, scale = scheduler.precondition(sample, time, structure)
                heads = inner if self.unet.config.head != "tied" and inner else None
                output = self._network(network_input, time, structure, heads)
                clean = skip + scale * output.sample.float()
                clean = clean.clamp(lowest, 1) if clip_sample else clean
                if inner:
                    noises = output.noises
                    if noises is None:
                        noises = scheduler.tied_noise(sample, clean, time, inner, structure)
                    states += scheduler.trajectory(clean, noises.float(), inner, structure)
                sample = scheduler.step(
                    clean, time, sample, structure, prev_timestep=next_time, eta=eta, generator=generator
                ).prev_sample
                if callback_on_step_end is not None:
                    tensors = {"latents": sample} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, index, time, tensors) or {}
                    sample = changed.pop("latents", sample)
                progress.update()

        # 5. From [epsilon, 1] to what was asked for.
        return self._output(sample, structure, states, steps, output_type, return_dict)

    def _network(self, sample, timestep, structure, steps=None):
        """The network's output; a network without structure is not given one."""
        arguments = {"structure": structure.to(self.unet.dtype)} if self.unet.config.use_structure else {}
        return self.unet(sample.to(self.unet.dtype), timestep, steps=steps, **arguments)

    def _structure(self, rows, image, timestep, latents, generator, device) -> torch.Tensor:
        """What the rates follow, [rows, C, H, W] in [epsilon, 1]."""
        if self.autoencoder is None:
            shape = (rows, self.unet.config.image_channels, *self._size())
            return torch.full(shape if image is None else image.shape, self.NO_STRUCTURE, device=device)
        if image is not None:
            latents = self.autoencoder.encode(image.to(device, self.autoencoder.dtype), timestep)[0]
        elif latents is None:
            latents = self.autoencoder.sample_prior(rows, generator=generator)
        structure = self.autoencoder.decode(latents.to(device, self.autoencoder.dtype)).float()
        if self.autoencoder.config.output == "scale":
            structure = self._from_scale(structure)
        return structure

    def _from_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """The image whose x_delta this is (eq. 7 solved for x_0), kept in [epsilon, 1]."""
        config = self.scheduler.config
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (-scale.log() / config.gamma - config.floor).clamp(config.epsilon, 1)

    def _paper(self, image, timestep, reading, eta, steps, generator, output_type, return_dict):
        """Algorithm 1: one call of each network, then line 9 for all j with the same predictions."""
        scheduler, device = self.scheduler, self._execution_device
        sample = image.to(device, torch.float32)
        structure = self._structure(len(sample), image, timestep, None, generator, device)  # line 1
        every = list(range(1, timestep + 1))
        if self.unet.config.target == "noise":  # line 5
            scale = scheduler.image_scale(structure)
            noises = self._network(sample, timestep, scale, every).noises.float()
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
        states = []
        if not steps:
            sample = scheduler.collapse(noises, sample, structure, reading, eta, generator)  # lines 6 to 12
        else:
            for step in range(timestep, 0, -1):
                states += [sample] if step in steps else []
                sample = scheduler.step_paper(noises[step - 1], step, sample, structure, reading, eta, generator)
        return self._output(sample, structure, states, steps, output_type, return_dict)

    def _output(self, sample, structure, states, steps, output_type, return_dict):
        images, structure = self._to_output(sample, output_type), self._to_output(structure, output_type)
        trajectory = [self._to_output(state, output_type) for state in states] if steps else None
        result = (images, structure, trajectory, steps[: len(states)] or None)
        self.maybe_free_model_hooks()
        return ParallelTrajectoryPipelineOutput(*result) if return_dict else result

    def _to_output(self, images: torch.Tensor, output_type: str):
        if output_type == "latent":
            return images
        images = self.scheduler.from_range(images).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def _size(self) -> tuple[int, int]:
        """(height, width) of what is generated."""
        config = self.unet.config if self.autoencoder is None else self.autoencoder.config
        size = config.sample_size
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def _times(self, num_passes: int, timesteps: Sequence[int] | None, start: int) -> list[int]:
        """The timesteps of the passes, descending from the start."""
        if not self._is_count(num_passes) or num_passes > start:
            raise ValueError(f"num_passes={num_passes!r}: expected a whole number from 1 to {start}")
        if timesteps is None:
            return [round(start * k / num_passes) for k in range(num_passes, 0, -1)]
        if num_passes != 1:
            raise ValueError(f"num_passes={num_passes}, timesteps={list(timesteps)}: expected one of the two")
        times = list(timesteps) if isinstance(timesteps, Sequence) else [timesteps]
        good = all(isinstance(time, int) and not isinstance(time, bool) for time in times)
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
        good = all(isinstance(step, int) and not isinstance(step, bool) and 1 <= step <= start for step in steps)
        if not steps or not good or len(set(steps)) < len(steps):
            raise ValueError(f"trajectory_steps={steps}: expected different whole numbers from 1 to {start}")
        return sorted(steps, reverse=True)

    def _check_inputs(self, batch_size, mode, image, timestep, latents, generator, output_type, tensor_inputs) -> None:
        total = len(self.scheduler)
        if not self._is_count(batch_size):
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number from 1 up")
        if mode not in ("structure", "paper"):
            raise ValueError(f"mode={mode!r}: expected 'structure' or 'paper'")
        whole = isinstance(timestep, int) and not isinstance(timestep, bool)
        if timestep is not None and not (whole and 0 <= timestep <= total):
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
        elif self.unet.config.target != "clean":
            raise ValueError(
                "mode='structure': this unet predicts noises only; expected mode='paper', as it was trained"
            )
        if latents is not None:
            if image is not None or self.autoencoder is None:
                raise ValueError("latents: expected none beside image, or without an autoencoder")
            size = self.autoencoder.config.latent_dim
            fits = isinstance(latents, torch.Tensor) and latents.ndim == 2 and latents.shape[1] == size
            if not fits or not len(latents) or not latents.isfinite().all():
                raise ValueError(
                    f"latents: got {getattr(latents, 'shape', type(latents))}; expected numbers [B, {size}]"
                )
        each = generator if isinstance(generator, list) else [generator] if generator is not None else []
        if not all(isinstance(one, torch.Generator) for one in each):
            raise ValueError(
                f"generator of type {type(generator).__name__}: expected a torch.Generator or a list of them"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={list(tensor_inputs)}: expected a subset of "
                f"{self._callback_tensor_inputs}"
            )

    def _image(self, image, timestep: int) -> torch.Tensor:
        """The image that was given, [B, C, H, W]: a clean one in [epsilon, 1], a noisy one as it is."""
        channels, size = self.unet.config.image_channels, self._size()
        if timestep > 0 and not isinstance(image, torch.Tensor):
            raise ValueError(
                f"image of type {type(image).__name__} at timestep={timestep}: expected a tensor [B, C, H, W]"
            )
        if isinstance(image, (list, tuple)):
            if not image:
                raise ValueError("image: expected one or more images")
            return torch.cat([self._image(each, timestep) for each in image])
        if isinstance(image, PIL.Image.Image):
            mode = {1: "L", 3: "RGB"}.get(channels)
            if image.mode != mode:
                raise ValueError(f"image is in mode {image.mode}: expected {mode}; see `Image.convert`")
            image = np.array(image, dtype=np.float32) / 255
            image = image[..., None] if image.ndim == 2 else image
        if isinstance(image, np.ndarray):
            if image.ndim not in (3, 4) or image.dtype.kind != "f":
                raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected float [B, H, W, C] in [0, 1]")
            image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
        if not isinstance(image, torch.Tensor):
            raise ValueError(f"image of type {type(image).__name__}: expected PIL, numpy or torch, or a list of them")
        image = image[None] if image.ndim == 3 else image
        fits = image.ndim == 4 and tuple(image.shape[1:]) == (channels, *size) and len(image) > 0
        if not fits or not image.is_floating_point():
            raise ValueError(
                f"image: got {image.dtype} {list(image.shape)}; expected float [B, {channels}, {size[0]}, {size[1]}]"
            )
        lowest, highest = image.amin().item(), image.amax().item()
        if not math.isfinite(lowest + highest):
            raise ValueError("image has values that are no numbers or infinite")
        if timestep > 0:
            return image
        if not (-1e-6 <= lowest and highest <= 1 + 1e-6):
            raise ValueError(f"image has values from {lowest:.3g} to {highest:.3g}: expected [0, 1]")
        return self.scheduler.to_range(image.float().clamp(0, 1))

    @staticmethod
    def _is_count(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    @staticmethod
    def _plain(module: torch.nn.Module) -> torch.nn.Module:
        """The module inside a compiled one."""
        return getattr(module, "_orig_mod", module)
