r"""Samples from the posterior of an update's images, and how far to trust them.

A most probable image says nothing of how sure it is. Hamiltonian Monte Carlo in the
space of latents draws from the posterior itself: a momentum :math:`p \sim N(0, I)` is
drawn, the dynamics of :math:`\tfrac12 E(u) + \tfrac12 \|p\|^2` are followed for some
leapfrog steps, and a Metropolis test makes up for their errors. With one leapfrog step
this is MALA, Langevin dynamics with a Metropolis test. Where the covariance at the mode
is known, the dynamics run in coordinates in which it is the identity.

All chains are trials of one energy, evaluated together. Steps are adapted in the
warm-up only. Whether the chains agree is measured (split R-hat, effective sample size),
and whether the sampler draws from the right law is tested by simulation: see
``calibration_ranks``.

Taught in: notebooks/05_vae_prior.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.alignment import align_images, reorder
from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.label_search import choose_labels
from gradinv_helpers.attacks.laplace import (
    LaplaceApproximation,
    laplace_approximation,
)
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.optimise import Minimiser, TrialState
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.reconstruction import Step
from gradinv_helpers.attacks.replay import Order
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.updates import SharedUpdate

SAMPLERS: tuple[str, ...] = ("mala", "hmc")
Sampler = Literal["mala", "hmc"]

# Shares of accepted moves for which the samplers are most efficient in many dimensions.
_TARGETS = {"mala": 0.574, "hmc": 0.8}
# Dual averaging, with the constants of the paper.
_SHRINK, _DELAY, _FORGET = 0.05, 10.0, 0.75
_MAP_LAST = 1e-5  # level at which the search for the mode ends by default
_FEWEST = 4  # draws of which diagnostics can be computed
# The search for the mode ends where an iteration gains less energy than this.
_POLISHED, _MOST_POLISHING = 1e-3, 300

Energy = Callable[[Tensor], tuple[Tensor, Tensor]]  # (A, n) -> (A,), (A, n)


@dataclass(frozen=True)
class PosteriorSamples:
    """Draws from the posterior, aligned within what may change places.

    Args:
        images: Shape (chains, draws, N, C, H, W), float32, on the CPU, not clamped.
        latents: Latents behind them (chains, draws, N, d).
        energies: Minus twice the log-density (chains, draws), up to a constant.
        labels: Label of every image (N,).
        reference: What all draws were aligned to (N, C, H, W): the mode where it was
            searched, otherwise the draw of the lowest energy.
        acceptance: Share of accepted moves after the warm-up, per chain.
        step_sizes: Step of the dynamics, per chain.
        r_hat: Split R-hat of every latent (N, d); near 1 where the chains agree.
        effective: Effective sample size of every latent (N, d), of all draws.
        residuals: Squared distance of every draw's update to the one that was sent,
            in units of its variances and per entry (chains, draws). Near 1 the images
            explain the update; well above 1 no image of this prior does, and the
            spread of the draws says nothing of how far the truth is.
        level: The tempering, as a share of every layer's norm. Above 0 the law is not
            that of a noise which the protocol states, and its width is a choice.
        noise: Standard deviation of the noise in every entry of the gradient, as
            stated by the protocol; 0 for none.
        laplace: The Gaussian at the mode that shaped the moves, if there was one.
        method: ``mala`` or ``hmc``.
        label_source: Where the labels come from.
        stopped: Why sampling ended.
        seconds: Wall time.
        seed: Seed of the chains.

    Taught in: notebooks/05_vae_prior.
    """

    images: Tensor
    latents: Tensor
    energies: Tensor
    labels: Tensor
    reference: Tensor
    acceptance: Tensor
    step_sizes: Tensor
    r_hat: Tensor
    effective: Tensor
    residuals: Tensor
    level: float
    noise: float
    laplace: LaplaceApproximation | None
    method: str
    label_source: str
    stopped: str
    seconds: float
    seed: int

    @property
    def tempered(self) -> bool:
        """Whether a tempering widens the law beyond the stated noise."""
        return self.level > 0

    @property
    def mean(self) -> Tensor:
        """Mean of the aligned images (N, C, H, W)."""
        return self.images.flatten(0, 1).mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of every pixel of the aligned images (N, C, H, W)."""
        return self.images.flatten(0, 1).std(0)


def sample_posterior(
    update: SharedUpdate,
    *,
    prior: ImagePrior | str = "spectrum",
    labels: Tensor | None = None,
    level: float | None = None,
    chains: int = 4,
    warmup: int = 500,
    draws: int = 500,
    thin: int = 1,
    method: Sampler = "mala",
    leapfrog: int = 10,
    start: Literal["map", "prior"] | Tensor = "map",
    precondition: bool = True,
    order: Order = "sequential",
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> PosteriorSamples:
    r"""Draw the images behind an update from their posterior.

    Args:
        update: A gradient or a weight change of n samples, whose noise is stated.
        prior: What is known of images: ``spectrum``, or any prior for the update's
            image shape.
        labels: True labels (N,), if the attacker is given them; inferred otherwise.
        level: Tempering, as a share of every layer's norm: the errors are taken to
            have the variance :math:`\tau^2 \|g_l\|^2` besides the noise. ``None`` is
            0 for updates that state a noise, and must be chosen for others.
        chains: Chains, evaluated together.
        warmup: Moves of every chain in which its step is adapted; not kept.
        draws: Draws to keep of every chain.
        thin: Moves per draw.
        method: ``mala`` takes one leapfrog step per move, ``hmc`` a random number
            between 1 and twice ``leapfrog``, less 1.
        leapfrog: Mean number of leapfrog steps of a move of ``hmc``.
        start: ``map`` searches the mode and starts the chains in the Gaussian around
            it; ``prior`` starts them in the prior; latents (N, d) take the place of
            the mode that would be searched.
        precondition: Whether the covariance at the mode shapes the moves. With
            ``start='prior'`` there is none.
        order: For several local steps, the images of each, as for ``replay_map``.
        seed: Seed of the chains and of the search.
        on_step: Called after every move; the loss is the mean energy of the chains.

    Returns:
        The draws with their diagnostics. After Ctrl-C, the draws so far.

    Raises:
        InputError: An argument is out of range, the update states no noise and no
            level is given, or labels cannot be inferred.

    Source: Roberts and Tweedie (1996) for MALA; Duane et al. (1987) and Neal (2011)
    for Hamiltonian dynamics; Hoffman and Gelman (2014) for the steps.
    Taught in: notebooks/05_vae_prior.
    """
    begun = time.perf_counter()
    for name, count in {"chains": chains, "draws": draws, "thin": thin}.items():
        check_count(name, count)
    check_count("warmup", warmup, minimum=0)
    check_count("leapfrog", leapfrog)
    check_choice("method", method, SAMPLERS)
    check_seed("seed", seed)
    known = load_prior(prior, update.image_shape) if isinstance(prior, str) else prior
    if tuple(known.image_shape) != tuple(update.image_shape):
        raise InputError(
            "prior", f"images of shape {update.image_shape}", known.image_shape
        )
    tau = _checked_level(update, level)
    if isinstance(start, str):
        check_choice("start", start, ("map", "prior"))
    found, source = None, ""
    if isinstance(start, str) and start == "map":
        last = max(tau, _MAP_LAST)
        estimate = map_estimate(
            update, prior=known, labels=labels, seed=seed, last_level=last
        )
        found = estimate.latents
        source = estimate.reconstruction.label_source
        if labels is None:
            labels = estimate.reconstruction.labels
    else:
        labels, source = choose_labels(update, known, labels)
    posterior = _in_double(Posterior(update, known, labels, order=order))
    laplace = None
    with cpu_threads(posterior.work):
        point = start if isinstance(start, Tensor) else None
        if found is not None:
            whole = found.to(posterior.like).reshape(1, -1)
            point = _polish(posterior, whole, tau)
        if point is not None:
            if point.numel() != posterior.size:
                raise InputError("start", f"{posterior.size} latents", point.numel())
            laplace = laplace_approximation(posterior, point, level=tau, seed=seed)
        points = _starts(posterior, laplace, chains, seed)
        walk = _Walk(
            lambda x: posterior.energy(x, tau),
            points,
            root=laplace.root if laplace is not None and precondition else None,
            target=_TARGETS[method],
            leapfrog=leapfrog if method == "hmc" else 1,
            seed=seed,
        )
        told = _teller(walk, on_step, warmup + draws * thin)
        stopped = walk.run(warmup, draws, thin, told)
    return _collect(
        posterior,
        walk,
        laplace,
        level=tau,
        method=method,
        label_source=source,
        stopped=stopped,
        seconds=time.perf_counter() - begun,
        seed=seed,
    )


def exchangeable(posterior: Posterior) -> Tensor:
    """Number the images (N,) so that those with equal numbers may change places.

    Images of one class may do so in the mean gradient of a client, and of several
    clients unless each scales its update to unit length. In several local batches of
    known images none may.

    Taught in: notebooks/05_vae_prior.
    """
    update, labels = posterior.update, posterior.labels.cpu()
    apart = posterior.order != "averaged" and posterior.several_batches
    if apart:
        return torch.arange(len(labels))
    sizes = torch.tensor(update.group_sizes or (update.num_samples,))
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    if not (update.normalized or posterior.steps):
        owners = torch.zeros_like(owners)
    return owners * posterior.num_classes + labels


# --- how far to trust chains --------------------------------------------------------


def split_r_hat(draws: Tensor) -> Tensor:
    """Compare the halves of all chains with one another.

    Args:
        draws: Shape (chains, draws, ...), at least 4 draws.

    Returns:
        The square root of the pooled variance over that within the halves (...). It
        is near 1 where all of them explore the same law, and larger elsewhere.

    Raises:
        InputError: Fewer than 4 draws.

    Source: Gelman and Rubin (1992); Vehtari et al. (2021) for the halves.
    Taught in: notebooks/05_vae_prior.
    """
    halves = _halves(draws)
    length = halves.shape[1]
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    pooled = (length - 1) / length * within + between
    return (pooled / within.clamp_min(1e-300)).sqrt()


def effective_sample_size(draws: Tensor) -> Tensor:
    """Count the independent draws that would tell as much about a mean.

    Args:
        draws: Shape (chains, draws, ...), at least 4 draws.

    Returns:
        One number for every entry (...), of all chains together.

    Raises:
        InputError: Fewer than 4 draws.

    Source: Geyer (1992) for the initial monotone sequence; Vehtari et al. (2021) for
    several chains.
    Taught in: notebooks/05_vae_prior.
    """
    halves = _halves(draws)
    chains, length = halves.shape[:2]
    centred = halves - halves.mean(1, keepdim=True)
    waves = torch.fft.rfft(centred, n=2 * length, dim=1)
    power = torch.fft.irfft(waves.abs().square(), n=2 * length, dim=1)[:, :length]
    within = power[:, 0].mean(0) / (length - 1)
    pooled = (length - 1) / length * within + halves.mean(1).var(0)
    pooled = pooled.clamp_min(1e-300)
    shared = power.mean(0) / length
    correlation = 1 - (within - shared) / pooled
    correlation[0] = 1
    pairs = correlation[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)
    falling = pairs.clamp_min(0).cummin(0).values * positive
    time_scale = (2 * falling.sum(0) - 1).clamp_min(1 / math.log10(chains * length))
    return chains * length / time_scale


def _halves(draws: Tensor) -> Tensor:
    if draws.dim() < 2 or draws.shape[1] < _FEWEST:
        expected = f"shape (chains, {_FEWEST} draws or more, ...)"
        raise InputError("draws", expected, tuple(draws.shape))
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


# --- calibration ----------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationRanks:
    """Ranks of known latents among draws from their posteriors.

    Args:
        ranks: For every replicate and every quantity, how many of the draws lie
            below the truth (replicates, quantities), from 0 to ``draws``.
        draws: Number of draws that each truth was ranked among.
        names: What the quantities are.

    Taught in: notebooks/05_vae_prior.
    """

    ranks: Tensor
    draws: int
    names: tuple[str, ...]

    def counts(self, bins: int = 8) -> Tensor:
        """How many ranks fall into equal parts of 0 to ``draws`` (quantities, bins).

        Raises:
            InputError: ``draws`` + 1 ranks cannot be divided into so many parts.
        """
        check_count("bins", bins, minimum=2)
        if (self.draws + 1) % bins:
            raise InputError("bins", f"a divisor of {self.draws + 1}", bins)
        places = self.ranks // ((self.draws + 1) // bins)
        found = [torch.bincount(column, minlength=bins) for column in places.T]
        return torch.stack(found)

    def p_values(self, bins: int = 8) -> Tensor:
        """Chi-square p-value of evenly spread ranks, for every quantity."""
        counts = self.counts(bins).double()
        expected = len(self.ranks) / bins
        excess = (counts - expected).square().sum(1) / expected
        half = torch.full_like(excess, (bins - 1) / 2)
        return torch.special.gammaincc(half, excess / 2)


def calibration_ranks(
    model: nn.Module,
    prior: ImagePrior,
    *,
    labels: Tensor,
    noise_std: float,
    replicates: int = 128,
    warmup: int = 200,
    draws: int = 63,
    thin: int = 4,
    method: Sampler = "hmc",
    leapfrog: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> CalibrationRanks:
    r"""Test a sampler by simulation: rank known latents among draws.

    Each replicate draws latents from the prior, computes the gradient of their images,
    adds noise, and samples the posterior from a start in the prior. If the sampler
    draws from the right law, the rank of the truth among the draws is uniform. Too
    narrow a law piles ranks up at both ends, too wide a law in the middle.

    The quantities are every latent, the energy, and the squared norm of the latents.
    Images of one class may change places, which a chain does rarely: give every image
    a label of its own where latents are to be ranked.

    Args:
        model: Any classifier whose gradients are meant.
        prior: Where the known latents come from.
        labels: Label of every image (N,), known to the sampler.
        noise_std: Standard deviation of the noise in every entry of a gradient.
        replicates: Truths, sampled together, one chain each.
        warmup: Moves in which steps are adapted.
        draws: Draws to rank among; one less than a multiple of the wanted bins.
        thin: Moves per draw; draws should be nearly independent.
        method: As for ``sample_posterior``.
        leapfrog: As for ``sample_posterior``.
        temperature: What the log-density is divided by; 1 is right. Others show what
            a wrong law looks like.
        seed: Seed of latents, noise and chains.

    Returns:
        The ranks.

    Raises:
        InputError: An argument is out of range.

    Source: Talts et al. (2018); Modrák et al. (2023) for ranks of the likelihood.
    Taught in: notebooks/05_vae_prior.
    """
    counted = {"replicates": replicates, "draws": draws, "thin": thin}
    for name, count in {**counted, "leapfrog": leapfrog}.items():
        check_count(name, count)
    check_count("warmup", warmup, minimum=0)
    check_number("noise_std", noise_std, exclusive=True)
    check_number("temperature", temperature, exclusive=True)
    check_choice("method", method, SAMPLERS)
    check_seed("seed", seed)
    model = copy.deepcopy(model).double()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(like.device)

    own = prior.to(like.detach()).given(labels)
    simulated = noise(replicates, len(labels), prior.size)
    classes = model(own.decode(simulated[0])).shape[1]
    targets = nn.functional.one_hot(labels.to(like.device), classes).to(simulated)
    found, _ = gradient_map(model)(
        own.decode(simulated), targets.expand(replicates, -1, -1)
    )
    sent = [gradient + noise_std * noise(*gradient.shape) for gradient in found]
    first = SharedUpdate(
        model=model,
        tensors=dict(zip(names, [gradient[0] for gradient in sent], strict=True)),
        num_samples=len(labels),
        image_shape=prior.image_shape,
        noise_std=noise_std,
    )
    posterior = Posterior(first, prior, labels)
    posterior.targets = sent  # every trial has an update of its own
    posterior.together = replicates

    def energy(points: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = posterior.energy(points, 0.0)
        return value / temperature, slope / temperature

    walk = _Walk(
        energy,
        noise(replicates, posterior.size),
        root=None,
        target=_TARGETS[method],
        leapfrog=leapfrog if method == "hmc" else 1,
        seed=seed + 1,
    )
    walk.run(warmup, draws, thin, lambda: None)
    flat = simulated.flatten(1)
    quantities = [
        torch.cat([points, energies[..., None], norms[..., None]], -1)
        for points, energies, norms in (
            (flat, energy(flat)[0], flat.square().sum(1)),
            (walk.kept, 2 * walk.kept_energies, walk.kept.square().sum(2)),
        )
    ]
    ranks = (quantities[1] < quantities[0][:, None]).sum(1).cpu()
    latents = [f"latent {k}" for k in range(posterior.size)]
    return CalibrationRanks(ranks, draws, (*latents, "energy", "squared norm"))


# --- chains -----------------------------------------------------------------------


class _Walk:
    """Hamiltonian Monte Carlo for all chains at once, each with a step of its own."""

    def __init__(
        self,
        energy: Energy,
        points: Tensor,
        *,
        root: Callable[[Tensor], Tensor] | None,
        target: float,
        leapfrog: int,
        seed: int,
    ):
        self.energy, self.points = energy, points
        self.root = root or (lambda x: x)
        self.target, self.leapfrog = target, leapfrog
        self.generator = torch.Generator().manual_seed(seed)
        self.energies, self.slopes = self._evaluate(points)
        chains, size = points.shape
        first = math.log(size**-0.25 if leapfrog > 1 else size ** (-1 / 6))
        self.log_steps = points.new_full((chains,), first, dtype=torch.float64)
        self.anchor = self.log_steps + math.log(10)
        self.lacking = torch.zeros_like(self.log_steps)
        self.averaged = torch.zeros_like(self.log_steps)
        self.moves, self.accepted = 0, torch.zeros_like(self.log_steps)
        self.draws: list[tuple[Tensor, Tensor]] = []

    @property
    def step_sizes(self) -> Tensor:
        """Step of every chain."""
        return self.log_steps.exp()

    @property
    def acceptance(self) -> Tensor:
        """Share of accepted moves since the warm-up, per chain."""
        return self.accepted / max(1, self.moves)

    @property
    def kept(self) -> Tensor:
        """Draws (chains, draws, n)."""
        return torch.stack([points for points, _ in self.draws], 1)

    @property
    def kept_energies(self) -> Tensor:
        """Their energies (chains, draws)."""
        return torch.stack([energies for _, energies in self.draws], 1)

    def run(self, warmup: int, draws: int, thin: int, tell: Callable[[], None]) -> str:
        """Warm up, then keep every ``thin``-th point; return why it ended."""
        try:
            for number in range(warmup):
                self._adapt(self._move(), number + 1)
                tell()
            if warmup:
                self.log_steps = self.averaged
            for _ in range(draws):
                for _ in range(thin):
                    self.accepted += self._move()[1]
                    self.moves += 1
                    tell()
                self.draws.append((self.points, self.energies))
        except KeyboardInterrupt:
            if not self.draws:
                raise
            return "interrupted"
        return "all draws made"

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the log-density, and its slope in the coordinates of the momentum."""
        energies, slopes = self.energy(points)
        return energies.detach() / 2, self.root(slopes.detach() / 2)

    def _normal(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(like)

    def _move(self) -> tuple[Tensor, Tensor]:
        """Propose and decide: probability of acceptance, and whether it was."""
        steps = 1
        if self.leapfrog > 1:  # of random length, or a period may be met
            low, high = 1, 2 * self.leapfrog
            steps = int(torch.randint(low, high, (), generator=self.generator))
        size = self.step_sizes[:, None].to(self.points)
        momentum = self._normal(self.points)
        before = self.energies + momentum.double().square().sum(1) / 2
        points, energies, slopes = self.points, self.energies, self.slopes
        for _ in range(steps):
            momentum = momentum - size / 2 * slopes
            points = points + size * self.root(momentum)
            energies, slopes = self._evaluate(points)
            momentum = momentum - size / 2 * slopes
        after = energies + momentum.double().square().sum(1) / 2
        chance = (before - after).nan_to_num(nan=-math.inf).clamp_max(0).exp()
        drawn = torch.rand(len(chance), generator=self.generator, dtype=torch.float64)
        taken = drawn.to(chance) < chance
        self.points = torch.where(taken[:, None], points, self.points)
        self.slopes = torch.where(taken[:, None], slopes, self.slopes)
        self.energies = torch.where(taken, energies, self.energies)
        return chance, taken.to(chance)

    def _adapt(self, decided: tuple[Tensor, Tensor], number: int) -> None:
        """Dual averaging of the logarithms of the steps."""
        share = 1 / (number + _DELAY)
        self.lacking = (1 - share) * self.lacking + share * (self.target - decided[0])
        self.log_steps = self.anchor - math.sqrt(number) / _SHRINK * self.lacking
        weight = number**-_FORGET
        self.averaged = weight * self.log_steps + (1 - weight) * self.averaged


def _teller(
    walk: _Walk, on_step: Callable[[Step], None] | None, total: int
) -> Callable[[], None]:
    made = 0

    def tell() -> None:
        nonlocal made
        made += 1
        if on_step is not None:
            energy = 2 * float(walk.energies.mean())
            on_step(Step(0, 0, made, energy, total, made == total))

    return tell


def _checked_level(update: SharedUpdate, level: float | None) -> float:
    if level is not None:
        return check_number("level", level, exclusive=not update.noise_std)
    if not update.noise_std:
        raise InputError(
            "level",
            "a number > 0 for an update that states no noise",
            "none",
            "its posterior is as narrow as rounding; a level widens it by choice",
        )
    return 0.0


def _in_double(posterior: Posterior) -> Posterior:
    return posterior if posterior.like.device.type == "mps" else posterior.double()


def _polish(posterior: Posterior, point: Tensor, level: float) -> Tensor:
    """Descend from a point (1, n) to the mode at this level."""

    def inspect(trial: int, state: TrialState) -> str:
        trace = state.trace
        if len(trace) > _MOST_POLISHING:
            return "all iterations used"
        flat = len(trace) > 1 and trace[-2] - trace[-1] < _POLISHED
        return "flat" if flat else ""

    states = Minimiser(
        lambda x, trials: posterior.energy(x, level),
        point,
        inspect=inspect,
        replace=lambda trial, state: None,
    ).run()
    return states[0].point[None].to(point)


def _starts(
    posterior: Posterior, laplace: LaplaceApproximation | None, chains: int, seed: int
) -> Tensor:
    if laplace is not None:
        return laplace.sample(chains, seed=seed).flatten(1).to(posterior.like)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        chains, posterior.size, generator=generator, dtype=torch.float64
    )
    return drawn.to(posterior.like)


@torch.no_grad()
def _collect(
    posterior: Posterior,
    walk: _Walk,
    laplace: LaplaceApproximation | None,
    **facts: Any,
) -> PosteriorSamples:
    """Align the draws, decode them and compute the diagnostics."""
    kept, energies = walk.kept, 2 * walk.kept_energies
    chains, draws = energies.shape
    latents = kept.view(chains * draws, posterior.num_samples, -1)
    parts = latents.flatten(1).split(64)
    images = torch.cat([posterior.images(part) for part in parts])
    if laplace is not None:
        reference = laplace.images
    else:
        reference = images[int(energies.flatten().argmin())]
    order = align_images(images, reference, exchangeable(posterior))
    images, latents = reorder(images, order), reorder(latents, order)
    latents = latents.unflatten(0, (chains, draws))
    unknown = torch.full(latents.shape[2:], math.nan)
    entries = sum(target[0].numel() for target in posterior.targets)
    residuals = (energies - kept.double().square().sum(2)) / entries
    enough = draws >= _FEWEST
    return PosteriorSamples(
        images=images.float().cpu().unflatten(0, (chains, draws)),
        latents=latents.float().cpu(),
        energies=energies.cpu(),
        labels=posterior.labels.cpu(),
        reference=reference.float().cpu(),
        acceptance=walk.acceptance.cpu(),
        step_sizes=walk.step_sizes.cpu(),
        r_hat=split_r_hat(latents).cpu() if enough else unknown,
        effective=effective_sample_size(latents).cpu() if enough else unknown,
        residuals=residuals.cpu(),
        noise=posterior.noise,
        laplace=laplace,
        **facts,
    )
