"""What a client can do to its update before sending it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from gradinv_helpers.errors import check_number
from gradinv_helpers.updates import SharedUpdate


class Defence(Protocol):
    """A change to an update that the client makes before sending it."""

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The defended update."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """Add independent Gaussian noise to every entry of an update.

    Plain noise without clipping bounds nothing: it is the defence of the DLG paper,
    not differential privacy.

    Args:
        std: Standard deviation of the noise, at least 0.
        relative: If true, ``std`` is the expected norm of the noise as a share of
            the norm of the update.

    Source: Zhu et al. (2019), Section 5.1. Taught in: notebooks/02_dlg_four_steps.
    """

    std: float
    relative: bool = False

    def __post_init__(self) -> None:
        check_number("std", self.std)

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The noisy update; it states the standard deviation, as a protocol would."""
        std = self.std
        if self.relative:
            entries = sum(t.numel() for t in update.tensors.values())
            squares = sum(
                float(t.double().square().sum()) for t in update.tensors.values()
            )
            std *= math.sqrt(squares / entries)
        noisy = {
            name: t
            + std
            * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
            for name, t in update.tensors.items()
        }
        return update.replace_tensors(
            noisy, noise_std=math.hypot(std, update.noise_std)
        )


def defend(
    update: SharedUpdate,
    *defences: Defence,
    generator: torch.Generator | None = None,
) -> SharedUpdate:
    """Apply defences one after the other to what a client sends.

    Args:
        update: The client's update; it is left as it was.
        defences: For example ``GaussianNoise(1e-3)``.
        generator: Source of randomness; torch's global one where ``None``.

    Returns:
        The update that travels.

    Taught in: notebooks/02_dlg_four_steps.
    """
    for defence in defences:
        update = defence(update, generator=generator)
    return update
