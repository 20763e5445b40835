"""From shared updates to images: the attack as one call.

Taught in: notebooks/02_dlg_four_steps and notebooks/03_stronger_matching.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gradinv_helpers.attacks.exact import ExactSolution, invert_exactly
from gradinv_helpers.attacks.gradinversion import GradInversionProblem
from gradinv_helpers.attacks.groups import run_groups, side_by_side
from gradinv_helpers.attacks.learned import (
    DEFAULT_PRIORS,
    Job,
    prior_for,
    run_under_prior,
)
from gradinv_helpers.attacks.learning_rate import rate_is_missing, with_learning_rate
from gradinv_helpers.attacks.matching import Distance
from gradinv_helpers.attacks.plan import ATTACKS, make_plan
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.attacks.reconstruction import Reconstruction, Step, TrialReport
from gradinv_helpers.attacks.search import Search
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.federated.aggregation import check_same_round
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.updates import SharedUpdate

__all__ = [
    "ATTACKS",
    "Reconstruction",
    "Step",
    "TrialReport",
    "invert",
    "invert_clients",
]

# Restarts in one batch: more of them gain nothing, or do not fit.
_TRIALS_CPU, _TRIALS_GPU = 24, 1024


def invert(
    update: SharedUpdate,
    *,
    attack: str = "auto",
    prior: ImagePrior | str | None = None,
    iterations: int | None = None,
    restarts: int | None = None,
    labels: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    init_scale: float = 0.05,
    tv_weight: float | None = None,
    distance: str | Distance | None = None,
    optimiser: str | None = None,
    log_every: int = 5,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Reconstruction:
    """Reconstruct the images and labels behind an update.

    An update of n samples is inverted with n unknown images. ``auto`` first tries the
    algebra of ``exact``; where that does not apply, or noise spoils its answer, images
    are searched for whose gradient matches the shared one. Restarts run as one batch;
    the one with the lowest loss is kept, and a restart that diverges or stands still
    far from a match is replaced by a new start and reported. Values outside [0, 1]
    cost a quadratic penalty.

    Args:
        update: What the server saw. Attacks under a prior replay local training; the
            others need a gradient, or a weight change by one SGD step. An update that
            a defence has encoded (``update.encoding``) is read by its likelihood:
            ``auto`` takes ``gaussian-map``; ``dataclasses.replace(update,
            encoding=None)`` is attacked at face value. Where the recipe of a weight
            change leaves the learning rate open, it is inferred first, and ``reason``
            says so.
        attack: ``dlg`` fits images and labels together by L-BFGS on the relative
            squared error; ``idlg`` first reads the label off the gradient (one sample
            only); ``inverting-gradients`` minimises the cosine distance and a little
            total variation by signed Adam, which suits ReLU networks;
            ``gradinversion`` adds what BatchNorm tells of the batch and pulls the
            restarts together, for batches behind deep networks whose clients send
            their buffers; ``exact`` solves equations where the model allows it, needs
            no iterations and certifies its answer; ``gaussian-map`` anneals towards
            the most probable images under ``prior``, which is what batches and
            aggregates need; ``vae-map`` does so under a VAE, and ``vae-posterior``
            averages draws from its posterior; ``diffusion-latent``,
            ``diffusion-posterior`` and ``gradinvdiff`` take a diffusion model for
            their prior; ``auto`` takes ``exact`` where its certificate holds,
            otherwise ``gaussian-map`` for several samples or several local steps, and
            the search that suits the model for one. Where the update of one sample is
            noisy, ``auto`` ends with the MAP estimate under a prior on neighbouring
            pixels.
        prior: What attacks under a prior know of images: a name or a folder for
            ``load_prior``, or a prior for the update's image shape. By default
            ``spectrum`` for ``gaussian-map``, and what comes with the package for
            digits for the others.
        iterations: Outer steps per restart, of up to 20 updates each, as in the
            published recipe; 200 by default. The attack stops early when done. With a
            diffusion model, its steps.
        restarts: Independent random starts; 3 by default. Chains of
            ``vae-posterior``, draws of ``diffusion-posterior``.
        labels: True labels (N,), if the attacker is given them. Results are then an
            upper bound and say so.
        seed: Seed of the random starts; the same call gives the same result.
        init_scale: Standard deviation of the noise around grey (0.5) at the start.
        tv_weight: Weight of the total variation of the images in the loss; the
            recipe's own by default: 0.01 for ``inverting-gradients`` and
            ``gradinversion``, otherwise 0.
        distance: How gradients are compared, instead of the recipe's way: ``squared``,
            ``cosine``, ``absolute``, ``layerwise``, or a function like those of
            ``gradinv_helpers.attacks.matching``.
        optimiser: ``l-bfgs``, ``adam``, ``signed-adam`` or ``levenberg-marquardt``
            instead of the recipe's.
        log_every: A snapshot is kept every so many iterations.
        on_step: Called after every iteration of every restart.
        checkpoint: A ``.safetensors`` file that keeps the state of a search. The same
            call goes on from it after an interruption; it is removed at the end.

    Returns:
        Images, labels, and how the attack went. After Ctrl-C the best so far is
        returned, with ``stopped`` saying "interrupted".

    Raises:
        InputError: An argument is out of range, the attack does not fit the update,
            or no restart gave a finite loss.

    Source: Zhu et al. (2019), Algorithm 1; Zhao et al. (2020) for the label; Geiping
    et al. (2020) for the cosine.
    Taught in: notebooks/02_dlg_four_steps and notebooks/03_stronger_matching.
    """
    return invert_clients(
        [update],
        attack=attack,
        prior=prior,
        iterations=iterations,
        restarts=restarts,
        labels=None if labels is None else [labels],
        seed=seed,
        init_scale=init_scale,
        tv_weight=tv_weight,
        distance=distance,
        optimiser=optimiser,
        log_every=log_every,
        on_step=on_step,
        checkpoint=checkpoint,
    )[0]


def invert_clients(
    updates: Sequence[SharedUpdate],
    *,
    attack: str = "auto",
    prior: ImagePrior | str | None = None,
    iterations: int | None = None,
    restarts: int | None = None,
    labels: Sequence[Tensor | Sequence[int]] | None = None,
    seed: int = 0,
    init_scale: float = 0.05,
    tv_weight: float | None = None,
    distance: str | Distance | None = None,
    optimiser: str | None = None,
    log_every: int = 5,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: str | Path | None = None,
) -> list[Reconstruction]:
    """Invert updates of several clients of one round, in one batch.

    Every client is attacked on its own, as by ``invert``; only the arithmetic is
    shared. Clients must have the same number of samples. Client k starts from the
    seed ``seed + k``. Very many clients are taken in groups, because a batch gains
    nothing beyond a few dozen restarts on a CPU.

    Args:
        updates: Updates of the same model with the same recipe.
        attack: As for ``invert``, and so are the other arguments but ``labels``.
        prior: What attacks under a prior know of images.
        iterations: Outer steps per restart.
        restarts: Independent random starts per client.
        labels: One entry per client, if the attacker is given them.
        seed: Seed of the first client's starts.
        init_scale: Standard deviation of the noise around grey at the start.
        tv_weight: Weight of the total variation.
        distance: How gradients are compared.
        optimiser: What minimises the distance.
        log_every: Iterations between two snapshots.
        on_step: Called after every iteration of every restart.
        checkpoint: A file that keeps the state of the search; groups of clients
            beyond the first add their number to its name.

    Returns:
        One reconstruction per update, in order. After Ctrl-C, clients whose turn had
        not begun are missing at the end.

    Raises:
        InputError: As for ``invert``, or the updates do not belong together.

    Taught in: notebooks/02_dlg_four_steps.
    """
    check_choice("attack", attack, ATTACKS)
    asked = {"iterations": iterations, "restarts": restarts}
    iterations = check_count("iterations", 200 if iterations is None else iterations)
    restarts = check_count("restarts", 3 if restarts is None else restarts)
    check_seed("seed", seed)
    check_count("log_every", log_every)
    check_number("init_scale", init_scale)
    check_same_round(updates)
    sizes = [u.group_sizes for u in updates]
    if len(set(sizes)) > 1:
        raise InputError("updates", "equal numbers of samples", f"{sizes}")
    settled = tv_weight is not None or distance is not None or optimiser is not None
    replayed = not updates[0].is_gradient  # searches without a prior cannot do that
    missing = rate_is_missing(updates[0])
    if missing and replayed and attack == "auto" and not settled:
        attack = "gaussian-map"
    if missing and attack != "gaussian-map":  # which fits the rate along
        solve = functools.partial(
            invert_clients,
            attack=attack,
            prior=prior,
            init_scale=init_scale,
            tv_weight=tv_weight,
            distance=distance,
            optimiser=optimiser,
            log_every=log_every,
            iterations=asked["iterations"],
            restarts=asked["restarts"],
        )
        return _with_inferred_rates(solve, updates, labels, seed, on_step, checkpoint)
    if attack == "exact" and (distance is not None or optimiser is not None):
        raise InputError(
            "attack", "a search, where a distance or an optimiser is given", "'exact'"
        )
    if attack in DEFAULT_PRIORS and settled:
        given = "a distance, an optimiser or a weight of the total variation"
        raise InputError("attack", f"another one, where {given} is set", repr(attack))
    solved: dict[int, Reconstruction] = {}
    guesses: dict[int, ExactSolution] = {}
    if attack == "exact" or (attack == "auto" and not settled):
        solved, guesses = _by_algebra(updates, labels, seed, must=attack == "exact")
        for k, solution in solved.items():
            if on_step is not None:
                on_step(Step(k, 0, iterations, solution.loss, iterations, True))
        if len(solved) == len(updates):
            return [solved[k] for k in range(len(updates))]
    open_ones = [k for k in range(len(updates)) if k not in solved]
    # Equations of full rank that leave a residual speak of noise.
    spoilt = len(guesses) == len(open_ones) and all(
        guess.certificate.determined for guess in guesses.values()
    )
    several = updates[0].num_samples > 1
    encoded = updates[0].encoding is not None  # only likelihoods read messages
    by_default = encoded or replayed or (several and not spoilt)
    falls_to_prior = attack == "auto" and by_default and not settled
    if attack in DEFAULT_PRIORS or falls_to_prior:
        name = "gaussian-map" if attack == "auto" else attack
        wishes = (labels, seed, checkpoint, on_step, name, prior, asked)
        try:
            solved |= _by_prior(updates, open_ones, *wishes)
            return _in_order(solved, len(updates))
        except InputError:
            if attack != "auto" or replayed:
                raise  # else a search that fits the labels, too
    plan = make_plan(
        updates,
        attack,
        labels=labels,
        distance=distance,
        optimiser=optimiser,
        tv_weight=tv_weight,
    )
    if spoilt:
        why = "the algebra of 'exact' left a residual, as noise does; then "
        plan = replace(plan, reason=f"{why}{plan.reason}")
    if plan.labels is None and len(guesses) == len(open_ones):
        found_labels = {k: guess.labels.cpu() for k, guess in guesses.items()}
        plan = replace(
            plan,
            labels=[found_labels.get(k, torch.empty(0)) for k in range(len(updates))],
            label_source=guesses[open_ones[0]].label_source,
        )
    noisy = any(update.noise_std for update in updates)
    on_cpu = next(iter(updates[0].tensors.values())).device.type == "cpu"
    if spoilt:  # a good start needs no rivals; a bad one is replaced
        restarts = 1
    most = max(1, (_TRIALS_CPU if on_cpu else _TRIALS_GPU) // restarts)
    chunks = _evenly(open_ones, most)

    kind = GradInversionProblem if attack == "gradinversion" else MatchingProblem
    problems = []
    for chosen in chunks:
        of_chosen = plan.labels and [plan.labels[k] for k in chosen]
        problems.append(
            kind([updates[k] for k in chosen], replace(plan, labels=of_chosen))
        )

    def search(number: int, tell: Callable[[Step], None]) -> Search:
        chosen = chunks[number]
        return Search(
            problems[number],
            clients=chosen,
            iterations=iterations,
            restarts=restarts,
            seed=seed,
            init_scale=init_scale,
            log_every=log_every,
            on_step=tell,
            guesses={
                i: guesses[k].images for i, k in enumerate(chosen) if k in guesses
            },
            denoise=attack == "auto" and not settled and (spoilt or noisy),
            checkpoint=_numbered(checkpoint, number),
        )

    makers = [functools.partial(search, number) for number in range(len(chunks))]
    work = problems[0].work * restarts * len(chunks[0])
    workers = side_by_side(work, problems[0].like)
    for chosen, found in zip(
        chunks, run_groups(makers, workers=workers, on_step=on_step), strict=False
    ):
        solved |= dict(zip(chosen, found, strict=False))
    return _in_order(solved, len(updates))


def _with_inferred_rates(
    solve: Callable[..., list[Reconstruction]],
    updates: Sequence[SharedUpdate],
    labels: Sequence[Tensor | Sequence[int]] | None,
    seed: int,
    on_step: Callable[[Step], None] | None,
    checkpoint: str | Path | None,
) -> list[Reconstruction]:
    """Attack clients one by one, each at the learning rate that its update shows."""
    found: list[Reconstruction] = []
    for k, update in enumerate(updates):

        def tell(step: Step, client: int = k) -> None:
            if on_step is not None:
                on_step(replace(step, client=client))

        known = None if labels is None else labels[k]
        filled, note = with_learning_rate(update, labels=known, seed=seed + k)
        (alone,) = solve(
            [filled],
            labels=None if known is None else [known],
            seed=seed + k,
            on_step=tell,
            checkpoint=_numbered(checkpoint, k),
        )
        found.append(replace(alone, reason=alone.reason + note))
        if alone.stopped == "interrupted":
            break
    return found


def _evenly(clients: Sequence[int], most: int) -> list[Sequence[int]]:
    """Groups of like size, none larger than ``most``; an even number, if several."""
    groups = -(-len(clients) // most)
    groups += groups % 2 if groups > 1 else 0
    width = -(-len(clients) // groups)
    return [clients[i : i + width] for i in range(0, len(clients), width)]


def _by_prior(
    updates: Sequence[SharedUpdate],
    chosen: Sequence[int],
    labels: Sequence[Tensor | Sequence[int]] | None,
    seed: int,
    checkpoint: str | Path | None,
    on_step: Callable[[Step], None] | None,
    attack: str,
    prior: ImagePrior | str | None,
    asked: Mapping[str, int | None],
) -> dict[int, Reconstruction]:
    """What a prior makes of every chosen client, up to an interruption."""
    known = prior_for(attack, prior, updates[0].image_shape)
    found: dict[int, Reconstruction] = {}
    for k in chosen:
        job = Job(
            updates[k],
            known,
            None if labels is None else torch.as_tensor(labels[k]),
            seed=seed + k,
            on_step=on_step,
            client=k,
            checkpoint=_numbered(checkpoint, k),
            **asked,
        )
        found[k] = run_under_prior(attack, job)
        if found[k].stopped == "interrupted":
            break
    return found


def _in_order(solved: dict[int, Reconstruction], count: int) -> list[Reconstruction]:
    """What is there of the clients in order, up to the first that is missing."""
    found = []
    for k in range(count):
        if k not in solved:
            break
        found.append(solved[k])
    if not found:  # interrupted before there was anything to return
        raise KeyboardInterrupt
    return found


def _numbered(path: str | Path | None, number: int) -> Path | None:
    """The checkpoint of one group of clients."""
    if path is None:
        return None
    path = Path(path)
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def _by_algebra(
    updates: Sequence[SharedUpdate],
    labels: Sequence[Tensor | Sequence[int]] | None,
    seed: int,
    *,
    must: bool,
) -> tuple[dict[int, Reconstruction], dict[int, ExactSolution]]:
    """Clients that algebra solves, and its answers that are not exact."""
    solved: dict[int, Reconstruction] = {}
    guesses: dict[int, ExactSolution] = {}
    for k, update in enumerate(updates):
        known = None if labels is None else torch.as_tensor(labels[k])
        begun = time.perf_counter()
        try:
            with cpu_threads(0):
                solution = invert_exactly(
                    update, labels=known, seed=seed + k, dense=must
                )
        except InputError:
            if must:
                raise
            break  # the structure is missing for all clients
        complete = len(solution.images) == update.num_samples
        if must or (complete and solution.certificate.exact):
            solved[k] = _as_reconstruction(update, solution, begun, seed + k)
        elif complete:
            guesses[k] = solution
    return solved, guesses


def _as_reconstruction(
    update: SharedUpdate, solution: ExactSolution, begun: float, seed: int
) -> Reconstruction:
    images = solution.images.clamp(0, 1).float().cpu()
    certificate = solution.certificate
    return Reconstruction(
        images=images,
        labels=solution.labels.cpu(),
        losses=(certificate.residual,),
        iterations=(0,),
        snapshots=images[None],
        snapshot_iterations=(0,),
        trials=(),
        stopped=str(certificate),
        seconds=time.perf_counter() - begun,
        attack="exact",
        reason=solution.reason,
        label_source=solution.label_source,
        seed=seed,
        certificate=certificate,
    )
