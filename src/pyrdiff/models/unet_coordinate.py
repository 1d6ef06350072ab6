"""Coordinate-conditioned UNet of Pyramidal DDPM (paper P, fig. 2): one network for every resolution."""

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401  (ModelMixin: diffusers looks it up in this namespace)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from pyrdiff.parts.jumps import check_jumps
from pyrdiff.parts.presets import Presets, unet_arguments
from pyrdiff.parts.sources import KeepsSource

PRESETS = {
    # Paper P, section 4: improved-diffusion at 256x256 with 64 channels and 1 residual block, attention at 16 and 8.
    "paper": dict(
        resolutions=(64, 128, 256),
        block_out_channels=(64, 64, 128, 128, 256, 256),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 4,
        layers_per_block=1,
        attention_head_dim=64,
    ),
    # 16/32/64 colour images in minutes on a GPU.
    "small": dict(
        resolutions=(16, 32, 64),
        block_out_channels=(64, 128, 192, 256),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
    ),
    # 16/32/64 colour images in an hour on a CPU.
    "mini": dict(
        resolutions=(16, 32, 64),
        block_out_channels=(32, 64, 96, 128),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
    ),
    # 8/16/32 images in minutes on two CPU cores.
    "tiny": dict(
        resolutions=(8, 16, 32),
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
    ),
}


class CoordinateUNet2DModel(KeepsSource, Presets, PeftAdapterMixin, UNet2DModel):
    r"""
    `UNet2DModel` that also sees where every pixel lies in the whole image (paper P, eq. 7 and 8).

    The row and column of each pixel, in [0, 1] with half-pixel centres, are encoded by sines and cosines and
    concatenated to the noisy image: 4 x `num_frequencies` channels beside `image_channels`.

    Args:
        image_channels: Channels of the image. The network's first layer has more.
        num_frequencies: L of eq. 7; the paper uses 6, so 24 channels.
        use_coordinates: `False` is the paper's ablation (fig. 6): no coordinates at all.
        resolutions: The sizes, low to high, that the network is trained at: an int for a square image or
            (height, width). Pipelines take their default levels from here.
        noise_window: Share of the noise process that the network is trained for above the lowest of its `resolutions`;
            1.0 for all of it. Pipelines start no step from more noise there.
        in_channels: `image_channels` or None. In the config it is `image_channels`, so that pipelines of diffusers draw
            noise of the right shape.
        out_channels: By default `image_channels`.
        class_names: Of the classes that `class_labels` stand for, by their place. One label more than there are classes
            stands for none of them, and is what the network is told where it is not told a class.
        jumps: Of a distilled network the only times that it is called at above the lowest of its `resolutions`,
            descending. From each it jumps to a clean image. None for all times.

    All other arguments are those of `UNet2DModel`. Height and width of a sample must be multiples of
    2 ** (len(block_out_channels) - 1).

    Raises:
        ValueError: for a setting out of range.
    """

    presets = PRESETS

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        num_frequencies: int = 6,
        use_coordinates: bool = True,
        resolutions: tuple | None = None,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        noise_window: float = 1.0,
        class_names: tuple[str, ...] | None = None,
        jumps: tuple[int, ...] | None = None,
    ):
        if image_channels < 1:
            raise ValueError(f"image_channels={image_channels}: expected 1 or more")
        if num_frequencies < 1:
            raise ValueError(f"num_frequencies={num_frequencies}: expected 1 or more (use_coordinates=False for none)")
        if in_channels not in (None, image_channels):
            raise ValueError(f"in_channels={in_channels}: expected image_channels={image_channels} or None")
        if not 0 < noise_window <= 1:
            raise ValueError(f"noise_window={noise_window}: expected a number in (0, 1]")
        if center_input_sample:
            raise ValueError("center_input_sample=True: expected False; samples are already in [-1, 1]")
        check_jumps(jumps)
        num_class_embeds = self._labels(class_names, num_class_embeds, class_embed_type)
        out_channels = image_channels if out_channels is None else out_channels
        if resolutions is not None:
            resolutions = [tuple(size) if isinstance(size, (list, tuple)) else int(size) for size in resolutions]
            sample_size = resolutions[-1] if sample_size is None else sample_size
        super().__init__(
            **unet_arguments(
                self,
                sample_size=sample_size,
                in_channels=image_channels + (4 * num_frequencies if use_coordinates else 0),
                out_channels=out_channels,
                num_class_embeds=num_class_embeds,
            )
        )
        # The parent registered its own view of these, 27 input channels. Users and stock pipelines mean the image's.
        self.register_to_config(
            in_channels=image_channels, out_channels=out_channels, resolutions=resolutions, sample_size=sample_size
        )
        self._encodings: dict[tuple, torch.Tensor] = {}  # of whole images, by size, device and type
        self._last_window: tuple | None = None  # the last coordinates that were given, and their encoding

    @staticmethod
    def _labels(names: tuple[str, ...] | None, given: int | None, kind: str | None) -> int | None:
        """How many labels there are."""
        if names is None:
            return given
        good = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n and n.isprintable() for n in names)
        if not good or not names or len(set(names)) < len(names):
            raise ValueError(f"class_names={names!r}: expected different names")
        if kind is not None or given not in (None, len(names) + 1):
            raise ValueError(
                f"num_class_embeds={given}, class_embed_type={kind!r}: expected {len(names) + 1} and None beside "
                f"{len(names)} class_names"
            )
        return len(names) + 1

    @staticmethod
    def coordinate_grid(
        height: int,
        width: int,
        box: tuple[float, float, float, float] | torch.Tensor = (0.0, 0.0, 1.0, 1.0),
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """
        Row and column of every pixel centre of a window, as fractions of the whole image.

        Args:
            height, width: Size of the window in pixels.
            box: (top, left, bottom, right) of the window in the whole image, each in [0, 1]; or a tensor [B, 4].
            device: Of the grid.

        Returns:
            float32 [2, height, width] (row, column); [B, 2, height, width] for a tensor of boxes. Pixel k of N lies at
            (k + 0.5) / N of its window, so a crop of a grid is the grid of the crop, and halving it by 2x2 means too.

        Example:
            >>> CoordinateUNet2DModel.coordinate_grid(1, 4)[1].tolist()  # the columns of one row
            [[0.125, 0.375, 0.625, 0.875]]
            >>> CoordinateUNet2DModel.coordinate_grid(1, 2, box=(0, 0.5, 1, 1))[1].tolist()  # its right half
            [[0.625, 0.875]]
        """
        exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        box = torch.as_tensor(box, dtype=exact, device=device)
        top, left, bottom, right = (edge[..., None] for edge in box.unbind(-1))
        rows = top + (bottom - top) * (torch.arange(height, dtype=exact, device=device) + 0.5) / height
        columns = left + (right - left) * (torch.arange(width, dtype=exact, device=device) + 0.5) / width
        shape = (*box.shape[:-1], height, width)
        return torch.stack((rows[..., :, None].expand(shape), columns[..., None, :].expand(shape)), dim=-3).float()

    def encode_coordinates(self, coordinates: torch.Tensor) -> torch.Tensor:
        """
        Sinusoidal encoding of coordinates, eq. 7 (no factor pi, as printed).

        Args:
            coordinates: [B, 2, H, W] in [0, 1], row and column.

        Returns:
            [B, 4L, H, W] in [-1, 1]: for the row, then the column: sin(2^0 x), cos(2^0 x), ... cos(2^(L-1) x).
        """
        frequencies = 2.0 ** torch.arange(self.config.num_frequencies, device=coordinates.device)
        angles = coordinates.float()[:, :, None] * frequencies[:, None, None]
        return torch.stack((angles.sin(), angles.cos()), dim=3).flatten(1, 3)

    def _encoding(self, sample: torch.Tensor, coordinates: torch.Tensor | None) -> torch.Tensor:
        """The encoded grid for `sample`, [1 or B, 4L, H, W]; kept, so that a step of a loop pays nothing for it."""
        if coordinates is None:
            return self._whole_image_encoding(sample)
        height, width = sample.shape[-2:]
        if coordinates.shape[1:] != (2, height, width) or coordinates.shape[0] not in (1, sample.shape[0]):
            raise ValueError(
                f"coordinates of shape {tuple(coordinates.shape)}: expected {(sample.shape[0], 2, height, width)}"
            )
        return self._window_encoding(sample, coordinates)

    def _whole_image_encoding(self, sample: torch.Tensor) -> torch.Tensor:
        """Kept by size, device and type."""
        compiling = torch.compiler.is_compiling()
        key = (*sample.shape[-2:], sample.device, sample.dtype)
        encoding = None if compiling else self._encodings.get(key)
        if encoding is None:
            device = sample.device if compiling else None  # made on the CPU, a GPU need not wait for the box
            grid = self.coordinate_grid(*sample.shape[-2:], device=device)[None]
            encoding = self.encode_coordinates(grid).to(sample.device, sample.dtype)
            if not compiling:
                if len(self._encodings) >= 16:
                    self._encodings.clear()
                self._encodings[key] = encoding
        return encoding

    def _window_encoding(self, sample: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Kept for the last coordinates that were given, as long as nobody writes into them."""
        compiling = torch.compiler.is_compiling()
        version = None if compiling or coordinates.is_inference() else coordinates._version
        if not compiling and self._last_window is not None:
            last, last_version, encoding = self._last_window
            same = last is coordinates and last_version == version
            if same and encoding.device == sample.device and encoding.dtype == sample.dtype:
                return encoding
        shared = coordinates.shape[0] > 1 and coordinates.stride(0) == 0
        grid = (coordinates[:1] if shared else coordinates).to(sample.device)
        encoding = self.encode_coordinates(grid).to(sample.dtype)
        if not compiling:
            self._last_window = (coordinates, version, encoding)
        return encoding

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        coordinates: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """
        Args:
            sample: [B, C, H, W], the noisy image; images are in [-1, 1].
            timestep: A number or [B], 0 to num_train_timesteps - 1.
            coordinates: [B, 2, H, W] in [0, 1], see `coordinate_grid`; by default `sample` is the whole image.
            class_labels: int64 [B], if the network has a class embedding: places in `class_names`, or their number
                for no class.
            return_dict: False for a tuple instead of a `UNet2DOutput`.

        Returns:
            The prediction, [B, out_channels, H, W].
        """
        if self.config.use_coordinates:
            encoding = self._encoding(sample, coordinates)
            sample = torch.cat((sample, encoding.expand(sample.shape[0], -1, -1, -1)), dim=1)
        return super().forward(sample, timestep, class_labels=class_labels, return_dict=return_dict)
