"""Encoder and decoder of a variational autoencoder, and its evidence lower bound.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.errors import InputError, check_choice, check_count, check_number

REDUCTIONS: tuple[str, ...] = ("sum", "mean")

_SMALLEST_GRID = 4  # the encoder halves an image until no side is longer
_MOST_SPANNED = 1024  # values of an image whose linear span is looked for
_NO_LENGTH = 1e-4  # share of the longest direction that counts as none
_FIRST_VARIANCE = 0.05  # of a pixel about the decoder's image


class VAENetwork(nn.Module):
    """Encoder and decoder of a conditional VAE, for any image size.

    Strided convolutions halve the image until it is at most 4 x 4; the decoder is the
    mirror image and cuts away what doubling an odd side has added. All slopes are
    continuous (SiLU, sigmoid), so that second-order searches can follow the decoder.

    Args:
        image_shape: Shape (C, H, W).
        latent_size: Latents per image.
        num_classes: Classes that encoder and decoder are told; 0 for none.
        width: Channels of the first convolution; twice as many in all others.
        hidden: Units of the fully connected layers on either side of the latents.
        span: Dimensions of the linear space that the decoder's images are projected
            on, see ``keep_to_span``; 0 for no projection.

    Source: Kingma and Welling (2014); Sohn, Lee and Yan (2015) for the condition.
    Taught in: notebooks/05_vae_prior.
    """

    centre: Tensor
    basis: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent_size: int,
        num_classes: int = 0,
        width: int = 32,
        hidden: int = 128,
        span: int = 0,
    ):
        super().__init__()
        if len(image_shape) != 3:
            expected = "three integers (C, H, W)"
            raise InputError("image_shape", expected, tuple(image_shape))
        channels, *sides = (check_count("image_shape", n) for n in image_shape)
        self.image_shape = (channels, sides[0], sides[1])
        self.latent_size = check_count("latent_size", latent_size)
        self.num_classes = check_count("num_classes", num_classes, minimum=0)
        self.width = check_count("width", width)
        self.hidden = check_count("hidden", hidden)
        sizes = [(sides[0], sides[1])]
        while not sizes[1:] or max(sizes[-1]) > _SMALLEST_GRID:
            height, length = sizes[-1]
            sizes.append(((height + 1) // 2, (length + 1) // 2))
        self._sizes = sizes[:-1]  # what each step of the decoder is cut to
        depths = [channels, width, *(2 * width for _ in sizes[2:])]
        pairs = list(itertools.pairwise(depths))
        self._grid = (depths[-1], *sizes[-1])
        flat = math.prod(self._grid)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairs)
        self.to_latents = nn.Sequential(
            nn.Linear(flat + num_classes, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_size),
        )
        self.from_latents = nn.Sequential(
            nn.Linear(latent_size + num_classes, hidden),
            nn.SiLU(),
            nn.Linear(hidden, flat),
            nn.SiLU(),
        )
        last = (width + 1) // 2
        ups = [*((b, a) for a, b in reversed(pairs[1:])), (width, last)]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in ups)
        self.to_pixels = nn.Conv2d(last, channels, 3, 1, 1)
        self.span = check_count("span", span, minimum=0)
        if span:
            count = math.prod(self.image_shape)
            self.register_buffer("centre", torch.zeros(count))
            self.register_buffer("basis", torch.zeros(count, span))
        # Of the residual variance per pixel, shared by all pixels.
        self.log_variance = nn.Parameter(torch.tensor(math.log(_FIRST_VARIANCE)))

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments that build this network."""
        return {
            "image_shape": list(self.image_shape),
            "latent_size": self.latent_size,
            "num_classes": self.num_classes,
            "width": self.width,
            "hidden": self.hidden,
            "span": self.span,
        }

    def encode(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (N, d) of q(z | x, y).

        Args:
            images: (N, C, H, W).
            classes: One row per image, 1 at its class (N, K).
        """
        hidden = images
        for layer in self.down:
            hidden = F.silu(layer(hidden))
        joined = torch.cat([hidden.flatten(1), classes], 1)
        mean, log_variance = self.to_latents(joined).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Images (N, C, H, W) of latents (N, d) and classes (N, K).

        They are in (0, 1) before any projection.
        """
        hidden = self.from_latents(torch.cat([latents, classes], 1))
        hidden = hidden.unflatten(1, self._grid)
        for layer, (height, width) in zip(self.up, reversed(self._sizes), strict=True):
            hidden = F.silu(layer(hidden)[..., :height, :width])
        drawn = torch.sigmoid(self.to_pixels(hidden))
        if not self.span:
            return drawn
        flat = (drawn.flatten(1) - self.centre) @ self.basis
        return (flat @ self.basis.T + self.centre).view_as(drawn)

    def keep_to_span(self, images: Tensor) -> None:
        """Project the decoder's images on the linear span of ``images``.

        Enlarged images fill a small part of their space only; a network learns that
        but roughly, and a projection exactly.

        Args:
            images: As many of (N, C, H, W) as the span has dimensions, or more.
        """
        flat = images.flatten(1).double()
        self.centre.copy_(flat.mean(0))
        _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        self.basis.copy_(directions[: self.span].T)


def span_of(images: Tensor) -> int:
    """Dimensions of the linear span of images (N, C, H, W) about their mean.

    0 where it is the whole space, or where there are too few images to tell.
    """
    count = math.prod(images.shape[1:])
    if len(images) <= count or count > _MOST_SPANNED:
        return 0
    flat = images.flatten(1).double()
    sizes = torch.linalg.svdvals(flat - flat.mean(0))
    rank = int((sizes > _NO_LENGTH * sizes[0]).sum())
    return rank if rank < count else 0


def elbo_terms(
    network: VAENetwork, images: Tensor, classes: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Both terms of the negative evidence lower bound, in nats per image.

    .. math::

        -\log p(x \mid z) &= \sum_{\text{pixels}} \frac{(x - D(z, y))^2}{2 \sigma^2}
        + \tfrac12 \log 2 \pi \sigma^2, \qquad z = m + s \varepsilon, \\
        \mathrm{KL} &= \tfrac12 \sum_{\text{latents}} m^2 + s^2 - 1 - \log s^2 .

    Args:
        network: The VAE; its one variance :math:`\sigma^2` is learned with it.
        images: (N, C, H, W) in [0, 1].
        classes: Their classes as ones (N, K).
        noise: Standard normal numbers (N, d).

    Returns:
        Negative log likelihood of one draw (N,), and KL divergence of the encoder's
        Gaussian from the standard normal one (N,).

    Source: Kingma and Welling (2014); Rybkin, Daniilidis and Levine (2021) for the
    learned variance.
    Taught in: notebooks/05_vae_prior.
    """
    mean, log_variance = network.encode(images, classes)
    latents = mean + (0.5 * log_variance).exp() * noise
    gaps = (images - network.decode(latents, classes)).flatten(1)
    spread = network.log_variance
    constant = gaps.shape[1] * (math.log(2 * math.pi) + spread)
    reconstruction = 0.5 * (gaps.square().sum(1) / spread.exp() + constant)
    divergence = mean.square() + log_variance.exp() - 1 - log_variance
    return reconstruction, 0.5 * divergence.sum(1)


def vae_loss(
    network: VAENetwork,
    reconstruction: Tensor,
    divergence: Tensor,
    *,
    beta: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Mean loss of a batch, from the two terms of ``elbo_terms``.

    Args:
        network: The VAE, for its numbers of pixels and latents.
        reconstruction: Negative log likelihood (N,) in nats per image.
        divergence: KL divergence (N,) in nats per image.
        beta: Weight of the divergence; 1 for the evidence lower bound.
        reduction: ``sum`` over pixels and over latents is the bound. ``mean`` over
            pixels and over latents is a well-known mistake: the divergence then counts
            pixels / latents times too much, and the latents are not used.

    Returns:
        A number.

    Raises:
        InputError: An unknown reduction or a negative weight.

    Source: Higgins et al. (2017) for the weight.
    Taught in: notebooks/05_vae_prior.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("beta", beta)
    if reduction == "mean":
        reconstruction = reconstruction / math.prod(network.image_shape)
        divergence = divergence / network.latent_size
    return (reconstruction + beta * divergence).mean()
