"""Parallel trajectory UNet (R of paper X): one pass gives the clean image and, by its heads, noises of many steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.utils import BaseOutput
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyrdiff.parts.batch import check_batch, one_for_each
from pyrdiff.parts.presets import Presets
from pyrdiff.parts.settings import check_choices, check_whole, is_whole
from pyrdiff.parts.sources import KeepsSource
from pyrdiff.parts.step_layers import StepAttention, StepConv, StepNorm

PRESETS = {
    # Appendix C for 32x32: 41.2M (section 4), of which 200 sub-networks of 18.8k. The paper says 512 and the number of
    # levels' blocks, not the other widths: these are chosen to give its count. One head of attention, as in DDPM.
    "paper-cifar10": dict(
        encoder_channels=(96, 208, 208, 176),
        decoder_channels=(176, 208, 208, 512),
        attention_levels=(1,),
        attention_head_dim=None,
        num_train_timesteps=200,
        head="literal",
        target="noise",
        chunk_size=50,
    ),
    # Appendix C for 128x128: 84.2M (section 4), of which 500 sub-networks of 18.7k. Their attention is left out: at
    # this size it would cost 5 times all the rest.
    "paper-celeba": dict(
        encoder_channels=(112, 112, 192, 320, 416),
        decoder_channels=(416, 320, 192, 192, 512),
        attention_levels=(3,),
        attention_head_dim=None,
        num_train_timesteps=500,
        head="literal",
        head_attention=False,
        target="noise",
        chunk_size=25,
    ),
    # 64x64 in an hour on a GPU.
    "small": dict(encoder_channels=(64, 96, 128, 160), attention_levels=(3,)),
    # 32x32 in minutes on a CPU.
    "mini": dict(encoder_channels=(32, 64, 96), layers_per_block=1, patch_size=2, time_embedding_dim=256),
    # As "mini" in half the time.
    "tiny": dict(encoder_channels=(16, 32, 64), layers_per_block=1, patch_size=2, time_embedding_dim=128),
}

TIME_CHANNELS = 128  # of the sinusoidal embedding (appendix C)
TIME_SCALE = 1000.0  # 1000 i/T is what is embedded, so that T does not matter
EXACTNESS = 1e-3  # j <= i also holds for an i that is this much too small: it may be a rounded product with T


@dataclass
class ParallelTrajectoryOutput(BaseOutput):
    """
    Args:
        sample: [B, C, H, W], the (preconditioned) clean image; None with `target="noise"`.
        noises: [S, B, C, H, W], Z^j of the S steps that were asked for, zero for j > i; None without `steps`.
    """

    sample: torch.Tensor | None
    noises: torch.Tensor | None = None


class Fusion(nn.Module):
    """Adds P_k of the time embedding and H_k of the structure to what enters a level (appendix C, item 2)."""

    def __init__(self, channels: int, time_channels: int, structure_channels: int | None):
        super().__init__()
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, channels))
        if structure_channels is not None:
            width = max(channels // 4, 8)
            self.structure = nn.Sequential(
                nn.Conv2d(structure_channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, channels, 1)
            )

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, structure: torch.Tensor | None) -> torch.Tensor:
        """Of `hidden` [B, c, h, w], `embedding` [B, e] and `structure` [B, s, h, w] or `None`."""
        hidden = hidden + self.time(embedding)[:, :, None, None]
        return hidden if structure is None else hidden + self.structure(structure)


class Block(nn.Module):
    """A residual block, and self-attention after it where a level has it."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, settings: dict):
        super().__init__()
        groups, head_dim = settings["norm_num_groups"], settings["attention_head_dim"] or out_channels
        self.resnet = ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=settings["time_embedding_dim"],
            groups=groups,
            dropout=settings["dropout"],
        )
        self.attention = None
        if attention:
            self.attention = Attention(
                out_channels,
                heads=out_channels // head_dim,
                dim_head=head_dim,
                norm_num_groups=groups,
                residual_connection=True,
                bias=True,
            )

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        hidden = self.resnet(hidden, embedding)
        return hidden if self.attention is None else self.attention(hidden)


class Level(nn.Module):
    """One resolution of the encoder or decoder: fusion, blocks, and the way to the next resolution."""

    def __init__(self, fusion: Fusion, blocks: list[Block], resize: nn.Module | None):
        super().__init__()
        self.fusion, self.blocks, self.resize = fusion, nn.ModuleList(blocks), resize
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden: torch.Tensor,
        embedding: torch.Tensor,
        structure: torch.Tensor | None,
        joined: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """
        What each block gives, and at last the resize, if there is one.

        Args:
            hidden, embedding, structure: As for `Fusion`.
            joined: What each block gets beside its input, on the way up.
        """
        hidden, outputs = self.fusion(hidden, embedding, structure), []
        for index, block in enumerate(self.blocks):
            hidden = torch.cat((hidden, joined[index]), dim=1) if joined else hidden
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, embedding)
            else:
                hidden = block(hidden, embedding)
            outputs.append(hidden)
        return outputs if self.resize is None else [*outputs, self.resize(hidden)]


class LiteralHead(nn.Module):
    """
    The sub-networks G_j of eq. 14 (appendix C): two residual blocks with self-attention and as many channels as the
    image has. All of them see the same features, so their first convolutions are one wide convolution, and the others
    grouped ones; the norm before the first is shared for it. Self-attention is left out where the features have more
    than 32x32 pixels: at 128x128 the scores of 500 sub-networks are 1611 GMAC and 268e9 numbers for an image.
    """

    MAX_PIXELS = 32 * 32

    def __init__(self, features: int, channels: int, settings: dict):
        super().__init__()
        steps, time_channels = settings["num_train_timesteps"], settings["time_embedding_dim"]
        self.channels = channels
        self.norm = nn.GroupNorm(settings["norm_num_groups"], features)
        self.shortcut = StepConv(steps, features, channels, 1)
        self.convs = nn.ModuleList(StepConv(steps, count, channels, 3) for count in [features] + 3 * [channels])
        self.norms = nn.ModuleList(StepNorm(steps, channels) for _ in range(3))
        self.times = nn.ModuleList(StepConv(steps, time_channels, channels, 1) for _ in range(2))
        attentions = 2 if settings["head_attention"] else 0
        self.attentions = nn.ModuleList(StepAttention(steps, channels) for _ in range(attentions))

    def prepare(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The part that is the same for all steps."""
        return features, F.silu(self.norm(features))

    def forward(
        self, prepared: tuple[torch.Tensor, torch.Tensor], embedding: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """[S, B, c, h, w] for the steps `rows + 1`."""
        features, hidden = prepared
        time = F.silu(embedding)[:, :, None, None]
        attends = features[0, 0].numel() <= self.MAX_PIXELS

        # 1. The first block, from the features.
        hidden = self.convs[0](hidden, rows, shared=True) + self.times[0](time, rows, shared=True)
        hidden = self.convs[1](F.silu(self.norms[0](hidden, rows)), rows)
        output = self.shortcut(features, rows, shared=True) + hidden
        for attention in self.attentions[:1] if attends else ():
            output = attention(output, rows)

        # 2. The second, each step by itself.
        hidden = self.convs[2](F.silu(self.norms[1](output, rows)), rows) + self.times[1](time, rows, shared=True)
        output = output + self.convs[3](F.silu(self.norms[2](hidden, rows)), rows)
        for attention in self.attentions[1:] if attends else ():
            output = attention(output, rows)
        return output.unflatten(1, (len(rows), self.channels)).transpose(0, 1)


class ParallelTrajectoryUNet2DModel(KeepsSource, Presets, ModelMixin, ConfigMixin):
    r"""
    UNet that sees a noisy image, the image's structure and the time, and predicts in one pass the clean image and the
    noises Z^j of the steps before it (paper X: R_phi, section 3.3 and appendix C).

    At the input of each level of the encoder and of the decoder, mappings P_k of the time embedding and H_k of the
    structure are added. The residual blocks see the time embedding, too, as in DDPM.

    Args:
        image_channels: Channels of the image.
        sample_size: Side, or (height, width), of images, for pipelines. The network takes any size.
        encoder_channels: Widths of the levels, finest first.
        decoder_channels: Widths of the levels, coarsest first. The last is the width of the features that the head
            sees. By default those of the encoder, reversed.
        layers_per_block: Residual blocks of a level of the encoder. The decoder has one more.
        attention_levels: Levels with self-attention; 0 is the finest. The middle has it if the coarsest level has.
        patch_size: Side of the squares of pixels that enter, and leave, as channels.
        norm_num_groups: Groups of the norms.
        attention_head_dim: Channels of a head of attention; None for one head.
        time_embedding_dim: Width of the time embedding.
        num_train_timesteps: T, the number of steps.
        use_structure: True if there is a structure: an input, and H_k.
        head: What predicts Z^j. "tied": nothing, since it follows from the clean image
            (`PixelAwareScheduler.tied_noise`). "literal": the paper's sub-networks G_j, with self-attention if the
            features have at most 32x32 pixels.
        head_attention: True if the head "literal" has self-attention.
        target: "clean" if the first output is the clean image. "noise" if there is only the head, as in the paper.
        chunk_size: Steps that the head computes at a time, by default all at once. In training, what a chunk computed
            is computed again on the way back instead of kept.
        dropout: Dropout of the residual blocks.

    Height and width of a sample must be multiples of `patch_size * 2 ** (len(encoder_channels) - 1)`.

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS
    _supports_gradient_checkpointing = True
    RETIRED = ("rank",)  # of a head that version 0.1.0 had
    CHOICES = {"head": ("tied", "literal"), "target": ("clean", "noise")}
    WHOLE = (
        "image_channels", "layers_per_block", "patch_size", "norm_num_groups", "time_embedding_dim",
        "num_train_timesteps",
    )  # fmt: skip

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        sample_size: int | tuple[int, int] | None = None,
        encoder_channels: tuple[int, ...] = (64, 128, 192),
        decoder_channels: tuple[int, ...] | None = None,
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (),
        patch_size: int = 1,
        norm_num_groups: int = 8,
        attention_head_dim: int | None = 32,
        time_embedding_dim: int = 512,
        num_train_timesteps: int = 200,
        use_structure: bool = True,
        head: Literal["tied", "literal"] = "tied",
        head_attention: bool = True,
        target: Literal["clean", "noise"] = "clean",
        chunk_size: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_choices(self.config, self.CHOICES)
        check_whole(self.config, *self.WHOLE)
        check_whole(self.config, "attention_head_dim", "chunk_size", optional=True)
        if target == "noise" and head == "tied":
            raise ValueError("head='tied': expected 'literal' with target='noise', which has no clean image")
        self._check_widths()
        levels = len(encoder_channels)
        down, up = list(encoder_channels), list(decoder_channels or reversed(encoder_channels))
        attends = [level in attention_levels for level in range(levels)]
        settings = dict(self.config)
        channels = image_channels * patch_size**2
        structure_channels = channels if use_structure else None

        def fusion(width: int) -> Fusion:
            return Fusion(width, time_embedding_dim, structure_channels)

        self.time_proj = Timesteps(TIME_CHANNELS, True, 0)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, time_embedding_dim)
        self.conv_in = nn.Conv2d(channels * (2 if use_structure else 1), down[0], 3, padding=1)

        # Down: what each block and each resize gives is kept for the way up.
        self.encoder, width, kept = nn.ModuleList(), down[0], [down[0]]
        for level, count in enumerate(down):
            entering = [width] + [count] * (layers_per_block - 1)
            blocks = [Block(before, count, attends[level], settings) for before in entering]
            resize = Downsample2D(count, use_conv=True, name="op") if level < levels - 1 else None
            self.encoder.append(Level(fusion(width), blocks, resize))
            kept += [count] * (layers_per_block + (resize is not None))
            width = count

        self.middle = nn.ModuleList([Block(width, width, attends[-1], settings), Block(width, width, False, settings)])

        self.decoder = nn.ModuleList()
        for index, count in enumerate(up):
            level, entering = levels - 1 - index, [width] + [count] * layers_per_block
            blocks = [Block(before + kept.pop(), count, attends[level], settings) for before in entering]
            resize = Upsample2D(count, use_conv=True) if level > 0 else None
            self.decoder.append(Level(fusion(width), blocks, resize))
            width = count

        if target == "clean":
            self.norm_out = nn.GroupNorm(norm_num_groups, width)
            self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
            # An untrained network predicts 0: with the preconditioning, the best guess without one.
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)
        if head == "literal":
            self.noise_fusion = fusion(width)
            self.noise_head = LiteralHead(width, channels, settings)

    def _check_widths(self) -> None:
        settings = self.config
        down, up = settings.encoder_channels, settings.decoder_channels
        up = tuple(reversed(down)) if up is None else up
        if not down:
            raise ValueError(f"encoder_channels={down!r}: expected a level or more")
        if len(up) != len(down):
            raise ValueError(f"decoder_channels={tuple(up)}: expected {len(down)} levels, as encoder_channels has")
        groups, head_dim = settings.norm_num_groups, settings.attention_head_dim
        for name, widths in (("encoder_channels", down), ("decoder_channels", up)):
            if any(width < 1 or width % groups for width in widths):
                raise ValueError(f"{name}={tuple(widths)}: expected multiples of norm_num_groups={groups}")
        for level in settings.attention_levels:
            if level not in range(len(down)):
                raise ValueError(
                    f"attention_levels={tuple(settings.attention_levels)}: expected levels from 0 to {len(down) - 1}"
                )
            for width in (down[level], up[-1 - level]):
                if head_dim is not None and width % head_dim:
                    raise ValueError(f"attention_head_dim={head_dim}: expected a divisor of {width} channels, or None")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        structure: torch.Tensor | None = None,
        steps: Sequence[int] | Literal["all"] | None = None,
        return_dict: bool = True,
    ) -> ParallelTrajectoryOutput | tuple:
        """
        Args:
            sample: [B, C, H, W], the noisy image x_i: scaled to unit variance by the scheduler, in paper mode as it is.
            timestep: i in (0, T]: a number, whole or not, or [B].
            structure: [B, C, H, W] in [0, 1], s0, or the scale in the paper. None with `use_structure=False`.
            steps: Steps j from 1 to T whose noises are returned, or "all".
            return_dict: False for a tuple instead of a `ParallelTrajectoryOutput`.

        Returns:
            `sample` [B, C, H, W], None with `target="noise"`, and `noises` [S, B, C, H, W], None without `steps`.

        Raises:
            ValueError: if the shapes do not fit, or the network cannot give the noises of these steps.
        """
        self._check_images(sample, structure)
        steps = self._checked_steps(steps)
        time = self._checked_time(timestep, sample)
        embedding = self.time_embedding(self.time_proj(time * self._time_factor).to(self.dtype))

        # 1. Squares of pixels become channels; the structure, centred, is made smaller for each level.
        patch, hidden, scales = self.config.patch_size, sample, [None] * len(self.encoder)
        if structure is not None:
            centred = 2 * structure.to(sample.dtype) - 1
            hidden = torch.cat((sample, centred), dim=1)
            patches = F.pixel_unshuffle(centred, patch)
            scales = [F.avg_pool2d(patches, 2**level) for level in range(len(self.encoder))]
        hidden = self.conv_in(F.pixel_unshuffle(hidden, patch))

        # 2. Down, the middle, and up; time and structure are added where a level begins (appendix C, item 2).
        kept = [hidden]
        for level, scale in zip(self.encoder, scales, strict=True):
            kept += level(kept[-1], embedding, scale)
        hidden = kept[-1]
        for block in self.middle:
            hidden = block(hidden, embedding)
        for level, scale in zip(self.decoder, reversed(scales), strict=True):
            joined = [kept.pop() for _ in level.blocks]
            hidden = level(hidden, embedding, scale, joined)[-1]

        # 3. The clean image, and the noises of the steps asked (eq. 14).
        clean = noises = None
        if self.config.target == "clean":
            clean = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden))), patch)
        if steps is not None:
            noises = self._noises(self.noise_fusion(hidden, embedding, scales[0]), embedding, time, steps)
        output = ParallelTrajectoryOutput(sample=clean, noises=noises)
        return output if return_dict else (clean, noises)

    @property
    def _time_factor(self) -> float:
        return TIME_SCALE / self.config.num_train_timesteps

    def _noises(
        self, features: torch.Tensor, embedding: torch.Tensor, time: torch.Tensor, steps: list[int]
    ) -> torch.Tensor:
        """[S, B, C, H, W]: Z^j = M_j G_j(features), where the mask M_j is 1 for j <= i (eq. 14)."""
        prepared = self.noise_head.prepare(features)

        def noises_of(rows: torch.Tensor) -> torch.Tensor:
            noises = self.noise_head(prepared, embedding, rows)
            later = rows[:, None] + 1 > time + EXACTNESS
            noises = noises.masked_fill(later[:, :, None, None, None], 0.0)
            return F.pixel_shuffle(noises, self.config.patch_size)

        size = self.config.chunk_size or len(steps)
        chunks = (torch.tensor(steps) - 1).to(features.device, non_blocking=True).split(size)
        if self.training and torch.is_grad_enabled() and size < len(steps):
            return torch.cat([checkpoint(noises_of, rows, use_reentrant=False) for rows in chunks])
        return torch.cat([noises_of(rows) for rows in chunks])

    def _check_images(self, sample: torch.Tensor, structure: torch.Tensor | None) -> None:
        multiple = self.config.patch_size * 2 ** (len(self.config.encoder_channels) - 1)
        check_batch(sample, self.config.image_channels, multiple)
        if not self.config.use_structure:
            if structure is not None:
                raise ValueError("structure is given: expected None, as use_structure=False")
        elif structure is None:
            raise ValueError(f"structure=None: expected an image of shape {tuple(sample.shape)}")
        elif structure.shape != sample.shape:
            raise ValueError(
                f"structure has shape {tuple(structure.shape)}: expected the sample's {tuple(sample.shape)}"
            )

    def _checked_steps(self, steps: Sequence[int] | str | None) -> list[int] | None:
        total = self.config.num_train_timesteps
        if steps is None:
            if self.config.target == "noise":
                raise ValueError("steps=None: expected a list of steps or 'all', as target='noise' has nothing else")
            return None
        if self.config.head == "tied":
            raise ValueError(
                f"steps={steps!r}: expected None with head='tied'; PixelAwareScheduler.tied_noise gives the noises"
            )
        given = range(1, total + 1) if isinstance(steps, str) and steps == "all" else steps
        given = list(given) if isinstance(given, (list, tuple, range)) else []
        whole = all(is_whole(step) and 1 <= step <= total for step in given)
        if not given or not whole or len(set(given)) < len(given):
            raise ValueError(f"steps={steps!r}: expected different whole numbers from 1 to {total}, or 'all'")
        return given

    def _checked_time(self, timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
        """[B], in float32."""
        time, total = one_for_each("timestep", timestep, sample), self.config.num_train_timesteps
        # The values are not looked at on an accelerator: that would wait for all that is queued there.
        # Nor while compiling, where it would break the graph.
        looks = time.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not ((time > 0) & (time <= total + EXACTNESS)).all():
            raise ValueError(f"timestep={timestep}: expected more than 0 and at most num_train_timesteps={total}")
        return time.to(sample.device, non_blocking=True).expand(len(sample))
