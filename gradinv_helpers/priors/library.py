"""Find a prior: by name, in a folder, or on the hub.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradinv_helpers.errors import InputError
from gradinv_helpers.files import expand_home

if TYPE_CHECKING:
    from gradinv_helpers.priors.gaussian import ImagePrior

PRIORS: tuple[str, ...] = (
    "spectrum",
    "vae-digits",
    "vae-photos",
    "diffusion-digits",
)

_VAE_FILES = ("model.safetensors",)
_DIFFUSION_FILES = ("model_index.json", "unet", "scheduler_config.json", "prior.json")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_prior(
    name: str | Path, image_shape: Sequence[int] | None = None
) -> ImagePrior:
    """Return a prior by its name, from a folder, or from the hub.

    Args:
        name: One of ``PRIORS``: ``spectrum``, the data-free Gaussian of photographs,
            or a prior that ships with the package. Or a folder, written by
            ``gradinv train-prior`` or holding a pipeline of diffusers. Or the name
            ``owner/model`` of a diffusion model on the hub, where there is no folder
            of that name.
        image_shape: Shape (C, H, W) of the images under attack. ``spectrum`` needs
            it; a learned prior draws images of one shape and is checked against it.

    Returns:
        The prior, on the CPU.

    Raises:
        InputError: An unknown name, a damaged folder, no network, or a prior of images
            of another shape.

    Taught in: notebooks/05_vae_prior.
    """
    if str(name) == "spectrum":
        from gradinv_helpers.priors.gaussian import spectrum_prior

        if image_shape is None:
            hint = "'spectrum' fits every size and has none of its own"
            expected = "the shape (C, H, W) of the images"
            raise InputError("image_shape", expected, None, hint)
        return spectrum_prior(image_shape)
    prior = _learned(name)
    if image_shape is not None and tuple(image_shape) != prior.image_shape:
        channels, height, _ = prior.image_shape
        colours = {1: "grey ", 3: "colour "}.get(channels, "")
        raise InputError(
            "image_shape",
            f"{prior.image_shape}, the images that {str(name)!r} draws",
            tuple(image_shape),
            f"load {colours}images with image_size={height}, train a prior for yours "
            "(gradinv train-prior), or take 'spectrum', which fits every size",
        )
    return prior


def folder_kind(folder: Path) -> str | None:
    """Say whose files a folder holds: ``vae``, ``diffusion``, or neither."""
    kinds = {"vae": _VAE_FILES, "diffusion": _DIFFUSION_FILES}
    for kind, names in kinds.items():
        if any((folder / name).exists() for name in names):
            return kind
    return None


def _learned(name: str | Path) -> ImagePrior:
    kind = str(name).split("-")[0] if str(name) in PRIORS else None
    if kind is None:
        kind = _kind_elsewhere(name)
    if kind == "vae":
        from gradinv_helpers.priors.vae import VAEPrior

        return VAEPrior.load(name)
    from gradinv_helpers.priors.diffusion import DiffusionPrior

    return DiffusionPrior.load(name)


def _kind_elsewhere(name: str | Path) -> str:
    """Kind of the prior in a folder; what the hub has is a diffusion model."""
    folder = expand_home(name)
    if folder.is_dir():
        kind = folder_kind(folder)
        if kind is None:
            raise InputError(
                "prior",
                "a folder with model.safetensors (VAE) or unet/ and scheduler/ "
                "(diffusion)",
                f"{str(name)!r} without them",
                "gradinv train-prior writes one",
            )
        return kind
    if _HUB_NAME.fullmatch(str(name)):
        return "diffusion"
    near = difflib.get_close_matches(str(name), PRIORS, n=1)
    raise InputError(
        "prior",
        f"one of {', '.join(PRIORS)}, a folder written by gradinv train-prior, or "
        "owner/model on the hub",
        repr(str(name)),
        f"did you mean {near[0]!r}?" if near else "",
    )
