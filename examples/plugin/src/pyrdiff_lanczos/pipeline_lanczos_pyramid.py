"""Pyramidal sampling with a Lanczos up-sampler. This file travels with every saved model, so it stands alone."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo


@dataclass
class LanczosPyramidPipelineOutput(BaseOutput):
    """
    Args:
        images: The top level: PIL images, a numpy array [B, H, W, C] in [0, 1], or a tensor [B, C, H, W] ("pt" in
            [0, 1], "latent" in [-1, 1], not clipped).
        levels: The images of every level, low to high, in the same form; `None` unless `return_levels=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    levels: list | None = None


class LanczosPyramidPipeline(DiffusionPipeline):
    r"""
    Unconditional generation from coarse to fine: the whole reverse process at the lowest resolution, then at each
    higher one only its last part, from the enlarged (Lanczos) and renoised image.

    Parameters:
        unet: A network trained at several resolutions; those in its config are the default levels.
        scheduler: Any scheduler of diffusers with `add_noise`.
        lanczos_lobes (`int`, defaults to 3): Lobes on each side of the kernel.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, lanczos_lobes: int = 3):
        super().__init__()
        if not hasattr(scheduler, "add_noise"):
            raise ValueError(f"scheduler={type(scheduler).__name__}: expected one with `add_noise`")
        if isinstance(lanczos_lobes, bool) or not isinstance(lanczos_lobes, int) or lanczos_lobes < 1:
            raise ValueError(f"lanczos_lobes={lanczos_lobes!r}: expected a whole number from 1 up")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(lanczos_lobes=lanczos_lobes)

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @staticmethod
    def lanczos_matrix(low: int, high: int, lobes: int = 3) -> torch.Tensor:
        """
        Enlarges `low` samples to `high`: row i holds L(x) = sinc(x) sinc(x / lobes) at the distances x of output i from
        the inputs, 0 from x = lobes on, divided by its sum (which differs from 1, most at the borders).

        Returns:
            float64 [high, low]. Pixel k of n lies at (k + 0.5) / n.
        """
        if not 1 <= low <= high:
            raise ValueError(f"low={low}, high={high}: expected 1 <= low <= high; to shrink would need an antialias")
        centres = (torch.arange(high, dtype=torch.float64) + 0.5) * low / high - 0.5
        distances = centres[:, None] - torch.arange(low, dtype=torch.float64)
        weights = torch.sinc(distances) * torch.sinc(distances / lobes) * (distances.abs() < lobes)
        return weights / weights.sum(dim=1, keepdim=True)

    @classmethod
    def enlarge(cls, images: torch.Tensor, size: tuple[int, int], lobes: int = 3) -> torch.Tensor:
        """Images [B, C, h, w] of any range enlarged to [B, C, *size], rows and columns apart."""
        rows, columns = (
            cls.lanczos_matrix(low, high, lobes).to(images) for low, high in zip(images.shape[-2:], size, strict=True)
        )
        return rows @ images @ columns.mT

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        resolutions: Sequence[int | tuple[int, int]] | None = None,
        num_inference_steps: int = 100,
        refine_steps: int = 8,
        refine_strength: float = 0.3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_levels: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LanczosPyramidPipelineOutput | tuple:
        """
        Args:
            batch_size: Number of images.
            resolutions: The levels, low to high, each an int or (height, width); by default those of training.
            num_inference_steps: Scheduler steps at the lowest level.
            refine_steps: Scheduler steps at each higher level.
            refine_strength: Share in (0, 1] of the noise process that a higher level starts from, or the scheduler's
                next step below it.
            generator: One generator, or one an image: image k then does not depend on the others.
            output_type: "pil", "np" and "pt" in [0, 1], or "latent" in [-1, 1].
            return_levels: Whether to return the images of every level.
            return_dict: Whether to return a `LanczosPyramidPipelineOutput` or a tuple (images, levels).
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": ...}) after each step, counted over
                all levels; may return changed tensors. Setting `pipeline._interrupt = True` ends the run.

        Raises:
            ValueError: for arguments out of range, before any work.
        """
        # 1. Check, and lay out the levels.
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        device, dtype, scheduler = self._execution_device, self.unet.dtype, self.scheduler
        sizes = self._level_sizes(resolutions)
        runs = [("num_inference_steps", num_inference_steps, 1.0)]
        runs += [("refine_steps", refine_steps, refine_strength)] * (len(sizes) - 1)
        self._num_timesteps = sum(len(self._set_timesteps(*run, device)) for run in runs)
        self._interrupt, step, latents, levels = False, 0, None, []
        step_arguments = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

        with self.progress_bar(total=self._num_timesteps) as progress:
            for size, run in zip(sizes, runs, strict=True):
                if self.interrupt:
                    break
                timesteps = self._set_timesteps(*run, device)
                shape = (batch_size, self.unet.config.in_channels, *size)
                noise = randn_tensor(shape, generator=generator, device=device)

                # 2. Noise at the lowest level; above, the enlarged image, renoised.
                if latents is None:
                    latents = noise * scheduler.init_noise_sigma
                else:
                    latents = self.enlarge(latents, size, self.config.lanczos_lobes)
                    latents = scheduler.add_noise(latents, noise, timesteps[:1].expand(batch_size))

                # 3. The reverse process.
                for timestep in timesteps:
                    if self.interrupt:
                        continue
                    model_input = scheduler.scale_model_input(latents, timestep).to(dtype)
                    prediction = self.unet(model_input, timestep, return_dict=False)[0].float()
                    latents = scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                        changed = callback_on_step_end(self, step, timestep, tensors) or {}
                        latents = changed.pop("latents", latents)
                    step += 1
                    progress.update()

                if return_levels:
                    levels.append(self._to_output(latents, output_type))

        # 4. From [-1, 1] to what was asked for.
        images = self._to_output(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, levels if return_levels else None)
        return LanczosPyramidPipelineOutput(images=images, levels=levels if return_levels else None)

    def _level_sizes(self, resolutions: Sequence | None) -> list[tuple[int, int]]:
        """The levels as (height, width); raises unless they grow and the network can run at them."""
        resolutions = list(resolutions or self.unet.config.resolutions or [])
        sizes = [tuple(size) if isinstance(size, Sequence) else (size, size) for size in resolutions]
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        fits = all(side > 0 and side % multiple == 0 for size in sizes for side in size)
        grows = all(low[0] <= high[0] and low[1] <= high[1] for low, high in zip(sizes, sizes[1:], strict=False))
        if not (sizes and fits and grows):
            raise ValueError(f"resolutions={resolutions}: expected sizes, low to high, of multiples of {multiple}")
        return sizes

    def _set_timesteps(self, name: str, steps: int, strength: float, device) -> torch.Tensor:
        """Readies the scheduler for the last `steps` steps of those that would be the whole process at that pace."""
        if not 0 < strength <= 1:
            raise ValueError(f"refine_strength={strength}: expected a number in (0, 1]")
        most = int(strength * self.scheduler.config.num_train_timesteps)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise ValueError(f"{name}={steps}: expected 1 to {most}, the training steps up to strength {strength}")
        whole = int(steps / strength)
        self.scheduler.set_timesteps(whole, device=device)
        begin = (whole - steps) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:]

    def _check_inputs(self, batch_size, generator, output_type, callback_inputs) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected a whole number from 1 up")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries: expected one, or batch_size={batch_size}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        if not set(callback_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs={list(callback_inputs)}: expected ['latents'] or []")

    def _to_output(self, latents: torch.Tensor, output_type: str):
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    # The two below are those of pyrdiff's own pipelines; every pipeline file carries them.

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads wherever diffusers
        is installed: stock `save_pretrained`, then the source files of this class and of the components that are not
        part of diffusers, and an index that names them. The arguments are those of `DiffusionPipeline`.
        """
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        for name, part in {"": self, **self.components}.items():
            part_class = type(getattr(part, "_orig_mod", part))  # of a compiled network, the network
            if part is not None and part_class.__module__.split(".")[0] not in ("diffusers", "transformers"):
                source = Path(inspect.getfile(part_class))
                shutil.copyfile(source, folder / name / source.name)
                index[name or "_class_name"] = [source.stem, part_class.__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in [folder / self.config_name, *folder.glob("*/*config.json")]:  # no trace of where it was loaded from
            config = json.loads(path.read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_module")}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            private, token = hub_arguments.pop("private", None), hub_arguments.get("token")
            repo_id = hub_arguments.pop("repo_id", folder.name)
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            self._upload_folder(folder, repo_id, **hub_arguments)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """
        As stock, but an index that names source files of the folder (see `save_pretrained`) is read as naming the
        modules of the same names that are imported from this class's package or from pyrdiff, where the network lives:
        `from_pretrained` of this class then runs no code from the folder and needs no trust flag.
        """
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        package = cls.__module__.split(".")[0]
        packages = (package,) if package == "diffusers_modules" else (package, "pyrdiff")
        for name, value in index.items():
            if not (isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)):
                continue
            for module in list(sys.modules):
                if module.split(".")[0] in packages and module.split(".")[-1] == value[0]:
                    index[name] = value[1] if name == "_class_name" else [module, value[1]]
        return config
