"""How much each level adds over the one below it, by spatial frequency."""

import torch

CHUNK = 64  # images that are held as floats at a time


def radial_covariance(images: torch.Tensor) -> torch.Tensor:
    """Covariance over channels by spatial frequency; white noise of covariance V gives V in every bin.

    The real part of FFT2 · FFT2* / (H·W), averaged over images and over those frequencies whose radius √(fy² + fx²),
    with fy and fx in whole cycles per image, rounds to the bin's number. The corners' higher frequencies are in the
    last bin. The diagonal is the power of each channel.

    Args:
        images: float [N, C, H, W].

    Returns:
        float64 [max(H, W) // 2 + 1, C, C], on the device of `images`.

    Raises:
        ValueError: when `images` is not a float tensor of four dimensions with at least one value.
    """
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(f"images={images.dtype} {list(images.shape)}: expected a non-empty float [N, C, H, W]")
    count, channels, height, width = images.shape
    bins = max(height, width) // 2 + 1
    waves = torch.fft.fft2(images, norm="ortho")
    products = torch.einsum("nchw,ndhw->hwcd", waves, waves.conj()).real.to(torch.float64) / count
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64, device=images.device)
    columns = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64, device=images.device)
    radius = (rows[:, None].square() + columns.square()).sqrt().round().long().clamp(max=bins - 1).flatten()
    sums = torch.zeros(bins, channels, channels, dtype=torch.float64, device=images.device)
    sums.index_add_(0, radius, products.flatten(0, 1))
    return sums / torch.bincount(radius, minlength=bins)[:, None, None]


def octave_power(images: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """How much the images of a set differ, by octave, as a share of how much those of another do; 1.0 is right.

    Each set is taken about its own mean image, so what all images share does not count.

    Args:
        images: float [N, C, H, W], N at least 2.
        reference: float [M, C, H, W], M at least 2.

    Returns:
        For 1, 2, 3-4, 5-8 ... cycles per image, up to half the shorter side: the ratio of their powers, over all
        channels and frequencies of the octave.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if images.shape[1:] != reference.shape[1:] or min(len(images), len(reference)) < 2:
        raise ValueError(
            f"images={list(images.shape)}, reference={list(reference.shape)}: expected two or more each, of one shape"
        )
    powers = []
    for part in (images, reference):
        mean, total = part.mean(0), 0.0
        for chunk in part.split(CHUNK):
            total = total + len(chunk) * radial_covariance(chunk - mean).diagonal(dim1=1, dim2=2).sum(1)
        powers.append(total / (len(part) - 1))
    height, width = images.shape[-2:]
    rows, columns = torch.fft.fftfreq(height, 1 / height), torch.fft.fftfreq(width, 1 / width)
    radius = (rows[:, None].square() + columns.square()).sqrt().round().long().clamp(max=len(powers[0]) - 1)
    count = torch.bincount(radius.flatten(), minlength=len(powers[0])).to(powers[0])
    shares, low, high = [], 1, 1
    while high <= min(height, width) // 2:
        ours, theirs = ((power * count)[low : high + 1].sum().item() for power in powers)
        shares.append(ours / theirs)
        low, high = high + 1, 2 * high
    return shares
