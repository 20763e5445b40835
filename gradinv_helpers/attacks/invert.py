"""From shared updates to images: the attack as one call.

Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.adam import SignedAdam
from gradinv_helpers.attacks.exact import Certificate, invert_layer_by_layer
from gradinv_helpers.attacks.gradients import GradientMap, Gradients, gradient_map
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.matching import (
    cosine_distance,
    normalized_groups,
    squared_error,
    squared_norm,
)
from gradinv_helpers.attacks.optimise import (
    NO_LOWER_POINT,
    Minimiser,
    TrialState,
)
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.federated.aggregation import check_same_round
from gradinv_helpers.priors.smoothness import total_variation
from gradinv_helpers.updates import SharedUpdate

ATTACKS: tuple[str, ...] = (
    "auto",
    "dlg",
    "idlg",
    "inverting-gradients",
    "exact",
)

# A relative residual below this is a match. Single images of LeNet are then beyond
# 45 dB, and the rounding of float32 stops most searches before 1e-10.
_MATCHED = 1e-9
# A trial that gains less than this share of its loss in _PATIENCE iterations stands.
_STANDSTILL = 0.02
_PATIENCE = 10
# Standing above this residual counts as stuck: the trial is replaced.
_STUCK = 1e-2
# Restarts in one batch: more of them gain nothing, or do not fit.
_TRIALS_CPU, _TRIALS_GPU = 24, 1024
_BOX_WEIGHT = 1.0
_TV_SMOOTHING = 1e-3


@dataclass(frozen=True)
class TrialReport:
    """How one restart of the attack ended.

    Args:
        seed: Number of the random start: the same number gives the same start.
        loss: Matching loss of its best point.
        iterations: Outer steps taken, of up to 20 L-BFGS updates each.
        evaluations: Evaluations of the matching loss.
        stopped: Why it stopped.
        replaced: Whether a new random start took its place.
    """

    seed: int
    loss: float
    iterations: int
    evaluations: int
    stopped: str
    replaced: bool


@dataclass(frozen=True)
class Reconstruction:
    """What the attacker makes of one update; it holds no ground truth.

    Args:
        images: Shape (N, C, H, W) in [0, 1], float32, on the CPU.
        labels: Shape (N,).
        losses: Loss of the chosen restart after each of ``iterations``: the matching
            loss, plus the weighted total variation and the cost of values outside
            [0, 1].
        iterations: Outer steps at which ``losses`` were taken.
        snapshots: Images (S, N, C, H, W) of the chosen restart on the way.
        snapshot_iterations: Outer steps at which ``snapshots`` were taken.
        trials: One report per restart, replaced ones included.
        stopped: Why the chosen restart stopped.
        seconds: Wall time of the whole attack; clients inverted together share it.
        attack: Name of the attack that ran.
        reason: Why this attack was picked.
        label_source: Where the labels come from.
        seed: Seed of the attack.
        certificate: What an exact attack can prove of its answer; ``None`` for
            attacks that search.
    """

    images: Tensor
    labels: Tensor
    losses: tuple[float, ...]
    iterations: tuple[int, ...]
    snapshots: Tensor
    snapshot_iterations: tuple[int, ...]
    trials: tuple[TrialReport, ...]
    stopped: str
    seconds: float
    attack: str
    reason: str
    label_source: str
    seed: int
    certificate: Certificate | None = None

    @property
    def loss(self) -> float:
        """Loss of the result; without total variation, its matching loss."""
        return self.losses[-1]


@dataclass(frozen=True)
class Step:
    """What a running attack tells its caller after an iteration of one restart.

    Args:
        client: Index of the update in the list under attack.
        restart: Index of the restart.
        iteration: Outer steps taken by this restart.
        loss: Its matching loss.
        iterations: Most steps it may take.
        finished: Whether this client needs no more work.
    """

    client: int
    restart: int
    iteration: int
    loss: float
    iterations: int
    finished: bool


def invert(
    update: SharedUpdate,
    *,
    attack: str = "auto",
    iterations: int | None = None,
    restarts: int | None = None,
    labels: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    init_scale: float = 0.05,
    tv_weight: float = 0.0,
    log_every: int = 5,
    on_step: Callable[[Step], None] | None = None,
) -> Reconstruction:
    """Reconstruct the images and labels behind an update.

    An update of n samples is inverted with n unknown images. The attack minimises
    the relative squared distance between the dummy gradient and the shared one by
    L-BFGS with strong-Wolfe line searches, from grey images plus a little noise;
    values outside [0, 1] cost a quadratic penalty. Restarts run as one batch; the
    one with the lowest matching loss is kept, and a restart that diverges or stands
    still far from a match is replaced by a new start and reported.

    Args:
        update: What the server saw. A weight change must come from one SGD step.
        attack: ``dlg`` fits images and labels together; ``idlg`` first reads the
            label off the gradient (one sample only); ``inverting-gradients`` minimises
            the cosine distance by signed Adam, which suits ReLU networks; ``exact``
            solves the layers one
            after the other by linear algebra (one sample, chains of layers) and needs
            no iterations; ``auto`` takes ``idlg`` where it is exact and ``dlg``
            otherwise.
        iterations: Outer steps per restart, of up to 20 L-BFGS updates each, as in
            the published recipe; 200 by default. The attack stops early when done.
        restarts: Independent random starts; 3 by default.
        labels: True labels (N,), if the attacker is given them. Results are then an
            upper bound and say so.
        seed: Seed of the random starts; the same call gives the same result.
        init_scale: Standard deviation of the noise around grey (0.5) at the start.
        tv_weight: Weight of the total variation of the images in the loss. The recipe
            of ``inverting-gradients`` needs some: 1e-2 is a good start.
        log_every: A snapshot is kept every so many iterations.
        on_step: Called after every iteration of every restart.

    Returns:
        Images, labels, and how the attack went. After Ctrl-C the best so far is
        returned, with ``stopped`` saying "interrupted".

    Raises:
        InputError: An argument is out of range, the attack does not fit the update,
            or no restart gave a finite loss.

    Source: Zhu et al. (2019), Algorithm 1; Zhao et al. (2020) for the label.
    Taught in: notebooks/02_dlg_four_steps.
    """
    return invert_clients(
        [update],
        attack=attack,
        iterations=iterations,
        restarts=restarts,
        labels=None if labels is None else [labels],
        seed=seed,
        init_scale=init_scale,
        tv_weight=tv_weight,
        log_every=log_every,
        on_step=on_step,
    )[0]


def invert_clients(
    updates: Sequence[SharedUpdate],
    *,
    attack: str = "auto",
    iterations: int | None = None,
    restarts: int | None = None,
    labels: Sequence[Tensor | Sequence[int]] | None = None,
    seed: int = 0,
    init_scale: float = 0.05,
    tv_weight: float = 0.0,
    log_every: int = 5,
    on_step: Callable[[Step], None] | None = None,
) -> list[Reconstruction]:
    """Invert updates of several clients of one round, in one batch.

    Every client is attacked on its own, as by ``invert``; only the arithmetic is
    shared. Clients must have the same number of samples. Client k starts from the
    seed ``seed + k``. Very many clients are taken in groups, because a batch gains
    nothing beyond a few dozen restarts on a CPU.

    Args:
        updates: Updates of the same model with the same recipe.
        attack: As for ``invert``, and so are the other arguments but ``labels``.
        iterations: Outer steps per restart.
        restarts: Independent random starts per client.
        labels: One entry per client, if the attacker is given them.
        seed: Seed of the first client's starts.
        init_scale: Standard deviation of the noise around grey at the start.
        tv_weight: Weight of the total variation.
        log_every: Iterations between two snapshots.
        on_step: Called after every iteration of every restart.

    Returns:
        One reconstruction per update, in order. After Ctrl-C, clients whose group had
        not begun are missing at the end.

    Raises:
        InputError: As for ``invert``, or the updates do not belong together.

    Taught in: notebooks/02_dlg_four_steps.
    """
    check_choice("attack", attack, ATTACKS)
    iterations = check_count("iterations", 200 if iterations is None else iterations)
    restarts = check_count("restarts", 3 if restarts is None else restarts)
    check_seed("seed", seed)
    check_count("log_every", log_every)
    check_number("init_scale", init_scale)
    check_number("tv_weight", tv_weight)
    check_same_round(updates)
    sizes = [u.group_sizes for u in updates]
    if len(set(sizes)) > 1:
        raise InputError("updates", "equal numbers of samples", f"{sizes}")
    if attack == "exact":
        if labels is not None:
            raise InputError("labels", "nothing for attack 'exact'", "labels")
        return [_exact(update, seed + k) for k, update in enumerate(updates)]
    plan = _plan(updates, attack, labels)
    on_cpu = next(iter(updates[0].tensors.values())).device.type == "cpu"
    width = max(1, (_TRIALS_CPU if on_cpu else _TRIALS_GPU) // restarts)
    found: list[Reconstruction] = []
    for first in range(0, len(updates), width):
        chosen = slice(first, first + width)
        known = plan.labels and plan.labels[chosen]
        search = _Search(
            _Problem(updates[chosen], replace(plan, labels=known), tv_weight=tv_weight),
            first_client=first,
            iterations=iterations,
            restarts=restarts,
            seed=seed,
            init_scale=init_scale,
            log_every=log_every,
            on_step=on_step,
        )
        found += search.run()
        if search.interrupted:
            break
    if not found:  # interrupted before there was anything to return
        raise KeyboardInterrupt
    return found


def _exact(update: SharedUpdate, seed: int) -> Reconstruction:
    begun = time.perf_counter()
    with cpu_threads(0):
        image, label, certificate = invert_layer_by_layer(update)
    images = image.clamp(0, 1).float().cpu()
    return Reconstruction(
        images=images,
        labels=label,
        losses=(certificate.residual,),
        iterations=(0,),
        snapshots=images[None],
        snapshot_iterations=(0,),
        trials=(),
        stopped=str(certificate),
        seconds=time.perf_counter() - begun,
        attack="exact",
        reason="one sample behind a chain of layers: each layer is solved in turn",
        label_source="inferred (last bias)",
        seed=seed,
        certificate=certificate,
    )


# --- what is known before the search --------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """The attack that was picked, why, and the labels if they are not unknowns."""

    attack: str
    reason: str
    label_source: str
    labels: list[Tensor] | None


def _plan(
    updates: Sequence[SharedUpdate],
    attack: str,
    given: Sequence[Tensor | Sequence[int]] | None,
) -> _Plan:
    one = updates[0].num_samples == 1
    searched = "dlg" if attack in ("auto", "idlg") else attack
    if given is not None:
        if len(given) != len(updates):
            raise InputError(
                "labels", f"one entry for each of {len(updates)} updates", len(given)
            )
        known = [
            _checked_labels(entry, update)
            for entry, update in zip(given, updates, strict=True)
        ]
        name = "dlg" if attack == "auto" else attack
        return _Plan(name, "labels were given", "given (upper bound)", known)
    if attack == "idlg" or (attack != "dlg" and one):
        try:
            found = [infer_labels(update) for update in updates]
        except InputError as error:
            if attack == "idlg":
                raise
            reason = f"the label cannot be read off: {error}"
            return _Plan(searched, reason, "fitted with the images", None)
        reason = "one sample: its label stands in the last layer's gradient"
        name = "idlg" if attack == "auto" else attack
        return _Plan(name, reason, "inferred (iDLG)", found)
    reason = "asked for" if attack == "dlg" else "several samples: labels are unknown"
    return _Plan(searched, reason, "fitted with the images", None)


def _checked_labels(given: Tensor | Sequence[int], update: SharedUpdate) -> Tensor:
    labels = torch.as_tensor(given).reshape(-1)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError("labels", "integers", str(labels.dtype))
    labels = labels.long().cpu()
    if len(labels) != update.num_samples:
        raise InputError(
            "labels", f"{update.num_samples} labels, one per sample", len(labels)
        )
    if int(labels.min()) < 0:
        raise InputError("labels", "class indices of at least 0", int(labels.min()))
    return labels


# --- the search ------------------------------------------------------------------


class _Problem:
    """The matching loss of all trials as one function of flat vectors.

    A trial's vector holds its images, then the logits of its labels where those are
    unknown.
    """

    def __init__(
        self, updates: Sequence[SharedUpdate], plan: _Plan, *, tv_weight: float
    ):
        first = updates[0]
        self.updates, self.plan, self.tv_weight = updates, plan, tv_weight
        self.first_order = plan.attack == "inverting-gradients"
        self.distance = cosine_distance if self.first_order else squared_error
        self.num_samples, self.shape = first.num_samples, first.image_shape
        # Normalised tensors cannot be turned into gradients, but a positive factor
        # does not matter once the dummy update is normalised as well.
        stated = [
            dict(u.tensors) if u.normalized and u.kind == "gradient" else u.gradient()
            for u in updates
        ]
        self.targets: Gradients = [
            torch.stack([gradient[name] for gradient in stated]) for name in stated[0]
        ]
        if not bool(squared_norm(self.targets).all()):
            raise InputError("update", "a non-zero update", "all zeros")
        # A copy, because some models keep what passes through them.
        self.model = copy.deepcopy(first.model)
        self.num_classes = self._count_classes()
        self._prepare()
        if plan.labels is not None:
            highest = max(int(labels.max()) for labels in plan.labels)
            if highest >= self.num_classes:
                raise InputError(
                    "labels",
                    f"labels below the model's {self.num_classes} classes",
                    highest,
                )

    def _prepare(self) -> None:
        self.like = self.targets[0]
        first = self.updates[0]
        self.map: GradientMap = gradient_map(self.model)
        if first.normalized:
            self.map = normalized_groups(self.map, first.group_sizes or ())

    def double(self) -> _Problem:
        """The same problem in double precision."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.updates[0].model).double()
        other.targets = [target.double() for target in self.targets]
        other._prepare()
        return other

    def _count_classes(self) -> int:
        grey = self.targets[0].new_full((2, *self.shape), 0.5)
        try:
            with torch.no_grad():
                logits = self._probe()(grey)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "image_shape",
                "a shape that the model takes",
                f"{self.shape}: {str(error).splitlines()[0]}",
            ) from error
        if logits.dim() != 2:
            raise InputError(
                "model", "logits of shape (N, classes)", tuple(logits.shape)
            )
        return logits.shape[1]

    def _probe(self) -> torch.nn.Module:
        """A copy of the model in evaluation mode, which may be run at will."""
        return copy.deepcopy(self.updates[0].model).eval()

    @property
    def num_pixels(self) -> int:
        return self.num_samples * math.prod(self.shape)

    @property
    def work(self) -> int:
        """Multiplications of one forward pass of one trial, at least roughly."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self._probe()(self.like.new_zeros(1, *self.shape))
        return counter.get_total_flops() // 2 * self.num_samples

    def start(self, generator: torch.Generator, init_scale: float) -> Tensor:
        """Grey images plus noise; label logits start at random, as in DLG."""
        noise = torch.randn(self.num_pixels, generator=generator)
        parts = [0.5 + init_scale * noise]
        if self.plan.labels is None:
            size = self.num_samples * self.num_classes
            parts.append(torch.randn(size, generator=generator))
        return torch.cat(parts).to(self.like)

    def images(self, points: Tensor) -> Tensor:
        """The images of points (..., n): (..., B, C, H, W), not yet clamped."""
        return points[..., : self.num_pixels].unflatten(
            -1, (self.num_samples, *self.shape)
        )

    def labels(self, point: Tensor, client: int) -> Tensor:
        """The labels that a point (n,) stands for: (B,)."""
        if self.plan.labels is not None:
            return self.plan.labels[client]
        return self._logits(point[None])[0].argmax(-1).cpu()

    def evaluate(self, points: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (A,) and gradient (A, n) of points (A, n)."""
        images = self.images(points)
        if self.plan.labels is None:
            targets = torch.softmax(self._logits(points), -1)
        else:
            chosen = torch.stack(self.plan.labels).to(clients.device)[clients]
            targets = F.one_hot(chosen, self.num_classes).to(points)
        gradients, pullback = self.map(images, targets)
        loss, derivatives = self.distance(gradients, [t[clients] for t in self.targets])
        to_images, to_targets = pullback(derivatives)

        penalty, slope = self._penalty(images)
        loss, to_images = loss + penalty, to_images + slope
        parts = [to_images.flatten(1)]
        if self.plan.labels is None:  # through the softmax
            mean = (targets * to_targets).sum(-1, keepdim=True)
            parts.append((targets * (to_targets - mean)).flatten(1))
        return loss, torch.cat(parts, 1)

    def project(self, points: Tensor) -> Tensor:
        """The nearest points whose images lie in [0, 1]."""
        images = points[..., : self.num_pixels].clamp(0, 1)
        return torch.cat([images, points[..., self.num_pixels :]], -1)

    def misfit(self, state: TrialState) -> float:
        """The matching loss alone, without what the penalties add to the loss."""
        penalty, _ = self._penalty(self.images(state.point)[None])
        return state.loss - float(penalty)

    def _penalty(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cost (A,) of values outside [0, 1] and of total variation, and its slope."""
        outside = images - images.clamp(0, 1)
        cost = _BOX_WEIGHT * outside.square().flatten(1).mean(1)
        slope = 2 * _BOX_WEIGHT / self.num_pixels * outside
        if self.tv_weight:
            with torch.enable_grad():
                free = images.detach().requires_grad_()
                roughness = total_variation(free, smoothing=_TV_SMOOTHING)
                (steepness,) = torch.autograd.grad(roughness.sum(), free)
            cost = cost + self.tv_weight * roughness.detach()
            slope = slope + self.tv_weight * steepness
        return cost, slope

    def _logits(self, points: Tensor) -> Tensor:
        return points[..., self.num_pixels :].unflatten(
            -1, (self.num_samples, self.num_classes)
        )


@dataclass(frozen=True)
class _Run:
    """A finished start: what a reconstruction shows of it."""

    point: Tensor
    report: TrialReport
    losses: tuple[float, ...]
    snapshots: dict[int, Tensor]


@dataclass
class _Slot:
    """One restart of one client: its current start and the runs behind it."""

    client: int
    restart: int
    seed: int = -1
    spent: int = 0  # iterations of runs that were replaced
    runs: list[_Run] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    earlier: _Run | None = None  # the part of the current run in single precision

    @property
    def begun(self) -> int:
        """Iterations that the current run had behind it when it was taken up again."""
        return self.earlier.report.iterations if self.earlier else 0


class _Search:
    """Restarts of all clients: starting, watching, replacing, choosing."""

    def __init__(
        self,
        problem: _Problem,
        *,
        first_client: int,
        iterations: int,
        restarts: int,
        seed: int,
        init_scale: float,
        log_every: int,
        on_step: Callable[[Step], None] | None,
    ):
        self.problem, self.iterations = problem, iterations
        self.first_client, self.seed = first_client, seed + first_client
        self.interrupted = False
        self.init_scale = init_scale
        self.log_every, self.on_step = log_every, on_step
        clients = range(len(problem.updates))
        self.slots = [_Slot(c, r) for c in clients for r in range(restarts)]
        self.all_slots = self.slots
        self.starts_drawn = [0 for _ in clients]
        self.solved = [False for _ in clients]
        # Noise of a known size leaves a residual of its own: no need to go below it.
        entries = sum(t[0].numel() for t in problem.targets)
        first = problem.updates[0]
        units = first.training.lr if first.kind == "delta" else 1.0  # of the gradient
        noise = [entries * (u.noise_std / units) ** 2 for u in problem.updates]
        scales = squared_norm(problem.targets).tolist()
        self.tolerance = [
            max(_MATCHED, n / s) for n, s in zip(noise, scales, strict=True)
        ]

    def run(self) -> list[Reconstruction]:
        begun = time.perf_counter()
        with cpu_threads(self.problem.work * len(self.slots)):
            starts = [self._new_start(slot) for slot in self.slots]
            finished = self._minimise(starts)
            blurred = [slot for slot in self.slots if self._needs_precision(slot)]
            if finished and blurred:
                self.problem, self.slots = self.problem.double(), blurred
                self._minimise([self._take_up(slot) for slot in blurred])
        seconds = time.perf_counter() - begun
        found = []
        for client in range(len(self.problem.updates)):
            if self.interrupted and not self._finite_runs(client):
                break
            found.append(self._reconstruction(client, seconds))
        return found

    def _minimise(self, starts: list[Tensor]) -> bool:
        """Run the current slots from ``starts``; say whether it was left to finish."""
        clients = [slot.client for slot in self.slots]
        self.clients = torch.tensor(clients, device=self.problem.like.device)
        minimiser: Minimiser | SignedAdam
        if self.problem.first_order:
            minimiser = SignedAdam(
                self._evaluate,
                torch.stack(starts),
                iterations=self.iterations,
                project=self.problem.project,
                inspect=self._inspect,
                replace=self._replace,
            )
        else:
            minimiser = Minimiser(
                self._evaluate,
                torch.stack(starts),
                inspect=self._inspect,
                replace=self._replace,
            )
        try:
            minimiser.run()
        except KeyboardInterrupt:
            for slot, state in zip(self.slots, minimiser.states, strict=True):
                if not state.stopped:
                    state.stopped = "interrupted"
                    self._record(slot, state, replaced=False)
            self.interrupted = True
            return False
        return True

    def _needs_precision(self, slot: _Slot) -> bool:
        """Whether rounding ended a run that was on its way to a match."""
        last = slot.runs[-1].report
        single = self.problem.like.dtype == torch.float32
        can = self.problem.like.device.type != "mps"  # it has no double precision
        left = self.iterations - slot.spent - last.iterations
        rounded = last.stopped == NO_LOWER_POINT and last.loss <= _STUCK
        return single and can and rounded and left > 0 and not self.solved[slot.client]

    def _take_up(self, slot: _Slot) -> Tensor:
        """Go on with the last run of a slot, in the precision of the problem."""
        slot.earlier = slot.runs.pop()
        return slot.earlier.point.to(self.problem.like)

    def _new_start(self, slot: _Slot) -> Tensor:
        """The next random start of this client; start s is the same in every call."""
        number = self.starts_drawn[slot.client]
        self.starts_drawn[slot.client] += 1
        slot.seed, slot.snapshots, slot.earlier = number, {}, None
        generator = torch.Generator().manual_seed(
            1_000_003 * number + self.seed + slot.client
        )
        return self.problem.start(generator, self.init_scale)

    def _evaluate(self, points: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        return self.problem.evaluate(points, self.clients[trials])

    def _inspect(self, trial: int, state: TrialState) -> str:
        """A reason to stop a restart after an iteration, or nothing."""
        slot = self.slots[trial]
        iteration = slot.begun + len(state.trace) - 1
        if iteration % self.log_every == 0:
            images = self.problem.images(state.point).clamp(0, 1)
            slot.snapshots[iteration] = images.float().cpu().clone()
        spent = slot.spent + iteration
        reason = self._reason(slot, state, spent)
        if self.on_step is not None:
            self.on_step(
                Step(
                    client=self.first_client + slot.client,
                    restart=slot.restart,
                    iteration=spent,
                    loss=state.loss,
                    iterations=self.iterations,
                    finished=self.solved[slot.client],
                )
            )
        return reason

    def _reason(self, slot: _Slot, state: TrialState, spent: int) -> str:
        if self.solved[slot.client]:
            return "another restart has matched the update"
        misfit = self.problem.misfit(state)
        if misfit <= self.tolerance[slot.client]:
            self.solved[slot.client] = True
            noisy = self.tolerance[slot.client] > _MATCHED
            return "matched down to the noise" if noisy else "matched"
        if spent >= self.iterations:
            return "all iterations used"
        trace = state.trace
        if len(trace) > _PATIENCE and not self.problem.first_order:
            if trace[-1] > (1 - _STANDSTILL) * trace[-1 - _PATIENCE]:
                return "stuck" if misfit > _STUCK else "standstill"
        return ""

    def _replace(self, trial: int, state: TrialState) -> Tensor | None:
        """Record a restart that stopped; give a new start if it failed."""
        slot = self.slots[trial]
        matches = self.problem.misfit(state) <= _STUCK
        failed = not matches and state.stopped != "all iterations used"
        used = slot.begun + state.iterations
        left = self.iterations - slot.spent - used
        again = failed and left > 0 and not self.solved[slot.client]
        self._record(slot, state, replaced=again)
        if not again:
            return None
        slot.spent += max(1, used)  # a start that fails at once costs one
        return self._new_start(slot)

    def _record(self, slot: _Slot, state: TrialState, *, replaced: bool) -> None:
        if slot.earlier is not None and not math.isfinite(state.loss):
            report = replace(slot.earlier.report, stopped=state.stopped)
            slot.runs.append(replace(slot.earlier, report=report))
            return
        losses = tuple(state.trace)
        if not losses or losses[-1] != state.loss:
            losses += (state.loss,)
        evaluations = state.evaluations
        if slot.earlier is not None:
            losses = slot.earlier.losses[:-1] + losses
            evaluations += slot.earlier.report.evaluations
        report = TrialReport(
            seed=slot.seed,
            loss=state.loss,
            iterations=slot.begun + state.iterations,
            evaluations=evaluations,
            stopped=state.stopped,
            replaced=replaced,
        )
        slot.runs.append(_Run(state.point.clone(), report, losses, slot.snapshots))

    def _runs(self, client: int) -> list[_Run]:
        own = [slot for slot in self.all_slots if slot.client == client]
        return [run for slot in own for run in slot.runs]

    def _finite_runs(self, client: int) -> list[_Run]:
        return [run for run in self._runs(client) if math.isfinite(run.report.loss)]

    def _reconstruction(self, client: int, seconds: float) -> Reconstruction:
        """The run of this client with the lowest matching loss."""
        runs, finite = self._runs(client), self._finite_runs(client)
        if not finite:
            raise InputError(
                "update",
                "a finite matching loss from at least one start",
                f"none in {len(runs)} starts",
                "lower init_scale, or check the model for overflow",
            )
        best = min(finite, key=lambda run: run.report.loss)
        plan = self.problem.plan
        images = self.problem.images(best.point).clamp(0, 1).float().cpu()
        last = len(best.losses) - 1
        snapshots = {i: x for i, x in best.snapshots.items() if i < last}
        snapshots[last] = images
        return Reconstruction(
            images=images,
            labels=self.problem.labels(best.point, client),
            losses=best.losses,
            iterations=tuple(range(len(best.losses))),
            snapshots=torch.stack(list(snapshots.values())),
            snapshot_iterations=tuple(snapshots),
            trials=tuple(run.report for run in runs),
            stopped=best.report.stopped,
            seconds=seconds,
            attack=plan.attack,
            reason=plan.reason,
            label_source=plan.label_source,
            seed=self.seed + client,
        )
