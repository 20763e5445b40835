"""Priors by name or folder. Taught in: notebooks/05_vae_prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import ImagePrior, spectrum_prior


def load_prior(
    name_or_folder: str | Path, image_shape: Sequence[int] | None = None
) -> ImagePrior:
    """Return a prior by its name, or from a folder."""
    name = str(name_or_folder)
    if name == "spectrum":
        if image_shape is None:
            raise InputError("image_shape", "a shape (C, H, W) for 'spectrum'", "none")
        return spectrum_prior(image_shape)
    if name.startswith("vae"):
        from gradinv_helpers.priors.vae import VAEPrior

        return VAEPrior.load(name_or_folder)
    from gradinv_helpers.priors.diffusion import DiffusionPrior

    return DiffusionPrior.load(name_or_folder)
