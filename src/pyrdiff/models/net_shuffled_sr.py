"""Network of super-resolution that works on squares of pixels as channels: a call costs what the small image costs."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from pyrdiff.parts.batch import check_batch, one_for_each
from pyrdiff.parts.presets import Presets
from pyrdiff.parts.settings import check_whole, checked_factors, is_whole
from pyrdiff.parts.sources import KeepsSource

PRESETS = {
    # Photographs x2 or x4, in an hour or more on a CPU: 2.6M parameters.
    "mini": dict(block_out_channels=(64, 128), layers_per_block=(3, 6)),
    # The same on a GPU: 14M.
    "small": dict(block_out_channels=(96, 256), layers_per_block=(4, 10)),
    # 8 -> 32 in minutes on a CPU: 0.2M.
    "tiny": dict(block_out_channels=(32, 48), layers_per_block=(1, 2)),
}


class ConditionedBlock(nn.Module):
    """Two convolutions beside an identity, and between them a scale and a shift of each channel by the conditions."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(embedding_dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # Near the identity at first, with conditions that change nothing: there is no norm to keep the values in range.
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.condition(embedding)[:, :, None, None].chunk(2, dim=1)
        return hidden + self.conv2(F.silu(torch.addcmul(shift, self.conv1(hidden), 1 + scale)))


class ShuffledSRModel(KeepsSource, Presets, ModelMixin, ConfigMixin):
    r"""
    Predicts a residual or an image, given the enlarged low-resolution image, as `ResidualSRUNet2DModel` does. Squares
    of 4x4 pixels are the channels of one place (pixel unshuffle, Shi et al. 2016, arXiv:1609.05158), so that at x4 the
    convolutions run on the grid of the small image. There are two levels and no norms: what the network makes of a
    place depends on the pixels around it only.

    It can be told how much detail to make up and how much damage to undo, if it was trained so (loss-conditional
    training, Dosovitskiy and Djolonga 2020).

    Args:
        image_channels: Channels of the image.
        scale_factors: The factors that the network is trained to enlarge by.
        sample_size: What it was trained on.
        block_out_channels: Channels on the grid, multiples of 4, and at half of it.
        layers_per_block: Blocks on the grid, before and again after those at half of it; and blocks at half of it.
        embedding_dim: Of what it is told.
        sees_sample: False for a network of one call, to which the noisy image and its noise level say nothing.
        in_channels, out_channels: `image_channels` or None. In the config they are `image_channels`.

    Height and width of a sample must be multiples of 8.

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS
    CELL = 4
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        scale_factors: tuple[int, ...] | None = None,
        sample_size: int | tuple[int, int] | None = None,
        block_out_channels: tuple[int, int] = (64, 128),
        layers_per_block: tuple[int, int] = (3, 6),
        embedding_dim: int = 64,
        sees_sample: bool = True,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        check_whole(self.config, "image_channels", "embedding_dim")
        for name in ("block_out_channels", "layers_per_block"):
            given = self.config[name]
            good = isinstance(given, (list, tuple)) and len(given) == 2
            if not good or not all(is_whole(value) and value >= 1 for value in given):
                raise ValueError(f"{name}={given!r}: expected two whole numbers from 1 up")
        if block_out_channels[0] % 4:
            raise ValueError(f"block_out_channels={tuple(block_out_channels)}: expected a multiple of 4 first")
        for name, given in (("in_channels", in_channels), ("out_channels", out_channels)):
            if given not in (None, image_channels):
                raise ValueError(f"{name}={given}: expected image_channels={image_channels} or None")
        factors = checked_factors(scale_factors)
        self.register_to_config(in_channels=image_channels, out_channels=image_channels, scale_factors=factors)

        (outer, inner), (around, inside) = block_out_channels, layers_per_block
        pixels = image_channels * self.CELL**2
        self.condition_embedding = nn.Sequential(
            nn.Linear(3, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(2 * pixels if sees_sample else pixels, outer, 3, padding=1)
        self.down_blocks = nn.ModuleList(ConditionedBlock(outer, embedding_dim) for _ in range(around))
        self.downsample = nn.Conv2d(4 * outer, inner, 1)
        self.mid_blocks = nn.ModuleList(ConditionedBlock(inner, embedding_dim) for _ in range(inside))
        self.upsample = nn.Conv2d(inner, 4 * outer, 1)
        self.up_blocks = nn.ModuleList(ConditionedBlock(outer, embedding_dim) for _ in range(around))
        self.conv_up1 = nn.Conv2d(outer, 2 * outer, 3, padding=1)
        self.conv_up2 = nn.Conv2d(outer // 2, outer, 3, padding=1)
        self.conv_out = nn.Conv2d(outer // 4, image_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        noise_level: torch.Tensor | float,
        low_res: torch.Tensor,
        detail: torch.Tensor | float = 1.0,
        restore: torch.Tensor | float = 0.0,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """
        Args:
            sample: [B, C, H, W], the noisy residual or image; with `sees_sample=False` its shape alone counts.
            noise_level: sqrt(gamma), the signal's share of `sample`: a number in (0, 1] or [B].
            low_res: [B, C, H, W], the low-resolution image enlarged to the sample's size, in [-1, 1].
            detail: Weight of the perceptual loss in [0, 1] that it was trained with: a number or [B].
            restore: Strength in [0, 1] of the damage that the low-resolution image has: a number or [B].
            return_dict: False for a tuple instead of a `UNet2DOutput`.

        Returns:
            The prediction, [B, C, H, W].

        Raises:
            ValueError: if the shapes do not fit.
        """
        if low_res.shape != sample.shape:
            raise ValueError(f"low_res has shape {tuple(low_res.shape)}: expected the sample's {tuple(sample.shape)}")
        check_batch(sample, self.config.image_channels, 2 * self.CELL)

        # 1. What it is told.
        told = {"noise_level": noise_level, "detail": detail, "restore": restore}
        if not self.config.sees_sample:
            told["noise_level"] = sample.new_zeros(())
        numbers = [one_for_each(name, value, sample) for name, value in told.items()]
        told = [each.to(sample.device, non_blocking=True).expand(len(sample)) for each in numbers]
        embedding = self.condition_embedding(torch.stack(told, dim=1).to(sample.dtype))

        # 2. The images, squares of pixels as channels.
        images = (sample, low_res.to(sample.dtype)) if self.config.sees_sample else (low_res.to(sample.dtype),)
        hidden = self.conv_in(F.pixel_unshuffle(torch.cat(images, dim=1), self.CELL))

        # 3. The grid, half of it, the grid again.
        hidden = self._through(self.down_blocks, hidden, embedding)
        middle = self._through(self.mid_blocks, self.downsample(F.pixel_unshuffle(hidden, 2)), embedding)
        hidden = hidden + F.pixel_shuffle(self.upsample(middle), 2)
        hidden = self._through(self.up_blocks, hidden, embedding)

        # 4. Out, in two steps.
        hidden = F.silu(F.pixel_shuffle(self.conv_up1(hidden), 2))
        output = self.conv_out(F.silu(F.pixel_shuffle(self.conv_up2(hidden), 2)))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _through(self, blocks: nn.ModuleList, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, embedding)
            else:
                hidden = block(hidden, embedding)
        return hidden
