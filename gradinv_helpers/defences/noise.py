"""Gaussian noise on an update. Taught in: notebooks/02_dlg_four_steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradinv_helpers.defences.common import check_unencoded
from gradinv_helpers.errors import check_number
from gradinv_helpers.updates import SharedUpdate


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
        if update.encoding is not None and not update.encoding.exact:
            check_unencoded(update)
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
