"""Training data: reading images, levels of resolution, multi-scale batches, the embedded letters,
low-resolution images made of high-resolution ones. Also image files that are read to be worked on and written back with
what they carry."""

from pyrdiff.parts.files import replacing
from pyrdiff.parts.outputs import Outputs

from .alpha import fill_hidden
from .batches import Batch, MultiScaleBatches
from .colors import color_statistics
from .degradations import degrade, shrink
from .files import Picture, check_saving, open_picture, reopen_picture, save_picture
from .glyphs import draw_glyphs
from .images import BadImageError, decode_image, fit_image, image_tensor
from .levels import ImageLevels
from .listing import Listing, list_images, look_into
from .seeds import seed_of
from .sources import ImageSource, open_source, read_image, sizes_of

__all__ = [
    "BadImageError",
    "Batch",
    "ImageLevels",
    "ImageSource",
    "Listing",
    "MultiScaleBatches",
    "Outputs",
    "Picture",
    "check_saving",
    "color_statistics",
    "decode_image",
    "degrade",
    "draw_glyphs",
    "fill_hidden",
    "fit_image",
    "image_tensor",
    "list_images",
    "look_into",
    "open_picture",
    "open_source",
    "read_image",
    "reopen_picture",
    "replacing",
    "save_picture",
    "seed_of",
    "shrink",
    "sizes_of",
]
