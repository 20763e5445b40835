r"""A small batch taken apart: labels, probabilities and features of every sample.

The gradient of the last layer is a sum of N products, one per sample,

.. math:: \frac{\partial L}{\partial [W, b]}
          = \frac1N \sum_i (p_i - e_{y_i})\,[h_i, 1]^\top ,
          \qquad p_i = \mathrm{softmax}(W h_i + b).

Its row space is spanned by the N inputs :math:`[h_i, 1]` and its column space by the N
errors :math:`p_i - e_{y_i}`. An input in the one space must have its error in the
other, which leaves more equations than unknowns as long as 2 N <= K.
Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradinv_helpers.attacks.last_layer import LastLayer, read_last_layer
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.updates import SharedUpdate

_MOST_SAMPLES = 8  # beyond, the search takes minutes
_FEWEST_CLASSES = 10  # classes among which the labels are sought, at least
_STARTS = 64  # per class, beside the rows of the gradient
_FIRST_STEPS, _STEPS = 15, 45
_KEPT_STARTS = 256  # that go on after the first steps
_POLISHING_STEPS = 12
_ATTEMPTS = 9
_LIMITS = (1e-3, 0.02, 0.3)  # how far candidates may be from fitting together, in turn
# Largest entry that a right answer may leave; wrong ones leave 0.1 to 1.
_LARGEST_RESIDUAL = 0.03
_SAME = 1e-2  # errors whose directions differ by less belong to one candidate
_CERTAIN = 1e-12  # a sample with a smaller error leaves nothing in the gradient


@dataclass(frozen=True)
class Separation:
    """The samples of a batch, as the last layer saw them.

    Args:
        labels: Labels (N,), in ascending order; the order within a batch has no
            meaning.
        probabilities: Softmax output of each sample, (N, K).
        features: Input of the last layer for each sample, (N, d).
        residual: Largest entry of the part of the gradient that is left unexplained,
            in units in which every direction of the gradient has length 1.

    Taught in: notebooks/03_stronger_matching.
    """

    labels: Tensor
    probabilities: Tensor
    features: Tensor
    residual: float


def separate_batch(
    update: SharedUpdate, *, num_samples: int | None = None, seed: int = 0
) -> Separation:
    """Solve the last layer's gradient for the labels and features of every sample.

    The answer is exact up to rounding, for untrained and trained models alike, and
    it is returned only where it reproduces the gradient. It needs a bias, at least
    twice as many classes as samples, samples that differ, and a gradient in which
    the least certain sample does not drown the others in rounding.

    Args:
        update: A gradient, or the weight change of one SGD step; a single client may
            have normalised it.
        num_samples: Size of the batch; ``update.num_samples`` where ``None``.
        seed: Seed of the starting points of the search.

    Returns:
        Labels, probabilities and features of all samples.

    Raises:
        InputError: The update does not have this structure, or no set of samples
            explains it.

    Taught in: notebooks/03_stronger_matching.
    """
    count = update.num_samples if num_samples is None else num_samples
    check_count("num_samples", count)
    check_seed("seed", seed)
    layer = read_last_layer(update)
    found = None
    if can_separate(update, layer, count):
        found = separate(update, layer, count, seed)
    if found is None:
        raise InputError(
            "update",
            "a batch that the gradient of the last layer separates",
            f"{count} samples of {layer.num_classes} classes that it does not",
            "use method 'moments' for their labels",
        )
    return found


def can_separate(update: SharedUpdate, layer: LastLayer, num_samples: int) -> bool:
    """Whether there are enough equations, and a gradient to state them."""
    recipe = update.training
    steps = max(recipe.num_steps(size) for size in update.group_sizes or ())
    one_step = steps == 1 and recipe.optimiser != "adam"
    known_scale = not update.normalized or (
        recipe.weight_decay == 0 and len(update.group_sizes or ()) == 1
    )
    enough = num_samples <= min(layer.num_classes // 2, _MOST_SAMPLES)
    return enough and layer.sent_bias is not None and one_step and known_scale


def separate(
    update: SharedUpdate, layer: LastLayer, num_samples: int, seed: int
) -> Separation | None:
    """The samples behind the gradient, or ``None`` where they are not found."""
    gradient = _gradient(update, layer)  # (K, d + 1)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    if len(values) <= num_samples or not values[num_samples - 1] > 0:
        return None
    # Behind the N samples only rounding and noise are left; they set the accuracy.
    tolerance = 10 * float(values[num_samples] / values[num_samples - 1])
    if tolerance > _LARGEST_RESIDUAL:
        return None
    left, values, right = left[:, :num_samples], values[:num_samples], right.T
    whole = _Space(left, right[:, :num_samples] * values)
    model = torch.cat([layer.weight, layer.bias[:, None]], 1)  # logits = model [h, 1]
    generator = torch.Generator().manual_seed(seed)
    scale = None if update.normalized else 1 / num_samples
    for attempt in range(_ATTEMPTS):
        limit = tolerance + _LIMITS[attempt % len(_LIMITS)]
        found = _take_apart(whole, model, num_samples, scale, limit, generator)
        if found is None:
            continue
        labels, coordinates, step = found
        coordinates, residual = _polish(whole, coordinates, labels, model, step)
        if residual < _LARGEST_RESIDUAL:
            break
    else:
        return None
    order = labels.argsort(stable=True)
    inputs = coordinates[order] @ whole.rows.T
    return Separation(
        labels=labels[order],
        probabilities=(inputs @ model.T).softmax(1),
        features=inputs[:, :-1],
        residual=residual,
    )


def _take_apart(
    whole: _Space,
    model: Tensor,
    num_samples: int,
    scale: float | None,
    limit: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float] | None:
    """Find samples, remove them, and look for the rest in what is left.

    Returns:
        Labels (N,), coordinates (N, r) and the scale, or ``None`` at a dead end.
    """
    space, labels, inputs = whole, torch.zeros(0, dtype=torch.int64), whole.rows.T[:0]
    while len(labels) < num_samples:
        candidates = _candidates(space, model, limit, generator)
        chosen = _compatible(space, candidates, scale, limit)
        if not len(chosen):
            return None
        new = candidates.coordinates[chosen]
        own = candidates.errors[chosen] @ space.columns
        if scale is None:
            scale = float(1 / (own * new).sum(1).mean())
        labels = torch.cat([labels, candidates.labels[chosen]])
        inputs = torch.cat([inputs, new @ space.rows.T])
        space = space.without(scale * own.T @ new, num_samples - len(labels))
    assert scale is not None
    coordinates = torch.linalg.lstsq(whole.rows, inputs.T).solution.T
    return labels, coordinates, scale


def _gradient(update: SharedUpdate, layer: LastLayer) -> Tensor:
    """Gradient of weight and bias, (K, d + 1); up to a factor if normalised."""
    assert layer.sent_bias is not None
    sent = torch.cat([layer.sent_weight, layer.sent_bias[:, None]], 1)
    if update.kind == "gradient":
        return sent
    recipe = update.training
    start = torch.cat([layer.weight, layer.bias[:, None]], 1)
    step = 1.0 if update.normalized else recipe.rate
    return -sent / step - recipe.weight_decay * start


@dataclass(frozen=True)
class _Space:
    """A gradient of rank r in coordinates in which it is the identity.

    With errors ``columns @ a`` and inputs ``rows @ c``, the samples of the gradient
    satisfy ``scale * sum_i outer(a_i, c_i) = identity``.
    """

    columns: Tensor  # (K, r), orthonormal
    rows: Tensor  # (d + 1, r)

    def without(self, part: Tensor, rank: int) -> _Space:
        """The space of the ``rank`` samples left after ``part`` of the identity."""
        rest = torch.eye(len(part), dtype=part.dtype) - part
        left, values, right = torch.linalg.svd(rest)
        rows = self.rows @ (right[:rank].T * values[:rank])
        return _Space(self.columns @ left[:, :rank], rows)


@dataclass(frozen=True)
class _Candidates:
    """Possible samples: label, error (M, K), coordinates (M, r) and misfit (M,)."""

    labels: Tensor
    errors: Tensor
    coordinates: Tensor
    misfit: Tensor


def _candidates(
    space: _Space, model: Tensor, limit: float, generator: torch.Generator
) -> _Candidates:
    """All (label, input) found whose error lies in the column space.

    Inputs run through the row space with the last entry kept at 1, from many starts
    for every label at once, by Levenberg-Marquardt on the direction of the error:
    a sample of which the model is certain counts as much as any other.
    """
    num_classes, rank = space.columns.shape
    one = space.rows[-1]  # coordinates whose product with c is the constant input
    origin = one / (one @ one)
    free = torch.linalg.svd(one[None])[2][1:].T  # (r, r - 1)
    slope = model @ space.rows  # logits of coordinates, (K, r)
    outside = torch.eye(num_classes, dtype=model.dtype)
    outside = outside - space.columns @ space.columns.T

    def fit(points: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        return _levenberg_marquardt(
            points, labels, slope @ origin, slope @ free, outside, steps
        )

    # Up to a positive factor the bias gradient: low where a label occurs.
    bias = space.columns @ one
    likely = bias.argsort()[: max(_FEWEST_CLASSES, 3 * rank)]
    starts = _starts(space.columns[likely], bias[likely], origin, free, generator)
    labels = likely.repeat_interleave(len(starts))
    points, misfit = fit(starts.repeat(len(likely), 1), labels, _FIRST_STEPS)
    best = misfit.argsort()[:_KEPT_STARTS]
    labels = labels[best]
    points, misfit = fit(points[best], labels, _STEPS)
    coordinates = origin + points @ free.T
    errors, _ = _errors(coordinates @ slope.T, labels)
    good = (misfit < min(limit, 0.02)) & (errors.norm(dim=1) > _CERTAIN)
    labels, errors, misfit = labels[good], errors[good], misfit[good]
    coordinates = coordinates[good]
    kept = _distinct(labels, errors, misfit)
    return _Candidates(labels[kept], errors[kept], coordinates[kept], misfit[kept])


def _starts(
    columns: Tensor,
    bias: Tensor,
    origin: Tensor,
    free: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Starting points (T, r - 1): rows of the gradient, and mixtures of two.

    Row k of the weight gradient over entry k of the bias gradient is a weighted sum
    of the inputs; where one sample dominates the row, it is that sample's input.
    """
    bias = torch.where(bias.abs() < 1e-12, torch.full_like(bias, 1e-12), bias)
    rows = (columns / bias[:, None] - origin) @ free  # (classes, r - 1)
    first, second = torch.randint(len(rows), (2, _STARTS), generator=generator)
    weight = 1.5 * torch.rand(_STARTS, 1, generator=generator).to(rows) - 0.25
    mixed = weight * rows[first] + (1 - weight) * rows[second]
    spread = 1 + 0.3 * torch.randn(mixed.shape, generator=generator).to(rows)
    return torch.cat([rows, mixed * spread])


def _errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p - e_y (M, K) without cancellation at the label, and p."""
    probabilities = logits.softmax(1)
    hard = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    others = probabilities * (1 - hard)
    return others - hard * others.sum(1, keepdim=True), probabilities


def _levenberg_marquardt(
    points: Tensor,
    labels: Tensor,
    offset: Tensor,
    slope: Tensor,
    outside: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Minimise the part of the error's direction that lies outside the column space.

    Args:
        points: Starts (M, r - 1).
        labels: Label of every start, (M,).
        offset: Logits at the origin, (K,).
        slope: Logits per unit of a point, (K, r - 1).
        outside: Projector (K, K) away from the column space.
        steps: Number of steps.

    Returns:
        Points (M, r - 1) and misfits (M,).
    """
    hard = torch.nn.functional.one_hot(labels, len(offset)).to(points.dtype)
    tiny = torch.finfo(points.dtype).tiny

    def evaluate(points: Tensor) -> tuple[Tensor, ...]:
        errors, probabilities = _errors(offset + points @ slope.T, labels)
        length = errors.norm(dim=1, keepdim=True).clamp_min(tiny)
        direction = errors / length
        misfit = direction @ outside
        return misfit, misfit.square().sum(1), probabilities, direction, length

    misfit, loss, *state = evaluate(points)
    if not points.shape[1]:
        return points, loss.sqrt()
    damping = torch.full_like(loss, 1e-2)
    for _ in range(steps):
        probabilities, direction, length = state
        mean = probabilities @ slope
        change = probabilities[..., None] * (slope - mean[:, None])  # (M, K, r - 1)
        change = change * (1 - hard)[..., None]
        change = change - hard[..., None] * change.sum(1, keepdim=True)
        along = (direction[..., None] * change).sum(1, keepdim=True)
        change = (change - direction[..., None] * along) / length[..., None]
        jacobian = outside @ change
        normal = jacobian.mT @ jacobian
        scale = normal.diagonal(dim1=1, dim2=2)
        scale = scale + 1e-9 * scale.amax(1, keepdim=True) + tiny
        system = normal + torch.diag_embed(damping[:, None] * scale)
        step = torch.linalg.solve_ex(system, jacobian.mT @ misfit[..., None])[0]
        tried = points - step[..., 0]
        new_misfit, new_loss, *new_state = evaluate(tried)
        better = new_loss < loss
        points = torch.where(better[:, None], tried, points)
        misfit = torch.where(better[:, None], new_misfit, misfit)
        loss = torch.where(better, new_loss, loss)
        state = [
            torch.where(better[:, None], new, old)
            for new, old in zip(new_state, state, strict=True)
        ]
        damping = torch.where(better, damping / 4, damping * 3).clamp(1e-12, 1e8)
    return points, loss.sqrt()


def _distinct(labels: Tensor, errors: Tensor, misfit: Tensor) -> Tensor:
    """Indices of the best candidate of every cluster, best first."""
    direction = errors / errors.norm(dim=1, keepdim=True)
    kept: list[int] = []
    for index in misfit.argsort(stable=True).tolist():
        near = [
            k
            for k in kept
            if labels[k] == labels[index]
            and float((direction[k] - direction[index]).norm()) < 10 * _SAME
        ]
        if not near:
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


def _compatible(
    space: _Space, candidates: _Candidates, scale: float | None, limit: float
) -> Tensor:
    """Indices of the largest set of candidates that can be samples of one batch.

    With errors ``columns @ a_i`` and coordinates c_i of all samples,
    ``scale * c_i @ a_j`` is 1 for i = j and 0 otherwise.
    """
    errors = candidates.errors @ space.columns  # a, (M, r)
    products = candidates.coordinates @ errors.T  # (M, M)
    own = products.diagonal()
    lengths = candidates.coordinates.norm(dim=1)[:, None] * errors.norm(dim=1)
    apart = (products.abs() / lengths < limit) & (products.T.abs() / lengths.T < limit)
    apart &= (own[:, None] / own - 1).abs() < 2 * limit
    able = own > 0
    if scale is not None:
        able &= (scale * own - 1).abs() < limit
    nodes = able.nonzero().flatten().tolist()
    chosen = _largest_clique(apart, nodes)[: space.columns.shape[1]]
    return torch.tensor(chosen, dtype=torch.int64)


def _largest_clique(edges: Tensor, nodes: list[int], budget: int = 2000) -> list[int]:
    """The largest set of nodes that are all joined to each other, first ones first."""
    best: list[int] = []

    def grow(chosen: list[int], rest: list[int]) -> None:
        nonlocal best, budget
        budget -= 1
        if len(chosen) > len(best):
            best = chosen
        for place, node in enumerate(rest):
            if budget < 0 or len(chosen) + len(rest) - place <= len(best):
                return
            grow([*chosen, node], [k for k in rest[place + 1 :] if edges[node, k]])

    grow([], nodes)
    return best


def _polish(
    space: _Space, coordinates: Tensor, labels: Tensor, model: Tensor, scale: float
) -> tuple[Tensor, float]:
    """Gauss-Newton on the whole gradient, for all samples together.

    Returns:
        Coordinates (N, r), and the largest entry of what they leave unexplained.
    """
    slope, one = model @ space.rows, space.rows[-1]
    size = coordinates.shape[1]
    identity = torch.eye(size, dtype=model.dtype)
    fixed = torch.kron(torch.eye(len(labels), dtype=model.dtype), one[None])

    def evaluate(coordinates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        errors, probabilities = _errors(coordinates @ slope.T, labels)
        gap = scale * errors.T @ coordinates - space.columns
        rest = torch.cat([gap.flatten(), coordinates @ one - 1])
        return rest, errors, probabilities

    rest, errors, probabilities = evaluate(coordinates)
    for _ in range(_POLISHING_STEPS):
        mean = probabilities @ slope
        change = probabilities[..., None] * (slope - mean[:, None])  # (N, K, r)
        jacobian = torch.einsum("nkt,ns->ksnt", change, coordinates)
        jacobian += torch.einsum("nk,st->ksnt", errors, identity)
        jacobian = scale * jacobian.reshape(len(slope) * size, -1)
        step = torch.linalg.lstsq(torch.cat([jacobian, fixed]), -rest[:, None])
        tried = coordinates + step.solution.reshape(coordinates.shape)
        new, *state = evaluate(tried)
        if not new.norm() < rest.norm():
            break
        coordinates, rest, (errors, probabilities) = tried, new, state
    return coordinates, float(rest.abs().max())
