"""What the attacks with a diffusion prior share: matching, bookkeeping, a polish.

Taught in: notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradinv_helpers.attacks.label_search import choose_labels
from gradinv_helpers.attacks.matching import cosine_distance, squared_norm
from gradinv_helpers.attacks.optimise import Minimiser, TrialState
from gradinv_helpers.attacks.plan import has_kinks
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step, TrialReport
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import SharedUpdate

_SNAPSHOTS = 10
_SMALLEST = 1e-20  # squared length of a direction that says nothing
# The polish: levels of the tempering, and the variance of what it may change.
_POLISH_LEVELS = (1e-2, 1e-3, 1e-4)
_POLISH_VARIANCE = 0.02


@dataclass(frozen=True)
class SampledReconstruction(Reconstruction):
    """A reconstruction that was chosen among several draws, with all of them.

    ``images`` is the draw whose gradient is closest to the update.

    Args:
        samples: Every draw (A, N, C, H, W) in [0, 1], before any polish.
        misfits: Relative squared distance of each draw's gradient to the update.

    Taught in: notebooks/06_diffusion_prior.
    """

    samples: Tensor = field(default_factory=lambda: torch.empty(0))
    misfits: tuple[float, ...] = ()


class Guide:
    """How well clean images of several trials explain an update, and the slope of it.

    Behind networks whose slope jumps (ReLU) the energy is that of a gradient of
    unknown length, as for ``map_estimate``.

    Args:
        update: What the server saw.
        prior: The diffusion model.
        labels: Labels (N,), if the attacker is given them; inferred otherwise.
    """

    def __init__(
        self, update: SharedUpdate, prior: DiffusionPrior, labels: Tensor | None
    ):
        if not isinstance(prior, DiffusionPrior):
            raise InputError("prior", "a DiffusionPrior", type(prior).__name__)
        shape = tuple(update.image_shape)
        if tuple(prior.image_shape) != shape:
            raise InputError("prior", f"images of shape {shape}", prior.image_shape)
        labels, self.label_source = choose_labels(update, prior, labels)
        self.posterior = Posterior(update, prior, labels, order="averaged")
        assert isinstance(self.posterior.prior, DiffusionPrior)
        self.prior: DiffusionPrior = self.posterior.prior
        self.by_cosine = has_kinks(update.model)

    @property
    def labels(self) -> Tensor:
        """Label of every image (N,)."""
        return self.posterior.labels

    def noise(self, trials: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers for the images of all trials, (A, N, C, H, W)."""
        shape = (trials, self.posterior.num_samples, *self.prior.image_shape)
        return torch.randn(shape, generator=generator).to(self.posterior.like)

    def match(self, images: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
        """Energy (A,), misfit (A,) and slope of the energy by the images.

        Args:
            images: Shape (A, N, C, H, W), in [0, 1] up to errors.
            level: The tempering, as a share of every layer's norm.

        Returns:
            -2 log likelihood in double precision; the relative squared distance to
            the update; the derivative of the first, of the shape of ``images``.
        """
        parts = [self._match(some, level) for some in self._parts(images)]
        energy, misfit, slopes = (torch.cat(p) for p in zip(*parts, strict=True))
        return energy, misfit, slopes

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.detach().split(self.posterior.together)

    def _match(self, images: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.posterior
        classes = posterior.classes.expand(len(images), -1, -1)
        gradients, pullback = posterior.map(images, classes)
        gaps = posterior.gaps(gradients)
        misfit = squared_norm(gaps) / squared_norm(posterior.targets)
        if self.by_cosine:
            count, scale = posterior.num_gradients, 2 / level**2
            pairs = zip(gradients, posterior.targets, strict=True)
            targets = [target.expand_as(gradient) for gradient, target in pairs]
            visible = posterior.visible(gradients[:count])
            distance, slopes = cosine_distance(visible, targets[:count])
            energy = distance.double() * scale
            # A cosine has no place for the statistics of BatchNorm.
            slopes = posterior.visible([slope * scale for slope in slopes])
            slopes += [torch.zeros_like(gap) for gap in gaps[count:]]
        else:
            energy, slopes = posterior.likelihood(gradients, level)
        return energy, misfit, pullback(slopes)[0]

    def expected_energy(self, level: float) -> float:
        """Energy that stated noise alone leaves at the true images."""
        posterior = self.posterior
        if self.by_cosine:
            return 0.0
        pairs = zip(posterior.targets, posterior.variances(level), strict=True)
        noisy = list(pairs)[: posterior.num_gradients]
        return sum(t.numel() * posterior.noise**2 / v for t, v in noisy)


class Progress:
    """What a running attack has so far, and the report that it ends with."""

    def __init__(
        self,
        guide: Guide,
        attack: str,
        steps: int,
        seed: int,
        on_step: Callable[[Step], None] | None,
        client: int,
    ):
        self.guide, self.attack, self.steps, self.seed = guide, attack, steps, seed
        self.on_step, self.client = on_step, client
        self.begun = time.perf_counter()
        self.images: Tensor | None = None  # latest (A, N, C, H, W) in [0, 1]
        self.misfits: list[Tensor] = []  # one (A,) per step
        self.snapshots: list[tuple[int, Tensor]] = []
        self.evaluations, self.stopped = 0, ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the block with fitting threads; Ctrl-C keeps what is there."""
        posterior = self.guide.posterior
        with cpu_threads(posterior.work):
            try:
                yield
                self.stopped = "all steps done"
            except KeyboardInterrupt:
                if self.images is None:
                    raise
                self.stopped = "interrupted"

    def tell(self, images: Tensor, misfits: Tensor) -> None:
        """Take in the clean images (A, N, C, H, W) of a step and their misfits."""
        self.images = images.detach().clamp(0, 1).nan_to_num(0.5).float().cpu()
        self.misfits.append(misfits.detach().double().cpu())
        step = len(self.misfits)
        if step % max(1, self.steps // _SNAPSHOTS) == 0:
            self.snapshots.append((step, self.images))
        if self.on_step is not None:
            best = _best(self.misfits[-1])
            loss = float(self.misfits[-1][best])
            self.on_step(Step(self.client, best, step, loss, self.steps, False))

    def finish(
        self,
        final: Tensor | None,
        reason: str,
        *,
        polish: int = 0,
    ) -> SampledReconstruction:
        """Choose the draw that explains the update best, polish it, and report.

        Args:
            final: Images (A, N, C, H, W) at the end; the latest ones where ``None``.
            reason: What ran.
            polish: Iterations of the polish, of 20 updates each.
        """
        assert self.images is not None
        samples = self.images
        if final is not None and self.stopped != "interrupted":
            samples = final.detach().clamp(0, 1).nan_to_num(0.5).float().cpu()
        like = self.guide.posterior.like
        _, misfits, _ = self.guide.match(samples.to(like), 1.0)
        misfits = misfits.double().cpu()
        best = _best(misfits)
        kept = {step: images[best] for step, images in self.snapshots}
        losses = [float(row[best]) for row in self.misfits]
        images, spent = samples[best], len(losses)
        losses[-1], kept[spent] = float(misfits[best]), images
        if polish and self.stopped != "interrupted":
            images = self._polish(images, polish)
            losses.append(float(self.guide.match(images[None].to(like), 1.0)[1][0]))
            kept[spent + 1] = images
            reason += f", then a likelihood polish of {polish} iterations"
        if self.on_step is not None and self.stopped != "interrupted":
            told = (self.client, best, spent, losses[-1], self.steps, True)
            self.on_step(Step(*told))
        return SampledReconstruction(
            images=images,
            labels=self.guide.labels.cpu(),
            losses=tuple(losses),
            iterations=tuple(range(1, len(losses) + 1)),
            snapshots=torch.stack(list(kept.values())),
            snapshot_iterations=tuple(kept),
            trials=tuple(
                TrialReport(a, float(m), spent, self.evaluations, self.stopped, False)
                for a, m in enumerate(misfits)
            ),
            stopped=self.stopped,
            seconds=time.perf_counter() - self.begun,
            attack=self.attack,
            reason=reason,
            label_source=self.guide.label_source,
            seed=self.seed,
            samples=samples,
            misfits=tuple(misfits.tolist()),
        )

    def _polish(self, images: Tensor, iterations: int) -> Tensor:
        with cpu_threads(self.guide.posterior.work):
            return polish(self.guide, images, iterations)


def polish(guide: Guide, images: Tensor, iterations: int) -> Tensor:
    """Move images (N, C, H, W) to where the likelihood wants them, and not further.

    What changes is a Gaussian with the spectrum of photographs around ``images``, in
    its whitened coordinates, so that the update decides where it says something and the
    images stay where it says nothing. L-BFGS follows the tempering downwards.
    """
    like = guide.posterior.like
    start = images.to(like)
    shape = guide.prior.image_shape
    change = spectrum_prior(shape, mean=0, variance=_POLISH_VARIANCE).to(like)
    point = start.new_zeros(1, start.numel())
    per_level = max(1, iterations // len(_POLISH_LEVELS))
    for level in _POLISH_LEVELS:

        def energy(
            points: Tensor, trials: Tensor, level: float = level
        ) -> tuple[Tensor, Tensor]:
            latents = points.unflatten(1, (len(start), change.size))
            value, _, slopes = guide.match(start + change.decode(latents), level)
            value = value + latents.double().square().sum((1, 2))
            slope = change.pull_back(latents, slopes) + 2 * latents
            return value, slope.flatten(1)

        def inspect(trial: int, state: TrialState) -> str:
            return "all iterations used" if len(state.trace) > per_level else ""

        states = Minimiser(
            energy, point, inspect=inspect, replace=lambda trial, state: None
        ).run()
        point = states[0].point[None]
    latents = point.unflatten(1, (len(start), change.size))
    moved = (start + change.decode(latents))[0]
    return moved.clamp(0, 1).nan_to_num(0.5).float().cpu()


def reverse_step(
    prior: DiffusionPrior, noisy: Tensor, clean: Tensor, level: int, after: int | None
) -> tuple[Tensor, float]:
    """Mean and standard deviation of the next noisy images, given clean ones.

    The law of :math:`x_s` given :math:`x_t` and :math:`x_0`, for any levels s < t.

    Source: Ho et al. (2020), Eq. 6 and 7, for steps of any length.
    """
    if after is None:
        return clean, 0.0
    now, then = float(prior.signal[level]), float(prior.signal[after])
    ratio = max(now, 1e-12) / then
    to_clean = math.sqrt(then) * (1 - ratio) / (1 - now)
    to_noisy = math.sqrt(ratio) * (1 - then) / (1 - now)
    deviation = math.sqrt((1 - then) / (1 - now) * (1 - ratio))
    return to_clean * clean + to_noisy * noisy, deviation


def unit(directions: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Directions of length 1 over ``dims``; zero where there is none, or no number."""
    finite = directions.nan_to_num(0.0, 0.0, 0.0)
    squares = finite.square().sum(dims, keepdim=True)
    return torch.where(
        squares > _SMALLEST, finite * squares.clamp_min(_SMALLEST).rsqrt(), 0
    )


def with_steps(prior: DiffusionPrior, steps: int | None) -> DiffusionPrior:
    """The same prior with another number of decoding steps."""
    return prior if steps is None else replace(prior, steps=steps)


def check_run(steps: int, trials: tuple[str, int], seed: int, polish: int = 0) -> None:
    """Refuse numbers that no attack can run with."""
    check_count("steps", steps)
    check_count(*trials)
    check_seed("seed", seed)
    check_count("polish", polish, minimum=0)


def _best(misfits: Tensor) -> int:
    return int(misfits.nan_to_num(nan=math.inf).argmin())
