r"""Levenberg-Marquardt: images from the linearised matching equations.

Matching is a least-squares problem, :math:`\|g(x) - g\|^2`, whose equations are close
to linear near a solution. Each iteration solves the linearised ones for all pixels at
once, with a damping that keeps the step where they can be trusted. Near a solution
every iteration about doubles the correct digits, where first-order methods gain a
constant factor; the price is a dense matrix of the pixels, so that it is for small
images and few of them.
Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.certificate import Certificate, gradient_residual
from gradinv_helpers.attacks.gradients import Gradients, gradient_map
from gradinv_helpers.attacks.jacobian import jacobian_rank, linearise_gradient
from gradinv_helpers.attacks.matching import squared_error, squared_norm
from gradinv_helpers.attacks.optimise import (
    NO_LOWER_POINT,
    Inspector,
    Objective,
    Replacer,
    TrialState,
)
from gradinv_helpers.errors import (
    InputError,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.priors.smoothness import total_variation
from gradinv_helpers.updates import SharedUpdate

# (points (A, n), which of the T trials they belong to (A,)) -> Hessians (A, n, n)
Curvature = Callable[[Tensor, Tensor], Tensor]

AT_MINIMUM = "the loss is at a minimum"
# The Hessian, its factor and what they are made from take about four matrices of the
# pixels, 2 GiB in double precision at this size; a factorisation takes seconds.
MOST_UNKNOWNS = 8192
_MATRIX_BYTES = 512 * 2**20  # Hessians held at once, where there are several trials
_FIRST_DAMPING = 0.1  # share of the largest curvature, per unit of a loss below 1
_LEAST_DAMPING = 1e-13  # below this, the factorisation fails by rounding
_HEAVY_DAMPING = 1e-3  # share of the largest curvature
_ATTEMPTS = 16
# A step that promises less than this share of the loss is not worth a Hessian.
_WORTHWHILE = 1e-9
# A relative residual below the first is exact up to rounding; one below the second
# is a solution of noisy or rounded equations that no other start will improve.
_MATCHED, _SOLVED = 1e-26, 1e-4
_STANDSTILL, _PATIENCE = 0.01, 5  # share of the loss, iterations
_TV_SMOOTHING = 1e-3


@dataclass
class _State(TrialState):
    """A trial whose updates are iterations, because each one needs a Hessian."""

    @property
    def iterations(self) -> int:
        return self.updates


class LevenbergMarquardt:
    r"""Damped Gauss-Newton steps for many least-squares problems at once.

    A step solves :math:`(H + \mu I)\,h = -\nabla D`. A step that lowers the loss less
    than the quadratic model promised raises the damping :math:`\mu`, a better one
    lowers it; besides, the damping follows the loss itself, so that it vanishes fast
    enough for quadratic convergence where the loss goes to zero. Every trial has its
    own damping and its own reasons to stop.

    Args:
        objective: Losses and gradients of a batch of points; it is told to which
            trials they belong.
        starts: Shape (T, n), one start per trial; taken to double precision, in which
            all calls are made.
        curvature: Hessians of the loss without the second derivatives of the
            residuals: twice J^T J for a sum of squares.
        inspect: Called at the start and after every iteration of a trial with its
            number and state; a non-empty answer stops it.
        replace: Called with a trial that has stopped; another start makes it run
            again, with counters at zero.

    Attributes:
        states: The latest state of every trial, also after an interruption. An
            update is an iteration.

    Raises:
        InputError: More unknowns than ``MOST_UNKNOWNS``.

    Source: Marquardt (1963); Nielsen (1999) for the damping after a step; Yamashita
    and Fukushima (2001) for damping in proportion to the loss.
    Taught in: notebooks/03_stronger_matching.
    """

    def __init__(
        self,
        objective: Objective,
        starts: Tensor,
        *,
        curvature: Curvature,
        inspect: Inspector,
        replace: Replacer,
    ):
        check_unknowns(starts.shape[1])
        self.objective, self.curvature = objective, curvature
        self.inspect, self.replace = inspect, replace
        starts = starts.double()
        self.states: list[TrialState] = [_State(point=s.clone()) for s in starts]
        # Rows of all arrays are the trials still running.
        self.trials = torch.arange(len(starts), device=starts.device)
        self.x = starts.clone()
        self.g = torch.zeros_like(self.x)
        self.f = self.x.new_full((len(starts),), math.nan)
        self.damping = self.x.new_zeros(len(starts))  # 0: no step taken yet
        self.growth = self.x.new_full((len(starts),), 2.0)
        self.fresh = list(range(len(starts)))

    def run(self) -> list[TrialState]:
        """Advance until no trial is running; return the last state of each."""
        while len(self.trials):
            self._advance()
        return self.states

    def _advance(self) -> None:
        """One iteration of every running trial, or the first look at a new one."""
        reasons = self._look_at_new()
        ready = [row for row in range(len(self.trials)) if row not in reasons]
        together = max(1, _MATRIX_BYTES // (8 * self.x.shape[1] ** 2))
        for first in range(0, len(ready), together):
            self._step(ready[first : first + together], reasons)
        self._retire(reasons)

    def _look_at_new(self) -> dict[int, str]:
        reasons: dict[int, str] = {}
        if not self.fresh:
            return reasons
        rows, self.fresh = self.fresh, []
        loss, gradient = self.objective(self.x[rows], self.trials[rows])
        self.f[rows], self.g[rows] = loss, gradient
        sound = torch.isfinite(loss) & torch.isfinite(gradient).all(1)
        for row, good in zip(rows, sound.tolist(), strict=True):
            state = self._state(row)
            state.evaluations = 1
            state.loss = float(self.f[row])
            if not good:
                reasons[row] = "the loss or its gradient is not finite at the start"
        self._report([row for row in rows if row not in reasons], reasons)
        return reasons

    def _step(self, rows: list[int], reasons: dict[int, str]) -> None:
        """Linearise a few trials and damp each of them until it finds a lower point."""
        hessians = self.curvature(self.x[rows], self.trials[rows])
        largest = hessians.diagonal(dim1=1, dim2=2).amax(1)
        new = self.damping[rows] == 0
        begin = _FIRST_DAMPING * self.f[rows].clamp_max(1) * largest
        first = torch.where(new, begin, self.damping[rows])
        self.damping[rows] = torch.maximum(first, _LEAST_DAMPING * largest)
        pending = dict(zip(rows, range(len(rows)), strict=True))  # row -> Hessian
        for attempt in range(_ATTEMPTS):
            asked, places = list(pending), list(pending.values())
            x, f, g = self.x[asked], self.f[asked], self.g[asked]
            chosen = hessians[places]  # a copy
            step = _damped_step(chosen, self.damping[asked], g)
            promised = (step * (self.damping[asked][:, None] * step - g)).sum(1) / 2
            loss, gradient = self.objective(x + step, self.trials[asked])
            gain = (f - loss) / promised
            finite = torch.isfinite(loss) & torch.isfinite(gradient).all(1)
            accepted = finite & (loss < f)
            # Under a heavy damping, little is promised anywhere: go on if it is kept.
            light = self.damping[asked] < _HEAVY_DAMPING * largest[places]
            vain = (promised <= _WORTHWHILE * f) & (light | ~accepted)
            self._adapt(asked, accepted, gain, loss / f)
            for place, row in enumerate(asked):
                self._state(row).evaluations += 1
                if bool(accepted[place]):
                    self.x[row], self.g[row] = x[place] + step[place], gradient[place]
                    self.f[row] = loss[place]
                    self._state(row).updates += 1
                if bool(vain[place]):
                    reasons[row] = NO_LOWER_POINT if attempt else AT_MINIMUM
                if bool(accepted[place] | vain[place]):
                    del pending[row]
            if not pending:
                break
        reasons.update(dict.fromkeys(pending, NO_LOWER_POINT))
        self._report(rows, reasons)

    def _adapt(
        self, rows: list[int], accepted: Tensor, gain: Tensor, fall: Tensor
    ) -> None:
        """Choose the next damping from how well a step kept its promise."""
        trust = (1 - (2 * gain - 1) ** 3).clamp(1 / 3, 2.0) * fall
        raised = self.damping[rows] * self.growth[rows]
        kept = self.damping[rows] * torch.nan_to_num(trust, nan=1.0)
        self.damping[rows] = torch.where(accepted, kept, raised)
        self.growth[rows] = torch.where(accepted, 2.0, 2 * self.growth[rows])

    def _state(self, row: int) -> TrialState:
        return self.states[int(self.trials[row])]

    def _report(self, rows: list[int], reasons: dict[int, str]) -> None:
        # First all states, so that they agree if one inspection ends the run.
        for row in rows:
            state = self._state(row)
            state.loss, state.point = float(self.f[row]), self.x[row].clone()
            state.trace.append(state.loss)
        for row in rows:
            if row not in reasons:
                reason = self.inspect(int(self.trials[row]), self._state(row))
                if reason:
                    reasons[row] = reason

    def _retire(self, reasons: dict[int, str]) -> None:
        """Replace stopped trials by new starts, or drop them from the batch."""
        leaving = []
        for row in sorted(reasons):
            trial = int(self.trials[row])
            state = self.states[trial]
            state.stopped = reasons[row]
            start = self.replace(trial, state)
            if start is None:
                leaving.append(row)
                continue
            self.states[trial] = _State(point=start.double().clone())
            self.x[row], self.damping[row], self.growth[row] = start, 0.0, 2.0
            self.fresh.append(row)
        if leaving:
            kept = [row for row in range(len(self.trials)) if row not in leaving]
            self.fresh = [kept.index(row) for row in self.fresh]
            for name in ("trials", "x", "g", "f", "damping", "growth"):
                setattr(self, name, getattr(self, name)[kept])


def check_unknowns(unknowns: int) -> None:
    """Refuse problems whose dense matrices do not fit.

    Raises:
        InputError: More unknowns than ``MOST_UNKNOWNS``.
    """
    if unknowns > MOST_UNKNOWNS:
        raise InputError(
            "update",
            f"at most {MOST_UNKNOWNS:,} unknown pixels for Levenberg-Marquardt",
            f"{unknowns:,}",
            "its matrices have the square of that; use L-BFGS, attack='dlg'",
        )


def _damped_step(hessians: Tensor, damping: Tensor, gradients: Tensor) -> Tensor:
    """Solve (H + damping) h = -g in place of H; NaN where it has no solution."""
    hessians.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    factor, info = torch.linalg.cholesky_ex(hessians)
    step = -torch.cholesky_solve(gradients[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], step, math.nan)


# --- gradient matching ------------------------------------------------------------


class MatchingSquares:
    r"""The squared matching error of batches with known labels, and its curvature.

    The loss is the one of the search by L-BFGS: the relative squared distance between
    gradients, plus the mean square of how far pixels are outside [0, 1], plus a
    weighted total variation. With Gaussian noise of variance :math:`\sigma^2` on every
    entry of the gradient it is minus the logarithm of a posterior, multiplied by
    :math:`2 \sigma^2 / \|g\|^2`.

    Args:
        model: The model before the update.
        shared: One (T, *parameter shape) per trainable parameter: shared gradients.
        targets: Class probabilities (T, B, K) of every trial's images.
        image_shape: Shape (C, H, W) of one image.
        box_weight: Weight of what is outside [0, 1].
        tv_weight: Weight of the total variation, one number or one per trial (T,).

    Attributes:
        unknowns: Pixels of one trial, n.

    Taught in: notebooks/03_stronger_matching.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: Gradients,
        targets: Tensor,
        image_shape: tuple[int, int, int],
        *,
        box_weight: float = 1.0,
        tv_weight: float | Tensor = 0.0,
    ):
        self.model = copy.deepcopy(model).double()
        self.shared = [gradient.double() for gradient in shared]
        self.targets = targets.double()
        self.batch_shape = (targets.shape[1], *image_shape)  # (B, C, H, W)
        self.unknowns = math.prod(self.batch_shape)
        self.box_weight = box_weight / self.unknowns
        weights = torch.as_tensor(tv_weight, dtype=torch.float64)
        self.tv_weight = weights.to(targets.device).expand(len(targets))
        self.map = gradient_map(self.model)

    def images(self, points: Tensor) -> Tensor:
        """Points (..., n) as batches of images (..., B, C, H, W), not clamped."""
        return points.unflatten(-1, self.batch_shape)

    def evaluate(self, points: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (A,) and gradients (A, n) of points (A, n) of some trials (A,)."""
        images, weights = self.images(points), self.tv_weight[trials]
        gradients, pullback = self.map(images, self.targets[trials])
        loss, derivatives = squared_error(gradients, [g[trials] for g in self.shared])
        slope = pullback(derivatives)[0].flatten(1)
        outside = points - points.clamp(0, 1)
        loss = loss + self.box_weight * outside.square().sum(1)
        slope = slope + 2 * self.box_weight * outside
        if bool(weights.any()):
            with torch.enable_grad():
                free = images.detach().requires_grad_()
                roughness = total_variation(free, smoothing=_TV_SMOOTHING)
                (steepness,) = torch.autograd.grad(roughness.sum(), free)
            loss = loss + weights * roughness.detach()
            slope = slope + weights[:, None] * steepness.flatten(1)
        return loss, slope

    def curvature(self, points: Tensor, trials: Tensor) -> Tensor:
        """Gauss-Newton Hessians (A, n, n) of points (A, n) of some trials (A,).

        The total variation counts by the parabola that touches it at the point and
        is nowhere below it.
        """
        found = points.new_empty(*points.shape, self.unknowns)
        for row, (point, trial) in enumerate(zip(points, trials.tolist(), strict=True)):
            images, targets = self.images(point), self.targets[trial]
            normal = linearise_gradient(self.model, images, targets).normal()
            scale = sum(float(g[trial].square().sum()) for g in self.shared)
            torch.mul(normal, 2 / scale, out=found[row])
            outside = ((point < 0) | (point > 1)).to(point)
            found[row].diagonal().add_(2 * self.box_weight * outside)
            weight = float(self.tv_weight[trial])
            if weight:
                _add_tv_curvature(found[row], images, weight)
        return found


def _add_tv_curvature(hessian: Tensor, images: Tensor, weight: float) -> None:
    """Add the curvature of parabolas above the total variation of (B, C, H, W)."""
    places = torch.arange(images.numel(), device=images.device).view_as(images)
    for dim in (-2, -1):
        count = images.shape[dim] - 1
        one = places.narrow(dim, 0, count).flatten()
        other = places.narrow(dim, 1, count).flatten()
        differences = images.diff(dim=dim).flatten()
        bend = weight / len(one) / torch.sqrt(differences**2 + _TV_SMOOTHING**2)
        for i, j, sign in ((one, one, 1), (other, other, 1), (one, other, -1)):
            hessian.index_put_((i, j), sign * bend, accumulate=True)
        hessian.index_put_((other, one), -bend, accumulate=True)


# --- the attack -------------------------------------------------------------------


def solve_dense(
    update: SharedUpdate,
    labels: Tensor,
    *,
    start: Tensor | None = None,
    tv_weight: float = 0.0,
    iterations: int = 40,
    restarts: int = 3,
    init_scale: float = 0.05,
    seed: int = 0,
) -> tuple[Tensor, Certificate, tuple[float, ...]]:
    """Solve the matching equations for all images of an update at once.

    Starts follow one another until one of them matches the update. The answer is *an*
    exact solution of the equations then; whether it is the only one near it is what
    the rank in the certificate says. Where the update is noisy, the answer is the
    maximum of the likelihood, or of the posterior if smoothness has a weight: with
    noise of standard deviation s on every entry and n pixels, the weight
    2 s^2 n / (0.1 |g|^2) expects neighbouring pixels to differ by 0.1.

    Args:
        update: A gradient, or the weight change of one SGD step.
        labels: Class indices (N,), true or inferred.
        start: Images (N, C, H, W) to begin with, instead of grey ones plus noise; no
            other start is tried then.
        tv_weight: Weight of the total variation, for noisy updates.
        iterations: Most iterations from each start.
        restarts: Most starts.
        init_scale: Standard deviation of the noise around grey.
        seed: Seed of the starts; the same call gives the same result.

    Returns:
        The images (N, C, H, W) of the lowest loss, in double precision and not
        clamped; their certificate; the loss at their start and after every iteration.

    Raises:
        InputError: Too many pixels or parameters for dense matrices, labels that do
            not fit, an update that is zero, normalised or of several steps, or no
            start with a finite loss.

    Source: Marquardt (1963). Taught in: notebooks/03_stronger_matching.
    """
    check_number("tv_weight", tv_weight)
    check_number("init_scale", init_scale)
    check_count("iterations", iterations)
    check_count("restarts", restarts)
    check_seed("seed", seed)
    if update.normalized:
        raise InputError("update", "a gradient of known length", "a normalised one")
    shape = (update.num_samples, *update.image_shape)
    check_unknowns(math.prod(shape))
    if start is not None and tuple(start.shape) != shape:
        raise InputError("start", f"shape {shape}", tuple(start.shape))
    shared = [gradient[None] for gradient in update.gradient().values()]
    if not bool(squared_norm(shared).all()):
        raise InputError("update", "a non-zero update", "all zeros")
    targets = _one_hot(update, labels).to(shared[0].device)
    squares = MatchingSquares(
        update.model, shared, targets[None], update.image_shape, tv_weight=tv_weight
    )
    generator = torch.Generator().manual_seed(seed)

    def grey() -> Tensor:
        noise = torch.randn(squares.unknowns, generator=generator, dtype=torch.float64)
        return (0.5 + init_scale * noise).to(squares.targets)

    runs: list[TrialState] = []

    def inspect(trial: int, state: TrialState) -> str:
        if state.loss <= _MATCHED:
            return "matched"
        before = state.trace[-1 - _PATIENCE :][0]
        if len(state.trace) > _PATIENCE and state.loss > (1 - _STANDSTILL) * before:
            return "standstill"
        return "all iterations used" if state.iterations >= iterations else ""

    def replace(trial: int, state: TrialState) -> Tensor | None:
        runs.append(state)
        solved = state.loss <= _SOLVED or start is not None
        return None if solved or len(runs) == restarts else grey()

    first = grey() if start is None else start.to(squares.targets).flatten()
    LevenbergMarquardt(
        squares.evaluate,
        first[None],
        curvature=squares.curvature,
        inspect=inspect,
        replace=replace,
    ).run()
    finite = [run for run in runs if run.trace]
    if not finite:
        expected = "a finite matching loss from at least one start"
        raise InputError("update", expected, f"none in {len(runs)} starts")
    best = min(finite, key=lambda run: run.loss)
    images = squares.images(best.point)
    rank = jacobian_rank(squares.model, images, squares.targets[0])
    certificate = Certificate(
        method="levenberg-marquardt",
        residual=gradient_residual(update, images, labels),
        unknowns=rank.unknowns,
        rank=rank.rank,
        condition=rank.condition,
    )
    return images, certificate, tuple(best.trace)


def _one_hot(update: SharedUpdate, labels: Tensor) -> Tensor:
    """Labels (N,) as class probabilities (N, K) of the update's model."""
    if labels.shape != (update.num_samples,) or labels.is_floating_point():
        expected = f"{update.num_samples} class indices, one per sample"
        raise InputError("labels", expected, f"{tuple(labels.shape)} {labels.dtype}")
    like = next(iter(update.tensors.values()))
    with torch.no_grad():
        model = copy.deepcopy(update.model).eval()
        classes = model(like.new_zeros(1, *update.image_shape)).shape[1]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise InputError("labels", f"indices from 0 to {classes - 1}", labels.tolist())
    return F.one_hot(labels.long(), classes).double()
