"""Weights that are numbers: what a run that diverged leaves is neither saved nor loaded."""

from collections.abc import Iterable, Mapping

import torch

LARGEST_WEIGHT = 1e18  # its square still fits into float32; weights that were trained are far below


def unusable(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with values that are not finite, or of a size that no training ends with."""
    return sorted(name for name, value in tensors.items() if not _is_usable(value))


def _is_usable(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta or value.numel() == 0:
        return True
    return bool(value.detach().float().abs().amax() <= LARGEST_WEIGHT)  # NaN is not


def refuse_unusable(networks: Iterable[tuple[str, object]], what: str) -> None:
    """
    Refuses networks whose weights are not numbers to go on with.

    Args:
        networks: (name, component); those that are no networks are passed over.
        what: What does not take place, for the message.

    Raises:
        ValueError: the network and the tensor are named.
    """
    for name, network in networks:
        bad = unusable(network.state_dict()) if isinstance(network, torch.nn.Module) else []
        if bad:
            raise ValueError(
                f"{name}: {bad[0]} has values that are not finite or above {LARGEST_WEIGHT:g}; expected those of a "
                f"training that did not diverge. {what}"
            )
