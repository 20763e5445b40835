r"""All samples of a batch at once: their features, from the labels and one layer.

The gradient of the last layer is a sum over the N samples,

.. math:: G = \frac{\partial L}{\partial [W, b]}
          = \frac1N \sum_i (p_i - e_{y_i})\,[h_i, 1]^\top ,
          \qquad p_i = \mathrm{softmax}(W h_i + b).

Its rows span the inputs :math:`[h_i, 1]`: only N (N - 1) coordinates are unknown, and
N (K - 1) equations are left for them, enough for every N < K. They are solved by a
batched Levenberg-Marquardt method.

Rounding is relative to the entries of a row, and rows differ by orders of magnitude
because the predicted probabilities do. What tells similar samples apart is therefore
found in the rows of *unlikely* classes: every row is divided by its noise first. In an
untrained LeNet this lifts the smallest of 8 singular values from, often, less than a
hundred times the noise to ten thousand times.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    groups_of,
    last_layer_input,
    mean_gradient,
    read_last_layer,
)
from gradinv_helpers.attacks.separation import Separation
from gradinv_helpers.compute import private_randomness
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.priors.gaussian import spectrum_prior
from gradinv_helpers.updates import SharedUpdate

# Starts of a round, and the power of its singular value by which column j of the
# whitened gradient counts: 1 is the gradient as it is, 0 makes noise count as much as
# the signal. Valleys that trap one kind of descent are open to the other.
_ROUNDS = ((16, 0.7), (32, 1.0), (64, 0.7), (64, 1.0))
_STAGES = ((1.0, 20), (0.25, 40), (0.0625, 120))  # share of the starts, steps
_KEPT_STARTS, _FEWEST_STARTS = 4, 2
_POLISHING_STEPS = 25
_WORK = 1e9  # multiplications per step that a round may take
_MEMORY = 2**28  # bytes of the systems of one step
_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-2, 1e-14, 1e8
_STANDS_OUT = 10.0  # times the noise, the least singular value of a sample
_ROUNDING = 0.3  # times eps: rounding of a gradient as a share of its norm
_NOISE_MARGIN = 40.0  # times the noise, what an answer may leave
_LOGIT_MARGIN = 2.5  # times the rounding of the logits, what it may leave besides
_MOST_ERROR = 0.1  # of the features, as a share of their distance from the mean


def separate_jointly(
    update: SharedUpdate,
    labels: Tensor,
    *,
    per_class: bool = False,
    starts: Tensor | None = None,
    seed: int = 0,
) -> Separation:
    """Solve the last layer's gradient for the features of all samples together.

    Needs the labels, a bias, and fewer samples than classes; up to half the number of
    classes, ``separate_batch`` finds the labels as well. An answer is returned only
    where it explains the gradient down to its rounding and noise, and where these
    leave no other answer. Wrong labels explain nothing.

    Args:
        update: A gradient, or the weight change of one SGD step, not normalised.
        labels: Labels (N,) of the batch in any order, from ``infer_labels``.
        per_class: Solve for the mean feature of each class. For models, as PyTorch
            initialises them, to which the images of a class look the same up to
            rounding.
        starts: Features (T, N, d) to start from, row i for the i-th label in
            ascending order (for every class once if ``per_class``). Where ``None``,
            those of ``feature_starts``.
        seed: Seed of the starting points.

    Returns:
        Labels in ascending order (every class once if ``per_class``), probabilities
        and features. Samples of equal labels are in no order. The residual refers to
        a gradient whose rows are divided by their noise.

    Raises:
        InputError: The update does not have this structure, or no features, or more
            than one set of them, explain it with these labels.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_seed("seed", seed)
    layer = read_last_layer(update)
    labels = _sorted_labels(labels, layer)
    _check_update(update, layer)
    gradient = _gradient(update, layer, len(labels))
    dtype = next(iter(update.tensors.values())).dtype
    noise = _noise_of_rows(update, layer, gradient, dtype)
    classes, counts = labels.unique(return_counts=True)
    shares = torch.full((len(labels),), 1 / len(labels), dtype=gradient.dtype)
    if per_class:
        labels, shares = classes, counts.to(gradient.dtype) / len(labels)
    if len(labels) >= layer.num_classes:
        raise InputError(
            "labels",
            f"fewer samples than the {layer.num_classes} classes",
            f"{len(labels)} samples",
        )
    problem = _state(gradient, noise, torch.finfo(dtype).eps, layer, labels, shares)
    if starts is not None:
        _check_starts(starts, len(labels), layer.weight.shape[1])
    points = _search(problem, update, starts, seed)
    if points is None:
        raise InputError(
            "labels",
            "labels with which one set of features explains the last layer's gradient",
            f"{labels.tolist()}, with which none was found",
            "check the labels, or solve per_class if rounding hides what differs",
        )
    return _separation(problem, points, layer)


def feature_starts(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    num_samples: int,
    count: int,
    *,
    seed: int = 0,
) -> Tensor:
    """Draw features of random smooth images, as the last linear layer receives them.

    Args:
        model: Classifier whose last ``torch.nn.Linear`` makes the logits.
        image_shape: Shape (C, H, W) of its input.
        num_samples: Number N of images in a batch.
        count: Number T of batches.
        seed: Seed of the images, drawn from ``spectrum_prior``.

    Returns:
        Features (T, N, d), in float64 on the CPU.

    Raises:
        InputError: A count is too small, or the model has no such layer.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("num_samples", num_samples)
    check_count("count", count)
    check_seed("seed", seed)
    model = copy.deepcopy(model)  # batch statistics may change on the way
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(
            "model", "a last layer of type torch.nn.Linear", type(model).__name__
        )
    prior = spectrum_prior(image_shape)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_samples * count, prior.size, generator=generator)
    first = next(model.parameters())
    images = prior.decode(latents.double()).to(first)
    with private_randomness(seed, images.device), torch.no_grad():
        found = [last_layer_input(model, part) for part in images.split(256)]
    features = torch.cat(found).cpu().double()
    if features.shape != (len(images), linear[-1].in_features):
        raise InputError(
            "model",
            "one vector per image at the last torch.nn.Linear",
            f"{tuple(features.shape)} for {len(images)} images",
        )
    return features.view(count, num_samples, -1)


# --- what is known ------------------------------------------------------------------


def _sorted_labels(labels: Tensor, layer: LastLayer) -> Tensor:
    """The labels in ascending order, if they are labels."""
    integer = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not integer or labels.dim() != 1 or not len(labels):
        got = type(labels).__name__
        if isinstance(labels, Tensor):
            got = f"{tuple(labels.shape)} of type {labels.dtype}"
        raise InputError("labels", "class numbers (N,) of type torch.int64", got)
    labels = labels.detach().cpu().sort().values
    if labels[0] < 0 or labels[-1] >= layer.num_classes:
        raise InputError(
            "labels", f"classes from 0 to {layer.num_classes - 1}", labels.tolist()
        )
    return labels


def _check_update(update: SharedUpdate, layer: LastLayer) -> None:
    """Refuse updates that are not the mean gradient of one step, with a bias."""
    steps = max(update.training.num_steps(size) for size in update.group_sizes or ())
    problem = None
    if layer.sent_bias is None:
        problem = "one without a bias in the last layer"
    elif update.normalized:
        problem = "normalised clients"
    elif steps > 1 or update.training.optimiser == "adam":
        problem = "several local steps, or Adam"
    if problem is not None:
        raise InputError(
            "update", "a gradient, or the weight change of one step of SGD", problem
        )


def _gradient(update: SharedUpdate, layer: LastLayer, num_samples: int) -> Tensor:
    """Mean gradient of weight and bias, (K, d + 1)."""
    weight, bias = mean_gradient(update, layer, groups_of(update, num_samples))
    assert bias is not None
    return torch.cat([weight, bias[:, None]], 1)


def _noise_of_rows(
    update: SharedUpdate, layer: LastLayer, gradient: Tensor, dtype: torch.dtype
) -> Tensor:
    """Norm (K,) of rounding and noise in every row of the gradient."""
    eps = torch.finfo(dtype).eps
    smallest = max(update.noise_std, torch.finfo(dtype).tiny)
    absolute = torch.full_like(gradient[:, 0], smallest * gradient.shape[1] ** 0.5)
    if update.kind == "delta":  # a difference of weights that were rounded
        start = torch.cat([layer.weight, layer.bias[:, None]], 1)
        absolute = torch.hypot(absolute, eps * start.norm(dim=1)) / update.training.rate
    return torch.hypot(eps * gradient.norm(dim=1), absolute)


def _check_starts(starts: Tensor, num_samples: int, size: int) -> None:
    """Refuse starts of another shape."""
    shape = tuple(starts.shape)
    if starts.dim() != 3 or not len(starts) or shape[1:] != (num_samples, size):
        raise InputError("starts", f"features (T, {num_samples}, {size})", shape)


# --- the equations ------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Features in coordinates of the gradient's row space, and what they must fit.

    A sample has r - 1 free coordinates z, its *point*; its input is
    ``rows @ (origin + free @ z)``, whose last entry is 1.
    """

    labels: Tensor  # (N,)
    hard: Tensor  # one-hot labels, (N, K)
    scale: Tensor  # weight of an error: share of the sample over noise of the row
    columns: Tensor  # (K, N), orthonormal
    values: Tensor  # (N,), singular values of the gradient in units of its noise
    tolerance: float  # what the right answer may leave, in the same units
    rows: Tensor  # (d + 1, N), orthogonal, with the singular values as norms
    origin: Tensor  # (N,)
    free: Tensor  # (N, N - 1), orthonormal
    offset: Tensor  # logits at the origin, (K,)
    slope: Tensor  # logits per unit of a point, (K, N - 1)


def _state(
    gradient: Tensor,
    noise: Tensor,
    eps: float,
    layer: LastLayer,
    labels: Tensor,
    shares: Tensor,
) -> _Problem:
    """Write the gradient in units of its noise, and choose coordinates.

    Raises:
        InputError: Its rank is not that of N samples, up to the noise.
    """
    num_samples, alive = len(labels), gradient.any(1)
    scale = torch.where(alive, eps / noise, torch.zeros_like(noise))
    left, values, right = torch.linalg.svd(
        scale[:, None] * gradient, full_matrices=False
    )
    kept = values[:num_samples]
    floor = _ROUNDING * eps
    if len(values) > num_samples:
        floor = max(floor, float(values[num_samples]))
    if len(kept) < num_samples or not float(kept[-1]) > _STANDS_OUT * floor:
        rank = int((kept > _STANDS_OUT * floor).sum())
        raise InputError(
            "update",
            f"a last layer's gradient that holds {num_samples} features and no more",
            f"one in which {rank} of {num_samples} directions stand out of the rest",
            "the labels are too many or too few, or noise hides what differs",
        )
    rows = right[:num_samples].T * kept
    one = rows[-1]  # coordinates whose product with c is the constant input
    origin = one / (one @ one)
    free = torch.linalg.svd(one[None])[2][1:].T
    model = torch.cat([layer.weight, layer.bias[:, None]], 1)  # logits = model [h, 1]
    rounding = eps * float((model * (rows @ origin)).norm(dim=1).max())  # of a logit
    return _Problem(
        labels=labels,
        hard=F.one_hot(labels, len(model)).to(gradient.dtype),
        scale=shares[:, None] * scale,
        columns=left[:, :num_samples],
        values=kept,
        tolerance=_NOISE_MARGIN * floor + _LOGIT_MARGIN * rounding * float(values[0]),
        rows=rows,
        origin=origin,
        free=free,
        offset=model @ rows @ origin,
        slope=model @ rows @ free,
    )


@dataclass(frozen=True)
class _Fit:
    """Points (T, N, N - 1) and what follows from them."""

    points: Tensor
    coordinates: Tensor  # (T, N, N)
    probabilities: Tensor  # (T, N, K)
    errors: Tensor  # scaled, (T, N, K)
    gap: Tensor  # weighted, (T, K, N)
    loss: Tensor  # (T,)

    def where(self, mask: Tensor, other: _Fit) -> _Fit:
        """This fit where ``mask`` (T,) is true, the other elsewhere."""

        def choose(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (own.dim() - 1)), own, others)

        return _Fit(*(choose(a, b) for a, b in zip(self.all, other.all, strict=True)))

    @property
    def all(self) -> tuple[Tensor, ...]:
        """The tensors, in order."""
        return (
            self.points,
            self.coordinates,
            self.probabilities,
            self.errors,
            self.gap,
            self.loss,
        )


def _evaluate(problem: _Problem, points: Tensor, weights: Tensor) -> _Fit:
    """What points leave of the whitened gradient, column j times ``weights[j]``."""
    probabilities = (problem.offset + points @ problem.slope.T).softmax(-1)
    others = probabilities * (1 - problem.hard)  # no cancellation at the label
    errors = others - problem.hard * others.sum(-1, keepdim=True)
    errors = errors * problem.scale
    coordinates = problem.origin + points @ problem.free.T
    gap = (errors.mT @ coordinates - problem.columns) * weights
    loss = torch.nan_to_num(gap.square().sum((1, 2)), nan=torch.inf)
    return _Fit(points, coordinates, probabilities, errors, gap, loss)


def _normal_equations(
    problem: _Problem, fit: _Fit, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """J^T J (T, m, m) and J^T gap (T, m) with m = N (N - 1), J never formed.

    The derivative of the gap by the point of sample n is the outer product of the
    change of its error with its coordinates, plus that of its error with the change
    of its coordinates; products of two such terms factorise.
    """
    count, num, size = fit.points.shape
    squares = weights.square()
    mean = fit.probabilities @ problem.slope
    change = (fit.probabilities * problem.scale)[..., None] * (
        problem.slope - mean[:, :, None]
    )  # (T, N, K, N - 1)
    flat = change.permute(0, 2, 1, 3).reshape(count, -1, num * size)
    system = (flat.mT @ flat).view(count, num, size, num, size)
    inner = (fit.coordinates * squares) @ fit.coordinates.mT  # (T, N, N)
    system *= inner[:, :, None, :, None]
    by_error = (flat.mT @ fit.errors.mT).view(count, num, size, num)
    by_place = (fit.coordinates * squares) @ problem.free  # (T, N, N - 1)
    cross = by_error[..., None] * by_place[:, :, None, None, :]
    system += cross
    system += cross.permute(0, 3, 4, 1, 2)
    metric = problem.free.T @ (squares[:, None] * problem.free)
    gram = fit.errors @ fit.errors.mT
    system += gram[:, :, None, :, None] * metric[:, None, :]
    weighted = fit.gap * weights
    slope = torch.einsum(
        "xnkz,xkn->xnz", change, weighted @ fit.coordinates.mT
    ) + fit.errors @ (weighted @ problem.free)
    return system.reshape(count, num * size, -1), slope.flatten(1)


def _levenberg_marquardt(
    problem: _Problem, points: Tensor, weights: Tensor, steps: int
) -> _Fit:
    """Minimise the weighted gap from every start; the results, best first."""
    fit = _evaluate(problem, points, weights)
    damping = torch.full_like(fit.loss, _DAMPING)
    before = fit.loss
    for step in range(steps if points.shape[2] else 0):
        system, slope = _normal_equations(problem, fit, weights)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal = diagonal + 1e-9 * diagonal.amax(1, keepdim=True)
        system.diagonal(dim1=1, dim2=2).add_(damping[:, None] * diagonal)
        root, _ = torch.linalg.cholesky_ex(system)
        move = torch.cholesky_solve(slope[..., None], root)
        tried = fit.points - torch.nan_to_num(move).view_as(fit.points)
        new = _evaluate(problem, tried, weights)
        better = new.loss < fit.loss
        fit = new.where(better, fit)
        damping = torch.where(better, damping / 4, damping * 3)
        damping = damping.clamp(_LEAST_DAMPING, _MOST_DAMPING)
        if step % 4 == 3:
            if bool((fit.loss > 0.99 * before).all()):
                break
            before = fit.loss
    order = fit.loss.argsort(stable=True)
    return _Fit(*(part[order] for part in fit.all))


# --- the search ---------------------------------------------------------------------


def _search(
    problem: _Problem, update: SharedUpdate, starts: Tensor | None, seed: int
) -> Tensor | None:
    """Points (N, N - 1) of the one answer, or ``None``: many starts, few go on."""
    num = len(problem.labels)
    most = _most_starts(problem)
    done = 0
    for number, (wanted, power) in enumerate(_ROUNDS):
        count = min(wanted, most)
        weights = problem.values**power
        weights = weights / weights.mean()
        if starts is None:
            shape = update.image_shape
            drawn = feature_starts(
                update.model, shape, num, count, seed=(seed + number) % 2**32
            )
        else:
            drawn = starts[done : done + count].detach().cpu().double()
            done += count
        if not len(drawn):
            break
        points = _points(problem, drawn)
        for share, steps in _STAGES:
            kept = max(_KEPT_STARTS, int(share * len(drawn)))
            fit = _levenberg_marquardt(problem, points[:kept], weights, steps)
            points = fit.points
            found = _accepted(problem, points[:_KEPT_STARTS])
            if found is not None:
                return found
    return None


def _most_starts(problem: _Problem) -> int:
    """Starts of one round that keep its time and memory in bounds."""
    unknowns = problem.slope.shape[1] * len(problem.labels)
    work = unknowns**3 / 3 + unknowns**2 * len(problem.slope) + 1
    most = min(_WORK / work, _MEMORY / (8 * unknowns**2 + 1))
    return max(_FEWEST_STARTS, int(most))


def _points(problem: _Problem, features: Tensor) -> Tensor:
    """Points (T, N, N - 1) nearest to features (T, N, d)."""
    inputs = F.pad(features, (0, 1), value=1.0)
    coordinates = inputs @ problem.rows / problem.values.square()
    return (coordinates - problem.origin) @ problem.free


def _accepted(problem: _Problem, points: Tensor) -> Tensor | None:
    """The points that explain the gradient down to its noise, if they agree."""
    if not len(points):
        return None
    whole = problem.values  # the gradient as it is, in units of its noise
    fit = _levenberg_marquardt(problem, points, whole, _POLISHING_STEPS)
    fits = fit.loss.sqrt() < problem.tolerance
    if not bool(fits[0]):
        return None
    features = fit.coordinates[fits] * problem.values  # orthogonal transforms of them
    deviation = features[0] - features[0].mean(0)
    spread = float(deviation.norm(dim=1).mean()) if len(deviation) > 1 else 1.0
    error = _largest_error(problem, fit, float(fit.loss[0].sqrt()))
    if error > _MOST_ERROR * spread:
        return None
    for other in features[1:]:
        apart = torch.cdist(features[0], other)
        strange = problem.labels[:, None] != problem.labels
        apart = apart.masked_fill(strange, torch.inf)
        farthest = max(float(apart.amin(0).max()), float(apart.amin(1).max()))
        if farthest > _MOST_ERROR * spread:
            return None
    return fit.points[0]


def _largest_error(problem: _Problem, fit: _Fit, left: float) -> float:
    """How far features can lie from the truth if ``left`` of the gradient is noise."""
    _, num, size = fit.points.shape
    if not size:
        return 0.0
    first = _Fit(*(part[:1] for part in fit.all))
    system, _ = _normal_equations(problem, first, problem.values)
    metric = problem.free.T @ (problem.values.square()[:, None] * problem.free)
    root = torch.linalg.cholesky(metric)  # |root^T z| is the length of a feature
    system = system[0].view(num, size, num * size)
    system = torch.linalg.solve_triangular(root, system, upper=False)
    system = system.reshape(num * size, num, size).permute(1, 2, 0)
    system = torch.linalg.solve_triangular(root, system, upper=False)
    least = float(torch.linalg.eigvalsh(system.reshape(num * size, -1))[0])
    return left / max(least, torch.finfo(system.dtype).tiny) ** 0.5


def _separation(problem: _Problem, points: Tensor, layer: LastLayer) -> Separation:
    """Features and probabilities of the points found."""
    fit = _evaluate(problem, points[None], torch.ones_like(problem.values))
    inputs = fit.coordinates[0] @ problem.rows.T
    features = inputs[:, :-1]
    return Separation(
        labels=problem.labels,
        probabilities=(features @ layer.weight.T + layer.bias).softmax(1),
        features=features,
        residual=float(fit.gap.abs().max()),
    )
