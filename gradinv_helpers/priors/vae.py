r"""A variational autoencoder as an image prior: what a network learned of images.

A decoder D turns d standard normal numbers z, and the class y, into an image; an
encoder q guesses z from an image. The VAE says how images come about:

.. math:: z = m_y + L_y u, \quad u \sim N(0, I_d), \qquad
   x = D(z, y) + S \eta, \quad \eta \sim N(0, I).

Training assumes codes z of mean 0 and covariance I; the mean :math:`m_y` and the root
:math:`L_y` of each class are fitted to the codes of the training images afterwards. The
latents of an image are u, standard normal as for every prior of this package.

The *hard* prior keeps D alone: an image is d numbers, however many pixels it has, so
even the gradient of a large batch has more equations than unknowns, and what D cannot
draw is out of reach. The *soft* prior keeps both terms: its latents are (u, η), and the
detail that D misses costs :math:`\tfrac12 \|\eta\|^2`. The root S of the residuals'
covariance is measured, and its size on images that the training has not seen.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.priors import vae_files
from gradinv_helpers.priors.gaussian import CovariancePrior, SpectrumPrior
from gradinv_helpers.priors.vae_codes import CodeLaw, standard_law
from gradinv_helpers.priors.vae_network import VAENetwork

if TYPE_CHECKING:
    from gradinv_helpers.data import Images

_CHUNK = 32  # images at once where a data set is measured


@dataclass(frozen=True, eq=False)
class VAEPrior:
    """The decoder of a VAE as a prior: d standard normal latents per image.

    A VAE that was told the classes needs them again: ``given`` binds them, one per
    image, and ``decode`` and ``encode`` then expect that many images side by side. One
    that was not told ignores them.

    Args:
        network: The trained network; its weights are frozen.
        residual: Gaussian of x - D(z, y), of mean 0.
        about: How the network was trained and measured, as in ``config.json``.
        classes: Classes of the images (N, K), as ones; bound by ``given``.
        name: What the prior is called in reports.
        codes: Where the codes of each class are; N(0, I) where ``None``.

    Source: Kingma and Welling (2014).
    Taught in: notebooks/05_vae_prior.
    """

    network: VAENetwork
    residual: SpectrumPrior | CovariancePrior
    about: Mapping[str, Any] = field(default_factory=dict)
    classes: Tensor | None = None
    name: str = "vae"
    codes: CodeLaw | None = None

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def law(self) -> CodeLaw:
        """The law of the codes, also where it is the standard one."""
        if self.codes is not None:
            return self.codes
        standard = standard_law(self.num_classes, self.size)
        return standard.to(self.network.log_variance)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return self.network.image_shape

    @property
    def size(self) -> int:
        """Latents per image."""
        return self.network.latent_size

    @property
    def num_classes(self) -> int:
        """Classes that the network is told; 0 for none."""
        return self.network.num_classes

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of latents (..., size).

        Raises:
            InputError: The classes are not bound, or not one per image.
        """
        lead = latents.shape[:-1]
        classes = self._classes(lead, latents)
        codes = self.law.place(latents.reshape(-1, self.size), classes)
        images = self.network.decode(codes, classes)
        return images.view(*lead, *self.image_shape)

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the latents from that by the images."""
        with torch.enable_grad():
            free = latents.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.decode(free), free, slopes)
        return slope

    def encode(self, images: Tensor) -> Tensor:
        """Latents (..., size): the encoder's mean for images (..., C, H, W).

        Raises:
            InputError: The classes are not bound, or not one per image.
        """
        lead = images.shape[:-3]
        classes = self._classes(lead, images)
        flat = images.reshape(-1, *self.image_shape)
        codes = self.network.encode(flat, classes)[0]
        return self.law.whiten(codes, classes).view(*lead, self.size)

    def given(self, labels: Tensor) -> VAEPrior:
        """The same prior for images of these classes (N,), in this order.

        Raises:
            InputError: A class is not one of those the network was told.
        """
        if not self.num_classes:
            return self
        return replace(self, classes=self._one_hot(labels))

    def to(self, like: Tensor) -> VAEPrior:
        """The same prior with the type and on the device of ``like``."""
        weight = self.network.log_variance
        if weight.dtype == like.dtype and weight.device == like.device:
            return self
        return replace(
            self,
            network=copy.deepcopy(self.network).to(like),
            residual=self.residual.to(like),
            classes=None if self.classes is None else self.classes.to(like),
            codes=None if self.codes is None else self.codes.to(like),
        )

    def soft(self) -> SoftVAEPrior:
        """The prior whose latents also hold what the decoder misses."""
        return SoftVAEPrior(self, name=f"soft {self.name}")

    @property
    def noise_std(self) -> float:
        """Standard deviation of a pixel about D(z, y), as the training learned it."""
        return math.exp(0.5 * float(self.network.log_variance))

    def log_density(self, images: Tensor, means: Tensor) -> Tensor:
        """Log p(x | z) (...,) in nats: independent Gaussian errors in all pixels."""
        count = math.prod(self.image_shape)
        log_variance = self.network.log_variance
        squares = (images - means).flatten(-3).square().sum(-1)
        constant = count * (math.log(2 * math.pi) + log_variance)
        return -0.5 * (squares / log_variance.exp() + constant)

    def elbo(self, images: Images, *, samples: int = 16, seed: int = 0) -> Tensor:
        """Evidence lower bound (N,) of labelled images, in nats per image."""
        return _log_weights(self, images, samples, seed).mean(0)

    def log_likelihood(
        self, images: Images, *, samples: int = 64, seed: int = 0
    ) -> Tensor:
        """Importance-weighted estimate (N,) of log p(x | y), in nats per image.

        A lower bound in expectation, at least as tight as the ELBO, which it equals
        for one sample.

        Args:
            images: Labelled images.
            samples: Draws of the encoder per image.
            seed: Seed of the draws.

        Source: Burda, Grosse and Salakhutdinov (2016).
        """
        weights = _log_weights(self, images, samples, seed)
        return weights.logsumexp(0) - math.log(samples)

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into a folder.

        Raises:
            InputError: The folder cannot be written to.
        """
        return vae_files.write_prior(self, folder)

    @staticmethod
    def load(folder: str | Path) -> VAEPrior:
        """Read what ``save`` has written, or a prior that ships with the package.

        Args:
            folder: The folder, or the name of one in ``PRETRAINED``.

        Raises:
            InputError: A file is missing, damaged, or does not fit the other.
        """
        network, residual, codes, about = vae_files.read_prior(folder)
        name = str(about.pop("name"))
        return VAEPrior(network, residual, about, name=name, codes=codes)

    def posterior_draws(
        self, images: Images, *, samples: int, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Draws of the encoder for labelled images, a few images at a time.

        Args:
            images: Labelled images of the prior's shape.
            samples: Draws per image.
            seed: Seed of the draws.

        Yields:
            Images (n, C, H, W), decoded draws (samples, n, C, H, W), and
            log p(z | y) - log q(z | x, y) of every draw (samples, n).

        Raises:
            InputError: Another image shape, or a class that the VAE has not seen.
        """
        check_count("samples", samples)
        check_seed("seed", seed)
        if images.shape != self.image_shape:
            expected = f"images of shape {self.image_shape}"
            raise InputError("images", expected, images.shape)
        generator = torch.Generator().manual_seed(seed)
        like = self.network.log_variance
        for start in range(0, len(images), _CHUNK):
            some = images[start : start + _CHUNK]
            bound, pixels = self.given(some.labels), some.pixels.to(like)
            classes = bound._classes((len(pixels),), pixels)
            mean, log_variance = self.network.encode(pixels, classes)
            shape = (samples, *mean.shape)
            noise = torch.randn(shape, generator=generator).to(like)
            codes = mean + (0.5 * log_variance).exp() * noise
            repeated = classes.repeat(samples, 1)
            latents = self.law.whiten(codes.flatten(0, 1), repeated).view(shape)
            log_ratio = 0.5 * (noise.square() + log_variance - latents.square()).sum(-1)
            log_ratio = log_ratio - self.law.log_volume(classes)
            yield pixels, bound.decode(latents), log_ratio

    def _one_hot(self, labels: Tensor) -> Tensor:
        like = self.network.log_variance
        if labels.dim() != 1 or labels.is_floating_point() or not len(labels):
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise InputError("labels", "integers of shape (N,)", got)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise InputError(
                "labels",
                f"classes from 0 to {self.num_classes - 1}, which this VAE has seen",
                f"{int(labels.min())} to {int(labels.max())}",
            )
        return F.one_hot(labels.to(like.device), self.num_classes).to(like)

    def _classes(self, lead: Sequence[int], like: Tensor) -> Tensor:
        """Classes (rows, K) of images with these leading dimensions."""
        if not self.num_classes:
            return like.new_zeros(math.prod(lead), 0)
        if self.classes is None:
            raise InputError(
                "prior",
                "a VAE whose classes are bound",
                f"{self.name!r} without labels",
                "call prior.given(labels) first",
            )
        count = len(self.classes)
        if count == 1:
            return self.classes.expand(math.prod(lead), -1)
        if not lead or lead[-1] != count:
            raise InputError(
                "latents", f"{count} images, one per label", tuple(lead)[-1:] or 1
            )
        rows = self.classes.expand(*lead, -1)
        return rows.reshape(-1, self.num_classes)


@dataclass(frozen=True, eq=False)
class SoftVAEPrior:
    r"""A VAE whose images may leave the decoder's manifold, at a price.

    The latents of an image are (u, η), d + C·H·W independent standard normal numbers,
    and the image is :math:`x = D(z, y) + S\eta`. This is the VAE's own generative
    model with :math:`p(x \mid z) = N(D(z, y), S S^\top)` and the noise written as a
    latent: :math:`\|u\|^2 + \|\eta\|^2 = \|u\|^2 + (x - D)^\top (S S^\top)^{-1}
    (x - D)`, so a search over (u, η) is one over (u, x), in coordinates in which the
    prior is white. Training shares one variance among all pixels; here D
    and q are fixed, and the covariance :math:`S S^\top` has the shape of the training
    images' residuals and the size of those of held-out images.

    Args:
        hard: The VAE.
        name: What the prior is called in reports.

    Taught in: notebooks/05_vae_prior.
    """

    hard: VAEPrior
    name: str = "soft vae"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return self.hard.image_shape

    @property
    def size(self) -> int:
        """Latents per image: those of the decoder, then one per value."""
        return self.hard.size + self.hard.residual.size

    def decode(self, latents: Tensor) -> Tensor:
        """Images (..., C, H, W) of latents (..., size); not confined to [0, 1]."""
        codes, details = self._parts(latents)
        return self.hard.decode(codes) + self.hard.residual.decode(details)

    def pull_back(self, latents: Tensor, slopes: Tensor) -> Tensor:
        """Derivative (..., size) by the latents from that by the images."""
        codes, details = self._parts(latents)
        parts = (
            self.hard.pull_back(codes, slopes),
            self.hard.residual.pull_back(details, slopes),
        )
        return torch.cat(parts, -1)

    def encode(self, images: Tensor) -> Tensor:
        """Latents (..., size) whose images are exactly ``images``.

        u is that of the encoder's mean, and η what is left.
        """
        codes = self.hard.encode(images)
        details = self.hard.residual.encode(images - self.hard.decode(codes))
        return torch.cat([codes, details], -1)

    def given(self, labels: Tensor) -> SoftVAEPrior:
        """The same prior for images of these classes (N,), in this order."""
        return replace(self, hard=self.hard.given(labels))

    def to(self, like: Tensor) -> SoftVAEPrior:
        """The same prior with the type and on the device of ``like``."""
        return replace(self, hard=self.hard.to(like))

    def log_density(self, images: Tensor, means: Tensor) -> Tensor:
        """Log p(x | z) (...,) in nats: Gaussian errors of covariance S Sᵀ."""
        residual = self.hard.residual
        details = residual.encode(images - means)
        if isinstance(residual, CovariancePrior):
            log_volume = residual.root.logdet()
        else:
            channels, height, width = self.image_shape
            log_volume = channels * residual.deviations.log().sum()
            log_volume += height * width * residual.colours.slogdet().logabsdet
        constant = 2 * log_volume + residual.size * math.log(2 * math.pi)
        return -0.5 * (details.square().sum(-1) + constant)

    def elbo(self, images: Images, *, samples: int = 16, seed: int = 0) -> Tensor:
        """Evidence lower bound (N,) of labelled images, in nats per image."""
        return _log_weights(self, images, samples, seed).mean(0)

    def log_likelihood(
        self, images: Images, *, samples: int = 64, seed: int = 0
    ) -> Tensor:
        """As for the hard prior, with the residuals' covariance."""
        weights = _log_weights(self, images, samples, seed)
        return weights.logsumexp(0) - math.log(samples)

    def _parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes, details = latents.split([self.hard.size, self.hard.residual.size], -1)
        return codes, details


def _log_weights(
    prior: VAEPrior | SoftVAEPrior, images: Images, samples: int, seed: int
) -> Tensor:
    """Log p(x, z | y) - log q(z | x, y) of draws of the encoder, (samples, N)."""
    hard = prior.hard if isinstance(prior, SoftVAEPrior) else prior
    draws = hard.posterior_draws(images, samples=samples, seed=seed)
    columns = [
        prior.log_density(pixels, drawn) + ratio for pixels, drawn, ratio in draws
    ]
    return torch.cat(columns, 1).double().cpu()
