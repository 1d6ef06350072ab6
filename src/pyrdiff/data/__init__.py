"""Training data: reading images, levels of resolution, multi-scale batches, the embedded letters, detail spectra."""

from .batches import Batch, MultiScaleBatches
from .glyphs import draw_glyphs
from .images import BadImageError, decode_image, fit_image, list_images
from .levels import ImageLevels
from .seeds import seed_of
from .sources import ImageSource, open_source
from .spectrum import detail_spectra, octave_power, radial_covariance

__all__ = [
    "BadImageError",
    "Batch",
    "ImageLevels",
    "ImageSource",
    "MultiScaleBatches",
    "decode_image",
    "detail_spectra",
    "draw_glyphs",
    "fit_image",
    "list_images",
    "octave_power",
    "open_source",
    "radial_covariance",
    "seed_of",
]
