r"""From an aggregated update to its images: annealed MAP under a prior.

A batch update holds fewer numbers than its images, and the squared error alone has many
minima. The posterior under a strong prior has few: with a large tempering
:math:`\tau` it is close to the prior, and all starts end at the same point; its maximum
is then followed while :math:`\tau` falls by steps of :math:`\sqrt{10}`, each a descent
by L-BFGS in whitened coordinates. Noise that the protocol states ends the annealing
where it is the larger part of the variance; noise that it does not state shows in a
residual that no longer falls with the level, and is then treated likewise.

Two things make this robust. Where the gradient of the last layer can be taken apart,
the features of every image are further equations, in which images do not mix, and
images that have these features, found first, are a start from which trained networks
are inverted, too. Where it cannot, several starts are taken, and images of one
class, which are what mixes, are exchanged between them wherever that lowers the energy.

Behind networks whose slope jumps (ReLU) the squared error is jagged. There the
likelihood is that of a gradient of unknown length, the cosine, and Adam follows it.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gradinv_helpers.attacks.free_rate import (
    can_free_rate,
    with_fitted_rate,
    with_free_rate,
)
from gradinv_helpers.attacks.gauss_newton import (
    SOLVERS,
    GaussNewton,
    has_sweeps,
    is_sum_of_squares,
)
from gradinv_helpers.attacks.joint_separation import separate_jointly
from gradinv_helpers.attacks.label_search import choose_labels
from gradinv_helpers.attacks.learning_rate import (
    first_learning_rate,
    infer_learning_rate,
    rate_is_missing,
)
from gradinv_helpers.attacks.likelihood import Quantised
from gradinv_helpers.attacks.optimise import Minimiser, TrialState
from gradinv_helpers.attacks.plan import has_kinks
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.rearrangement import as_lists, as_tensors, rearranged
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step, TrialReport
from gradinv_helpers.attacks.replay import Order
from gradinv_helpers.attacks.saved_stages import SavedStages, fingerprint
from gradinv_helpers.attacks.separation import Separation, separate_batch
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.updates import SharedUpdate

# Shares of every layer's norm. The first has one optimum in all cases seen; random
# starts at the second end at different ones; the last is what float32 lets through.
_FIRST, _SCOUTING, _LAST = 1e-2, 1e-3, 1e-5
_FIRST_OF_REPLAY = 1e-1  # without the order of the images, more is off at first
_STEP = 10**0.5
_IN_DOUBLE = 5e-5  # below this level, rounding of float32 is in the way
_NEWTON_PATIENCE = 6  # conjugate gradients that begin anew gain little at first
_NEWTON = 1e-3  # from this level on, the update is nearly linear in the images
_LAST_SHARE = 16  # iterations of the last level to one of those above
_FLAT, _FLAT_AT_LAST, _PATIENCE = 1e-3, 2e-4, 2
_NOISE_SHARE = 0.3  # of the noise, where annealing ends
_STEP_SHARE = 0.03  # of the smallest step of quantised entries, likewise
# Where a level ends with this share of the residual of the level above, or more, the
# rest is noise: without noise it falls to a third.
_STALLED = 0.8
# Down to this level the order of several local steps is sought.
_REARRANGED = 2e-3
# Smaller residuals may be rounding, and larger ones a search that fails.
_ROUNDING, _MOST_NOISE = 1e-4, 0.1
_EXCHANGE_ITERATIONS = 4
_NO_NOISE = 1e-6  # noise that is smaller than this share of an entry is none
_SMALL_START, _WIDE_START = 0.1, 1.0  # standard deviations of the latents
_COSINE_LEVELS = (1e-2, 1e-3)
_FEATURE_LEVELS, _FEATURE_ITERATIONS = (0.3, 0.1, 0.03, 0.01), 3
_ADAM_STEP = 0.3


Energy = Callable[[Tensor], tuple[Tensor, Tensor]]  # (T, size) -> (T,), (T, size)
# Asked with whether there is one trial, its number and its state: why to stop, or "".
Inspect = Callable[[bool, int, TrialState], str]
Solve = Callable[[Inspect], list[TrialState]]


@dataclass(frozen=True)
class Stage:
    """Where the annealing stood at the end of one level.

    Args:
        level: The tempering, as a share of every layer's norm.
        images: Images (N, C, H, W) in [0, 1].
        misfit: Relative distance of their gradient to the update.
        surprise: Mean square of the latents; 1 for a typical draw from the prior.
        iterations: Iterations so far, of 20 updates each.
    """

    level: float
    images: Tensor
    misfit: float
    surprise: float
    iterations: int


@dataclass(frozen=True)
class MapEstimate:
    """The most probable images, and the way there.

    Args:
        reconstruction: As every attack returns it.
        stages: The annealing, level by level.
        separated: Whether the last layer's gradient gave the features of every image.
        noise: Standard deviation of the noise in every entry of the gradient, as
            stated by the protocol or found in a residual that would not fall; 0 for
            none.
        latents: Latents (N, d) of the images.
        label_shares: Class probabilities (N, K) of images that were mixed in pairs;
            ``None`` where every image has one label.
        learning_rate: The client's learning rate, where it had to be inferred.

    Taught in: notebooks/04_aggregated_gradients.
    """

    reconstruction: Reconstruction
    stages: tuple[Stage, ...]
    separated: bool
    noise: float
    latents: Tensor
    label_shares: Tensor | None = None
    learning_rate: float | None = None


def map_estimate(
    update: SharedUpdate,
    *,
    prior: ImagePrior | str = "spectrum",
    labels: Tensor | None = None,
    iterations: int = 300,
    restarts: int = 4,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
    client: int = 0,
    last_level: float = _LAST,
    order: Order | None = None,
    checkpoint: str | Path | None = None,
    solver: str = "auto",
) -> MapEstimate:
    r"""Find the most probable images behind an update of n samples.

    Args:
        update: A gradient, or a weight change after any local training, of one client
            or of several. A learning rate that it leaves open is inferred, and refined
            together with the images at every level.
        prior: What is known of images: ``spectrum``, or any prior for the update's
            image shape.
        labels: True labels (N,), if the attacker is given them; inferred otherwise.
        iterations: Most iterations of the annealing, of 20 updates each.
        restarts: Starts among which images of one class are exchanged; one is enough
            where the last layer's gradient can be taken apart.
        seed: Seed of the starts.
        on_step: Called after every iteration.
        client: Index of the update in the caller's list, for ``on_step``.
        last_level: Share of every layer's norm at which annealing ends; what the
            protocol states as noise ends it earlier.
        order: The images of every local step, as for ``replay_map``, if the attacker
            knows them; labels are then by place. Sought otherwise.
        checkpoint: A ``.safetensors`` file that keeps the annealing. The same call
            goes on from its last level after an interruption, with more iterations
            if wanted; it is removed at the end.
        solver: ``lbfgs``, or ``gauss-newton`` with conjugate gradients from a level of
            1e-3 on, where the energy is a smooth sum of squares; other energies keep
            their own search. ``auto`` takes it where the features of every image are
            known and its products cost no more than an evaluation, for one gradient
            of a plain chain of layers.

    Returns:
        The images with the annealing's stages. After Ctrl-C, the best so far.

    Raises:
        InputError: An argument is out of range, or labels cannot be inferred.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("iterations", iterations)
    check_count("restarts", restarts)
    check_seed("seed", seed)
    check_choice("solver", solver, SOLVERS)
    shape = update.image_shape
    known = load_prior(prior, shape) if isinstance(prior, str) else prior
    if tuple(known.image_shape) != tuple(shape):
        raise InputError("prior", f"images of shape {shape}", known.image_shape)
    rate, unsure = None, False
    if rate_is_missing(update):
        options: dict[str, Any] = {"labels": labels, "order": order, "seed": seed}
        if has_kinks(update.model):  # nothing after this looks at the rate
            rate = infer_learning_rate(update, prior=known, **options)
        else:
            rate, exact = first_learning_rate(update, prior=known, **options)
            unsure = not exact
        update = rate.fill(update)
    features = None
    labels, source = choose_labels(update, known, labels)
    plain = _quiet(update) and update.training.clip_norm is None
    plain &= update.encoding is None
    if update.num_samples > 1 and plain and order is None:
        found = _taken_apart(update, labels, source, seed)
        if found is not None and source.startswith("given"):
            features = found.features[labels.argsort(stable=True).argsort()]
        elif found is not None:
            labels, features = found.labels, found.features
            source = "inferred (last layer taken apart)"
    search = _Annealing(
        Posterior(update, known, labels, features, order or "averaged"),
        iterations,
        1 if features is not None else restarts,
        seed,
        on_step,
        client,
        last_level,
        inferred=not source.startswith("given"),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        solver=solver,
        first_rate=rate.lr if rate is not None and unsure else None,
    )
    estimate = search.run(source)
    if rate is None:
        return estimate
    if search.first_rate is not None:
        where = f"{rate.source.split(',')[0]}, then images"
        rate = replace(rate, lr=search.posterior.training.rate, source=where)
    images = estimate.reconstruction
    return replace(
        estimate,
        reconstruction=replace(images, reason=images.reason + rate.note),
        learning_rate=rate.lr,
    )


def _quiet(update: SharedUpdate) -> bool:
    """Whether the stated noise is no more than rounding."""
    entries = torch.cat([part.flatten().double() for part in update.tensors.values()])
    return update.noise_std <= _NO_NOISE * float(entries.square().mean().sqrt())


def _taken_apart(
    update: SharedUpdate, labels: Tensor, source: str, seed: int
) -> Separation | None:
    """Labels and features of every image, where the last layer's gradient has them."""
    try:
        return separate_jointly(update, labels, seed=seed)
    except InputError:
        if source.startswith("given"):
            return None
    try:  # slower and for fewer images, but it needs no labels
        return separate_batch(update, seed=seed)
    except InputError:
        return None


class _Annealing:
    """One annealing: scouting, exchange, descent."""

    def __init__(
        self,
        posterior: Posterior,
        iterations: int,
        restarts: int,
        seed: int,
        on_step: Callable[[Step], None] | None,
        client: int,
        last_level: float,
        inferred: bool,
        checkpoint: Path | None,
        solver: str = "auto",
        first_rate: float | None = None,
    ):
        self.posterior, self.iterations, self.restarts = posterior, iterations, restarts
        self.seed, self.on_step, self.client = seed, on_step, client
        self.by_cosine = has_kinks(posterior.model)
        self.by_replay, self.inferred = posterior.steps > 0, inferred
        self.first_rate = None
        if not self.by_cosine and can_free_rate(posterior):
            self.first_rate = first_rate
        by_adam = posterior.update.training.optimiser == "adam"
        if self.by_replay and by_adam and self._can_double(posterior.like):
            # Its first step is nearly a sign, with a slope that float32 loses.
            self.posterior = posterior.double()
        several = (
            posterior.several_batches or len(posterior.update.group_sizes or ()) > 1
        )
        self.order_unknown = (
            self.by_replay and posterior.order == "averaged" and several
        )
        self.levels = _levels(posterior, last_level)
        self.by_newton = solver != "lbfgs" and is_sum_of_squares(posterior)
        self.by_newton &= self.first_rate is None
        pinned = posterior.features is not None and has_sweeps(posterior)
        self.by_newton &= solver == "gauss-newton" or pinned
        self.stages: list[Stage] = []
        self.losses: list[float] = []
        self.trials: list[TrialReport] = []
        self.spent, self.evaluations = 0, 0
        self.stopped = ""
        self.best: Tensor | None = None
        self.saved = checkpoint and SavedStages(checkpoint, self._fingerprint())

    def run(self, label_source: str) -> MapEstimate:
        """Anneal, and report."""
        begun = time.perf_counter()
        threads = cpu_threads(self.posterior.work)
        with threads:
            try:
                if self.by_cosine:
                    self._follow_cosine()
                else:
                    self._anneal()
            except KeyboardInterrupt:
                if self.best is None:
                    raise
                self.stopped = "interrupted"
        if self.saved and self.stopped != "interrupted":
            self.saved.remove()
        if self.on_step is not None and self.stopped != "interrupted":
            last = self.losses[-1]
            told = (self.client, 0, self.spent, last, self.iterations, True)
            self.on_step(Step(*told))
        update, posterior = self.posterior.update, self.posterior
        assert self.best is not None
        images = posterior.images(self.best).clamp(0, 1).float().cpu()
        snapshots = [*(stage.images for stage in self.stages), images]
        places = [*(stage.iterations for stage in self.stages), self.spent]
        kept = dict(zip(places, snapshots, strict=True))
        why = "cosine, Adam" if self.by_cosine else "annealed L-BFGS"
        why += " and Gauss-Newton" if self.by_newton else ""
        if update.encoding is not None:
            why += f", likelihood of {update.encoding.kind} messages"
        shares = None
        if posterior.mixed:
            shares = posterior.label_shares(self.best[None])[0].float().cpu()
        found = Reconstruction(
            images=images,
            labels=posterior.labels.cpu() if shares is None else shares.argmax(1),
            losses=tuple(self.losses),
            iterations=tuple(range(len(self.losses))),
            snapshots=torch.stack(list(kept.values())),
            snapshot_iterations=tuple(kept),
            trials=tuple(self.trials),
            stopped=self.stopped,
            seconds=time.perf_counter() - begun,
            attack="gaussian-map",
            reason=f"{_counted(update.num_samples)} under the prior "
            f"{posterior.prior.name!r}, {why}",
            label_source=label_source,
            seed=self.seed,
        )
        separated = posterior.features is not None
        unknowns = self.best.detach().view(posterior.num_samples, -1).cpu()
        return MapEstimate(
            reconstruction=found,
            stages=tuple(self.stages),
            separated=separated,
            noise=posterior.noise,
            latents=unknowns[:, : posterior.prior.size],
            label_shares=shares,
        )

    # --- smooth networks --------------------------------------------------------

    def _anneal(self) -> None:
        point, done = self._starts(1, _SMALL_START), 0
        kept = self._take_up()
        if kept is not None:
            point, done = kept
        elif self.by_replay and self.inferred and self.restarts > 1:
            point, done = self._try_labels(point)
        elif self.posterior.features is not None:
            point = self._fit_features(point)
        if done < len(self.levels):
            self._follow(point, self.levels[done:], keep=True)
        self.stopped = self.stopped or "the last level is flat"

    def _fit_features(self, point: Tensor) -> Tensor:
        """Images with the known inputs of the last layer, whatever their gradient.

        Its iterations are forward passes, which the budget of the annealing leaves out.
        """
        for level in _FEATURE_LEVELS:
            energy = functools.partial(self.posterior.feature_energy, level=level)
            solve = functools.partial(_lbfgs, energy, point)
            point, _ = self._minimise(solve, _FLAT, _FEATURE_ITERATIONS, quiet=True)
        self.spent, self.losses = 0, []
        return point

    def _follow(
        self, point: Tensor, levels: Sequence[float], *, keep: bool = False
    ) -> tuple[Tensor, float]:
        """Descend level by level; return the last point and its energy."""
        scouted = any(stage.level < 1.01 * _SCOUTING for stage in self.stages)
        for level in levels:
            share = self._share(level)
            if level < 1.01 * _SCOUTING and not scouted:
                point, scouted = self._scout(point, level, share), True
            if level < _IN_DOUBLE and self._can_double(point):
                self.posterior = self.posterior.double()
                point = point.double()
            flat = _FLAT_AT_LAST if level == self.levels[-1] else _FLAT
            moved, energies = self._descend(point, level, flat, share)
            if self.order_unknown and level > _REARRANGED:
                before = self.posterior
                self.posterior, point = rearranged(self.posterior, moved)
                if self.posterior is not before:
                    moved, energies = self._descend(point, level, flat, share)
            if self._meets_noise(moved):
                moved, energies = self._descend(point, level, flat, share)
            point = moved
            self._end_stage(point[0], level)
            if keep and self.stopped != "all iterations used":
                self._keep(point, 1 + self.levels.index(level))
            if self._below_noise(level):
                break
        energy = float(energies[0])
        self._report_trial(energy)
        return point, energy

    def _try_labels(self, start: Tensor) -> tuple[Tensor, int]:
        """Follow several sets of labels for some levels, and keep the most probable.

        Labels inferred from several local steps may be off by one, and images can
        hide that: the residual of grey images says which sets are worth a trial.
        """
        levels = [level for level in self.levels if level > _REARRANGED]
        begun, lowest = self.posterior, math.inf
        kept: dict[str, Any] = {}
        for labels in self._label_sets(start)[: self.restarts]:
            self.posterior = begun.rearranged(labels, begun.order)
            self.stages, self.losses, self.spent = [], [], 0
            point, energy = self._follow(start, levels)
            if energy < lowest:
                lowest, best = energy, point
                names = ("posterior", "stages", "losses", "spent")
                kept = {name: getattr(self, name) for name in names}
        for name, value in kept.items():
            setattr(self, name, value)
        return best, len(levels)

    def _label_sets(self, start: Tensor) -> list[Tensor]:
        """The inferred labels, then those with one changed, the likeliest first."""
        labels, order = self.posterior.labels, self.posterior.order
        grey = torch.zeros_like(start)
        seen = {tuple(labels.sort().values.tolist())}
        changed: list[tuple[float, int, Tensor]] = []
        for place, label in itertools.product(
            range(len(labels)), range(self.posterior.num_classes)
        ):
            other = labels.clone()
            other[place] = label
            counted = tuple(other.sort().values.tolist())
            if counted in seen:
                continue
            seen.add(counted)
            trial = self.posterior.rearranged(other, order)
            changed.append((float(trial.misfit(grey)[0]), len(changed), other))
        return [labels, *(other for *_, other in sorted(changed, key=lambda c: c[:2]))]

    def _scout(self, point: Tensor, level: float, share: int) -> Tensor:
        """Take every class from that of several starts in which it lies best."""
        if self.restarts == 1 or self.by_replay or not self._repeated():
            return point
        wide = self._starts(self.restarts - 1, _WIDE_START)
        found, energies = self._descend(torch.cat([point, wide]), level, _FLAT, share)
        return self._exchange(found, energies, level)[None]

    def _meets_noise(self, point: Tensor) -> bool:
        """Take a residual that no longer falls with the level for noise."""
        if self.posterior.noise or not self.stages or self.stopped:
            return False  # known already, or not minimised to the end
        if self.posterior.update.encoding is not None:
            return False  # what is left is the encoding
        before = self.stages[-1].misfit
        misfit = math.sqrt(float(self.posterior.misfit(point)[0]))
        if misfit < _STALLED * before or not _ROUNDING < misfit < _MOST_NOISE:
            return False
        self.posterior.noise = misfit * self.posterior.entry
        return True

    def _below_noise(self, level: float) -> bool:
        """Whether the noise is so much larger that lower levels change nothing."""
        largest = math.sqrt(max(self.posterior.norms))
        return level * largest < 2 * _NOISE_SHARE * self.posterior.noise

    def _can_double(self, like: Tensor) -> bool:
        return like.dtype == torch.float32 and like.device.type != "mps"

    def _share(self, level: float) -> int:
        """Iterations that this level may take of those left."""
        left = max(0, self.iterations - self.spent)
        shares = sum(other <= level for other in self.levels)
        if self._takes_newton(level) and shares > 1:  # long runs gain most
            shares += _LAST_SHARE - 1
        return max(1, left // shares)

    def _takes_newton(self, level: float) -> bool:
        return self.by_newton and level < 1.01 * _NEWTON

    def _repeated(self) -> list[Tensor]:
        """Places of the images of every class that has several."""
        labels = self.posterior.labels
        places = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
        return [place for place in places if len(place) > 1]

    def _exchange(self, points: Tensor, energies: Tensor, level: float) -> Tensor:
        """Take every class from the start in which it lies best."""
        best = int(energies.argmin())
        size = self.posterior.width
        classes = self._repeated()
        others = [k for k in range(len(points)) if k != best]
        candidates = [points[best]]
        for places in classes:
            for other in others:
                mixed = points[best].view(-1, size).clone()
                mixed[places] = points[other].view(-1, size)[places]
                candidates.append(mixed.flatten())
        moved, found = self._descend(
            torch.stack(candidates), level, _FLAT, _EXCHANGE_ITERATIONS
        )
        result = moved[0].view(-1, size).clone()
        for number, places in enumerate(classes):
            first = 1 + number * len(others)
            rivals = found[first : first + len(others)]
            if len(others) and rivals.min() < found[0]:
                chosen = moved[first + int(rivals.argmin())]
                result[places] = chosen.view(-1, size)[places]
        joined = result.flatten()[None]
        together, energy = self._descend(joined, level, _FLAT, _EXCHANGE_ITERATIONS)
        singles = torch.cat([together, moved])
        return singles[int(torch.cat([energy, found]).argmin())]

    def _descend(
        self, points: Tensor, level: float, flat: float, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Minimise the energy of all points (T, size) at one level."""
        if self.first_rate is not None:
            self.posterior = with_free_rate(
                self.posterior, points[:1], level, self.first_rate
            )
        energy = functools.partial(self.posterior.energy, level=level)
        solve = functools.partial(_lbfgs, energy, points)
        if len(points) == 1 and self._takes_newton(level):
            solve = functools.partial(_newton, self.posterior, points[0], level)
            return self._minimise(solve, flat, iterations, patience=_NEWTON_PATIENCE)
        found = self._minimise(solve, flat, iterations)
        if self.first_rate is not None:
            lowest = found[0][found[1].argmin()]
            self.posterior = with_fitted_rate(self.posterior, lowest[None])
        return found

    def _minimise(
        self,
        solve: Solve,
        flat: float,
        iterations: int,
        *,
        patience: int = _PATIENCE,
        quiet: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Where a solver ends, points (T, size), and the energies there."""
        spent = self.spent

        def inspect(single: bool, trial: int, state: TrialState) -> str:
            if trial == 0:
                self.spent = spent + len(state.trace) - 1
            if single:
                self.best = state.point.clone()
                self._tell(state.point, quiet=quiet)
            if len(state.trace) > iterations:
                self.stopped = "all iterations used"
                return "all iterations used"
            if len(state.trace) > patience:
                gained = state.trace[-1 - patience] - state.trace[-1]
                return "flat" if gained < flat * state.trace[-1] else ""
            return ""

        self.stopped = ""
        states = solve(inspect)
        self.evaluations += sum(state.evaluations for state in states)
        found = torch.stack([state.point for state in states]).to(self.posterior.like)
        losses = torch.tensor([state.loss for state in states], dtype=torch.float64)
        losses = losses.nan_to_num(nan=math.inf)
        if not bool(losses.isfinite().any()):
            raise InputError("update", "a finite energy from one start", "none")
        self.best = found[int(losses.argmin())]
        return found, losses

    # --- the file ---------------------------------------------------------------

    def _fingerprint(self) -> str:
        posterior = self.posterior
        facts = [self.seed, self.restarts, self.levels, self.inferred, self.by_newton]
        facts += [posterior.order, posterior.labels.tolist(), posterior.noise]
        facts += [posterior.prior.name, posterior.update.training]
        if self.first_rate is not None:
            facts.append("rate unknown")
        if posterior.update.encoding is not None:
            facts.append(posterior.update.encoding)
        return fingerprint(facts, posterior.targets)

    def _keep(self, point: Tensor, done: int) -> None:
        """Write where the annealing stands, with ``done`` levels behind it."""
        if not self.saved:
            return
        posterior, order = self.posterior, self.posterior.order
        tensors = {"point": point, "labels": posterior.labels}
        for number, stage in enumerate(self.stages):
            tensors[f"stage.{number}"] = stage.images
        numbers = [(s.level, s.misfit, s.surprise, s.iterations) for s in self.stages]
        facts = {
            "done": done,
            "stages": numbers,
            "losses": self.losses,
            "spent": self.spent,
            "evaluations": self.evaluations,
            "noise": posterior.noise,
            "order": as_lists(order),
            "rate": posterior.training.lr,
        }
        self.saved.save(tensors, facts)

    def _take_up(self) -> tuple[Tensor, int] | None:
        """What an earlier call has kept: its point, and the levels behind it."""
        kept = self.saved and self.saved.load()
        if not kept:
            return None
        tensors, facts = kept
        for number, (level, misfit, surprise, iterations) in enumerate(facts["stages"]):
            images = tensors[f"stage.{number}"]
            self.stages.append(Stage(level, images, misfit, surprise, iterations))
        self.losses = facts["losses"]
        self.spent, self.evaluations = facts["spent"], facts["evaluations"]
        order = cast("Order", as_tensors(facts["order"]))
        self.posterior = self.posterior.rearranged(tensors["labels"], order)
        if self.first_rate is not None:
            self.posterior = self.posterior.with_rate(facts["rate"])
        self.posterior.noise = facts["noise"]
        point = tensors["point"].to(self.posterior.like.device)
        self.best = point[0]
        if point.dtype == torch.float64 and self.posterior.like.dtype != point.dtype:
            self.posterior = self.posterior.double()
        return point, facts["done"]

    # --- networks whose slope jumps ----------------------------------------------

    def _follow_cosine(self) -> None:
        """Adam on the cosine, level and step falling together."""
        points = self._starts(1, _SMALL_START)
        if self.posterior.features is not None:
            points = self._follow_features(points)
        points = points.requires_grad_()
        updates = 20 * self.iterations
        optimiser = torch.optim.Adam([points], lr=_ADAM_STEP)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
        first, last = _COSINE_LEVELS
        for number in range(updates):
            share = number / max(1, updates - 1)
            level = first * (last / first) ** share
            energy, slope = self.posterior.cosine_energy(points.detach(), level)
            points.grad = slope * level**2
            optimiser.step()
            schedule.step()
            self.evaluations += 1
            if number % 20 == 19:
                self.spent = number // 20 + 1
                self.best = points.detach()[0].clone()
                self._tell(self.best)
                if self.spent % max(1, self.iterations // 6) == 0:
                    self._end_stage(self.best, level)
        self.best = points.detach()[0].clone()
        self.stopped = "all iterations used"
        self._report_trial(float(energy[0]))

    def _follow_features(self, points: Tensor) -> Tensor:
        """Adam on the features alone, from a grey image to one that has them."""
        points = points.requires_grad_()
        updates = 5 * self.iterations
        optimiser = torch.optim.Adam([points], lr=_ADAM_STEP)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
        first, last = _FEATURE_LEVELS[0], _FEATURE_LEVELS[-1]
        for number in range(updates):
            level = first * (last / first) ** (number / updates)
            _, slope = self.posterior.feature_energy(points.detach(), level)
            points.grad = slope * level**2
            optimiser.step()
            schedule.step()
        return points.detach()

    # --- common -----------------------------------------------------------------

    def _starts(self, count: int, scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + round(1000 * scale))
        noise = torch.randn(count, self.posterior.size, generator=generator)
        return (scale * noise).to(self.posterior.like)

    def _tell(self, point: Tensor, *, quiet: bool = False) -> None:
        loss = float(self.posterior.misfit(point[None])[0])
        self.losses.append(loss)
        if self.on_step is not None and not quiet:
            self.on_step(Step(self.client, 0, self.spent, loss, self.iterations, False))

    def _report_trial(self, energy: float) -> None:
        self.trials.append(
            TrialReport(
                seed=0,
                loss=energy,
                iterations=self.spent,
                evaluations=self.evaluations,
                stopped=self.stopped,
                replaced=False,
            )
        )

    def _end_stage(self, point: Tensor, level: float) -> None:
        images = self.posterior.images(point).clamp(0, 1).float().cpu()
        misfit = math.sqrt(float(self.posterior.misfit(point[None])[0]))
        surprise = float(point.double().square().mean())
        self.stages.append(Stage(level, images, misfit, surprise, self.spent))


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _lbfgs(energy: Energy, points: Tensor, inspect: Inspect) -> list[TrialState]:
    """L-BFGS from points (T, size)."""
    return Minimiser(
        lambda x, trials: energy(x),
        points,
        inspect=functools.partial(inspect, len(points) == 1),
        replace=lambda trial, state: None,
    ).run()


def _newton(
    posterior: Posterior, point: Tensor, level: float, inspect: Inspect
) -> list[TrialState]:
    """Gauss-Newton from a point (size,)."""
    told = functools.partial(inspect, True)
    return [GaussNewton(posterior, point, level, inspect=told).run()]


def _levels(posterior: Posterior, last: float) -> list[float]:
    """Falling levels, down to the last or to where the noise is larger."""
    if posterior.noise:
        largest = math.sqrt(max(posterior.norms))
        last = max(last, min(_FIRST, _NOISE_SHARE * posterior.noise / largest))
    steps = [
        law.step / math.sqrt(norm)
        for law, norm in zip(posterior.likelihoods, posterior.norms, strict=True)
        if isinstance(law, Quantised) and norm
    ]
    if steps:  # what is rounded away does not come back at lower levels
        last = max(last, min(_FIRST, _STEP_SHARE * min(steps)))
    first = _FIRST_OF_REPLAY if posterior.steps else _FIRST
    count = max(0, round(math.log(first / last) / math.log(_STEP)))
    return [first / _STEP**k for k in range(count + 1)]
