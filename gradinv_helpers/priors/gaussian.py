r"""Natural images as a Gaussian: what an attacker knows before seeing an update.

Neighbouring points are alike and the three colours go up and down together. The
simplest law that says so is a Gaussian whose covariance C is diagonal in the discrete
cosine transform, with a variance that falls with the square of the frequency f, times a
covariance of the colours. In *whitened* coordinates u,

.. math:: x = \mu + C^{1/2} u, \qquad u \sim N(0, I),

every direction is as likely as any other: :math:`\tfrac12 \|u\|^2` is the cost of an
image, and a descent in u moves smooth structure first and fine detail last.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError, check_choice, check_count, check_number

FORMS: tuple[str, ...] = ("spectrum", "covariance")

# Photographs in [0, 1]: mean and variance of their values, and the shares of the
# variance that lie along grey, red against green, and blue against both.
_MEAN, _VARIANCE = 0.47, 0.06
_COLOURS = (2.6, 0.3, 0.1)
_RIDGE = 3e-5  # variance of every pixel that no training image accounts for
_MOST_PIXELS = 6144  # of a dense covariance


class ImagePrior(Protocol):
    """What a reconstruction needs of a prior: images as a function of latents.

    The latents of one image are ``size`` numbers, independent and standard normal
    before anything is known.
    """

    @property
    def name(self) -> str:
        """What the prior is called in reports."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""

    @property
    def size(self) -> int:
        """Latents per image."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of latents (..., size)."""

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the latents from that by the images."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents (..., size) whose images come close to ``images``."""

    def given(self, labels: Tensor) -> ImagePrior:
        """The same prior for images of these classes (N,), in this order."""

    def to(self, like: Tensor) -> ImagePrior:
        """The same prior with the type and on the device of ``like``."""


@dataclass(frozen=True)
class SpectrumPrior:
    """A Gaussian whose covariance is diagonal in frequencies, times one of colours.

    Nothing dense is ever formed: both roots of the covariance cost two small matrix
    products per image.

    Args:
        mean: Mean image, broadcast to (C, H, W).
        deviations: Standard deviation of every DCT coefficient, (H, W).
        colours: Rows are the directions in which colours vary, each with the length
            of its standard deviation, (C, C).
        name: What the prior is called in reports.

    Source: Field (1987) for the spectrum of natural images.
    Taught in: notebooks/04_aggregated_gradients.
    """

    mean: Tensor
    deviations: Tensor
    colours: Tensor
    name: str = "spectrum"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        height, width = self.deviations.shape
        return len(self.colours), height, width

    @property
    def size(self) -> int:
        """Latents per image."""
        return math.prod(self.image_shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of whitened coordinates (..., size)."""
        rows, columns = self._transforms(latents)
        scaled = latents.unflatten(-1, self.image_shape) * self.deviations
        bands = rows.T @ scaled @ columns
        return torch.einsum("kc,...khw->...chw", self.colours, bands) + self.mean

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the coordinates from that by the images."""
        rows, columns = self._transforms(slopes)
        bands = torch.einsum("kc,...chw->...khw", self.colours, slopes)
        return ((rows @ bands @ columns.T) * self.deviations).flatten(-3)

    def encode(self, images: Tensor) -> Tensor:
        """Whitened coordinates (..., size) of images (..., C, H, W)."""
        rows, columns = self._transforms(images)
        unmix = torch.linalg.inv(self.colours.double()).to(images)
        centred = images - self.mean
        bands = torch.einsum("ck,...chw->...khw", unmix, centred)
        return (rows @ bands @ columns.T / self.deviations).flatten(-3)

    def given(self, labels: Tensor) -> SpectrumPrior:
        """The same prior: it knows no classes."""
        return self

    def to(self, like: Tensor) -> SpectrumPrior:
        """The same prior with the type and on the device of ``like``."""
        return SpectrumPrior(
            self.mean.to(like),
            self.deviations.to(like),
            self.colours.to(like),
            self.name,
        )

    def _transforms(self, like: Tensor) -> tuple[Tensor, Tensor]:
        _, height, width = self.image_shape
        return _like(height, like.dtype, like.device), _like(
            width, like.dtype, like.device
        )


@dataclass(frozen=True)
class CovariancePrior:
    """A Gaussian with any covariance, by its dense root.

    Args:
        mean: Mean image (C, H, W).
        root: Symmetric root of the covariance, (n, n) with n = C*H*W.
        name: What the prior is called in reports.

    Taught in: notebooks/04_aggregated_gradients.
    """

    mean: Tensor
    root: Tensor
    name: str = "covariance"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        channels, height, width = self.mean.shape
        return channels, height, width

    @property
    def size(self) -> int:
        """Latents per image."""
        return self.mean.numel()

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of whitened coordinates (..., size)."""
        return (latents @ self.root).unflatten(-1, self.image_shape) + self.mean

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the coordinates from that by the images."""
        return slopes.flatten(-3) @ self.root

    def encode(self, images: Tensor) -> Tensor:
        """Whitened coordinates (..., size) of images (..., C, H, W)."""
        flat = (images - self.mean).flatten(-3)
        return (flat.double() @ torch.linalg.inv(self.root.double())).to(images)

    def given(self, labels: Tensor) -> CovariancePrior:
        """The same prior: it knows no classes."""
        return self

    def to(self, like: Tensor) -> CovariancePrior:
        """The same prior with the type and on the device of ``like``."""
        return CovariancePrior(self.mean.to(like), self.root.to(like), self.name)


def spectrum_prior(
    image_shape: Sequence[int],
    *,
    mean: float = _MEAN,
    variance: float = _VARIANCE,
    power: float = 1.0,
    colours: Sequence[float] = _COLOURS,
) -> SpectrumPrior:
    r"""Build the data-free prior of photographs, for any image size.

    Args:
        image_shape: Shape (C, H, W).
        mean: Mean of all values, in [0, 1].
        variance: Variance of a pixel.
        power: The variance of a DCT coefficient of frequency f is proportional to
            :math:`(1 + |f|^2)^{-power}`; 0 is white noise.
        colours: Variances along grey, red against green, and blue against both, in
            any unit; used for three channels only. Others vary independently.

    Returns:
        The prior, in double precision on the CPU.

    Raises:
        InputError: A value is out of range.

    Source: Field (1987): the power spectrum of natural scenes falls as 1/f².
    Taught in: notebooks/04_aggregated_gradients.
    """
    if len(image_shape) != 3:
        raise InputError("image_shape", "three integers (C, H, W)", tuple(image_shape))
    channels, height, width = (check_count("image_shape", n) for n in image_shape)
    check_number("mean", mean)
    check_number("variance", variance, exclusive=True)
    check_number("power", power)
    down = torch.arange(height, dtype=torch.float64)[:, None]
    right = torch.arange(width, dtype=torch.float64)
    shares = (1 + down.square() + right.square()) ** -power
    return SpectrumPrior(
        mean=torch.tensor(mean, dtype=torch.float64),
        deviations=(variance * shares / shares.mean()).sqrt(),
        colours=_colour_root(channels, colours),
    )


def fit_gaussian(
    images: Tensor, *, form: str = "spectrum", ridge: float = _RIDGE
) -> SpectrumPrior | CovariancePrior:
    """Fit a Gaussian prior to public images.

    Args:
        images: Public images (N, C, H, W) in [0, 1], none of which is under attack.
        form: ``spectrum`` fits the mean pixel, a variance for every frequency and the
            covariance of the channels; ``covariance`` fits the covariance of all
            values, which takes many images and a dense matrix.
        ridge: Variance added to every pixel, above 0, so that no image is impossible.

    Returns:
        The prior, in double precision on the CPU.

    Raises:
        InputError: Fewer than two images, or too many values for a dense covariance.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_choice("form", form, FORMS)
    check_number("ridge", ridge, exclusive=True)
    if images.dim() != 4 or len(images) < 2:
        expected = "at least 2 images of shape (N, C, H, W)"
        raise InputError("images", expected, tuple(images.shape))
    samples = images.double().cpu()
    channels, height, width = samples.shape[1:]
    if form == "covariance":
        if samples[0].numel() > _MOST_PIXELS:
            raise InputError(
                "images",
                f"at most {_MOST_PIXELS} values for a dense covariance",
                samples[0].numel(),
                "use form='spectrum'",
            )
        flat = samples.flatten(1)
        covariance = torch.cov(flat.T, correction=0)
        covariance.diagonal().add_(ridge)
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp_min(ridge).sqrt()) @ vectors.T
        return CovariancePrior(flat.mean(0).view(samples.shape[1:]), root)
    mean = samples.mean((0, 2, 3))[:, None, None]
    centred = samples - mean
    across = torch.einsum("nchw,ndhw->cd", centred, centred)
    across = across / (len(samples) * height * width)
    across.diagonal().add_(ridge)
    values, vectors = torch.linalg.eigh(across / across.trace() * channels)
    rows, columns = cosine_transform(height), cosine_transform(width)
    bands = (rows @ centred @ columns.T).square().mean((0, 1)) + ridge
    return SpectrumPrior(
        mean=mean,
        deviations=bands.sqrt(),
        colours=(vectors * values.clamp_min(1e-6).sqrt()).T,
        name="fitted spectrum",
    )


def cosine_transform(size: int) -> Tensor:
    """The orthonormal discrete cosine transform as a matrix (size, size).

    Row k holds frequency k, in half waves per side.

    Source: Ahmed, Natarajan and Rao (1974).
    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("size", size)
    frequencies = torch.arange(size, dtype=torch.float64)[:, None]
    places = torch.arange(size, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / size * frequencies * places)
    waves[0] /= math.sqrt(2)
    return waves * math.sqrt(2 / size)


@functools.lru_cache(maxsize=16)
def _like(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return cosine_transform(size).to(device, dtype)


def _colour_root(channels: int, variances: Sequence[float]) -> Tensor:
    if channels != 3:
        return torch.eye(channels, dtype=torch.float64)
    if len(variances) != 3:
        raise InputError("colours", "three variances", len(variances))
    axes = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True)
    checked = [check_number("colours", v, exclusive=True) for v in variances]
    shares = torch.tensor(checked, dtype=torch.float64)
    return axes * (shares / shares.mean()).sqrt()[:, None]
