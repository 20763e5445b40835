"""Attacks under a prior, by name: what ``invert`` passes its arguments on to.

Taught in: notebooks/05_vae_prior and notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.updates import SharedUpdate

if TYPE_CHECKING:
    from gradinv_helpers.priors.diffusion import DiffusionPrior

_ITERATIONS, _RESTARTS = 200, 3  # of a search
_CHAINS, _MOVES = 4, 800  # of a sampler
_UPDATES = 20  # or moves, in one iteration
_LEVEL = 1e-2  # tempering of the draws where the update states no noise
_SHOWN = 12  # draws among the snapshots

DEFAULT_PRIORS: dict[str, str] = {
    "gaussian-map": "spectrum",
    "vae-map": "vae-digits",
    "vae-posterior": "vae-digits",
    "diffusion-latent": "diffusion-digits",
    "diffusion-posterior": "diffusion-digits",
    "gradinvdiff": "diffusion-digits",
}


@dataclass(frozen=True)
class Job:
    """One update under attack, and the caller's wishes.

    Args:
        update: What the server saw.
        prior: What is known of its images.
        labels: Labels (N,), if the attacker is given them.
        iterations: Most iterations of a search, of 20 updates each, or steps of a
            diffusion; ``None`` for the attack's own number.
        restarts: Independent starts, chains or draws; ``None`` likewise.
        seed: Seed of everything random.
        on_step: Called after every iteration.
        client: Index of the update in the caller's list.
        checkpoint: File that keeps an annealing.
    """

    update: SharedUpdate
    prior: ImagePrior
    labels: Tensor | None
    iterations: int | None
    restarts: int | None
    seed: int
    on_step: Callable[[Step], None] | None
    client: int
    checkpoint: Path | None


def prior_for(
    attack: str, prior: ImagePrior | str | None, image_shape: tuple[int, int, int]
) -> ImagePrior:
    """Find what an attack is to know of images.

    Raises:
        InputError: The prior is unknown, or of another kind or shape than it takes.
    """
    wanted = DEFAULT_PRIORS[attack] if prior is None else prior
    known = load_prior(wanted, image_shape) if isinstance(wanted, str) else wanted
    if prior is None and isinstance(known, VAEPrior):
        known = known.soft()  # reaches the detail that the decoder misses
    if tuple(known.image_shape) != tuple(image_shape):
        raise InputError("prior", f"images of shape {image_shape}", known.image_shape)
    by_diffusion = attack in ("diffusion-latent", "diffusion-posterior", "gradinvdiff")
    if by_diffusion and not hasattr(known, "predict"):
        raise InputError(
            "prior",
            f"a diffusion model for {attack!r}",
            repr(known.name),
            "load one by gi.load_prior, or use attack='vae-map'",
        )
    return known


def run_under_prior(attack: str, job: Job) -> Reconstruction:
    """Run an attack of ``DEFAULT_PRIORS`` on one update."""
    return _RUNS[attack](job)


def _map(job: Job, *, name: str) -> Reconstruction:
    estimate = map_estimate(
        job.update,
        prior=job.prior,
        labels=job.labels,
        iterations=job.iterations or _ITERATIONS,
        restarts=job.restarts or _RESTARTS,
        seed=job.seed,
        on_step=job.on_step,
        client=job.client,
        checkpoint=job.checkpoint,
    )
    return dataclasses.replace(estimate.reconstruction, attack=name)


def _posterior_mean(job: Job) -> Reconstruction:
    """Mean of the aligned draws; some of them are its snapshots."""
    from gradinv_helpers.attacks.sampling import sample_posterior

    moves = _MOVES if job.iterations is None else _UPDATES * job.iterations
    half = max(4, moves // 2)
    found = sample_posterior(
        job.update,
        prior=job.prior,
        labels=job.labels,
        level=None if job.update.noise_std else _LEVEL,
        chains=job.restarts or _CHAINS,
        warmup=half,
        draws=half,
        seed=job.seed,
        on_step=job.on_step,
    )
    mean = found.mean.clamp(0, 1)
    every = found.images.flatten(0, 1)
    places = torch.linspace(0, len(every) - 1, min(_SHOWN, len(every))).long()
    shown = torch.cat([every[places].clamp(0, 1), mean[None]])
    energies = found.energies.mean(0)
    tempered = f", tempered at {found.level:g}" if found.tempered else ""
    return Reconstruction(
        images=mean,
        labels=found.labels,
        losses=tuple(energies.tolist()),
        iterations=tuple(range(len(energies))),
        snapshots=shown,
        snapshot_iterations=(*places.tolist(), len(every)),
        trials=(),
        stopped=found.stopped,
        seconds=found.seconds,
        attack="vae-posterior",
        reason=f"mean of {len(every)} draws under the prior {job.prior.name!r}"
        f"{tempered}; worst R-hat {float(found.r_hat.max()):.2f}",
        label_source=found.label_source,
        seed=job.seed,
    )


def _latent(job: Job) -> Reconstruction:
    from gradinv_helpers.attacks.diffusion_latent import diffusion_latent

    return diffusion_latent(
        job.update,
        _diffusion(job),
        restarts=job.restarts or 1,
        **_common(job),
    )


def _guided(job: Job) -> Reconstruction:
    from gradinv_helpers.attacks.diffusion_posterior import diffusion_posterior

    return diffusion_posterior(
        job.update,
        _diffusion(job),
        draws=job.restarts or 4,
        **_common(job),
    )


def _optimised_means(job: Job) -> Reconstruction:
    from gradinv_helpers.attacks.gradinvdiff import gradinvdiff

    return gradinvdiff(
        job.update,
        _diffusion(job),
        restarts=job.restarts or 1,
        **_common(job),
    )


def _diffusion(job: Job) -> DiffusionPrior:
    return cast("DiffusionPrior", job.prior)  # ``prior_for`` has made sure of it


def _common(job: Job) -> dict[str, Any]:
    steps = {} if job.iterations is None else {"steps": job.iterations}
    return {
        "labels": job.labels,
        "seed": job.seed,
        "on_step": job.on_step,
        "client": job.client,
        **steps,
    }


_RUNS: dict[str, Callable[[Job], Reconstruction]] = {
    "gaussian-map": functools.partial(_map, name="gaussian-map"),
    "vae-map": functools.partial(_map, name="vae-map"),
    "vae-posterior": _posterior_mean,
    "diffusion-latent": _latent,
    "diffusion-posterior": _guided,
    "gradinvdiff": _optimised_means,
}
