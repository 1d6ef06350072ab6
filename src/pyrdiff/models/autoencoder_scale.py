"""Scale autoencoder of paper X (G, appendix C): a VAE whose decoder gives the brightness that sets the noise rates."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from pyrdiff.parts.batch import one_for_each
from pyrdiff.parts.checks import check_generators
from pyrdiff.parts.noise import white_noise
from pyrdiff.parts.presets import Presets
from pyrdiff.parts.settings import check_choices, check_whole, is_whole
from pyrdiff.parts.sources import KeepsSource

PRESETS = {
    # Paper X, appendix C and section 5: 30.3 million parameters.
    "paper-cifar10": dict(
        block_out_channels=(128, 256, 384),
        layers_per_block=2,
        bottleneck_channels=64,
        latent_dim=2336,
        attention_sizes=(16,),
        norm_num_groups=32,
    ),
    # The same for 128x128 faces and 500 steps: 61.3 million.
    "paper-celeba": dict(
        sample_size=128,
        block_out_channels=(128, 128, 256, 384, 512),
        layers_per_block=2,
        bottleneck_channels=64,
        latent_dim=3552,
        attention_sizes=(16,),
        norm_num_groups=32,
        num_train_timesteps=500,
    ),
    # 64x64 faces on a GPU.
    "small": dict(
        sample_size=64, block_out_channels=(64, 128, 192), bottleneck_channels=32, latent_dim=256, patch_size=2
    ),
    # 32x32 colour images on a CPU.
    "mini": dict(block_out_channels=(24, 48), patch_size=2),
    # 32x32 grey images on a CPU.
    "tiny": dict(image_channels=1, block_out_channels=(16, 32), patch_size=2, latent_dim=32),
}


@dataclass
class ScaleAutoencoderOutput(BaseOutput):
    """
    Output of `ScaleAutoencoder`.

    Args:
        structure: [B, C, H, W], s0 in [epsilon, 1]; with `output="scale"` x_delta in [0, 1].
        mean: [B, latent_dim], of the posterior q(z | x).
        log_variance: [B, latent_dim], of the posterior, in [-20, 10].
    """

    structure: torch.Tensor
    mean: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None


class Level(nn.Module):
    """
    Residual blocks at one resolution, each followed by self-attention if `attention` is true. The group norms come
    before the convolutions (appendix C), as in `ResnetBlock2D`. Maps [B, in_channels, H, W] to [B, channels, H, W].
    """

    def __init__(
        self, in_channels: int, channels: int, layers: int, attention: bool, groups: int, time_channels: int | None
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(
            ResnetBlock2D(
                in_channels=channels if layer else in_channels,
                out_channels=channels,
                temb_channels=time_channels,
                groups=groups,
            )
            for layer in range(layers)
        )
        self.attentions = nn.ModuleList(
            Attention(
                channels,
                heads=1,
                dim_head=channels,
                bias=True,
                norm_num_groups=groups,
                residual_connection=True,
                _from_deprecated_attn_block=True,
            )
            for _ in range(layers if attention else 0)
        )

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        for index in range(len(self.blocks)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(self._layer, index, hidden, embedding)
            else:
                hidden = self._layer(index, hidden, embedding)
        return hidden

    def _layer(self, index: int, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        hidden = self.blocks[index](hidden, embedding)
        return self.attentions[index](hidden) if self.attentions else hidden


class ScaleAutoencoder(KeepsSource, Presets, ModelMixin, ConfigMixin):
    r"""
    Convolutional VAE of an image's structure s0, the brightness per pixel that sets the rates of its noise (paper X).

    The encoder sees a clean or a noisy image and its time step. The decoder sees a latent vector alone, since a sample
    of the prior has no time step. After training, `set_prior` puts in a Gaussian mixture that was fitted to draws of
    the posterior. It is saved with the weights, and `sample_prior` draws from it.

    Args:
        image_channels: Channels of the image.
        sample_size: Side, or (height, width), of the image: multiples of `patch_size * 2 ** len(block_out_channels)`,
            as every level ends with a downsampling.
        block_out_channels: Channels of each level.
        layers_per_block: Residual blocks of each level, in the encoder and in the decoder.
        bottleneck_channels: Channels of the lowest feature map, which is flattened and projected to the mean and the
            log-variance of the latent vector.
        latent_dim: Size Z of the latent vector.
        attention_sizes: Sides of the feature maps (the longer side of an oblong one) with self-attention after each
            residual block. The paper has it at 16.
        patch_size: Side of the squares of pixels that enter, and leave, as channels.
        norm_num_groups: Groups of the group norms.
        time_embedding_dim: Size of the sinusoidal time embedding, an even number.
        num_train_timesteps: Largest time step T; 0 is the clean image.
        epsilon: Darkest value of an image.
        output: What the decoder gives: "structure", s0 in [epsilon, 1], or "scale", the paper's x_delta =
            exp(-gamma x0).
        prior: What `sample_prior` draws from by default: "gmm", the mixture of `set_prior`, or "normal", N(0, I).
        prior_components: Components K of the mixture. `set_prior` writes this and the next.
        active_latents: Number A of latent dimensions that the mixture is on.
        residual_std: RMS of the training images minus their structures. The trainer measures it for the scheduler.

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS
    # Diffusers brings weights back when `forward` is called; pipelines call `encode`, `decode` and `sample_prior`.
    _supports_group_offloading = False
    _supports_gradient_checkpointing = True
    CHOICES = {"output": ("structure", "scale"), "prior": ("gmm", "normal")}
    WHOLE = (
        "image_channels", "layers_per_block", "bottleneck_channels", "latent_dim", "patch_size", "norm_num_groups",
        "time_embedding_dim", "num_train_timesteps",
    )  # fmt: skip

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        block_out_channels: tuple[int, ...] = (32, 64, 96),
        layers_per_block: int = 1,
        bottleneck_channels: int = 16,
        latent_dim: int = 64,
        attention_sizes: tuple[int, ...] = (),
        patch_size: int = 1,
        norm_num_groups: int = 8,
        time_embedding_dim: int = 128,
        num_train_timesteps: int = 200,
        epsilon: float = 4e-3,
        output: Literal["structure", "scale"] = "structure",
        prior: Literal["gmm", "normal"] = "gmm",
        prior_components: int | None = None,
        active_latents: int | None = None,
        residual_std: float | None = None,
    ):
        super().__init__()
        check_whole(self.config, *self.WHOLE)
        check_choices(self.config, self.CHOICES)
        if time_embedding_dim % 2:
            raise ValueError(f"time_embedding_dim={time_embedding_dim}: expected an even number")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon}: expected a number between 0 and 1")
        widths, groups = tuple(block_out_channels), norm_num_groups
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ValueError(
                f"block_out_channels={widths}: expected multiples of norm_num_groups={groups}, one or more"
            )
        multiple = patch_size * 2 ** len(widths)
        size = (sample_size, sample_size) if is_whole(sample_size) else tuple(sample_size)
        if len(size) != 2 or any(not is_whole(side) or side < 1 or side % multiple for side in size):
            raise ValueError(
                f"sample_size={sample_size}: expected one side or (height, width), multiples of {multiple}"
            )
        sides = [max(size) // patch_size // 2**level for level in range(len(widths))]
        if not set(attention_sizes) <= set(sides):
            raise ValueError(
                f"attention_sizes={tuple(attention_sizes)}: expected sides of levels, among {tuple(sides)}"
            )
        if (prior_components is None) != (active_latents is None):
            raise ValueError(
                f"prior_components={prior_components}, active_latents={active_latents}: expected both or none"
            )
        if prior_components is not None and not (prior_components >= 1 and 1 <= active_latents <= latent_dim):
            raise ValueError(
                f"prior_components={prior_components}, active_latents={active_latents}: expected 1 or more components "
                f"on 1 to latent_dim={latent_dim} dimensions"
            )
        self.size = size
        self.bottleneck = (bottleneck_channels, size[0] // multiple, size[1] // multiple)
        marks = [side in attention_sizes for side in sides]

        # Encoder: levels, each followed by a downsampling, and the projection to mean and log-variance.
        time_channels = 4 * time_embedding_dim
        self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_embedding_dim, time_channels)
        self.conv_in = nn.Conv2d(image_channels * patch_size**2, widths[0], 3, padding=1)
        self.down_levels = nn.ModuleList(
            Level(before, width, layers_per_block, mark, groups, time_channels)
            for before, width, mark in zip((widths[0], *widths), widths, marks, strict=False)
        )
        self.downsamplers = nn.ModuleList(Downsample2D(width, use_conv=True, name="op") for width in widths)
        self.encoder_norm = nn.GroupNorm(groups, widths[-1])
        self.encoder_out = nn.Conv2d(widths[-1], bottleneck_channels, 3, padding=1)
        self.to_moments = nn.Linear(math.prod(self.bottleneck), 2 * latent_dim)
        # Start near a plain autoencoder. As PyTorch leaves it, the means of images differ by a tenth of the noise that
        # is added, and the decoder first learns to ignore them, at a high learning rate for good.
        with torch.no_grad():
            self.to_moments.bias[latent_dim:] = -4.0

        # Decoder: the same levels in reverse, each after an upsampling.
        self.from_latents = nn.Linear(latent_dim, math.prod(self.bottleneck))
        self.decoder_in = nn.Conv2d(bottleneck_channels, widths[-1], 3, padding=1)
        self.upsamplers = nn.ModuleList(
            Upsample2D(before, use_conv=True, out_channels=width)
            for before, width in zip((widths[-1], *widths[::-1]), widths[::-1], strict=False)
        )
        self.up_levels = nn.ModuleList(
            Level(width, width, layers_per_block, mark, groups, None)
            for width, mark in zip(widths[::-1], marks[::-1], strict=True)
        )
        self.decoder_norm = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_channels * patch_size**2, 3, padding=1)

        if prior_components is not None:  # filled by a loaded folder or by set_prior; weights of 0 say: not yet
            self._register_prior(
                torch.zeros(prior_components),
                torch.zeros(prior_components, active_latents),
                torch.zeros(prior_components, active_latents, active_latents),
                torch.zeros(active_latents, dtype=torch.long),
            )

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, timestep: torch.Tensor | float = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The posterior q(z | x_i, i), a normal distribution with independent dimensions.

        Args:
            sample: [B, C, H, W], a clean image in [epsilon, 1] or a noisy one.
            timestep: i in 0 ... T, a number or [B]; 0 for a clean image.

        Returns:
            Mean and log-variance, [B, latent_dim] each, in float32 or wider. The log-variance is in [-20, 10], so that
            one wild step of training gives neither an infinite KL nor noise too small for float32.

        Raises:
            ValueError: if a shape or a time step does not fit.
        """
        channels = self.config.image_channels
        if sample.ndim != 4 or tuple(sample.shape[1:]) != (channels, *self.size):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}: expected (B, {channels}, {self.size[0]}, {self.size[1]})"
            )
        time, last = one_for_each("timestep", timestep, sample), self.config.num_train_timesteps
        # The values are not looked at on an accelerator: that would wait for all that is queued there.
        # Nor while compiling, where it would break the graph.
        looks = time.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not ((time >= 0) & (time <= last)).all():
            raise ValueError(f"timestep={timestep}: expected 0 to num_train_timesteps={last}")
        time = time.to(sample.device, non_blocking=True).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(time).to(self.dtype))

        hidden = self.conv_in(F.pixel_unshuffle(sample, self.config.patch_size))
        for level, downsample in zip(self.down_levels, self.downsamplers, strict=True):
            hidden = downsample(level(hidden, embedding))
        hidden = self.encoder_out(F.silu(self.encoder_norm(hidden)))
        moments = self.to_moments(hidden.flatten(1))
        mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20.0, 10.0)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        The structure s0 = epsilon + (1 - epsilon) sigmoid(u) of latent vectors [B, latent_dim]: [B, C, H, W] in
        [epsilon, 1]. With `output="scale"` it is sigmoid(u), the scale x_delta, in [0, 1].

        The result is in float32 or wider, whatever the network's type, since exp(-20) of a white pixel is 0 in float16.
        Raises `ValueError` if the shape does not fit.
        """
        self._check_latents("latents", latents)
        hidden = self.from_latents(latents.to(self.dtype)).unflatten(1, self.bottleneck)
        hidden = self.decoder_in(hidden)
        for upsample, level in zip(self.upsamplers, self.up_levels, strict=True):
            hidden = level(upsample(hidden))
        hidden = self.conv_out(F.silu(self.decoder_norm(hidden)))
        logits = F.pixel_shuffle(hidden, self.config.patch_size)
        scale = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return scale if self.config.output == "scale" else self.config.epsilon + (1 - self.config.epsilon) * scale

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float = 0,
        posterior_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ScaleAutoencoderOutput | tuple:
        """
        Encodes and decodes.

        Args:
            sample, timestep: As for `encode`.
            posterior_noise: [B, latent_dim], standard normal numbers that draw a latent of the posterior for the
                decoder. By default the decoder gets the mean.
            return_dict: False for a tuple of the fields instead of a `ScaleAutoencoderOutput`.
        """
        mean, log_variance = self.encode(sample, timestep)
        latents = mean if posterior_noise is None else mean + torch.exp(log_variance / 2) * posterior_noise.to(mean)
        structure = self.decode(latents)
        if not return_dict:
            return structure, mean, log_variance
        return ScaleAutoencoderOutput(structure=structure, mean=mean, log_variance=log_variance)

    def sample_latents(
        self,
        mean: torch.Tensor,
        log_variance: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draws z = mean + exp(log_variance / 2) * noise of the posterior, all [B, latent_dim]. With a list of generators
        each row has its own. Raises `ValueError` if the shapes or the number of generators do not fit.
        """
        self._check_latents("mean", mean)
        if log_variance.shape != mean.shape:
            raise ValueError(
                f"log_variance has shape {tuple(log_variance.shape)}: expected the mean's {tuple(mean.shape)}"
            )
        if isinstance(generator, (list, tuple)):
            generator = self._check_generators(generator, len(mean))
        noise = white_noise(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(log_variance / 2) * noise

    @staticmethod
    def kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
        """KL(N(mean, exp(log_variance)) || N(0, I)) in nats, [B], of arguments [B, Z]: the sum over the dimensions."""
        return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).sum(dim=1)

    def set_prior(
        self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor, active: torch.Tensor
    ) -> None:
        """
        Puts in a Gaussian mixture as the prior of the dimensions `active`. The others stay N(0, 1). It is saved with
        the network. The arguments are tensors or numpy arrays, such as those of scikit-learn's `GaussianMixture`.

        Args:
            weights: [K], of the components, summing to 1.
            means: [K, A].
            covariances: [K, A, A], symmetric and positive definite.
            active: [A], indices of latent dimensions, each once.

        Raises:
            ValueError: if a shape or a value does not fit.
        """
        weights, means, covariances = (
            torch.as_tensor(array).detach().to("cpu", torch.float64) for array in (weights, means, covariances)
        )
        active = torch.as_tensor(active).detach().cpu()
        self._check_active(active)
        self._check_mixture(weights, means, covariances, len(active))
        cholesky, failed = torch.linalg.cholesky_ex(covariances)
        if failed.any():
            raise ValueError(
                f"covariances[{failed.nonzero()[0].item()}] is not positive definite: expected symmetric and positive "
                "definite matrices; a fit with a larger ridge gives them"
            )
        self._register_prior((weights / weights.sum()).float(), means.float(), cholesky.float(), active.long())
        self.register_to_config(prior="gmm", prior_components=len(weights), active_latents=len(active))

    def _check_active(self, active: torch.Tensor) -> None:
        latents = self.config.latent_dim
        whole = not (active.is_floating_point() or active.dtype == torch.bool)
        if active.ndim != 1 or not len(active) or not whole or len(active.unique()) < len(active):
            raise ValueError(f"active={active.tolist()}: expected different indices of latent dimensions")
        if active.min() < 0 or active.max() >= latents:
            raise ValueError(f"active={active.tolist()}: expected indices from 0 to {latents - 1}")

    @staticmethod
    def _check_mixture(weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor, size: int) -> None:
        if weights.ndim != 1 or not len(weights):
            raise ValueError(f"weights has shape {tuple(weights.shape)}: expected (K,)")
        count = len(weights)
        for name, array, shape in (("means", means, (count, size)), ("covariances", covariances, (count, size, size))):
            if tuple(array.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(array.shape)}: expected {shape}")
        for name, array in (("weights", weights), ("means", means), ("covariances", covariances)):
            if not array.isfinite().all():
                raise ValueError(f"{name} has infinite or undefined values: expected finite ones")
        if (weights < 0).any() or abs(weights.sum().item() - 1) > 1e-4:
            raise ValueError(f"weights={weights.tolist()}: expected numbers from 0 up that sum to 1")
        if not torch.allclose(covariances, covariances.mT, rtol=1e-4, atol=1e-8):
            raise ValueError("covariances are not symmetric: expected symmetric and positive definite matrices")

    def sample_prior(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prior: Literal["gmm", "normal"] | None = None,
    ) -> torch.Tensor:
        """
        Latent vectors of the prior, [batch_size, latent_dim] in float32, for `decode`.

        Args:
            batch_size: Number of vectors.
            generator: One, or a list of one for each row; each row is then what its generator gives alone. The numbers
                are drawn on the generator's device.
            prior: "gmm", the mixture of `set_prior` with N(0, 1) on the inactive dimensions, or "normal", N(0, I). By
                default that of the config.

        Raises:
            ValueError: if an argument does not fit, or for "gmm" if there is no mixture.
        """
        check_whole({"batch_size": batch_size}, "batch_size")
        mixture = self._mixture(prior)
        if isinstance(generator, (list, tuple)):
            generators = self._check_generators(generator, batch_size)
            return torch.cat([self._draw(1, row_generator, mixture) for row_generator in generators])
        return self._draw(batch_size, generator, mixture)

    def _draw(self, count: int, generator: torch.Generator | None, mixture: tuple | None) -> torch.Tensor:
        """`count` rows of the prior by one generator: first the components, then the normal numbers."""
        check_generators(generator)
        device = self.device if generator is None else generator.device
        choice = torch.rand(count, generator=generator, device=device)
        latents = torch.randn(count, self.config.latent_dim, generator=generator, device=device).to(self.device)
        if mixture is None:
            return latents
        weights, means, cholesky, active = mixture
        index = torch.searchsorted(weights.cumsum(0), choice.to(self.device), right=True).clamp(max=len(weights) - 1)
        latents[:, active] = means[index] + (cholesky[index] @ latents[:, active, None]).squeeze(-1)
        return latents

    def _mixture(self, prior: str | None) -> tuple[torch.Tensor, ...] | None:
        """Weights, means, Cholesky factors (float32) and indices of the mixture; `None` for N(0, I)."""
        prior = self.config.prior if prior is None else prior
        check_choices({"prior": prior}, {"prior": self.CHOICES["prior"]})
        if prior == "normal":
            return None
        if self.config.prior_components is None or not self.prior_weights.any():
            raise ValueError(
                'prior="gmm", but no mixture was fitted: fit one to what encode and sample_latents give '
                'of the training images and put it in by set_prior, or ask for prior="normal"'
            )
        floats = (self.prior_weights, self.prior_means, self.prior_cholesky)
        return *(buffer.float() for buffer in floats), self.prior_active

    def _register_prior(self, weights, means, cholesky, active) -> None:
        for name, buffer in (("weights", weights), ("means", means), ("cholesky", cholesky), ("active", active)):
            self.register_buffer(f"prior_{name}", buffer.to(self.conv_in.weight.device))

    def _check_latents(self, name: str, latents: torch.Tensor) -> None:
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(f"{name} has shape {tuple(latents.shape)}: expected (B, {self.config.latent_dim})")

    @staticmethod
    def _check_generators(generators: list | tuple, count: int) -> list[torch.Generator]:
        check_generators(list(generators))
        if len(generators) != count:
            raise ValueError(f"generator has length {len(generators)}: expected one for each of {count} rows")
        return list(generators)
