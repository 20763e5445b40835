r"""From the gradient of a denoising loss to its images: GIDM and GIDM+ as a MAP search.

The unknowns are whitened coordinates u of the images under a prior and, where the
noise is private, the noise itself under the prior it was drawn from. Minimised is
minus twice the logarithm of their posterior,

.. math:: E = \sum_l \|g_l(D(u), \epsilon) - g_l\|^2 / (\tau^2 \|g_l\|^2)
   + \|u\|^2 + \|\epsilon\|^2 ,

while the tempering :math:`\tau` falls. The noise starts at a random draw of the
attacker's own, and nothing here takes a guess near the truth. Steps that are not given
are read from the time embedding; where that cannot be done, every assignment of steps
is followed for a while and the lowest energy kept.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradinv_helpers.attacks.adam import Adam
from gradinv_helpers.attacks.denoising import (
    DenoisingMap,
    DenoisingUpdate,
    check_noise,
    check_steps,
)
from gradinv_helpers.attacks.denoising_steps import assignments, infer_timestep
from gradinv_helpers.attacks.matching import cosine_distance, squared_norm
from gradinv_helpers.attacks.optimise import (
    UPDATES_PER_ITERATION,
    Minimiser,
    TrialState,
)
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step, TrialReport
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.priors.gaussian import ImagePrior, spectrum_prior

Distance = Literal["l2", "cosine"]
DISTANCES = ("l2", "cosine")
Optimiser = Literal["lbfgs", "adam"]
OPTIMISERS = ("lbfgs", "adam")

# Shares of every layer's norm; at the last, rounding of float32 is near.
_LEVELS = (1e-1, 1e-2, 1e-3, 1e-4)
_FLAT, _PATIENCE = 1e-3, 2
_SMALL_START, _WIDE_START = 0.1, 1.0  # standard deviations of the latents
# Relative squared distances: of a solution, and of a local minimum at that level.
_SOLVED, _ABANDONED, _ABANDONED_AT = 1e-8, 1e-4, 1e-2
_ALL_USED = "all iterations used"
_GLANCE_LEVEL, _GLANCE_ITERATIONS = 3e-2, 4  # of every assignment of steps
_COARSE, _FEW_STEPS = 16, 50  # steps of the first scan of a long schedule


@dataclass(frozen=True)
class DenoisingEstimate:
    """The most probable images behind a diffusion client's gradient.

    Args:
        reconstruction: As every attack returns it; its labels are -1, as there are
            none. The losses are relative squared distances of the gradients.
        noise: Noise (N, C, H, W), as given or as found.
        timesteps: Steps (N,).
        step_source: ``given``, ``time embedding`` or ``scan``.
        scanned: Assignments of steps that were followed, with their energies.
        noise_known: Whether the noise was given.

    Taught in: notebooks/06_diffusion_prior.
    """

    reconstruction: Reconstruction
    noise: Tensor
    timesteps: Tensor
    step_source: str
    scanned: tuple[tuple[tuple[int, ...], float], ...]
    noise_known: bool


def invert_denoising(
    update: DenoisingUpdate,
    *,
    noise: Tensor | None = None,
    timesteps: Tensor | Sequence[int] | None = None,
    prior: ImagePrior | None = None,
    refine: bool = False,
    distance: Distance = "l2",
    optimiser: Optimiser = "lbfgs",
    iterations: int = 100,
    restarts: int = 4,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> DenoisingEstimate:
    """Find the images behind the gradient of a denoising loss.

    With noise and steps given this is the setting of GIDM, without them that of
    GIDM+.

    Args:
        update: What the client sent.
        noise: The client's noise (N, C, H, W), if the attacker is given it; otherwise
            it is a further unknown, from a random start.
        timesteps: The client's steps (N,), if the attacker is given them, in the order
            of ``noise``; inferred otherwise.
        prior: What is known of images; the data-free Gaussian of photographs if not
            given. A trained generator with ``decode`` and ``pull_back`` fits here.
        refine: Go on over the whitened pixels of the data-free Gaussian from where the
            search under ``prior`` has ended, for a generator that cannot make every
            image; as many iterations again.
        distance: ``l2``, of every layer by its norm, or ``cosine``.
        optimiser: ``lbfgs``, or ``adam`` as the first attacks used.
        iterations: Most iterations of a restart, of 20 updates each.
        restarts: Most random starts; one that solves the equations is the last, and
            the lowest energy is returned. With private noise many starts end in local
            minima, which the distance shows.
        seed: Seed of the starts.
        on_step: Called after every iteration.

    Returns:
        The images, the noise and the steps. After Ctrl-C, the best so far.

    Raises:
        InputError: An argument is out of range, or the steps cannot be found.

    Source: Huang et al. (2024), GIDM and GIDM+, for the two settings.
    Taught in: notebooks/06_diffusion_prior.
    """
    check_count("iterations", iterations)
    check_count("restarts", restarts)
    check_seed("seed", seed)
    check_choice("distance", distance, DISTANCES)
    check_choice("optimiser", optimiser, OPTIMISERS)
    gaussian = spectrum_prior(update.image_shape)
    known = gaussian if prior is None else prior
    if tuple(known.image_shape) != update.image_shape:
        expected = f"images of shape {update.image_shape}"
        raise InputError("prior", expected, tuple(known.image_shape))
    if noise is not None:
        noise = check_noise("noise", noise, (update.num_samples, *update.image_shape))
    begun = time.perf_counter()
    problem = _Problem(update, known, noise, distance)
    given = None
    if timesteps is not None:
        n, total = update.num_samples, update.num_steps
        given = tuple(check_steps("timesteps", timesteps, n, total).tolist())
    with cpu_threads(_work(update)):
        if given is not None:
            scanned, source = [_Glance(given)], "given"
        else:
            scanned, source = _find_steps(problem, optimiser, seed)
        steps = min(scanned, key=lambda glance: glance.energy).steps
        search = _Search(_Energy(problem, steps), optimiser, iterations, on_step)
        refined = _Energy(_Problem(update, gaussian, noise, distance), steps)
        search.run(restarts, seed, refined if refine else None)
    attack = "gidm+" if noise is None else "gidm"
    report, found_noise = search.report(attack, seed, begun)
    return DenoisingEstimate(
        reconstruction=report,
        noise=found_noise,
        timesteps=torch.tensor(steps),
        step_source=source,
        scanned=tuple((g.steps, g.energy) for g in scanned if len(scanned) > 1),
        noise_known=noise is not None,
    )


def _work(update: DenoisingUpdate) -> int:
    """Multiplications of a forward pass, if every weight acts at every pixel."""
    _, height, width = update.image_shape
    weights = sum(tensor.numel() for tensor in update.tensors.values())
    return weights * update.num_samples * height * width


@dataclass(frozen=True)
class _Problem:
    """What the attacker has: the update, a prior, and the noise if it is known."""

    update: DenoisingUpdate
    prior: ImagePrior
    noise: Tensor | None
    distance: Distance


class _Energy:
    """Minus twice the log posterior of latents and noise, for given steps."""

    def __init__(self, problem: _Problem, steps: tuple[int, ...]):
        update = problem.update
        model = copy.deepcopy(update.model)
        sent = list(update.tensors.values())
        eps = torch.finfo(sent[0].dtype).eps
        if sent[0].device.type != "mps":  # rounding of the search is in the way
            model, sent = model.double(), [t.double() for t in sent]
        self.targets = [t[None] for t in sent]
        self.like = self.targets[0]
        self.prior = problem.prior.to(self.like)
        noise = problem.noise
        self.noise = None if noise is None else noise.to(self.like)
        self.shape = (update.num_samples, *update.image_shape)
        self.map = DenoisingMap(
            model, torch.tensor(steps), update.alphas_cumprod, update.prediction
        )
        self.norms = [float(squared_norm([t])) for t in self.targets]
        if not any(self.norms):
            raise InputError("update", "a non-zero gradient", "all zeros")
        # Layers that cancel exactly hold only rounding, in proportion to the others.
        self.rounding = eps**2 * sum(self.norms)
        self.by_cosine = problem.distance == "cosine"

    @property
    def latents(self) -> int:
        """Latents of all images."""
        return self.shape[0] * self.prior.size

    @property
    def size(self) -> int:
        """Unknowns: latents, and noise unless it is known."""
        return self.latents + (math.prod(self.shape) if self.noise is None else 0)

    def parts(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (A, N, size), images and noise (A, N, C, H, W) of points."""
        latents = points[:, : self.latents].unflatten(1, (self.shape[0], -1))
        images = self.prior.decode(latents)
        if self.noise is not None:
            return latents, images, self.noise.expand(len(points), *self.shape)
        return latents, images, points[:, self.latents :].unflatten(1, self.shape)

    def point(self, images: Tensor, noise: Tensor) -> Tensor:
        """The point (size,) of images and noise (1, N, C, H, W)."""
        found = self.prior.encode(images).flatten()
        return found if self.noise is not None else torch.cat([found, noise.flatten()])

    def __call__(self, points: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Energy (A,) and its derivative of points (A, size)."""
        latents, images, noise = self.parts(points)
        gradients, pullback = self.map(images, noise)
        if self.by_cosine:
            targets = [t.expand(len(points), *t.shape[1:]) for t in self.targets]
            gap, slopes = cosine_distance(gradients, targets)
            energy = 2 * gap.double() / level**2
            slopes = [slope * (2 / level**2) for slope in slopes]
        else:
            energy = torch.zeros_like(points[:, 0], dtype=torch.float64)
            slopes = []
            triples = zip(gradients, self.targets, self.norms, strict=True)
            for gradient, target, norm in triples:
                variance = level**2 * norm + self.rounding
                error = gradient - target
                energy = energy + squared_norm([error]).double() / variance
                slopes.append(error * (2 / variance))
        to_images, to_noise = pullback(slopes)
        back = [self.prior.pull_back(latents, to_images).flatten(1)]
        if self.noise is None:
            back.append(to_noise.flatten(1))
        energy = energy + points.double().square().sum(1)
        return energy, torch.cat(back, 1) + 2 * points

    def misfit(self, point: Tensor) -> float:
        """Relative squared distance of the gradient of a point (size,)."""
        _, images, noise = self.parts(point[None])
        gradients, _ = self.map(images, noise)
        gaps = [a - b for a, b in zip(gradients, self.targets, strict=True)]
        return float(squared_norm(gaps)[0]) / sum(self.norms)


def _random_start(energy: _Energy, seed: int, number: int) -> Tensor:
    """Latents of the prior, at first near its mean, and noise of the attacker's own."""
    drawing = torch.Generator().manual_seed((seed + 1_000_003 * number) % 2**32)
    start = torch.randn(energy.size, generator=drawing)
    start[: energy.latents] *= _WIDE_START if number else _SMALL_START
    return start.to(energy.like)


def _minimise(
    energy: _Energy,
    start: Tensor,
    level: float,
    optimiser: Optimiser,
    iterations: int,
    tell: Callable[[TrialState], None] | None = None,
) -> TrialState:
    """Descend at one level until it is flat or the iterations are used."""
    flat, before = 0, math.inf

    def inspect(trial: int, state: TrialState) -> str:
        nonlocal flat, before
        if tell is not None and state.updates:
            tell(state)
        flat = flat + 1 if not state.loss < (1 - _FLAT) * before else 0
        before = min(before, state.loss)
        if flat >= _PATIENCE and optimiser == "lbfgs":
            return "the last level is flat"
        return _ALL_USED if state.iterations >= iterations else ""

    def objective(points: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        return energy(points, level)

    minimiser: Minimiser | Adam
    if optimiser == "lbfgs":
        minimiser = Minimiser(
            objective, start[None], inspect=inspect, replace=lambda trial, state: None
        )
    else:
        minimiser = Adam(
            objective,
            start[None],
            iterations=iterations,
            project=lambda points: points,
            inspect=inspect,
            replace=lambda trial, state: None,
            signed=False,
        )
    return minimiser.run()[0]


# --- the steps ------------------------------------------------------------------


@dataclass(frozen=True)
class _Glance:
    """The energy that a short search with these steps ends at."""

    steps: tuple[int, ...]
    energy: float = 0.0


def _find_steps(
    problem: _Problem, optimiser: Optimiser, seed: int
) -> tuple[list[_Glance], str]:
    """Assignments of steps to the images, and where they come from."""
    update = problem.update
    try:
        different = infer_timestep(update).steps
    except InputError:
        if update.num_samples > 1:
            raise
        return _scan(problem, optimiser, seed), "scan"
    found = assignments(different, update.num_samples, problem.noise is not None)
    if len(found) == 1:
        return [_Glance(found[0])], "time embedding"
    return [_glance(problem, f, optimiser, seed) for f in found], "time embedding"


def _scan(problem: _Problem, optimiser: Optimiser, seed: int) -> list[_Glance]:
    """Try the steps of one image: a long schedule coarsely, then around the best."""
    total = problem.update.num_steps
    stride = 1 if total <= _FEW_STEPS else -(-total // _COARSE)
    tried: dict[int, _Glance] = {}

    def look(steps: Iterable[int]) -> None:
        for step in steps:
            if 0 <= step < total and step not in tried:
                tried[step] = _glance(problem, (step,), optimiser, seed)

    look(range(0, total, stride))
    while stride > 1:
        stride = -(-stride // 2)
        best = min(tried, key=lambda step: tried[step].energy)
        look((best - stride, best + stride))
    return [tried[step] for step in sorted(tried)]


def _glance(
    problem: _Problem, steps: tuple[int, ...], optimiser: Optimiser, seed: int
) -> _Glance:
    energy = _Energy(problem, steps)
    start = _random_start(energy, seed, 0)
    state = _minimise(energy, start, _GLANCE_LEVEL, optimiser, _GLANCE_ITERATIONS)
    return _Glance(steps, state.loss)


# --- the annealing --------------------------------------------------------------


@dataclass
class _Trial:
    """One restart: where it stands, and the way there."""

    number: int
    point: Tensor
    energy: float = math.inf  # at the last level, once it is there
    spent: int = 0
    evaluations: int = 0
    stopped: str = "interrupted"
    losses: list[float] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)


class _Search:
    """Annealed descents from random starts, one after another."""

    def __init__(
        self,
        energy: _Energy,
        optimiser: Optimiser,
        iterations: int,
        on_step: Callable[[Step], None] | None,
    ):
        self.energy, self.optimiser = energy, optimiser
        self.iterations, self.on_step = iterations, on_step
        self.trials: list[_Trial] = []
        self.refined: _Trial | None = None

    @property
    def best(self) -> _Trial:
        """The restart of the lowest energy, or the one that was refined."""
        if self.refined is not None:
            return self.refined
        return min(self.trials, key=lambda t: (t.energy, t.losses[-1:] or [math.inf]))

    def run(self, restarts: int, seed: int, refined: _Energy | None) -> None:
        """Anneal from every start, the best one once more with another energy.

        Ctrl-C ends it with what is there.
        """
        try:
            for number in range(restarts):
                start = _random_start(self.energy, seed, number)
                self.trials.append(_Trial(number, start))
                self._anneal(self.trials[-1], self.iterations)
                if self.trials[-1].losses[-1] < _SOLVED:
                    break
            if refined is not None:
                self._go_on(self.best, refined)
        except KeyboardInterrupt:
            if not self.trials or not self.trials[0].losses:
                raise
            self.best.stopped = "interrupted"

    def _go_on(self, trial: _Trial, refined: _Energy) -> None:
        _, images, noise = self.energy.parts(trial.point[None])
        self.energy, self.refined = refined, trial
        trial.point = refined.point(images, noise)
        self._anneal(trial, 2 * self.iterations)

    def _anneal(self, trial: _Trial, iterations: int) -> None:
        def follow(state: TrialState) -> None:
            trial.spent += 1
            trial.point = state.point.clone()
            trial.losses.append(self.energy.misfit(trial.point))
            self._tell(trial, iterations)

        for index, level in enumerate(_LEVELS):
            share = (iterations - trial.spent) // (len(_LEVELS) - index)
            budget = max(1, share)
            if trial.spent >= iterations:
                break
            state = _minimise(
                self.energy, trial.point, level, self.optimiser, budget, follow
            )
            if state.updates % UPDATES_PER_ITERATION or not trial.losses:
                follow(state)  # it stopped within an iteration
            trial.point, trial.stopped = state.point, state.stopped
            trial.evaluations += state.evaluations
            _, images, _ = self.energy.parts(trial.point[None])
            trial.snapshots[trial.spent] = _as_images(images[0])
            at_minimum = state.stopped != _ALL_USED and level <= _ABANDONED_AT
            if at_minimum and trial.losses[-1] > _ABANDONED:
                trial.stopped = "a local minimum"
                return
        trial.energy = state.loss

    def _tell(self, trial: _Trial, iterations: int, finished: bool = False) -> None:
        if self.on_step is not None:
            loss, spent = trial.losses[-1], trial.spent
            self.on_step(Step(0, trial.number, spent, loss, iterations, finished))

    def report(
        self, attack: str, seed: int, begun: float
    ) -> tuple[Reconstruction, Tensor]:
        """What every attack returns, and the noise."""
        best = self.best
        _, images, noise = self.energy.parts(best.point[None])
        best.snapshots[best.spent] = _as_images(images[0])
        self._tell(best, self.iterations, finished=True)
        trials = [
            TrialReport(t.number, t.energy, t.spent, t.evaluations, t.stopped, False)
            for t in self.trials
        ]
        found = Reconstruction(
            images=_as_images(images[0]),
            labels=torch.full((len(images[0]),), -1),
            losses=tuple(best.losses),
            iterations=tuple(range(1, len(best.losses) + 1)),
            snapshots=torch.stack(list(best.snapshots.values())),
            snapshot_iterations=tuple(best.snapshots),
            trials=tuple(trials),
            stopped=best.stopped,
            seconds=time.perf_counter() - begun,
            attack=attack,
            reason=f"gradient of a denoising loss, prior {self.energy.prior.name!r}",
            label_source="none: a denoiser has no labels",
            seed=seed,
        )
        return found, noise[0].float().cpu()


def _as_images(images: Tensor) -> Tensor:
    return images.detach().clamp(0, 1).float().cpu()
