r"""A whole batch out of one gradient, where a linear layer and ReLU come first.

Let X (B, d) be what the first linear layer is fed and E (B, H) the derivative of the
loss by its outputs. With a column of ones beside X, weight and bias gradient are one
matrix of rank B,

.. math:: G = [\partial L/\partial W,\ \partial L/\partial b] = E^\top [X, 1] .

A factorisation of G gives E and X up to an unknown B x B matrix. ReLU ends the
ambiguity: it is off for many pairs of sample and unit, so E is sparse. In coordinates
of the row space, G becomes C (H, B), and every row of E is C q for some direction q
that makes it sparse. These directions are found by three observations:

- two parallel rows of C belong to units that one sample alone activates: they *are*
  this sample, which is then taken out of the search;
- the smallest eigenvector of :math:`\sum_r c_r c_r^\top / ((c_r q)^2 + \epsilon^2)`,
  taken again and again with shrinking :math:`\epsilon`, leads from a random start to a
  sparse direction. It does so far more often among units that a typical image hardly
  activates;
- a candidate image foretells which units are off for it. If it is right, the rows of
  these units miss one dimension, and the missing one is its q, to full precision.
  Each sample is confirmed on its own by this test.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.analytic import (
    LinearFront,
    class_fits,
    linear_front,
)
from gradinv_helpers.attacks.certificate import (
    HIGHEST_CONDITION,
    Certificate,
    LayerSolution,
    gradient_residual,
)
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.updates import SharedUpdate

METHOD = "low rank"

# Random starts per round, and the shares of units, those that a typical image
# activates least first, among which the rounds search in turn.
_STARTS = 64
_SHARES = (0.5, 0.35, 0.7, 1.0)
# Width of the weights at the start, its factor per step and its end, for rows of unit
# length.
_WIDTH, _SHRINK, _NARROW = 0.3, 0.7, 1e-6
# Entries of E count as zero below this many noise levels, or this share of their row.
_NOISE_LEVELS, _ZERO = 8.0, 1e-5
# Margins, in standard deviations over the units, by which a unit must be off to be
# foretold: an image that is not yet precise errs where a pre-activation is small.
_MARGINS = (0.0, 0.05, 0.2, 0.5)
# A confirmed sample may err in this share of the units; an exact one may only miss
# few that should speak, where E is as small as the noise.
_DISAGREEMENT, _SILENT = 0.05, 0.01
# Singular values that are looked at beyond the stated number of samples.
_BEYOND = 8


def invert_low_rank(
    update: SharedUpdate,
    *,
    labels: Tensor | None = None,
    rounds: int = 60,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Certificate]:
    r"""Solve for the batch behind the gradient of a linear layer and ReLU.

    The number of samples is the rank of the gradient, which may be less than
    ``update.num_samples`` if that is an upper bound. An image that occurs several
    times with one label is found once and returned as often. The label of a sample is
    the class whose error, sent back through the layers behind, points along its row of
    E.

    The certificate needs no Jacobian with respect to all B d pixels. Let S be the span
    of the differences of the samples, of dimension B - 1. The change of G is
    :math:`\dot E^\top [X, 1] + E^\top [\dot X, 0]`. As E has rank B, and the first
    term has its rows in the span of [X, 1], a change of the samples that leaves S
    shows on its own. What remains are B (B - 1) coordinates within S, with columns
    :math:`e_i [\nu_m, 0] + h_{im} [x_i, 1]`, where :math:`\nu_m` is a basis of S and
    :math:`h_{im}` the Hessian of the loss of sample i by the layer's outputs, times
    :math:`W \nu_m`. The rank is :math:`B (d - B + 1)` plus the rank of these columns:
    a lower bound, because the gradients of later layers are left out. Repeated images
    count once.

    Args:
        update: A gradient, or the weight change of one SGD step.
        labels: True labels (B,) if they are given; they fix the order of the result.
        rounds: Most rounds of 64 random starts; a batch that is found ends them.
        seed: Seed of the random starts.

    Returns:
        Images (B, C, H, W), in double precision and not clamped; labels (B,), by which
        they are sorted unless ``labels`` are given; the certificate. Where the rounds
        did not suffice, images that are not confirmed are a best guess, and only the
        pixels of the others count in the rank.

    Raises:
        InputError: The model does not begin with a linear layer with a bias and ReLU,
            the update is normalised or of several steps, or its rank is zero or above
            the number of samples.

    Source: Dimitrov et al. (2024), SPEAR, for low rank, sparsity and the greedy choice;
    the search and the confirmation of single samples are our own.
    Taught in: notebooks/03_stronger_matching.
    """
    check_count("rounds", rounds, minimum=0)
    check_seed("seed", seed)
    front = relu_front(copy.deepcopy(update.model).double())
    if update.normalized:
        raise InputError(
            "update",
            "a gradient of known length",
            "a normalised one",
            "the weights of the samples need its scale; use attack='auto'",
        )
    gradient = update.gradient()
    weight, bias = (gradient[f"{front.name}.{part}"] for part in ("weight", "bias"))
    generator = torch.Generator().manual_seed(seed)
    rows = _factorise(weight, bias, front.layer, update.num_samples, generator)
    found = _search(rows, rounds, generator)
    inputs, errors = found.inputs(rows), found.errors(rows)
    order, classes, counts = _label(front, inputs, errors, labels, update.num_samples)
    inputs, errors = inputs[order], errors[order]
    if bool(found.exact.all()):
        rank, condition = _jacobian_rank(front, inputs, errors, classes, counts)
    else:
        rank, condition = int(found.exact.sum()) * inputs.shape[1], math.inf
    images = front.images(inputs, update.image_shape).repeat_interleave(counts, 0)
    classes = classes.repeat_interleave(counts).cpu()
    equations = weight.numel() + bias.numel()
    layer = LayerSolution(front.name, inputs.numel(), equations, condition)
    residual = gradient_residual(update, images, classes)
    certificate = Certificate(
        METHOD, residual, inputs.numel(), rank, condition, (layer,)
    )
    return images, classes, certificate


def relu_front(model: nn.Module) -> LinearFront:
    """Split a model that begins with a linear layer and ReLU, behind which all is free.

    Args:
        model: Any classifier.

    Raises:
        InputError: The model begins in another way.

    Taught in: notebooks/03_stronger_matching.
    """
    front = linear_front(model)
    following = front.after[0] if len(front.after) else None
    if type(following) is not nn.ReLU:
        raise InputError(
            "model",
            f"a ReLU directly behind layer {front.name}",
            following or "nothing",
            "use attack='auto'",
        )
    return front


# --- the gradient as rows of coordinates -----------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The gradient of every unit in coordinates of the row space.

    Rows of ``values`` and all that follows it belong to units with a gradient; rows of
    ``all_values`` to all units.
    """

    basis: Tensor  # (B, d + 1), orthonormal
    all_values: Tensor  # (H, B)
    values: Tensor  # (h, B)
    noise: Tensor  # (h,), standard deviation of each coordinate
    outputs: Tensor  # (h, B): times coordinates of an input, its pre-activations

    @property
    def rank(self) -> int:
        return len(self.basis)

    @property
    def ones(self) -> Tensor:
        """What gives the last entry of [x, 1] from its coordinates: (B,)."""
        return self.basis[:, -1]

    @property
    def size(self) -> Tensor:
        return self.values.norm(dim=1)

    @property
    def noise_share(self) -> float:
        return float((self.noise / self.size).median())

    def directions(self) -> Tensor:
        """The rows at unit length: (h, B)."""
        return self.values / self.size[:, None]

    def is_zero(self, q: Tensor) -> Tensor:
        """Whether entries of C q vanish, for unit directions q (n, B): (n, h)."""
        least = torch.maximum(_NOISE_LEVELS * self.noise, _ZERO * self.size)
        return (q @ self.values.T).abs() < least

    def activity(self) -> Tensor:
        """Place of every unit by its pre-activation for a typical image: 0 to 1.

        Every row divided by its bias entry is a weighted mean of samples; the median
        of these is typical.
        """
        sums = self.values @ self.ones
        there = sums.abs() > 1e-9 * sums.abs().max()
        typical = (self.values[there] / sums[there, None]).median(0).values
        place = (self.outputs @ typical).argsort().argsort()
        return place.to(self.values) / len(place)


def _factorise(
    weight: Tensor,
    bias: Tensor,
    layer: nn.Linear,
    num_samples: int,
    generator: torch.Generator,
) -> _Rows:
    """Rank, row space and noise of a layer's gradient, by a randomised SVD."""
    matrix = torch.cat([weight, bias[:, None]], 1).double()
    height, width = matrix.shape
    looked = min(num_samples + _BEYOND, height, width)
    probe = torch.randn(width, looked, generator=generator, dtype=torch.float64)
    range_, _ = torch.linalg.qr(matrix @ probe.to(matrix))
    range_, _ = torch.linalg.qr(matrix @ (matrix.T @ range_))
    _, sizes, basis = torch.linalg.svd(range_.T @ matrix, full_matrices=False)
    floor = torch.finfo(weight.dtype).eps * float(sizes[0])
    if looked > num_samples:
        rest = matrix - range_ @ (range_.T @ matrix)
        room = max(1, height - looked) * max(1, width - looked)
        edge = float(rest.norm()) / room**0.5 * (height**0.5 + width**0.5)
        beyond = float(sizes[num_samples])
        if beyond > max(10 * edge, 100 * floor):
            raise InputError(
                "update",
                f"a gradient of rank {num_samples} at most, the number of samples",
                "one of higher rank in the first layer",
                "it is not the gradient of so few samples; use attack='auto'",
            )
        floor = max(floor, 4 * beyond)
    rank = int((sizes[:num_samples] > floor).sum())
    basis = basis[:rank]
    values = matrix @ basis.T
    noise = (matrix - values @ basis).norm(dim=1) / max(1, width - rank) ** 0.5
    size = values.norm(dim=1)
    noise = torch.maximum(noise, 8 * torch.finfo(torch.float64).eps * size)
    alive = size > 10 * rank**0.5 * noise
    if int(alive.sum()) < max(1, rank):
        got = "zeros or noise alone"
        raise InputError("update", "a gradient in the first layer", got)
    own = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().to(basis)
    return _Rows(basis, values, values[alive], noise[alive], own[alive] @ basis.T)


# --- the search for sparse directions --------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Directions q of confirmed samples, and coordinates p of these samples.

    A direction is precise as soon as it is confirmed. Coordinates are ``exact`` if they
    come from units of this sample alone, or once all directions are known.
    """

    q: Tensor  # (m, B), of unit length
    p: Tensor  # (m, B), scaled so that the last entry of [x, 1] is one
    exact: Tensor  # (m,)

    @classmethod
    def nothing(cls, rows: _Rows) -> _Found:
        none = rows.values.new_zeros(0, rows.rank)
        return cls(none, none, torch.zeros(0, dtype=torch.bool, device=none.device))

    def inputs(self, rows: _Rows) -> Tensor:
        """What the layer was fed, (m, d)."""
        augmented = self.p @ rows.basis
        return augmented[:, :-1]

    def errors(self, rows: _Rows) -> Tensor:
        """Derivative of the loss by the layer's outputs, (m, H)."""
        scale = (self.q * self.p).sum(1, keepdim=True)
        return self.q / scale @ rows.all_values.T

    def merge(self, others: _Found) -> _Found:
        """Add new directions; take an exact p for a direction that has none."""
        q, p, exact = (t.clone() for t in (self.q, self.p, self.exact))
        new = []
        for i in range(len(others.q)):
            same = (q @ others.q[i]).abs() > 1 - 1e-6
            place = int(same.to(q).argmax()) if bool(same.any()) else -1
            if place < 0:
                new.append(i)
            elif others.exact[i] and not exact[place]:
                p[place], exact[place] = others.p[i], True
        return _Found(
            torch.cat([q, others.q[new]]),
            torch.cat([p, others.p[new]]),
            torch.cat([exact, others.exact[new]]),
        )


def _search(rows: _Rows, rounds: int, generator: torch.Generator) -> _Found:
    """Take the samples apart: one direction per dimension, confirmed or not."""
    found = _confirm(rows, _parallel_rows(rows), precise=True)
    open_ = _complement(found.p[found.exact])  # (k, B), where the others must lie
    activity = rows.activity()
    many = len(open_) > 1  # a single direction needs no search
    pool = open_[:0] if many else open_
    spaces = [_space(rows, open_, activity < share) for share in _SHARES if many]
    for place in range(rounds if many else 1):
        if len(found.q) >= rows.rank:
            break
        space = spaces[place % len(spaces)] if many else None
        if space is not None:
            pool = torch.cat([pool, space.sparse_directions(generator)])
        # Zeros of units that everything activates tell less.
        zeros = rows.is_zero(pool).to(pool) @ (1 - activity)
        pool = pool[zeros.argsort(descending=True, stable=True)]
        known = found.q[~found.exact]
        candidates = torch.cat([known, pool])
        candidates = candidates[_independent(candidates @ open_.T)]
        pool = candidates[len(known) :]
        if len(candidates) == len(open_):
            found = found.merge(_confirm(rows, _coordinates(found, candidates)))
    return _complete(rows, found, pool)


def _complete(rows: _Rows, found: _Found, pool: Tensor) -> _Found:
    """As many directions as the rank, confirmed or not, and their coordinates."""
    q = torch.cat([found.q, pool, torch.eye(rows.rank).to(pool)])
    kept = _independent(q)
    p = torch.linalg.inv(q[kept]).T
    p = p / _away_from_zero(p @ rows.ones)[:, None]
    if len(found.q) == rows.rank == 1 + kept[-1]:
        return replace(found, p=p, exact=torch.ones_like(found.exact))
    # Coordinates of one sample have no part in the direction of another one.
    parts = (F.normalize(found.p, dim=1) @ found.q.T).abs().fill_diagonal_(0)
    pure = parts < max(1e-6, 100 * rows.noise_share)
    exact = F.pad(found.exact & pure.all(1), (0, len(q) - len(found.q)))[kept]
    p[exact] = F.pad(found.p, (0, 0, 0, len(q) - len(found.q)))[kept][exact]
    return _Found(q[kept], p, exact)


def _coordinates(found: _Found, candidates: Tensor) -> Tensor:
    """Coordinates of the candidates, given those that are known: (k, B)."""
    exact = found.q[found.exact]
    return torch.linalg.pinv(torch.cat([exact, candidates])).T[len(exact) :]


def _confirm(rows: _Rows, p: Tensor, *, precise: bool = False) -> _Found:
    """Those of the candidates p (n, B) whose silent units miss just one dimension.

    If the candidates are ``precise``, those that no unit contradicts are exact.
    """
    found = _Found.nothing(rows)
    last = p @ rows.ones
    there = last.abs() > 1e-9 * p.norm(dim=1)
    p = p[there] / last[there, None]
    if rows.rank == 1 or not len(p):
        exact = torch.ones(len(p), dtype=torch.bool, device=p.device)
        return _Found(F.normalize(p, dim=1), p, exact)
    outputs = p @ rows.outputs.T  # (n, h)
    spread = outputs.std(1)
    margins = spread[:, None] * torch.tensor(_MARGINS).to(p)
    silent = outputs[:, None] < -margins[:, :, None]  # (n, margins, h)
    enough = silent.sum(2) >= rows.rank + 2
    moments = silent.to(p) @ _products(rows.directions())
    values = torch.linalg.eigvalsh(moments.unflatten(2, (rows.rank, rows.rank)))
    hopeful = enough & (values[..., 0] < 1e-4 * values[..., 1])
    white = rows.values / rows.noise[:, None]
    for i, j in hopeful.nonzero().tolist():
        block = white[silent[i, j]]
        _, sizes, directions = torch.linalg.svd(block, full_matrices=False)
        sizes = sizes / len(block) ** 0.5  # in noise levels
        if sizes[-1] > 10 or sizes[-2] < 30 * sizes[-1].clamp_min(1):
            continue
        q = directions[-1]
        on = (rows.values @ q).abs() > _NOISE_LEVELS * rows.noise
        wrongly_on = on & (outputs[i] < -1e-6 * spread[i])
        wrongly_off = ~on & (outputs[i] > 1e-6 * spread[i])
        # Few rows may miss a dimension by accident, but q then lives elsewhere too.
        if float((wrongly_on | wrongly_off).double().mean()) > _DISAGREEMENT:
            continue
        agrees = ~wrongly_on.any() & (wrongly_off.double().mean() < _SILENT)
        exact = agrees & precise
        found = found.merge(_Found(q[None], p[i : i + 1], exact[None]))
    return found


def _parallel_rows(rows: _Rows) -> Tensor:
    """One row of every group of parallel ones, the largest groups first."""
    directions = rows.directions()
    share = rows.noise / rows.size
    apart = 1 - (directions @ directions.T).square()
    bound = 10 * rows.rank**0.5 * (share[:, None] + share)
    parallel = apart < bound.square() + 1e-14
    parallel.fill_diagonal_(False)
    counts = parallel.sum(1)
    taken = counts == 0
    heads: list[int] = []
    for unit in counts.argsort(descending=True, stable=True).tolist():
        if not taken[unit] and len(heads) < 4 * rows.rank:
            heads.append(unit)
            taken |= parallel[unit]
    return rows.values[heads]


@dataclass(frozen=True)
class _Space:
    """Rows of some units in the part of the space that is still open.

    ``rows`` (h, k) have unit length and moments close to the identity; ``back`` (k, B)
    turns their directions into those of all coordinates.
    """

    rows: Tensor
    back: Tensor
    narrow: float

    def sparse_directions(self, generator: torch.Generator) -> Tensor:
        """Unit directions (starts, B) with many zeros, from random starts."""
        size = self.rows.shape[1]
        chosen = torch.rand(_STARTS, len(self.rows), generator=generator)
        chosen = chosen.argsort(1)[:, : size - 1].to(self.rows.device)
        q = _smallest(self.rows[chosen].mT @ self.rows[chosen])
        products = _products(self.rows)
        width = _WIDTH
        while True:
            weights = 1 / ((q @ self.rows.T).square() + width**2)
            q = _smallest((weights @ products).unflatten(1, (size, size)))
            if width <= self.narrow:
                return F.normalize(q @ self.back, dim=1)
            width = max(self.narrow, width * _SHRINK)


def _space(rows: _Rows, open_: Tensor, units: Tensor) -> _Space | None:
    """The chosen units within the open space; ``None`` where they do not span it."""
    size = len(open_)
    inside = rows.values[units] @ open_.T
    share = rows.noise_share
    there = inside.norm(dim=1) > max(1e-6, 20 * size**0.5 * share) * rows.size[units]
    inside = F.normalize(inside[there], dim=1)
    if len(inside) < 2 * size:
        return None
    back = open_
    for _ in range(3):
        values, vectors = torch.linalg.eigh(inside.T @ inside / len(inside))
        if float(values[0]) < 1e-10:
            return None
        whiten = vectors / values.sqrt()
        inside, back = F.normalize(inside @ whiten, dim=1), whiten.T @ back
    return _Space(inside, back, max(_NARROW, share))


def _products(rows: Tensor) -> Tensor:
    """r r^T of every row (h, k), flat: (h, k * k)."""
    return (rows[:, :, None] * rows[:, None, :]).flatten(1)


def _smallest(matrices: Tensor) -> Tensor:
    """Eigenvector of the smallest eigenvalue: (n, k) for (n, k, k)."""
    return torch.linalg.eigh(matrices)[1][..., 0]


def _complement(vectors: Tensor) -> Tensor:
    """Orthonormal rows that span what is orthogonal to rows (m, B): (B - m, B)."""
    if not len(vectors):
        return torch.eye(vectors.shape[1]).to(vectors)
    return torch.linalg.svd(vectors, full_matrices=True)[2][len(vectors) :]


def _independent(vectors: Tensor) -> list[int]:
    """Places of rows that are not in the span of earlier ones."""
    kept: list[int] = []
    basis = vectors[:0]
    for place, vector in enumerate(F.normalize(vectors, dim=1)):
        rest = vector
        for _ in range(2):
            rest = rest - (basis @ rest) @ basis
        if float(rest.norm()) > 1e-4:
            basis = torch.cat([basis, F.normalize(rest, dim=0)[None]])
            kept.append(place)
            if len(kept) == vectors.shape[1]:
                break
    return kept


def _away_from_zero(values: Tensor) -> Tensor:
    tiny = values.abs() < 1e-12
    return torch.where(tiny, torch.full_like(values, 1e-12), values)


# --- labels and the certificate ---------------------------------------------------


def _label(
    front: LinearFront,
    inputs: Tensor,
    errors: Tensor,
    given: Tensor | None,
    num_samples: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the samples, their classes and how often each one occurs."""
    from scipy.optimize import linear_sum_assignment

    fits, weights = class_fits(front, inputs, errors)  # (m, K)
    if given is not None and len(given) == len(inputs):
        classes = given.to(fits.device).long()
        places, samples = linear_sum_assignment(-fits[:, classes].T.cpu().numpy())
        order = torch.as_tensor(samples)[torch.as_tensor(places).argsort()]
        order = order.to(fits.device)
    else:
        classes = fits.argmax(1)
        order = classes.argsort(stable=True)
        classes = classes[order]
    return order, classes, _count(weights[order, classes], num_samples)


def _count(shares: Tensor, num_samples: int) -> Tensor:
    """Occurrences of samples with these shares in the mean; one each where unclear."""
    for total in (num_samples, *range(len(shares), num_samples)):
        counts = (shares * total).round()
        fits = (shares * total - counts).abs().max() < 0.05
        if fits and counts.min() >= 1 and int(counts.sum()) == total:
            return counts.long()
    return torch.ones_like(shares, dtype=torch.long)


def _jacobian_rank(
    front: LinearFront,
    inputs: Tensor,
    errors: Tensor,
    classes: Tensor,
    counts: Tensor,
) -> tuple[int, float]:
    """Rank and condition of the Jacobian of the first layer's gradient.

    The singular values of E stand for changes that leave the span of the samples.
    """
    size, width = inputs.shape
    sizes = torch.linalg.svdvals(errors)
    spans = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2]
    spans = spans[: size - 1]  # (s, d), orthonormal directions of S
    outside = size * (width - len(spans))
    rank = outside if bool(sizes[-1] * HIGHEST_CONDITION > sizes[0]) else 0
    if len(spans):
        bends = _bends(front, inputs, classes, counts / counts.sum(), spans)
        gram = _inner_gram(inputs, errors, spans, bends)
        inner = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
        rounding = (10 * len(gram) * torch.finfo(gram.dtype).eps) ** 0.5
        least = max(1 / HIGHEST_CONDITION, rounding) * inner[-1]
        rank += int((inner > least).sum())
        sizes = torch.cat([sizes, inner])
    full = rank == size * width
    return rank, float(sizes.max() / sizes.min()) if full else math.inf


def _inner_gram(inputs: Tensor, errors: Tensor, spans: Tensor, bends: Tensor) -> Tensor:
    """J^T J of the first layer's gradient for moves within S: (B s, B s).

    Moving sample i along direction m changes G by e_i [nu_m, 0] + h_im [x_i, 1].
    """
    overlap = inputs @ inputs.T + 1  # of [x_i, 1] with [x_j, 1]
    along = inputs @ spans.T  # (B, s)
    same = torch.eye(len(spans)).to(spans)
    gram = torch.einsum("ij,mn->imjn", errors @ errors.T, same)
    mixed = torch.einsum("ih,jnh,jm->imjn", errors, bends, along)
    bent = torch.einsum("imh,jnh,ij->imjn", bends, bends, overlap)
    gram = gram + mixed + mixed.permute(2, 3, 0, 1) + bent
    return gram.flatten(2).flatten(0, 1)


def _bends(
    front: LinearFront,
    inputs: Tensor,
    classes: Tensor,
    shares: Tensor,
    directions: Tensor,
) -> Tensor:
    """Change of every row of E as its sample moves along directions: (B, s, H)."""
    outputs = front.layer(inputs).detach().requires_grad_()
    moves = directions @ front.layer.weight.detach().T
    with torch.enable_grad():
        logits = front.after(outputs.clone())
        losses = F.cross_entropy(logits, classes, reduction="none")
        (error,) = torch.autograd.grad(
            (losses * shares).sum(), outputs, create_graph=True
        )
        products = [
            torch.autograd.grad((error @ move).sum(), outputs, retain_graph=True)[0]
            for move in moves
        ]
    return torch.stack(products, 1)
