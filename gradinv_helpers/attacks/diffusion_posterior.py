r"""Reverse diffusion that is guided by an update (diffusion posterior sampling).

Every step of a reverse diffusion estimates the clean images behind the noisy ones. Here
their gradient is compared with the update, and the derivative of the distance, taken
back through the U-Net to the noisy images, bends the step:

.. math::

    \nabla \log p_t(x_t \mid g) \approx \nabla \log p_t(x_t)
    + \nabla_{x_t} \log p(g \mid \hat x_0(x_t)) .

The update is matched on the estimate of the clean images: the gradient of a noisy image
says nothing. The second term stands for an average over all clean images by its value
at their mean, so the draws are close to a posterior only where that mean is good; they
are no exact sample of it.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import math
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
from gradinv_helpers.errors import check_number
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.updates import SharedUpdate

_LEVEL = 1e-2
_EACH_TRIAL = (-4, -3, -2, -1)


def diffusion_posterior(
    update: SharedUpdate,
    prior: DiffusionPrior,
    *,
    labels: Tensor | None = None,
    guidance: float = 0.35,
    steps: int = 50,
    draws: int = 4,
    level: float = _LEVEL,
    polish: int = 0,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
    client: int = 0,
) -> SampledReconstruction:
    """Draw images that a diffusion model finds likely and that explain an update.

    The guidance of a step has a fixed length, ``guidance`` times that of the fresh
    noise: it then neither vanishes nor explodes with the scale of a gradient, and fades
    with the noise. Where the protocol states noise, it weakens as the residual comes
    down to what that noise leaves, so that noise is not fitted.

    Args:
        update: A gradient, or a weight change after local training.
        prior: A diffusion model of images of the same shape.
        labels: Labels (N,), if the attacker is given them; inferred otherwise.
        guidance: Length of the guidance in units of the fresh noise; 0 gives draws from
            the prior alone, the floor of every claim.
        steps: Steps of the reverse diffusion, one evaluation of the update's gradient
            each.
        draws: Independent draws, run together.
        level: Tempering of the likelihood, as a share of every layer's norm; it weighs
            stated noise against layers of different size.
        polish: Iterations of a likelihood polish in pixels of the best draw, of 20
            updates each; it may leave what the diffusion model knows.
        seed: Seed of all noise.
        on_step: Called after every step.
        client: Index of the update in the caller's list, for ``on_step``.

    Returns:
        The draw that explains the update best, and all of them as ``samples``.
        After Ctrl-C, the latest estimates.

    Raises:
        InputError: An argument is out of range, shapes differ, or labels cannot be
            inferred.

    Source: Chung et al. (2023), Algorithm 1, with a step of fixed length.
    Taught in: notebooks/06_diffusion_prior.
    """
    check_run(steps, ("draws", draws), seed, polish)
    check_number("guidance", guidance)
    check_number("level", level, exclusive=True)
    guide = Guide(update, prior, labels)
    progress = Progress(guide, "diffusion-posterior", steps, seed, on_step, client)
    generator = torch.Generator().manual_seed(seed)
    noisy = guide.noise(draws, generator)
    levels = guide.prior.levels(steps)
    with progress.running():
        for now, after in zip(levels, [*levels[1:], None], strict=True):
            free = noisy.requires_grad_()
            clean, _ = guide.prior.predict(free, now)
            images = clean / 2 + 0.5
            energy, misfits, slopes = guide.match(images, level)
            (slope,) = torch.autograd.grad(images, free, slopes)
            excess = 1 - guide.expected_energy(level) / energy.clamp_min(1e-30)
            weight = guidance * excess.clamp_min(0).to(slope)
            # Beyond [-1, 1] there are no images; the slope above is unclamped.
            clean = clean.detach().clamp(-1, 1)
            mean, deviation = reverse_step(
                guide.prior, noisy.detach(), clean, now, after
            )
            fresh = guide.noise(draws, generator)
            push = math.sqrt(fresh[0].numel()) * unit(slope, _EACH_TRIAL)
            push = weight[:, None, None, None, None] * push
            noisy = mean + deviation * (fresh - push)
            progress.evaluations += 1
            progress.tell(images, misfits)
    reason = (
        f"{update.num_samples} images, reverse diffusion of {guide.prior.name!r} "
        f"guided for {steps} steps"
    )
    final = noisy.detach() / 2 + 0.5
    return progress.finish(final, reason, polish=polish)
