"""UNet of SR4 (paper S, fig. 2) and of SR3: it sees the noisy image, the enlarged input and the noise level."""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel  # noqa: F401  (ModelMixin: diffusers looks it up in this namespace)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from pyrdiff.parts.batch import check_batch, one_for_each
from pyrdiff.parts.jumps import check_jumps
from pyrdiff.parts.presets import Presets, unet_arguments
from pyrdiff.parts.settings import check_choices, check_whole, checked_factors
from pyrdiff.parts.sources import KeepsSource

PRESETS = {
    # Paper S, fig. 2, and its base, SR3 at 16 -> 128: 6 -> 64 ... 512 channels down to 8x8.
    "paper": dict(block_out_channels=(64, 128, 256, 512, 512), layers_per_block=2, dropout=0.2),
    # 16 -> 64 or windows of photographs, in minutes on a GPU.
    "small": dict(block_out_channels=(64, 128, 192, 256)),
    # 16 -> 64 in an hour on a CPU.
    "mini": dict(block_out_channels=(32, 64, 96, 128), norm_num_groups=8),
    # 8 -> 32 in minutes on a CPU.
    "tiny": dict(block_out_channels=(32, 64, 96), norm_num_groups=8),
}


class LowResInjection(nn.Module):
    """
    What the low-resolution image adds to the middle layers (section 6): its features at `2 ** halvings` times fewer
    pixels a side, projected for each place that they are added to.

    Args:
        scheme: How it is made smaller: "conv_stack" by convolutions of stride 2 with activations, "large_kernel" by
            one convolution, "direct" by taking every n-th pixel, "bicubic" by resampling.
        image_channels: Channels of the image.
        channels: Of the features at each place.
        halvings: Number of halvings between the image and the places, 0 or more.
    """

    def __init__(self, scheme: str, image_channels: int, channels: tuple[int, ...], halvings: int):
        super().__init__()
        self.scheme, self.stride, width = scheme, 2**halvings, channels[0]
        features = image_channels
        if scheme == "conv_stack":
            layers = [nn.Conv2d(image_channels, width // 2, 3, padding=1), nn.SiLU()]
            features = width // 2
            for _ in range(halvings):
                layers += [nn.Conv2d(features, width, 3, stride=2, padding=1), nn.SiLU()]
                features = width
            self.reduce = nn.Sequential(*layers)
        elif scheme == "large_kernel":
            self.reduce = nn.Conv2d(image_channels, width, 2 * self.stride + 1, stride=self.stride, padding=self.stride)
            features = width
        self.project = nn.ModuleList(nn.Conv2d(features, count, 1) for count in channels)

    def forward(self, low_res: torch.Tensor) -> list[torch.Tensor]:
        """Features [B, c, H / stride, W / stride] for each place, of the enlarged input [B, C, H, W]."""
        if self.scheme == "direct":
            low_res = low_res[..., self.stride // 2 :: self.stride, self.stride // 2 :: self.stride]
        elif self.scheme == "bicubic":
            size = [side // self.stride for side in low_res.shape[-2:]]
            low_res = F.interpolate(low_res.float(), size, mode="bicubic", antialias=True).to(low_res.dtype)
        else:
            low_res = self.reduce(low_res)
        return [project(low_res) for project in self.project]


class ResidualSRUNet2DModel(KeepsSource, Presets, PeftAdapterMixin, UNet2DModel):
    r"""
    `UNet2DModel` that predicts the noise of a residual or an image, given the low-resolution image (paper S).

    The default is SR4. The network of SR3 is `low_res_injection=None, attention="16x16"`, trained with a linear
    schedule on images. The names of sizes are the paper's, for 128x128 images and five levels. For other images, too,
    "16x16" is the level above the lowest and "middle" (8x8) is the lowest.

    Args:
        image_channels: Channels of the image. The network's first layer has twice as many.
        low_res_injection: How the low-resolution image reaches the two places at the level above the lowest, on the way
            down and on the way up (section 6): "conv_stack", "direct", "bicubic" or "large_kernel"; None for not at
            all.
        attention: Where there is self-attention: in the "middle", or at "16x16" as in SR3.
        input_fusion: How the input joins the noisy image: "concat", or "attention" (section 5.1), which first weighs
            the input's pixels by sigmoid(query(noisy image) x key(input)).
        scale_factors: The factors that the network is trained to enlarge by.
        in_channels: `image_channels` or None. In the config it is `image_channels`, so that pipelines of diffusers draw
            noise of the right shape.
        out_channels: By default `image_channels`; twice as many to predict the variance, too (section 5.3).
        jumps: Of a distilled network the only times that it is called at, descending. From each it jumps to a clean
            image. None for all times.

    All other arguments are those of `UNet2DModel`; the types of the blocks follow from `attention`. Height and width of
    a sample must be multiples of 2 ** (len(block_out_channels) - 1).

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS
    # sqrt(gamma) times this is embedded as a time: the factor of WaveGrad, which SR3 follows.
    NOISE_LEVEL_SCALE = 5000.0
    CHOICES = {
        "low_res_injection": (None, "conv_stack", "direct", "bicubic", "large_kernel"),
        "attention": ("middle", "16x16"),
        "input_fusion": ("concat", "attention"),
    }

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        low_res_injection: Literal["conv_stack", "direct", "bicubic", "large_kernel"] | None = "conv_stack",
        attention: Literal["middle", "16x16"] = "middle",
        input_fusion: Literal["concat", "attention"] = "concat",
        sample_size: int | tuple[int, int] | None = None,
        scale_factors: tuple[int, ...] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] | None = None,
        mid_block_type: str = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] | None = None,
        block_out_channels: tuple[int, ...] = (64, 128, 192, 256),
        layers_per_block: int = 1,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 32,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool | None = None,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        jumps: tuple[int, ...] | None = None,
    ):
        check_whole(self.config, "image_channels")
        check_choices(self.config, self.CHOICES)
        check_jumps(jumps)
        levels = len(block_out_channels)
        if levels < 2:
            raise ValueError(f"block_out_channels={tuple(block_out_channels)}: expected 2 levels or more")
        scale_factors = checked_factors(scale_factors)
        if in_channels not in (None, image_channels):
            raise ValueError(f"in_channels={in_channels}: expected image_channels={image_channels} or None")
        if out_channels not in (None, image_channels, 2 * image_channels):
            raise ValueError(
                f"out_channels={out_channels}: expected {image_channels}, or {2 * image_channels} with the variance"
            )
        out_channels = image_channels if out_channels is None else out_channels
        derived = self._derived_settings(levels)
        super().__init__(**unet_arguments(self, in_channels=2 * image_channels, out_channels=out_channels, **derived))
        # The parent registered its own view of these. Users and stock pipelines mean the image's.
        self.register_to_config(in_channels=image_channels, out_channels=out_channels, scale_factors=scale_factors)
        if input_fusion == "attention":
            self.fusion_query = nn.Conv2d(image_channels, image_channels, 3, padding=1)
            self.fusion_key = nn.Conv2d(image_channels, image_channels, 3, padding=1)
        if low_res_injection is not None:
            # Channels that enter the level above the lowest on the way down, and on the way up.
            places = (block_out_channels[max(levels - 3, 0)], block_out_channels[-1])
            self.injection = LowResInjection(low_res_injection, image_channels, places, halvings=levels - 2)

    def _derived_settings(self, levels: int) -> dict:
        """The parent's settings that follow from `attention`, or that this network cannot have otherwise."""
        attention = self.config.attention
        marks = [attention == "16x16" and level == levels - 2 for level in range(levels)]
        derived = {
            "center_input_sample": False,
            "time_embedding_type": "positional",
            "down_block_types": ["AttnDownBlock2D" if mark else "DownBlock2D" for mark in marks],
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ["AttnUpBlock2D" if mark else "UpBlock2D" for mark in reversed(marks)],
            "add_attention": attention == "middle",
            "class_embed_type": None,
            "num_class_embeds": None,
            "num_train_timesteps": None,
        }
        for name, value in derived.items():
            given = self.config[name]
            given = list(given) if isinstance(given, (list, tuple)) else given
            if given is not None and given != value:
                raise ValueError(f"{name}={given!r}: expected {value!r}, as attention={attention!r} has it, or None")
        return derived

    def forward(
        self,
        sample: torch.Tensor,
        noise_level: torch.Tensor | float,
        low_res: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """
        Args:
            sample: [B, C, H, W], the noisy residual or image.
            noise_level: sqrt(gamma), the signal's share of `sample`: a number in (0, 1] or [B].
            low_res: [B, C, H, W], the low-resolution image enlarged to the sample's size, in [-1, 1].
            return_dict: False for a tuple instead of a `UNet2DOutput`.

        Returns:
            The prediction, [B, out_channels, H, W].

        Raises:
            ValueError: if the shapes do not fit.
        """
        if low_res.shape != sample.shape:
            raise ValueError(f"low_res has shape {tuple(low_res.shape)}: expected the sample's {tuple(sample.shape)}")
        check_batch(sample, self.config.image_channels, 2 ** (len(self.config.block_out_channels) - 1))

        # 1. The noise level, embedded as UNet2DModel embeds a time.
        level = one_for_each("noise_level", noise_level, sample).to(sample.device, non_blocking=True)
        level = level.expand(len(sample)) * self.NOISE_LEVEL_SCALE
        embedding = self.time_embedding(self.time_proj(level).to(self.dtype))

        # 2. The two images (section 5.1), and what the low-resolution one adds further in (section 6).
        low = low_res.to(sample.dtype)
        fused = low
        if self.config.input_fusion == "attention":
            fused = torch.sigmoid(self.fusion_query(sample) * self.fusion_key(low)) * low
        added = None if self.config.low_res_injection is None else self.injection(low)

        # 3. Down, the middle, and up.
        hidden = self.conv_in(torch.cat((sample, fused), dim=1))
        kept, last = [hidden], len(self.down_blocks) - 1
        for index, block in enumerate(self.down_blocks):
            if added is not None and index == last - 1:
                hidden = hidden + added[0]
            hidden, residuals = block(hidden, embedding)
            kept += residuals
        hidden = self.mid_block(hidden, embedding)
        for index, block in enumerate(self.up_blocks):
            if added is not None and index == 1:
                hidden = hidden + added[1]
            count = len(block.resnets)
            kept, residuals = kept[:-count], tuple(kept[-count:])
            hidden = block(hidden, residuals, embedding)
        output = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return UNet2DOutput(sample=output) if return_dict else (output,)
