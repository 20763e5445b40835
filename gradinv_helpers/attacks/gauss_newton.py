r"""Gauss-Newton with conjugate gradients: the last digits of a MAP estimate.

The energy of the latents u is a sum of squares, :math:`\|r(u)\|^2 + \|u\|^2` with the
whitened residual :math:`r_i = (g_i(D(u)) - g_i) / \sqrt{v_i}` and Jacobian
:math:`J = \partial r / \partial u`. Where the residual is nearly linear, the step s to
the minimum solves

.. math:: \bigl(J^\top J + (1 + \mu) I\bigr)\, s = -(J^\top r + u) .

Conjugate gradients need products with :math:`J` and :math:`J^\top` only, and no matrix.
In whitened coordinates they have a use beyond their speed: what the prior thinks likely
and the update sees well, smooth structure, comes first, so that a search that ends
early ends at a plausible image. Scaling the unknowns by the diagonal of
:math:`J^\top J` reaches small residuals in fewer products, but through fine detail.

How long to go on with one linearisation is decided by the energy itself: every 20
products it is taken at the point reached, and as long as it falls as promised, the
same conjugate gradients go on. Starting them anew loses the directions that are known.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gradinv_helpers.attacks.gradients import ChainProducts, Gradients, is_plain_chain
from gradinv_helpers.attacks.last_layer import last_layer_input
from gradinv_helpers.attacks.levenberg_marquardt import AT_MINIMUM
from gradinv_helpers.attacks.likelihood import Gaussian
from gradinv_helpers.attacks.optimise import NO_LOWER_POINT, Inspector, TrialState
from gradinv_helpers.attacks.plan import has_kinks
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.errors import InputError, check_number
from gradinv_helpers.priors.gaussian import (
    CovariancePrior,
    ImagePrior,
    SpectrumPrior,
)

SOLVERS: tuple[str, ...] = ("auto", "lbfgs", "gauss-newton")
PRODUCTS_PER_ITERATION = 20
# Shares of the promised fall: below the first the residual is linearised anew, and
# the damping of a step is raised below the second and lowered above the third.
_TRUSTED, _POOR, _GOOD = 0.5, 0.25, 0.75
_FIRST_DAMPING, _MOST_DAMPING = 0.1, 1e12
_DAMPING_FACTOR = 10.0
_SOLVED = 1e-10  # of the right side, where the linear system counts as solved
_NOTHING = 1e-13  # share of the energy that is rounding
_DIFFERENCE = 1e-5  # of the latents, for products of maps without sweeps


def is_sum_of_squares(posterior: Posterior) -> bool:
    """Whether an energy is a smooth sum of squares of functions of the latents.

    Signs, rounded or pruned messages and mixed labels have other likelihoods, and
    networks whose slope jumps are no smooth functions.

    Taught in: notebooks/04_aggregated_gradients.
    """
    gaussian = all(isinstance(law, Gaussian) for law in posterior.likelihoods)
    return gaussian and not posterior.mixed and not has_kinks(posterior.model)


def has_sweeps(posterior: Posterior) -> bool:
    """Whether products cost no more than an evaluation of the energy.

    That is so for one gradient of a plain chain of layers. Elsewhere a product with J
    is a difference of two updates.

    Taught in: notebooks/04_aggregated_gradients.
    """
    update = posterior.update
    plain = not (posterior.steps or update.normalized)
    plain = plain and update.training.clip_norm is None
    plain = plain and len(posterior.targets) == posterior.num_gradients
    return plain and is_plain_chain(posterior.model)


class ResidualJacobian:
    r"""Products with the Jacobian of a posterior's whitened residual.

    The residual holds, besides the update, the features of the last layer where the
    posterior knows them.

    Args:
        posterior: Whose energy is a sum of squares.
        points: Latents (A, n) of A trials, at which it is linearised.
        level: The tempering, as a share of every layer's norm.

    Raises:
        InputError: The energy is no sum of squares.

    Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(self, posterior: Posterior, points: Tensor, level: float):
        if not is_sum_of_squares(posterior):
            expected = "a Gaussian likelihood of a smooth network"
            raise InputError("update", expected, "another")
        self.posterior = posterior
        self.latents, self.classes = posterior._split(points.to(posterior.like))
        self.weights = [1 / math.sqrt(v) for v in posterior.variances(level)]
        if posterior.features is not None:
            self.weights.append(1 / (math.sqrt(posterior.feature_scale) * level))
        self.map: _Products
        if has_sweeps(posterior):
            self.map = _Sweeps(self)
        else:
            self.map = _Differences(self)

    def along(self, directions: Tensor) -> Gradients:
        """How the residual's parts move with the latents (A, n)."""
        shaped = directions.to(self.latents).view_as(self.latents)
        parts = zip(self.map.along(shaped), self.weights, strict=True)
        return [part * weight for part, weight in parts]

    def back(self, residuals: Gradients) -> Tensor:
        """Products (A, n) of the transpose with parts of residuals (A, ...)."""
        pairs = zip(residuals, self.weights, strict=True)
        slopes = self.map.back([part * weight for part, weight in pairs])
        return self.posterior.prior.pull_back(self.latents, slopes).flatten(1)

    def normal(self, directions: Tensor) -> Tensor:
        """Products (A, n) of J^T J with directions (A, n)."""
        return self.back(self.along(directions)).to(directions)


class _Products(Protocol):
    """Unscaled products, from latents (A, N, d) and back to images."""

    def along(self, movements: Tensor) -> Gradients: ...

    def back(self, cotangents: Gradients) -> Tensor: ...


class _Sweeps:
    """Sweeps through a chain of layers."""

    def __init__(self, jacobian: ResidualJacobian):
        posterior, self.latents = jacobian.posterior, jacobian.latents
        self.prior, self.featured = posterior.prior, posterior.features is not None
        images = self.prior.decode(self.latents)
        self.chain = ChainProducts(posterior.model, images, jacobian.classes)

    def along(self, movements: Tensor) -> Gradients:
        moved = _decoder_along(self.prior, self.latents, movements)
        gradients, features = self.chain.along(moved)
        return [*gradients, features] if self.featured else gradients

    def back(self, cotangents: Gradients) -> Tensor:
        if not self.featured:
            return self.chain.back(cotangents)
        *gradients, features = cotangents
        return self.chain.back(gradients) + self.chain.back_from_last(features)


class _Differences:
    """Central differences along, and the map's own pull-back."""

    def __init__(self, jacobian: ResidualJacobian):
        self.posterior, self.latents = jacobian.posterior, jacobian.latents
        self.classes = jacobian.classes

    def along(self, movements: Tensor) -> Gradients:
        largest = movements.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
        step = _DIFFERENCE / largest
        ends = [self._parts(self.latents + sign * step * movements) for sign in (1, -1)]
        share = (0.5 / step).flatten()
        return [
            (up - down) * share.view(-1, *(1,) * (up.dim() - 1))
            for up, down in zip(*ends, strict=True)
        ]

    def back(self, cotangents: Gradients) -> Tensor:
        posterior = self.posterior
        images = posterior.prior.decode(self.latents).detach()
        count = len(posterior.targets)
        _, pullback = posterior.map(images, self.classes)
        slopes, _ = pullback(cotangents[:count])
        if posterior.features is None:
            return slopes
        with torch.enable_grad():
            free = images.requires_grad_()
            found = torch.stack([last_layer_input(posterior.reader, x) for x in free])
            (slope,) = torch.autograd.grad(found, free, cotangents[count])
        return slopes + slope

    @torch.no_grad()
    def _parts(self, latents: Tensor) -> Gradients:
        posterior = self.posterior
        images = posterior.prior.decode(latents)
        parts, _ = posterior.map(images, self.classes)
        if posterior.features is None:
            return parts
        read = [last_layer_input(posterior.reader, x) for x in images]
        return [*parts, torch.stack(read)]


@torch.no_grad()
def _decoder_along(prior: ImagePrior, latents: Tensor, movements: Tensor) -> Tensor:
    """How images move with their latents (A, N, d)."""
    if isinstance(prior, SpectrumPrior | CovariancePrior):  # affine
        return prior.decode(movements) - prior.mean
    largest = movements.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    step = _DIFFERENCE / largest
    up, down = (prior.decode(latents + sign * step * movements) for sign in (1, -1))
    return (up - down) / (2 * step[..., None, None])


class ConjugateGradients:
    r"""Conjugate gradients for :math:`A s = b`, a few products at a time.

    Args:
        product: Products of a positive definite A with a vector (n,).
        right: The right side b (n,).

    Attributes:
        step: The solution so far, from zero.
        fall: By how much :math:`s \cdot A s - 2 b \cdot s` has fallen.
        products: Products so far.
        solved: Whether the residual is down to rounding.

    Source: Hestenes and Stiefel (1952). Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], right: Tensor):
        self.product, self.right = product, right
        self.step, self.residual = torch.zeros_like(right), right.clone()
        self.direction = right.clone()
        self.square = self.first = float(right @ right)
        self.products, self.fall, self.solved = 0, 0.0, self.first == 0

    def advance(self, products: int) -> None:
        """Take more products, fewer if that solves the system."""
        for _ in range(products):
            if self.solved:
                break
            moved = self.product(self.direction)
            self.products += 1
            bend = float(self.direction @ moved)
            if not bend > 0:  # rounding
                self.solved = True
                break
            share = self.square / bend
            self.step = self.step + share * self.direction
            self.residual = self.residual - share * moved
            square = float(self.residual @ self.residual)
            self.direction = self.residual + square / self.square * self.direction
            self.square = square
            self.solved = square <= _SOLVED**2 * self.first
        self.fall = float((self.right + self.residual) @ self.step)


class GaussNewton:
    """Damped Gauss-Newton steps from one point, until there is a reason to stop.

    Args:
        posterior: Whose energy is a sum of squares.
        start: Latents (n,).
        level: The tempering, as a share of every layer's norm.
        inspect: Called at the start and after every iteration, of 20 products with J
            and with its transpose and one energy, with 0 and the state; a non-empty
            answer stops it.

    Attributes:
        state: The latest state, also after an interruption. A pair of products counts
            as an evaluation, which costs about as much.

    Raises:
        InputError: The energy is no sum of squares.

    Source: Marquardt (1963) for the damping; Dembo, Eisenstat and Steihaug (1982) for
    steps that are solved inexactly.
    Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(
        self,
        posterior: Posterior,
        start: Tensor,
        level: float,
        *,
        inspect: Inspector,
    ):
        check_number("level", level)
        self.posterior, self.level, self.inspect = posterior, level, inspect
        self.state = TrialState(point=start.detach().double().clone())
        self.slope = torch.zeros_like(self.state.point)
        self.damping = 0.0

    def run(self) -> TrialState:
        """Advance until there is a reason to stop."""
        state = self.state
        state.loss, self.slope = self._energy(state.point)
        if not math.isfinite(state.loss):
            state.stopped = "the loss or its gradient is not finite at the start"
        else:
            state.stopped = self._report()
        while not state.stopped:
            state.stopped = self._step()
        return state

    def _energy(self, point: Tensor) -> tuple[float, Tensor]:
        energy, slope = self.posterior.energy(
            point[None].to(self.posterior.like), self.level
        )
        self.state.evaluations += 1
        return float(energy), slope[0].double()

    def _report(self) -> str:
        self.state.trace.append(self.state.loss)
        return self.inspect(0, self.state)

    def _step(self) -> str:
        """Linearise the residual, and go on for as long as the energy agrees."""
        state, start, damping = self.state, self.state.point, self.damping
        jacobian = ResidualJacobian(self.posterior, start[None], self.level)

        def product(direction: Tensor) -> Tensor:
            normal = jacobian.normal(direction[None])[0]
            return normal + (1 + damping) * direction

        system = ConjugateGradients(product, -self.slope / 2)
        promised, ratio, before, reason = 0.0, 0.0, state.loss, ""
        while not reason:
            known = system.products
            system.advance(PRODUCTS_PER_ITERATION)
            state.evaluations += system.products - known
            ahead = system.fall + damping * float(system.step.square().sum())
            if ahead - promised <= _NOTHING * state.loss:
                if promised:
                    break
                state.point = start + system.step  # below what energies can tell
                return AT_MINIMUM
            point = start + system.step
            energy, slope = self._energy(point)
            ratio = (state.loss - energy) / (ahead - promised)
            promised = ahead
            if energy < state.loss:
                state.point, state.loss, self.slope = point, energy, slope
                state.updates += 1
            reason = self._report()
            if system.solved or not ratio > _TRUSTED:
                break
        share = (before - state.loss) / promised
        if not share > _POOR:
            self.damping = max(_FIRST_DAMPING, _DAMPING_FACTOR * damping)
        elif share > _GOOD:
            lower = damping / _DAMPING_FACTOR
            self.damping = lower if lower >= _FIRST_DAMPING else 0.0
        return reason or (NO_LOWER_POINT if self.damping > _MOST_DAMPING else "")
