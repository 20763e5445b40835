r"""Which classes a client holds, and in which shares, from what it sends.

The bias gradient of the last layer is mean prediction minus label shares. A weight
change is the sum of such gradients along the client's way. An attacker with a few
labelled images of its own pushes them through models on that way: their predictions
are what the client's images of each class would have been predicted to be.
Taught in: notebooks/07_iid_noniid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gradinv_helpers.attacks.label_counts import nearest_counts
from gradinv_helpers.attacks.labels import infer_label_counts
from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    bias_noise,
    gains,
    groups_of,
    last_linear,
    mean_gradient,
    parameter_name,
    read_last_layer,
)
from gradinv_helpers.compute import cpu_threads, private_randomness
from gradinv_helpers.errors import InputError, check_choice, check_seed
from gradinv_helpers.updates import SharedUpdate

Weights = dict[str, Tensor]

PROPORTION_METHODS: tuple[str, ...] = ("auto", "examples", "counts")

_ROUNDS = 3  # of proportions and way in turn
_PATH_POINTS = 16
_CLEARLY_BETTER = 0.5  # cosine of another candidate, above that of even shares
_SIMULATED = 6  # clients of each candidate
_SCATTER = 3.5  # times that of simulated clients, which own few examples
_FEW = 2  # images per class; clients with fewer cannot hold any given shares
_MOST_ROWS = 20  # classes up to which the weights of the last layer are used, too
_MOST_CLASSES = 200
_LEAST_SHARE = 2e-3
_LEAST_VARIANCE = 1e-4
# Images of the attacker are not those of the client: predictions of a class are off by
# such a share, and evidence counts for less than if all of it were independent.
_MODEL_ERROR = 0.1
_EVIDENCE = 0.2
_SPREAD_WEIGHT = 3.0  # of the prior that prefers near-equal shares
_NEAR_EQUAL = 0.1  # scatter of log shares that this prior takes for equal


def infer_class_proportions(
    update: SharedUpdate,
    *,
    examples: Tensor | None = None,
    example_labels: Tensor | None = None,
    method: str = "auto",
    seed: int = 0,
) -> Tensor:
    r"""Estimate the share of every class among the images behind an update.

    With labelled images of the attacker's own, the mean gradient of the last layer is
    explained as a mixture: an example of class c contributes
    :math:`(p(t) - e_c)\, h(t)^\top`, averaged over the client's steps t, so that

    .. math::
        \bar g \sim \mathcal N\Big(\sum_c \pi_c R_c,\;
        \sum_c \big(\tfrac{\pi_c}{N} + \tfrac{\pi_c^2}{m_c}\big) C_c + \dots\Big)

    with the mean :math:`R_c` and the covariance :math:`C_c` of these contributions
    over the :math:`m_c` examples of class c. The way of the client is simulated with
    examples drawn in the current proportions and made to end where the client's model
    ended; proportions and way are improved in turn. After several steps this answer
    competes with even shares, with the counts of labels and with a middle way: clients
    of all these proportions are simulated, and those whose change points the way of the
    update win. Even shares are kept where the update could be of such a client.

    Without examples, or where Adam or an unknown scale hides the mean gradient, the
    labels are counted by ``infer_label_counts``, which needs no images. Its counts
    are good where few classes prevail and poor for trained models and even shares.

    Args:
        update: What the server saw; a gradient or a weight change.
        examples: Images (M, C, H, W) in [0, 1] that are *not* the client's, at least
            two of each class.
        example_labels: Their classes (M,).
        method: ``examples``, ``counts``, or ``auto`` for the first that fits.
        seed: Seed of the simulated training and of ``infer_label_counts``.

    Returns:
        Shares (K,), float64 on the CPU, of sum 1.

    Raises:
        InputError: Examples of a wrong shape or too few of them, or a method that
            does not fit the update.

    Source: Chen and Vikalo (2024) for counts by simulated training; the mixture of
    examples is our own.
    Taught in: notebooks/07_iid_noniid.
    """
    check_choice("method", method, PROPORTION_METHODS)
    check_seed("seed", seed)
    layer = read_last_layer(update)
    given = _checked_examples(update, layer, examples, example_labels)
    obstacle = _obstacle(update, layer, given is not None)
    if method == "counts" or (method == "auto" and obstacle):
        counts = infer_label_counts(update, seed=seed).double()
        return counts / counts.sum()
    if given is None or obstacle:
        raise InputError("update", "what method 'examples' needs", obstacle)
    device = given[0].device
    with cpu_threads(0), private_randomness(seed, device):
        return _by_examples(update, layer, *given, seed)


def _obstacle(update: SharedUpdate, layer: LastLayer, has_examples: bool) -> str:
    """Why a mixture of examples cannot be fitted; empty where it can."""
    if not has_examples:
        return "no examples"
    if update.normalized:
        return "normalised clients, whose scale is unknown"
    if update.kind == "delta" and update.training.optimiser == "adam":
        return "a change by Adam, which is no sum of gradients"
    if layer.num_classes > _MOST_CLASSES:
        return f"more than {_MOST_CLASSES} classes"
    return ""


def _checked_examples(
    update: SharedUpdate,
    layer: LastLayer,
    examples: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Examples and labels where the model is, or ``None`` where none were given."""
    if examples is None and labels is None:
        return None
    if examples is None or labels is None:
        raise InputError("examples", "examples and example_labels together", "one")
    shape = tuple(examples.shape)
    if len(shape) != 4 or shape[1:] != update.image_shape:
        wanted = ", ".join(map(str, update.image_shape))
        raise InputError("examples", f"shape (M, {wanted})", shape)
    if labels.shape != shape[:1] or labels.is_floating_point():
        raise InputError("example_labels", f"{shape[0]} integers", tuple(labels.shape))
    if int(labels.min()) < 0 or int(labels.max()) >= layer.num_classes:
        raise InputError(
            "example_labels",
            f"classes 0 to {layer.num_classes - 1}",
            f"{int(labels.min())} to {int(labels.max())}",
        )
    fewest = int(labels.bincount(minlength=layer.num_classes).min())
    if fewest < 2:
        raise InputError("examples", "at least two of every class", fewest)
    like = next(iter(update.tensors.values()))
    return examples.to(like.device, like.dtype), labels.to(like.device)


# --- the mixture ------------------------------------------------------------------


@dataclass(frozen=True)
class _Mixture:
    """What examples of every class contribute to the mean gradient.

    Args:
        means: (K, F).
        covariances: Of one example, (K, F, F).
        examples: Number of examples of each class, (K,).
        observed: The client's mean gradient (F,).
        lenses: Directions (L, d + 1) in which features were looked at.
        noise: Covariance of noise in it, (F, F).
        num_samples: Images of the client.
        evidence: Weight of the likelihood beside the prior.
    """

    means: Tensor
    covariances: Tensor
    examples: Tensor
    observed: Tensor
    lenses: Tensor
    noise: Tensor
    num_samples: int
    evidence: float

    def cost(self, logits: Tensor) -> Tensor:
        """Minus log posterior of the shares ``softmax(logits)``, tempered."""
        shares = logits.softmax(0)
        mean = shares @ self.means
        weight = shares / self.num_samples + shares.square() / self.examples
        parts = shares[:, None] * self.means
        covariance = torch.einsum("c,cij->ij", weight, self.covariances)
        covariance = covariance + _MODEL_ERROR**2 * parts.T @ parts + self.noise
        factor = torch.linalg.cholesky(covariance)
        left = (self.observed - mean)[:, None]
        residual = torch.linalg.solve_triangular(factor, left, upper=False)
        misfit = residual.square().sum() / 2 + factor.diagonal().log().sum()
        scatter = (logits - logits.mean()).square().sum() + len(logits) * _NEAR_EQUAL**2
        return self.evidence * misfit + _SPREAD_WEIGHT / 2 * scatter.log()

    def solve(self, starts: list[Tensor]) -> Tensor:
        """Likeliest shares (K,), the best of searches from several starts."""
        best = (math.inf, starts[0])
        for start in starts:
            logits = start.clamp_min(_LEAST_SHARE).log()
            logits = (logits - logits.mean()).requires_grad_()
            search = torch.optim.LBFGS(
                [logits], max_iter=40, line_search_fn="strong_wolfe"
            )

            def closure() -> Tensor:
                search.zero_grad()  # noqa: B023
                value = self.cost(logits)  # noqa: B023
                value.backward()
                return value

            search.step(closure)
            value = self.cost(logits).item()
            if value < best[0]:
                best = (value, logits.detach().softmax(0))
        return best[1]


def _by_examples(
    update: SharedUpdate,
    layer: LastLayer,
    examples: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    """Shares (K,), improved in turn with the simulated way of the client."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = layer.num_classes
    even = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    counts = infer_label_counts(update, seed=seed).double()
    starts = [even, counts / counts.sum()]
    steps = 1
    if update.kind == "delta":
        steps = max(update.training.num_steps(n) for n in update.group_sizes or ())
    shares = even
    for turn in range(_ROUNDS if steps > 1 else 1):
        way = _way(update, examples, labels, shares, steps, generator)
        mixture = _mixture(update, layer, examples, labels, way, steps)
        found = mixture.solve([*starts, shares] if turn else starts)
        shares = (shares + found) / 2 if turn else found
    if steps == 1:
        return shares
    counted = counts / counts.sum()
    observed, lenses = mixture.observed, mixture.lenses

    def clients(own: Tensor) -> Tensor:
        return _simulated(update, layer, examples, labels, lenses, own, generator)

    # How far a trained model still moves depends on whether it has seen the images,
    # and the examples it has not. So directions are compared, not lengths.
    candidates = [even, shares, counted, (shares + counted) / 2]
    simulated = [clients(own) for own in candidates]
    cosines = torch.stack(
        [F.cosine_similarity(observed, one.mean(0), dim=0) for one in simulated]
    )
    best = int(cosines.argmax())
    scatter = simulated[0].var(0).sum() + mixture.noise.trace()
    distance = (observed - simulated[0].mean(0)).square().sum()
    could_be_even = bool(distance < _SCATTER * scatter)
    could_be_even &= bool(cosines[best] - cosines[0] < _CLEARLY_BETTER)
    if could_be_even and update.num_samples >= _FEW * num_classes:
        return even
    return candidates[best]


def _mixture(
    update: SharedUpdate,
    layer: LastLayer,
    examples: Tensor,
    labels: Tensor,
    way: list[tuple[int, Weights]],
    steps: int,
) -> _Mixture:
    """Contributions of all examples along a way, and what was observed of them."""
    num_classes, own = layer.num_classes, labels.cpu()
    groups = groups_of(update, update.num_samples)
    passes = [_last_layer_pass(update, weights, examples) for _, weights in way]
    lenses = _lenses(passes[0][0], own, num_classes, layer.sent_bias is not None)
    labels_as_ones = F.one_hot(own, num_classes).double()
    found = torch.stack(
        [
            torch.einsum(
                "mk,ml->mkl", logits.softmax(1) - labels_as_ones, features @ lenses.T
            ).flatten(1)
            for features, logits in passes
        ]
    )
    times = torch.tensor([step for step, _ in way])
    each = torch.einsum("t,tmf->mf", _time_shares(update, times, steps), found)
    counts = own.bincount(minlength=num_classes).double()
    members = labels_as_ones / counts
    means = members.T @ each
    left = each - means[own]
    covariances = torch.stack(
        [
            left[own == k].T @ left[own == k] / (counts[k] - 1)
            for k in range(num_classes)
        ]
    )
    identity = torch.eye(num_classes, dtype=torch.float64)
    noise = torch.kron(identity, lenses @ lenses.T)
    scatter = covariances.diagonal(dim1=1, dim2=2).mean() / update.num_samples
    floor = _LEAST_VARIANCE * (scatter + means.square().mean())
    return _Mixture(
        means=means,
        covariances=covariances,
        examples=counts,
        observed=_observed(update, layer, groups, lenses),
        lenses=lenses,
        noise=bias_noise(update, layer, groups) ** 2 * noise
        + floor * torch.eye(means.shape[1], dtype=torch.float64),
        num_samples=update.num_samples,
        evidence=1.0 if steps == 1 else _EVIDENCE,
    )


def _observed(
    update: SharedUpdate, layer: LastLayer, groups: tuple[int, ...], lenses: Tensor
) -> Tensor:
    """Mean gradient of the last layer, seen through the lenses (K * L,)."""
    weight, bias = mean_gradient(update, layer, groups)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return (torch.cat([weight, bias[:, None]], 1) @ lenses.T).flatten()


def _lenses(
    features: Tensor, labels: Tensor, num_classes: int, has_bias: bool
) -> Tensor:
    """Directions (L, d + 1) in which features, and the bias's 1, are looked at.

    The mean feature of every class, and the constant that the bias multiplies.
    """
    rows = []
    if num_classes <= _MOST_ROWS or not has_bias:
        means = torch.stack([features[labels == k].mean(0) for k in range(num_classes)])
        means[:, -1] = 0
        rows.append(means / means.norm(dim=1).mean().clamp_min(1e-30))
    if has_bias:
        rows.append(F.one_hot(torch.tensor([features.shape[1] - 1])).double())
    return torch.cat(rows)


def _last_layer_pass(
    update: SharedUpdate, weights: Weights, examples: Tensor
) -> tuple[Tensor, Tensor]:
    """Features with a 1 behind them (M, d + 1) and logits (M, K), float64, CPU."""
    model = copy.deepcopy(update.model)  # batch statistics may change on the way
    seen: list[Tensor] = []
    layer = model.get_submodule(last_linear(update))
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        logits = functional_call(model, weights, (examples,))
    handle.remove()
    features = F.pad(seen[-1].double().cpu(), (0, 1), value=1.0)
    return features, logits.double().cpu()


# --- the way ----------------------------------------------------------------------


def _time_shares(update: SharedUpdate, times: Tensor, steps: int) -> Tensor:
    """How much of the mean gradient stems from each point of the way, sum 1."""
    counted = torch.ones(1, dtype=torch.float64)
    if update.kind == "delta":
        counted = gains(update.training, steps)
    nearest = (torch.arange(steps)[:, None] - times).abs().argmin(1)
    shares = torch.zeros(len(times), dtype=torch.float64)
    return shares.index_add_(0, nearest, counted / counted.sum())


def _way(
    update: SharedUpdate,
    examples: Tensor,
    labels: Tensor,
    shares: Tensor,
    steps: int,
    generator: torch.Generator,
) -> list[tuple[int, Weights]]:
    """Some steps of the client, and the weights before each of them.

    One client is simulated on examples drawn with the given shares. What it misses of
    the client's end is spread evenly over its steps.
    """
    points = torch.linspace(0, steps - 1, min(steps, _PATH_POINTS)).round().long()
    wanted = set(points.tolist())
    way = []
    batches = _batches(update, labels, shares, generator)
    for step, weights in enumerate(_trained(update, examples, labels, batches)):
        if step in wanted:
            way.append((step, {n: w.clone() for n, w in weights.items()}))
    before = way[0][1]
    missed = {n: before[n] + update.tensors[n] - w for n, w in weights.items()}
    return [
        (step, {n: w + step / steps * missed[n] for n, w in point.items()})
        for step, point in way
    ]


def _batches(
    update: SharedUpdate,
    labels: Tensor,
    shares: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """Indices of the examples in every local step of a client with these shares.

    It owns a bootstrap sample of the examples of each class, and shuffles them before
    every epoch. Where it has too few images to hold the shares, they are drawn afresh
    for each step.
    """
    recipe, own = update.training, labels.cpu()
    size = max(update.group_sizes or (update.num_samples,))
    if update.kind == "gradient" or recipe.num_steps(size) == 1:
        return []
    batch_size = min(recipe.batch_size or size, size)
    if size < _FEW * len(shares):
        chances = (shares / own.bincount(minlength=len(shares)))[own]
        return [
            torch.multinomial(chances, batch_size, True, generator=generator)
            for _ in range(recipe.num_steps(size))
        ]
    owned = []
    for k, count in enumerate(nearest_counts(size * shares, size).tolist()):
        known = (own == k).nonzero()[:, 0]
        luck = torch.randint(len(known), (len(known),), generator=generator)
        drawn = torch.randint(len(known), (count,), generator=generator)
        owned.append(known[luck][drawn])
    mine = torch.cat(owned)
    batches: list[Tensor] = []
    for _ in range(recipe.epochs):
        order = torch.randperm(size, generator=generator)
        batches.extend(mine[order].split(batch_size))
    return batches


def _trained(
    update: SharedUpdate, examples: Tensor, labels: Tensor, batches: list[Tensor]
) -> Iterator[Weights]:
    """Train on batches of examples: the weights before each step, and at the end.

    The tensors are those that the next step changes.
    """
    model = copy.deepcopy(update.model)
    trained = {n: p for n, p in model.named_parameters() if n in update.tensors}
    weights = {n: p.detach() for n, p in trained.items()}
    recipe = update.training
    optimiser = torch.optim.SGD(
        list(trained.values()),
        lr=recipe.rate,
        momentum=0.9 if recipe.optimiser == "momentum" else 0.0,
        weight_decay=recipe.weight_decay,
    )
    for batch in batches:
        yield weights
        drawn = batch.to(labels.device)
        optimiser.zero_grad()
        F.cross_entropy(model(examples[drawn]), labels[drawn]).backward()
        optimiser.step()
    yield weights


# --- candidates -------------------------------------------------------------------


def _simulated(
    update: SharedUpdate,
    layer: LastLayer,
    examples: Tensor,
    labels: Tensor,
    lenses: Tensor,
    shares: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean gradients (clients, F) of simulated clients with the given shares."""
    name, groups = last_linear(update), groups_of(update, update.num_samples)
    found = []
    for _ in range(_SIMULATED):
        batches = _batches(update, labels, shares, generator)
        *_, end = _trained(update, examples, labels, batches)
        weight = end[parameter_name(name, "weight")].double().cpu() - layer.weight
        bias = None
        if layer.sent_bias is not None:
            bias = end[parameter_name(name, "bias")].double().cpu() - layer.bias
        other = replace(layer, sent_weight=weight, sent_bias=bias)
        found.append(_observed(update, other, groups, lenses))
    return torch.stack(found)
