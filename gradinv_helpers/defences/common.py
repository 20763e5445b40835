"""What all defences have in common. Taught in: notebooks/02_dlg_four_steps."""

from __future__ import annotations

from typing import Protocol

import torch

from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import SharedUpdate


class Defence(Protocol):
    """A change to an update that the client makes before sending it."""

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The defended update."""
        ...


def defend(
    update: SharedUpdate,
    *defences: Defence,
    generator: torch.Generator | None = None,
) -> SharedUpdate:
    """Apply defences one after the other to what a client sends.

    An encoding (pruning, signs, quantisation) is the last of them: noise that is added
    to encoded numbers would take them apart.

    Args:
        update: The client's update; it is left as it was.
        defences: For example ``GaussianNoise(1e-3)`` or ``TopK(0.1)``.
        generator: Source of randomness; torch's global one where ``None``.

    Returns:
        The update that travels. It states its noise and its encoding.

    Raises:
        InputError: A defence follows an encoding.

    Taught in: notebooks/02_dlg_four_steps and notebooks/08_differential_privacy.
    """
    for defence in defences:
        update = defence(update, generator=generator)
    return update


def check_unencoded(update: SharedUpdate) -> None:
    """Make sure that no defence has encoded an update yet.

    Raises:
        InputError: One has.
    """
    if update.encoding is not None:
        raise InputError(
            "update",
            "one that is not encoded yet",
            f"encoding {update.encoding.kind!r}",
            "an encoding is the last defence, and there is one of them",
        )
