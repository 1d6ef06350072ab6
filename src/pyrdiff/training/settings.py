"""The flags that every training script has, named as in diffusers' `train_unconditional.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal


class TrainingStopped(Exception):
    """A signal ended training after a checkpoint was saved; the exit code is 128 + its number."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by signal {signal_number} after step {step}; the same command resumes")
        self.exit_code = 128 + signal_number


class TrainingDiverged(RuntimeError):
    """The loss or the gradient was not finite."""


SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.01, 0.28  # of the weights, as shares of a training: a plain mean has 0.289


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of a size such as "64" or "48x64"; None for anything else."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        return None
    return int(sides[0]), int(sides[-1])


@dataclass(kw_only=True)
class TrainingSettings:
    """Flags of every training script."""

    class_labels: ClassVar[bool] = False  # whether the images' classes are trained on
    allow_enlarging: ClassVar[bool] = True  # whether images smaller than the resolution may be trained on
    generates: ClassVar[bool] = True  # whether whole images are drawn, of which it takes more than a few
    level_share: ClassVar[tuple[int, ...] | None] = None  # as `MultiScaleBatches` takes it
    start_name: ClassVar[str] = "started from"  # on the card, what `init_from` is to the model

    train_data_dir: str | None = None
    """Folder of images (searched recursively), an .npz or .npy array, or "glyphs" for the embedded letters."""
    dataset_name: str | None = None
    """Data set on the Hub, instead of a folder."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    image_column: str | None = None
    """Its image column; by default the only one."""
    array_key: str | None = None
    """The array to take from an .npz file; by default the only one of images, or x_train."""
    init_from: str | None = None
    """Begin with the weights of a trained network instead of random ones: folder or repository of a pipeline (of this
    method or stock diffusion), a finished training, a checkpoint folder or a bundled model. Its architecture stays."""
    lora_rank: int | None = None
    """With init_from: train an adapter (LoRA) of this rank, a small file that is loaded over that model, instead of all
    its weights; 4 to 32 are usual."""
    output_dir: str = "runs/model"
    """Checkpoints, samples, log.jsonl, and the finished pipeline in its folder `pipeline` (an adapter: `adapter`)."""
    resolution: tuple[str, ...] = ("64",)
    """Size of the images, a number or HEIGHTxWIDTH."""
    patch_size: int | None = None
    """Train on windows of this size instead of whole images."""
    image_channels: Literal[1, 3] = 3
    """3 for colour, 1 for gray."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour (0 to 255) that transparent images are laid on."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do with a file that cannot be read: stop, or name it and go on."""
    cache_dir: str | None = None
    """Keep the decoded images here, memory-mapped, instead of in memory."""
    random_flip: bool = False
    """Mirror half of the images left to right."""
    train_batch_size: int = 48
    """Images a step and process at the lowest resolution; higher ones get fewer, so that the pixels stay the same."""
    max_train_steps: int = 10_000
    """Optimiser steps."""
    minutes: float | None = None
    """Instead of max_train_steps: train as many steps as fit, and be saved within this time."""
    gradient_accumulation_steps: int = 1
    """Batches added up to one optimiser step."""
    learning_rate: float = 1e-4
    lr_scheduler: Literal["cosine", "constant", "constant_with_warmup", "linear"] = "cosine"
    lr_warmup_steps: int = 100
    """Optimiser steps over which the rate rises from 0."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_ema: bool = True
    """Sample with and publish an exponential moving average of the weights."""
    ema_max_decay: float = 0.9999
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    keep_averages: bool = False
    """Keep what averages of the weights of any length can be made of afterwards, by `pyrdiff ema`: up to 17 copies of
    two averages, in the folder `averages`."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """By default what `accelerate config` says."""
    channels_last: bool | None = None
    """Memory layout of the network; by default on GPUs, where it is the faster one."""
    compile: bool = False
    """torch.compile the network: worth it for runs of an hour and more."""
    checkpointing_steps: int = 500
    """Optimiser steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Checkpoints kept."""
    resume_from_checkpoint: str = "latest"
    """"latest" (the newest that verifies, or a fresh start), a checkpoint folder, or "none" (refuses a used folder)."""
    save_images_steps: int = 1000
    """Optimiser steps between sample grids; 0 for none."""
    eval_batch_size: int = 8
    """Images in a sample grid."""
    logging_steps: int = 10
    """Optimiser steps between lines of log.jsonl."""
    report_to: str | None = None
    """Tracker of accelerate beside log.jsonl: tensorboard, wandb, comet_ml, all ..."""
    seed: int = 0
    push_to_hub: bool = False
    """Publish the finished pipeline on the Hub (log in before: hf auth login, or HF_TOKEN)."""
    hub_model_id: str | None = None
    """Repository, user/name; by default the name of output_dir, in your own account."""
    hub_private_repo: bool = False
    """Make a new repository private."""
    license: str | None = None
    """Licence identifier of the model for its card, such as apache-2.0."""
    data_description: str | None = None
    """For the model card: what the images are, and their licence."""

    def __post_init__(self):
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("expected one of train_data_dir and dataset_name")
        self._at_least(1, "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps")
        self._at_least(1, "checkpoints_total_limit", "eval_batch_size", "logging_steps", "patch_size", "lora_rank")
        self._at_least(0, "lr_warmup_steps", "save_images_steps", "seed", "adam_weight_decay")
        self._above_zero("learning_rate", "max_grad_norm", "adam_epsilon", "minutes")
        for name in ("adam_beta1", "adam_beta2", "ema_max_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._check("resolution", len(self.sizes) > 0, "at least one size")
        self._check("hub_model_id", self.hub_model_id is None or self.push_to_hub, "none without push_to_hub")
        if self.lora_rank is not None:
            self._check("init_from", self.init_from is not None, "the model that the adapter is for, with lora_rank")
            self._check("push_to_hub", not self.push_to_hub, "False with lora_rank; hf upload publishes an adapter")
        self._check("background", all(0 <= value <= 255 for value in self.background), "numbers from 0 to 255")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`resolution` as (height, width) pairs."""
        sizes = []
        for text in self.resolution:
            size = parse_size(str(text))
            self._check("resolution", size is not None, "numbers such as 64, or 48x64 for height x width")
            sizes.append(size)
        return sizes

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of what is trained on at the largest size: whole images, or windows of them."""
        return tuple(min(side, self.patch_size or side) for side in self.sizes[-1])

    def _check(self, name: str, good: bool, expected: str) -> None:
        """Refuses a flag's value, and says what is expected."""
        if not good:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def _at_least(self, least: int, *names: str) -> None:
        """Refuses numbers below `least`."""
        for name in names:
            self._check_number(name, lambda value: value >= least, f"{least} or more")

    def _above_zero(self, *names: str) -> None:
        """Refuses what is not a number above 0."""
        for name in names:
            self._check_number(name, lambda value: 0 < value < float("inf"), "a number above 0")

    def _check_number(self, name: str, accepts: Callable[[float], bool], expected: str) -> None:
        """As `_check`; None is accepted where it is the default."""
        value = getattr(self, name)
        may_be_left_out = self.__dataclass_fields__[name].default is None
        self._check(name, may_be_left_out if value is None else accepts(value), expected)
