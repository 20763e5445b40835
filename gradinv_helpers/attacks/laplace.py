r"""How sure an update makes us of its images: the Laplace approximation.

Near a point u of the latent space an update is linear in the latents, with the Jacobian
J. Errors of covariance :math:`\Sigma` on its entries and the standard normal prior then
make the posterior a Gaussian around its mode, with the covariance

.. math:: H^{-1} = (I + J^\top \Sigma^{-1} J)^{-1}
    = I - V \,\mathrm{diag}\!\left(\frac{\lambda}{1 + \lambda}\right) V^\top

for the eigenvalues :math:`\lambda` and eigenvectors V of
:math:`J^\top \Sigma^{-1} J`. A direction with :math:`\lambda > 1` is known better from
the update than from the prior, and the update gives away
:math:`\tfrac12 \log_2 \det H` bits about the images.

``Posterior.energy`` is minus *twice* the log-density: H is half of the Gauss-Newton
part of its Hessian.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradinv_helpers.attacks.jacobian import (
    Linearisation,
    gram,
    linearise_gradient,
)
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.spectrum import Spectrum, estimate_spectrum
from gradinv_helpers.errors import (
    InputError,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.priors.gaussian import ImagePrior

_MOST_LATENTS = 3072  # whose eigenvectors are all computed
_MOST_BYTES = 2**30  # of a dense Jacobian, or of the decoder's
_RANK, _BLOCK = 256, 16  # of a Krylov space, where not all are
_STEPS, _PROBES = 120, 8  # of the quadrature that then gives the bits
_CHUNK_BYTES = 2**27  # of the trials that are carried together
_DIFFERENCE = 6e-6  # cube root of the rounding: the step of a central difference
_ADJOINT = 1e-6  # of two products that must be equal
# Eigenvalues of a squared matrix below this share of the largest are computed again.
_SQUARED = 1e-8


@dataclass(frozen=True)
class LaplaceApproximation:
    """A Gaussian posterior of the latents of all images.

    It describes one mode. Images of one class may be exchanged in most updates, so
    there are as many equal modes as there are such orders.

    Args:
        latents: Its mean (N, d), for N images of d latents each.
        prior: What turns latents into images.
        spectrum: Singular values of the whitened Jacobian: all of them, or a sample
            that stands for all.
        eigenvalues: Squares of those that were computed one by one (k,), from the
            largest to the smallest.
        directions: Their directions in the latent space, one per row (k, N*d).
        level: The tempering, as a share of every layer's norm; 0 for none.
        noise: Standard deviation of the noise in every entry of the gradient.

    Taught in: notebooks/05_vae_prior.
    """

    latents: Tensor
    prior: ImagePrior
    spectrum: Spectrum
    eigenvalues: Tensor
    directions: Tensor
    level: float
    noise: float

    @property
    def exact(self) -> bool:
        """Whether all eigenvalues are known; otherwise ``bits`` are an estimate."""
        return self.spectrum.exact

    @property
    def bits(self) -> float:
        """What the update tells about all images: half of log2 det H."""
        return self.spectrum.sum_of(_bits)[0]

    @property
    def bits_error(self) -> float:
        """Standard error of ``bits``; 0 where exact."""
        return self.spectrum.sum_of(_bits)[1]

    @property
    def identifiable(self) -> int:
        """Directions that the update knows better than the prior: eigenvalues > 1."""
        return round(self.spectrum.count_above(1.0)[0])

    @property
    def image_bits(self) -> Tensor:
        """What the update tells about every image while the others are unknown (N,).

        The sum is at most ``bits``: the rest is about how images go together. Where
        not all eigenvalues are known it is a lower bound.
        """
        if self._complete:  # free of differences of nearly equal numbers
            return -torch.linalg.svdvals(self._factors()).log2().sum(1)
        seen = self._of_images() * self._share().sqrt()
        eye = torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
        return -torch.linalg.slogdet(eye - seen @ seen.mT)[1] / math.log(4)

    @property
    def image_bits_alone(self) -> Tensor:
        """What the update would tell about every image, were the others known (N,)."""
        seen = self._of_images() * self.eigenvalues.sqrt()
        return torch.log1p(torch.linalg.svdvals(seen).square()).sum(1) / math.log(4)

    def scaled(self, factor: float) -> LaplaceApproximation:
        """The same for variances of the update ``factor`` times as large.

        With a noise that is far above the rounding, a noise k times as large is a
        factor of k squared.
        """
        check_number("factor", factor, exclusive=True)
        values = self.spectrum.values / math.sqrt(factor)
        return replace(
            self,
            spectrum=replace(self.spectrum, values=values),
            eigenvalues=self.eigenvalues / factor,
            level=self.level * math.sqrt(factor),
            noise=self.noise * math.sqrt(factor),
        )

    def root(self, points: Tensor) -> Tensor:
        """Products (..., N*d) with the symmetric root of the covariance."""
        along = points @ self.directions.T
        shrunk = (along * (1 + self.eigenvalues).rsqrt()) @ self.directions
        if self._complete:
            return shrunk
        return shrunk + points - along @ self.directions

    def covariance(self) -> Tensor:
        """The covariance of all latents (N*d, N*d), dense."""
        eye = torch.eye(self.latents.numel(), dtype=self.latents.dtype)
        root = self.root(eye.to(self.latents.device))
        return root @ root.T

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Draw latents (count, N, d)."""
        check_count("count", count)
        check_seed("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        size = self.latents.numel()
        noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
        drawn = self.root(noise.to(self.latents)).view(count, *self.latents.shape)
        return self.latents + drawn

    def sample_images(self, count: int, *, seed: int = 0) -> Tensor:
        """Draw images (count, N, C, H, W), not clamped."""
        return self.prior.decode(self.sample(count, seed=seed))

    @property
    def images(self) -> Tensor:
        """Images (N, C, H, W) at the mean of the latents, not clamped."""
        return self.prior.decode(self.latents)

    @torch.no_grad()
    def pixel_std(self) -> Tensor:
        """Standard deviation of every pixel (N, C, H, W), the decoder linearised."""
        values = math.prod(self.prior.image_shape)
        seen = self._of_images()
        parts = []
        for rows in _decoder_rows(self.prior, self.latents):  # (N, part, d)
            if self._complete:
                parts.append((rows @ self._factors()).square().sum(2))
            else:
                known = (rows @ seen).square() * self._share()
                parts.append(rows.square().sum(2) - known.sum(2))
        variance = torch.cat(parts, 1).clamp_min(0)
        assert variance.shape[1] == values
        return variance.sqrt().view(-1, *self.prior.image_shape)

    @property
    def _complete(self) -> bool:
        return len(self.eigenvalues) == self.latents.numel()

    def _share(self) -> Tensor:
        return self.eigenvalues / (1 + self.eigenvalues)

    def _of_images(self) -> Tensor:
        """Every image's part of the directions, (N, d, k)."""
        return self.directions.T.reshape(*self.latents.shape, -1)

    def _factors(self) -> Tensor:
        """F (N, d, k) with F F^T the covariance of every image's latents."""
        return self._of_images() * (1 + self.eigenvalues).rsqrt()


def laplace_approximation(
    posterior: Posterior,
    point: Tensor,
    *,
    level: float = 0.0,
    rank: int | None = None,
    seed: int = 0,
) -> LaplaceApproximation:
    r"""Approximate the posterior by a Gaussian around a point.

    Args:
        posterior: Whose update and prior count. Features of the last layer, which come
            from the same update, do not count a second time.
        point: Latents of all images, (N, d) or (N*d,); the mode of the posterior,
            where the covariance is to hold.
        level: The tempering, as a share of every layer's norm; 0 leaves the noise
            that the update states, and rounding.
        rank: Directions to compute one by one, by a block Krylov method; the others
            keep the variance of the prior, and ``bits`` and ``identifiable`` are
            estimates: their standard errors say nothing of what the quadrature
            misses of the smallest eigenvalues, which was 1 to 3 percent of the bits
            and all but the count. ``None`` computes all of them where they are few
            enough.
        seed: Seed of the Krylov method and of the estimate.

    Returns:
        The Gaussian, in double precision.

    Raises:
        InputError: The point has another size, or an argument is out of range.

    Source: Lindley (1956) for the information; Tierney and Kadane (1986) for the use
    of Laplace's method on posteriors.
    Taught in: notebooks/05_vae_prior.
    """
    check_number("level", level)
    check_seed("seed", seed)
    if point.numel() != posterior.size:
        raise InputError("point", f"{posterior.size} latents", point.numel())
    if rank is not None:
        check_count("rank", rank, maximum=posterior.size)
    jacobian = LatentJacobian(posterior, point, level)
    if rank is None and not jacobian.is_small:
        rank = min(_RANK, posterior.size)
    if rank is None:
        values, directions = _all_directions(jacobian.dense())
        found = values[: jacobian.equations].sqrt()[None]
        weights = torch.ones_like(found)
        counts = jacobian.unknowns, jacobian.equations
        spectrum = Spectrum(*counts, found, weights, exact=True)
    else:
        values, directions = _leading_directions(jacobian, rank, seed)
        spectrum = estimate_spectrum(jacobian, steps=_STEPS, probes=_PROBES, seed=seed)
    return LaplaceApproximation(
        latents=jacobian.latents,
        prior=jacobian.posterior.prior,
        spectrum=spectrum,
        eigenvalues=values,
        directions=directions,
        level=float(level),
        noise=jacobian.posterior.noise,
    )


class LatentJacobian:
    r"""How an update moves with its latents, in units of its own errors.

    The matrix is :math:`\Sigma^{-1/2} \, \partial g / \partial u`. Its products are
    exact for gradients; where the map is another one (several local steps, normalised
    clients) those with directions are central differences.

    Args:
        posterior: Of which update, and under which prior.
        point: Latents of all images, (N, d) or (N*d,).
        level: The tempering, as a share of every layer's norm.

    Taught in: notebooks/05_vae_prior.
    """

    def __init__(self, posterior: Posterior, point: Tensor, level: float):
        self.posterior = posterior.double()
        shape = posterior.num_samples, posterior.prior.size
        like = self.posterior.like
        self.latents = point.detach().to(like).reshape(shape)
        self.scales = self.posterior.spreads(level)
        self.shapes = [target.shape[1:] for target in self.posterior.targets]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.parts: list[Linearisation] = []  # each image's own, or that of all
        self.decoder = like.new_zeros(0)
        values = math.prod(posterior.prior.image_shape)
        fits = 8 * values * self.latents.numel() <= _MOST_BYTES
        update = posterior.update
        if fits and not (self.posterior.steps or update.normalized):
            self._linearise()

    def _linearise(self) -> None:
        posterior = self.posterior
        rows = _decoder_rows(posterior.prior, self.latents)
        self.decoder = torch.cat(list(rows), 1)
        images = posterior.prior.decode(self.latents)
        # The mean gradient is that of every image alone, unless they share statistics
        # of the batch; and the map of the posterior may be another one altogether.
        for size in (1, len(images)):
            pairs = zip(images.split(size), posterior.classes.split(size), strict=True)
            self.parts = [linearise_gradient(posterior.model, *p) for p in pairs]
            whole = all(len(p.gradient) == self.equations for p in self.parts)
            if whole and self._is_adjoint():
                return
        self.parts = []

    def _is_adjoint(self) -> bool:
        """Whether both kinds of products belong to one matrix, for one pair."""
        generator = torch.Generator().manual_seed(0)
        like = self.latents
        right = torch.randn(1, self.unknowns, generator=generator).to(like)
        moved = self.along(right)
        left = moved + moved.norm() / math.sqrt(self.equations) * torch.randn(
            1, self.equations, generator=generator
        ).to(like)
        one, other = (moved * left).sum(), (self.back(left) * right).sum()
        return bool((one - other).abs() <= _ADJOINT * moved.norm() * left.norm())

    @property
    def unknowns(self) -> int:
        """Number of latents of all images."""
        return self.latents.numel()

    @property
    def equations(self) -> int:
        """Number of entries of the update."""
        return sum(self.sizes)

    @property
    def is_small(self) -> bool:
        """Whether all singular values can be computed one by one."""
        fits = 8 * self.equations * self.unknowns <= _MOST_BYTES
        return fits and self.unknowns <= _MOST_LATENTS

    def along(self, directions: Tensor) -> Tensor:
        """Products (k, m) with directions (k, n)."""
        step = self._together
        return torch.cat([self._along(some) for some in directions.split(step)])

    def back(self, cotangents: Tensor) -> Tensor:
        """Products (k, n) of the transpose with cotangents (k, m)."""
        step = self._together
        return torch.cat([self._back(some) for some in cotangents.split(step)])

    def dense(self) -> Tensor:
        """The matrix (m, n)."""
        if len(self.parts) == self.latents.shape[0]:
            pairs = zip(self.parts, self.decoder, strict=True)
            rows = torch.cat([part.along(own.T) for part, own in pairs])
            return self._whiten(rows / len(self.parts)).T
        eye = torch.eye(self.unknowns, dtype=self.latents.dtype)
        return self.along(eye.to(self.latents.device)).T

    @property
    def _together(self) -> int:
        fitting = _CHUNK_BYTES // (8 * (self.equations + 4 * self.unknowns))
        return max(1, min(fitting, self.posterior.together))

    def _along(self, directions: Tensor) -> Tensor:
        shaped = directions.view(-1, *self.latents.shape)
        if self.parts:
            moved = torch.einsum("npd,knd->knp", self.decoder, shaped)
            own = moved.flatten(1).chunk(len(self.parts), 1)
            pairs = zip(self.parts, own, strict=True)
            total = torch.stack([part.along(m) for part, m in pairs]).sum(0)
            return self._whiten(total / len(self.parts))
        steps = _DIFFERENCE / shaped.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
        up, down = (
            self._update(self.latents + sign * steps * shaped) for sign in (1, -1)
        )
        return self._whiten((up - down) / (2 * steps[:, :, 0]))

    def _update(self, latents: Tensor) -> Tensor:
        """The updates (k, m) of latents (k, N, d)."""
        posterior = self.posterior
        classes = posterior.classes.expand(len(latents), -1, -1)
        gradients, _ = posterior.map(posterior.prior.decode(latents), classes)
        return torch.cat([gradient.flatten(1) for gradient in gradients], 1)

    def _whiten(self, movements: Tensor) -> Tensor:
        parts = zip(movements.split(self.sizes, 1), self.scales, strict=True)
        return torch.cat([part / scale for part, scale in parts], 1)

    def _back(self, cotangents: Tensor) -> Tensor:
        posterior, count = self.posterior, len(cotangents)
        latents = self.latents.expand(count, -1, -1)
        classes = posterior.classes.expand(count, -1, -1)
        _, pullback = posterior.map(posterior.prior.decode(latents), classes)
        whitened = self._whiten(cotangents.to(self.latents)).split(self.sizes, 1)
        pairs = zip(whitened, self.shapes, strict=True)
        slopes, _ = pullback([part.reshape(count, *shape) for part, shape in pairs])
        return posterior.prior.pull_back(latents, slopes).flatten(1)


def _bits(singular_values: Tensor) -> Tensor:
    return torch.log1p(singular_values.square()) / math.log(4)


@torch.no_grad()
def _decoder_rows(prior: ImagePrior, latents: Tensor) -> list[Tensor]:
    """The decoder's Jacobian at latents (N, d), in parts (N, pixels, d) of its rows."""
    count, shape = len(latents), prior.image_shape
    values = math.prod(shape)
    eye = torch.eye(values, dtype=latents.dtype, device=latents.device)
    step = max(1, _CHUNK_BYTES // (8 * count * (8 * values + prior.size)))
    parts = []
    for rows in eye.split(step):
        slopes = rows.view(-1, 1, *shape).expand(-1, count, *shape)
        expanded = latents.expand(len(rows), *latents.shape)
        parts.append(prior.pull_back(expanded, slopes).detach().transpose(0, 1))
    return parts


def _all_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All n eigenvalues of A^T A, from the largest, and eigenvectors as rows (n, n)."""
    values, vectors = torch.linalg.eigh(gram(matrix))
    few = int((values <= _SQUARED * values[-1]).sum())
    if few:  # rounding of the largest is in the way: once more without them
        rest = vectors[:, :few]
        values[:few], turned = torch.linalg.eigh(gram(matrix @ rest))
        vectors[:, :few] = rest @ turned
        order = values.argsort()
        values, vectors = values[order], vectors[:, order]
    return values.clamp_min(0).flip(0), vectors.T.flip(0)


def _leading_directions(
    jacobian: LatentJacobian, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of A^T P A, P a projection on a block Krylov space, largest first."""
    generator = torch.Generator().manual_seed(seed)
    width = max(1, min(_BLOCK, rank // 8))
    size = jacobian.unknowns
    block = torch.randn(size, width, generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(block.to(jacobian.latents))[0]
    basis, images = block[:, :0], []
    while True:
        basis = torch.cat([basis, block], 1)
        moved = jacobian.along(block.T)
        images.append(moved)
        width = min(width, rank - basis.shape[1])
        if not width:
            break
        block = jacobian.back(moved).T[:, :width]
        scale = block.norm(dim=0).clamp_min(1e-300)
        block = block / scale
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        # Columns that lie in the space already say nothing: random ones take over.
        spent = block.norm(dim=0) < 1e-10
        fresh = torch.randn(size, width, generator=generator, dtype=torch.float64)
        block = torch.where(spent, fresh.to(block), block)
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
    # Seen through the columns of A Q, never more is known than is: a lower bound.
    left = torch.linalg.qr(torch.cat(images).T)[0]
    _, values, found = torch.linalg.svd(jacobian.back(left.T), full_matrices=False)
    return values.square(), found
