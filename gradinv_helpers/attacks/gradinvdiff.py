r"""Gradient inversion inside the steps of a diffusion model (GradInvDiff), repaired.

In every step of the reverse diffusion, a few updates of Adam move the mean of the next
noisy images towards the update (adaptive mean optimisation); mean and moved mean are
blended; and the fresh noise is replaced by its part along that move (gradient-aligned
noise).

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradinv_helpers.attacks.guidance import (
    Guide,
    Progress,
    SampledReconstruction,
    check_run,
    reverse_step,
    unit,
)
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.errors import check_count, check_number
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.updates import SharedUpdate

_LEVEL = 1e-2
_EACH_IMAGE = (-3, -2, -1)
_NO_MOVE = 1e-12  # squared length below which a move has no direction


def gradinvdiff(
    update: SharedUpdate,
    prior: DiffusionPrior,
    *,
    labels: Tensor | None = None,
    steps: int = 50,
    inner_steps: int = 5,
    step_size: float = 0.1,
    restarts: int = 1,
    level: float = _LEVEL,
    polish: int = 0,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
    client: int = 0,
) -> SampledReconstruction:
    r"""Invert an update by optimising the means of a reverse diffusion.

    With :math:`\mu` the mean of a step and :math:`\mu^*` the mean for the optimised
    clean images, the next noisy images are
    :math:`\gamma_t \mu^* + (1 - \gamma_t) \mu + \sigma_t \epsilon_\parallel`, where
    :math:`\gamma_t` falls from 1 to 0 and :math:`\epsilon_\parallel` is the part of
    fresh noise along :math:`\mu^* - \mu`.

    Three flaws of a known implementation are repaired. It matches the noisy mean, whose
    gradient says nothing; here the estimate of the clean images is matched. It projects
    the noise of the whole batch at once, which couples images; here every image has its
    own direction. Its projection points away from the update as often as towards it;
    here it always points along the move.

    What remains: noise in one direction instead of all hardly spreads, and
    :math:`\gamma_t` trusts the update most where the estimate is worst. The result is a
    heuristic optimum, and several starts are no draws from a distribution.

    Args:
        update: A gradient, or a weight change after local training.
        prior: A diffusion model of images of the same shape.
        labels: Labels (N,), if the attacker is given them; inferred otherwise.
        steps: Steps of the reverse diffusion.
        inner_steps: Updates of Adam in every step.
        step_size: Step of these updates, for images in [-1, 1]; the published 0.01
            hardly moves them in so few updates.
        restarts: Random starts, run together.
        level: Tempering of the likelihood, as a share of every layer's norm.
        polish: Iterations of a likelihood polish in pixels at the end, of 20 updates
            each; it may leave what the diffusion model knows.
        seed: Seed of all noise.
        on_step: Called after every step.
        client: Index of the update in the caller's list, for ``on_step``.

    Returns:
        The start whose images explain the update best, and all others as ``samples``.
        After Ctrl-C, the latest estimates.

    Raises:
        InputError: An argument is out of range, shapes differ, or labels cannot be
            inferred.

    Source: Wang et al. (2025), GradInvDiff.
    Taught in: notebooks/06_diffusion_prior.
    """
    check_run(steps, ("restarts", restarts), seed, polish)
    check_count("inner_steps", inner_steps)
    check_number("step_size", step_size, exclusive=True)
    check_number("level", level, exclusive=True)
    guide = Guide(update, prior, labels)
    progress = Progress(guide, "gradinvdiff", steps, seed, on_step, client)
    generator = torch.Generator().manual_seed(seed)
    noisy = guide.noise(restarts, generator)
    levels = guide.prior.levels(steps)
    with progress.running():
        for now, after in zip(levels, [*levels[1:], None], strict=True):
            with torch.no_grad():
                clean = guide.prior.predict(noisy, now)[0].clamp(-1, 1)
            moved, misfits = _optimise(guide, clean, inner_steps, step_size, level)
            progress.evaluations += inner_steps + 1
            mean, deviation = reverse_step(guide.prior, noisy, clean, now, after)
            wanted, _ = reverse_step(guide.prior, noisy, moved, now, after)
            trust = now / levels[0] if levels[0] else 1.0
            fresh = guide.noise(restarts, generator)
            noisy = mean + trust * (wanted - mean)
            noisy = noisy + deviation * aligned_noise(fresh, wanted - mean)
            progress.tell(moved / 2 + 0.5, misfits)
    reason = (
        f"{update.num_samples} images, means of {guide.prior.name!r} optimised in "
        f"{steps} steps"
    )
    return progress.finish(noisy / 2 + 0.5, reason, polish=polish)


def aligned_noise(noise: Tensor, move: Tensor) -> Tensor:
    """Part of the noise along the move of its own image, never against it.

    Args:
        noise: Standard normal, shape (..., C, H, W).
        move: Same shape; noise stays as it is where an image has no move.

    Source: Wang et al. (2025), gradient-aligned noise, with the sign repaired.
    Taught in: notebooks/06_diffusion_prior.
    """
    direction = unit(move, _EACH_IMAGE)
    along = (noise * direction).sum(_EACH_IMAGE, keepdim=True).abs()
    still = move.square().sum(_EACH_IMAGE, keepdim=True) < _NO_MOVE
    return torch.where(still, noise, along * direction)


def _optimise(
    guide: Guide, clean: Tensor, updates: int, step_size: float, level: float
) -> tuple[Tensor, Tensor]:
    """Clean images closer to the update, and their misfits, the best of each trial."""
    point = clean.clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=step_size)
    best, lowest, misfits = clean.clone(), None, None
    for number in range(updates + 1):
        energy, misfit, slopes = guide.match(point.detach() / 2 + 0.5, level)
        energy = energy.nan_to_num(nan=torch.inf)
        if lowest is None or misfits is None:
            lowest, misfits = energy, misfit
        else:
            lower = energy < lowest
            lowest = torch.where(lower, energy, lowest)
            misfits = torch.where(lower, misfit, misfits)
            best = torch.where(_over_images(lower), point.detach(), best)
        if number < updates:
            # One scale for each trial; Adam is blind to it, but not to overflow.
            point.grad = unit(slopes, (-4, -3, -2, -1))
            optimiser.step()
            with torch.no_grad():
                point.clamp_(-1, 1)
    assert misfits is not None
    return best, misfits


def _over_images(per_trial: Tensor) -> Tensor:
    return per_trial[:, None, None, None, None]
