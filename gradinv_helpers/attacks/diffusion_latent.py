r"""Gradient matching in the latents of a diffusion model ("Diffusion-DLG").

The deterministic reverse diffusion is a function D from noise z to images. Matching the
update in z instead of in pixels keeps the images near those that the model knows. Noise
of d dimensions has a length near :math:`\sqrt{d}`, give or take 0.7, and the energy
holds z there:

.. math::

    -2 \log p(g \mid D(z)) + \lambda \sum_i (\|z_i\| - \sqrt{d})^2 .

The length of a standard normal z has a variance near 1/2, so :math:`\lambda = 2` is
the weight of its own law; a Gaussian prior :math:`\|z\|^2` would pull to z = 0
instead, which no draw ever comes close to.

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
    with_steps,
)
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.errors import check_number
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.updates import SharedUpdate

_LEVELS = (1e-1, 1e-3)
_TYPICAL_WEIGHT = 2.0


def diffusion_latent(
    update: SharedUpdate,
    prior: DiffusionPrior,
    *,
    labels: Tensor | None = None,
    prior_weight: float = _TYPICAL_WEIGHT,
    steps: int = 150,
    step_size: float = 0.1,
    decoding_steps: int | None = None,
    restarts: int = 1,
    polish: int = 0,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
    client: int = 0,
) -> SampledReconstruction:
    r"""Invert an update of n images by a search over the noise they come from.

    Adam on the latents of all images and restarts at once; the tempering of the
    likelihood falls from 1e-1 to 1e-3 of every layer's norm, and ends where noise that
    the protocol states is the larger part.

    Args:
        update: A gradient, or a weight change after local training.
        prior: A diffusion model of images of the same shape.
        labels: Labels (N,), if the attacker is given them; inferred otherwise.
        prior_weight: Weight :math:`\lambda` of the typical length of the noise; 2 is
            the weight of its law, 0 leaves the latents free.
        steps: Updates of the latents.
        step_size: First step of Adam, which falls to a tenth along a cosine.
        decoding_steps: Steps of the reverse diffusion; the prior's own by default.
        restarts: Random starts, run together.
        polish: Iterations of a likelihood polish in pixels at the end, of 20 updates
            each; it may leave what the diffusion model knows.
        seed: Seed of the starts.
        on_step: Called after every update.
        client: Index of the update in the caller's list, for ``on_step``.

    Returns:
        The start whose images explain the update best, and all others as ``samples``;
        they are optima, not draws from a posterior. After Ctrl-C, the latest ones.

    Raises:
        InputError: An argument is out of range, shapes differ, or labels cannot be
            inferred.

    Source: Zhu et al. (2019) for matching; Song et al. (2021) for the decoder.
    Taught in: notebooks/06_diffusion_prior.
    """
    check_run(steps, ("restarts", restarts), seed, polish)
    check_number("prior_weight", prior_weight)
    check_number("step_size", step_size, exclusive=True)
    guide = Guide(update, with_steps(prior, decoding_steps), labels)
    progress = Progress(guide, "diffusion-latent", steps, seed, on_step, client)
    generator = torch.Generator().manual_seed(seed)
    latents = guide.noise(restarts, generator).flatten(-3).requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, steps, eta_min=step_size / 10
    )
    final = None
    with progress.running():
        for step in range(steps):
            level = _LEVELS[0] * (_LEVELS[1] / _LEVELS[0]) ** (step / max(1, steps - 1))
            images = guide.prior.decode(latents)
            _, misfits, slopes = guide.match(images, level)
            (slope,) = torch.autograd.grad(images, latents, slopes)
            slope = slope + prior_weight * _length_slope(latents.detach())
            # Adam forgets slowly, so the scale must not grow as the level falls.
            latents.grad = (slope * level**2).nan_to_num(0.0, 0.0, 0.0)
            optimiser.step()
            schedule.step()
            progress.evaluations += 1
            progress.tell(images, misfits)
        final = guide.prior.decode(latents.detach())
    reason = (
        f"{update.num_samples} images, noise of {guide.prior.name!r} decoded in "
        f"{guide.prior.steps} steps"
    )
    return progress.finish(final, reason, polish=polish)


def _length_slope(latents: Tensor) -> Tensor:
    """Derivative of the squared distance of every length to its typical value."""
    typical = math.sqrt(latents.shape[-1])
    lengths = latents.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return 2 * (1 - typical / lengths) * latents
