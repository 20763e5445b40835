r"""The learning rate of a client, from the change of weights that it sent.

A server that runs FedAvg prescribes the rate; one that only sees what arrives does not
know it, and a change :math:`\Delta = -\eta \sum_s g_s` seems to leave the scale of the
gradients open. The last layer does not. There a sample's gradient is
:math:`(p - y)\,(h^\top, 1)`, so that rows and bias of the change give the feature h
whatever the rate, h gives the prediction p by the known weights, and

.. math:: \eta = \frac{\langle \Delta_b,\, n/N - \bar p\rangle}
                      {\|n/N - \bar p\|^2}

for one step by SGD: exactly for one sample, and up to the scatter of predictions for
several, with the label counts n that fit the direction of the change best. Over several
steps predictions move; the last layer alone is then replayed on h, at every rate of a
fine grid, and the rate whose change fits is taken.

That leaves out that features move as well, and that samples differ. The rate is
therefore one more unknown of the posterior: whatever images are tried, the rate is the
one that fits them best, while the annealing falls. For a wrong rate there are images
that make up for much of it, so fitting them in turn stands still.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.free_rate import with_fitted_rate, with_free_rate
from gradinv_helpers.attacks.label_counts import (
    mean_feature,
    nearest_counts,
    predictions_of,
    with_bias,
)
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    dummy_features,
    gains,
    mean_gain,
    read_last_layer,
)
from gradinv_helpers.attacks.optimise import Minimiser, TrialState
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.replay import Batches, Order, local_batches
from gradinv_helpers.compute import cpu_threads
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.priors.library import load_prior
from gradinv_helpers.updates import LocalTraining, SharedUpdate

# Rates that are tried: from what the bias change needs at least, upwards.
_GRID, _SPAN = 400, 1e4
_MARGIN = 0.5  # of that least rate: momentum and decay are not counted exactly
_ORDERS_FEW, _ORDERS_MANY, _FEW = 64, 8, 8  # orders that are tried; samples
_MOST_COUNTS = 24  # label counts that are replayed
_RIVALS, _WORSE, _SLACK = 3, 3.0, 0.01  # hypotheses that images decide on
_SURE = 1e-3  # smaller misses of one step leave nothing to refine
_LEVELS = (1e-1, 3e-2, 1e-2, 3e-3)
_ITERATIONS, _FLAT, _PATIENCE = 3, 1e-3, 2  # per level, of 20 updates each
_MOMENTUM = 0.9
_GOLDEN, _NARROWINGS = (5**0.5 - 1) / 2, 40


@dataclass(frozen=True)
class LearningRateEstimate:
    """A learning rate that an update gives away.

    Args:
        lr: The rate.
        first: What the last layer alone says; for Adam, the largest entry.
        labels: Labels (N,) that go with it; given or inferred.
        order: The images of every local step, by place among the labels, where the
            client takes several batches and an order fits; otherwise ``averaged``.
        misfit: Distance of the fitted change to the one sent, as a share of it; of
            the last layer's bias alone where no images were fitted. NaN for several
            steps of Adam without images.
        source: How the rate was found, in words.

    Taught in: notebooks/04_aggregated_gradients.
    """

    lr: float
    first: float
    labels: Tensor
    order: Order
    misfit: float
    source: str

    @property
    def note(self) -> str:
        """What to add to the reason of an attack at this rate."""
        return f"; learning rate {self.lr:.4g} inferred ({self.source})"

    def fill(self, update: SharedUpdate) -> SharedUpdate:
        """The update, its recipe completed by the rate found."""
        return _at(update, self.lr)


def infer_learning_rate(
    update: SharedUpdate,
    *,
    prior: ImagePrior | str = "spectrum",
    labels: Tensor | Sequence[int] | None = None,
    order: Order | None = None,
    refine: bool = True,
    seed: int = 0,
) -> LearningRateEstimate:
    r"""Find the learning rate with which a client computed its weight change.

    Any rate in the update's recipe is ignored. The estimate scales with the update as
    it must: a change that is c times as large after one step of SGD has c times the
    rate. Adam's first step is the sign of the gradient times the rate, so that its
    largest entry is the rate; of several steps, some entry hardly ever turns around,
    and the largest entry by the number of steps is little less than the rate.

    Rates so large that one step turns the predictions around are found poorly: what
    the later steps do depends on them no more, or erratically.

    Args:
        update: A weight change, of one client or of several with one rate.
        prior: What is known of images, as for ``map_estimate``.
        labels: True labels (N,), if the attacker is given them; found together with
            the rate otherwise.
        order: The images of every local step, if the attacker knows them; labels are
            then by place.
        refine: Whether images are fitted together with the rate. Otherwise the last
            layer alone is asked, which takes a fraction of a second.
        seed: Seed of dummy images and of the orders that are tried.

    Returns:
        The rate, with the labels that go with it.

    Raises:
        InputError: The update is a gradient, normalised, encoded or zero, or its
            model does not end with a linear layer.

    Taught in: notebooks/04_aggregated_gradients.
    """
    levels = _LEVELS if refine else ()
    return _inferred(update, prior, labels, order, levels, seed)[0]


def first_learning_rate(
    update: SharedUpdate,
    *,
    prior: ImagePrior,
    labels: Tensor | None = None,
    order: Order | None = None,
    seed: int = 0,
) -> tuple[LearningRateEstimate, bool]:
    """The rate from which a fit of images sets out that goes on refining it.

    Returns:
        The estimate, for which images were fitted only to decide between several
        explanations, and whether it is exact.

    Taught in: notebooks/04_aggregated_gradients.
    """
    return _inferred(update, prior, labels, order, _LEVELS[:1], seed)


def _inferred(
    update: SharedUpdate,
    prior: ImagePrior | str,
    labels: Tensor | Sequence[int] | None,
    order: Order | None,
    levels: Sequence[float],
    seed: int,
) -> tuple[LearningRateEstimate, bool]:
    """The rate, refined with images at some levels, and whether it needs no more.

    One level serves to choose, and is left out where there is no choice.
    """
    check_seed("seed", seed)
    _check(update)
    layer = read_last_layer(update)
    if labels is not None:
        labels = _checked_labels(labels, update, layer)
    if isinstance(order, str) and order == "sequential":
        order = local_batches(update.num_samples, update.training)
    with cpu_threads(0):
        rivals = _by_last_layer(update, layer, labels, order, seed)
    best = rivals[0]
    settled = _steps(update) == 1 and len(rivals) == 1 and best.miss < _SURE
    if settled or (len(levels) < 2 and len(rivals) == 1) or not levels:
        return _estimate(best, best.lr, best.miss, _source(update)), settled
    known = load_prior(prior, update.image_shape) if isinstance(prior, str) else prior
    fits = [_Fit(update, known, rival) for rival in rivals]
    with cpu_threads(fits[0].posterior.work):
        for number, level in enumerate(levels):
            for fit in fits:
                fit.descend(level)
            if number == 0:  # the prior's choice; the others cost as much again
                fits = [min(fits, key=lambda fit: fit.lowest)]
    fit = fits[0]
    source = f"{_source(update)}, then images"
    return _estimate(fit.rival, fit.lr, fit.misfit(), source), False


def learning_rate_profile(
    update: SharedUpdate,
    rates: Sequence[float],
    *,
    labels: Tensor | Sequence[int],
    prior: ImagePrior | str = "spectrum",
    order: Order = "averaged",
    level: float = 3e-2,
    iterations: int = 4,
) -> Tensor:
    """Fit images at each of some learning rates, and see how well they explain.

    Args:
        update: A weight change.
        rates: Learning rates.
        labels: Labels (N,).
        prior: What is known of images.
        order: As for ``replay_map``.
        level: Tempering, as a share of every layer's norm.
        iterations: Most iterations for the first rate, of 20 updates each; every
            other rate starts from the images of the one before.

    Returns:
        Relative distance (R,) of the fitted change to the one sent, float64.

    Raises:
        InputError: As for ``infer_learning_rate``, or there are no rates.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("iterations", iterations)
    _check(update)
    if not len(rates):
        raise InputError("rates", "at least one learning rate", "none")
    given = _checked_labels(labels, update, read_last_layer(update))
    known = load_prior(prior, update.image_shape) if isinstance(prior, str) else prior
    posterior = Posterior(_at(update, float(rates[0])), known, given, order=order)
    point = posterior.like.new_zeros(1, posterior.size)
    found = []
    with cpu_threads(posterior.work):
        for rate in rates:
            there = posterior.with_rate(float(rate))

            def energy(points: Tensor, _: Tensor, at: Posterior = there) -> _Energy:
                return at.energy(points, level)

            point = _minimised(energy, point, iterations)[0]
            found.append(float(there.misfit(point)[0].sqrt()))
    return torch.tensor(found, dtype=torch.float64)


def rate_is_missing(update: SharedUpdate) -> bool:
    """Whether an attack on an update has to infer its learning rate."""
    return update.kind == "delta" and update.training.lr is None


def with_learning_rate(
    update: SharedUpdate,
    *,
    prior: ImagePrior | str = "spectrum",
    labels: Tensor | Sequence[int] | None = None,
    order: Order | None = None,
    refine: bool = True,
    seed: int = 0,
) -> tuple[SharedUpdate, str]:
    """Fill in the learning rate of an update where its recipe leaves it open.

    Returns:
        The update with a rate, and what to add to the reason of an attack on it;
        empty where the rate was known.
    """
    if not rate_is_missing(update):
        return update, ""
    found = infer_learning_rate(
        update, prior=prior, labels=labels, order=order, refine=refine, seed=seed
    )
    return found.fill(update), found.note


# --- the last layer -----------------------------------------------------------------


@dataclass(frozen=True)
class _Rival:
    """One explanation of the last layer's change.

    Args:
        lr: Learning rate.
        labels: Labels (N,).
        order: The images of every local step.
        miss: Distance of its bias change to the one sent, as a share of it.
    """

    lr: float
    labels: Tensor
    order: Order
    miss: float


def _by_last_layer(
    update: SharedUpdate,
    layer: LastLayer,
    labels: Tensor | None,
    order: Order | None,
    seed: int,
) -> list[_Rival]:
    """What explains the last layer's change, the best first."""
    if update.training.optimiser == "adam":
        return [_by_largest_entry(update, labels, order, seed)]
    features = dummy_features(update, seed)
    weight, sent = with_bias(layer.sent_weight, layer.sent_bias, features)
    layer = replace(layer, sent_weight=weight, sent_bias=sent)
    feature = mean_feature((weight, sent))
    rates = _rates(update, sent)
    if labels is not None:
        sets = [labels]
    else:
        sets = _label_sets(update, layer, feature, features, rates)
    if _steps(update) == 1:
        found = [
            _one_step(update, layer, feature, features, given, order) for given in sets
        ]
    else:
        found = [
            _replay(update, layer, feature, given, order, rates, seed) for given in sets
        ]
    found.sort(key=lambda rival: rival.miss)
    worst = _WORSE * found[0].miss + _SLACK
    return [rival for rival in found[:_RIVALS] if rival.miss <= worst]


def _rates(update: SharedUpdate, sent: Tensor) -> Tensor:
    """Rates (R,) from the lowest that can have moved the bias so far.

    An entry of p - y is at most 1.
    """
    gain = mean_gain(update.training, update.group_sizes or ())
    least = float(sent.abs().max()) / gain
    ends = math.log(_MARGIN * least), math.log(_SPAN * least)
    return torch.linspace(*ends, _GRID, dtype=torch.float64).exp()


def _by_largest_entry(
    update: SharedUpdate, labels: Tensor | None, order: Order | None, seed: int
) -> _Rival:
    """Adam's rate, as if some entry had moved by it in every step, as in the first."""
    steps = _steps(update)
    rate = max(float(sent.abs().max()) for sent in update.tensors.values()) / steps
    if not rate:
        raise InputError("update", "a non-zero weight change", "all zeros")
    if labels is None:
        labels = infer_labels(_at(update, rate), seed=seed)
    miss = 0.0 if steps == 1 else math.nan  # of several, the bias alone does not say
    return _Rival(rate, labels, order or "averaged", miss)


def _label_sets(
    update: SharedUpdate,
    layer: LastLayer,
    feature: Tensor,
    features: Tensor,
    rates: Tensor,
) -> list[Tensor]:
    """Labels (N,) that go with some rate, as many as are worth a replay.

    At every rate the counts are N times mean prediction minus mean bias gradient. The
    prediction is that at the start, and the mean on the line between both models.
    """
    assert layer.sent_bias is not None
    count = update.num_samples
    if count == 1:
        return [layer.sent_bias.argmax()[None]]
    mean = layer.sent_bias / mean_gain(update.training, update.group_sizes or ())
    misses: dict[tuple[int, ...], float] = {}
    for expected in _predictions(update, layer, feature, features):
        for rate in rates:
            counts = nearest_counts(count * (expected + mean / rate), count)
            error = counts / count - expected
            scale = float((mean @ error) / (error @ error))
            miss = float((mean - scale * error).norm() / mean.norm())
            if scale > 0:
                key = tuple(counts.tolist())
                misses[key] = min(miss, misses.get(key, math.inf))
    if not misses:
        wanted = "a last layer that moves towards some labels"
        raise InputError("update", wanted, "one that moves away from all")
    chosen = sorted(misses, key=lambda key: (misses[key], key))[:_MOST_COUNTS]
    classes = torch.arange(layer.num_classes)
    return [torch.repeat_interleave(classes, torch.tensor(key)) for key in chosen]


def _predictions(
    update: SharedUpdate, layer: LastLayer, feature: Tensor, features: Tensor
) -> list[Tensor]:
    """Mean prediction (K,) before training, and on the way, with decay added."""
    assert layer.sent_bias is not None
    recipe, steps = update.training, _steps(update)
    scatter = features - features.mean(0)
    if update.num_samples == 1:
        scatter = torch.zeros_like(scatter[:1])
    counted = gains(recipe, steps)
    speeds = counted.flip(0) if recipe.optimiser == "momentum" else counted
    places = torch.cat([torch.zeros(1), speeds.cumsum(0)[:-1] / speeds.sum()])
    at = [
        predictions_of(
            layer.weight + place * layer.sent_weight,
            layer.bias + place * layer.sent_bias,
            feature[None],
            scatter,
        )[0]
        + recipe.weight_decay * (layer.bias + place * layer.sent_bias)
        for place in places.tolist()
    ]
    line = counted @ torch.stack(at) / counted.sum()
    return [at[0]] if steps == 1 else [at[0], line]


def _one_step(
    update: SharedUpdate,
    layer: LastLayer,
    feature: Tensor,
    features: Tensor,
    labels: Tensor,
    order: Order | None,
) -> _Rival:
    """The rate of one step in closed form."""
    assert layer.sent_bias is not None
    rest = order or "averaged"
    (expected,) = _predictions(update, layer, feature, features)
    error = _shares(labels, layer.num_classes) - expected
    rate = float((layer.sent_bias @ error) / (error @ error))
    if not rate > 0:  # labels that the update contradicts
        return _Rival(float(layer.sent_bias.abs().max()), labels, rest, math.inf)
    miss = (layer.sent_bias - rate * error).norm() / layer.sent_bias.norm()
    return _Rival(rate, labels, rest, float(miss))


def _replay(
    update: SharedUpdate,
    layer: LastLayer,
    feature: Tensor,
    labels: Tensor,
    order: Order | None,
    rates: Tensor,
    seed: int,
) -> _Rival:
    """The rate at which the last layer, trained on one feature, moves as it did."""
    sent = layer.sent_bias
    assert sent is not None
    orders = _orders(update, labels, order, seed)
    shares = torch.stack([
        torch.stack([_shares(labels[step], layer.num_classes) for step in steps])
        for steps in orders
    ])  # fmt: skip

    def miss(shares: Tensor, some: Tensor) -> Tensor:
        moved = _bias_change(update.training, layer, feature, shares, some)
        return (moved - sent).norm(dim=2) / sent.norm()

    found = miss(shares, rates).nan_to_num(nan=math.inf)
    place, index = divmod(int(found.argmin()), len(rates))
    ends = (rates[max(index - 1, 0)], rates[min(index + 1, len(rates) - 1)])
    best, value = _golden(
        lambda rate: float(miss(shares[place : place + 1], rate.reshape(1))), *ends
    )
    if order is None:
        order = orders[place] if _one_client(update) else "averaged"
    return _Rival(best, labels, order, value)


def _orders(
    update: SharedUpdate, labels: Tensor, order: Order | None, seed: int
) -> list[Batches]:
    """Orders of the images that differ in the labels of some step."""
    count, recipe = update.num_samples, update.training
    if order is not None and not isinstance(order, str) and _one_client(update):
        return [[torch.as_tensor(step) for step in order]]
    most = _ORDERS_FEW if count <= _FEW else _ORDERS_MANY
    found: dict[tuple[tuple[int, ...], ...], Batches] = {}
    for number in range(most):
        steps = local_batches(count, recipe, seed=seed + number if number else None)
        found.setdefault(
            tuple(tuple(sorted(labels[step].tolist())) for step in steps), steps
        )
    return list(found.values())


def _bias_change(
    recipe: LocalTraining,
    layer: LastLayer,
    feature: Tensor,
    shares: Tensor,
    rates: Tensor,
) -> Tensor:
    """Train the last layer on one feature with soft labels.

    Args:
        recipe: What is replayed.
        layer: The last layer.
        feature: Its input (d,).
        shares: Labels of every step, (S, T, K).
        rates: Learning rates (R,).

    Returns:
        Changes of the bias (S, R, K).
    """
    start = torch.stack([layer.weight @ feature, layer.bias])  # both parts of logits
    reach = torch.stack([feature.square().sum(), torch.ones(()).double()])[:, None]
    present = start.expand(len(shares), len(rates), -1, -1)
    speed, momentum = torch.zeros_like(present), 0.0
    if recipe.optimiser == "momentum":
        momentum = _MOMENTUM
    for targets in shares.unbind(1):
        error = present.sum(2).softmax(-1) - targets[:, None]
        slope = reach * error[:, :, None] + recipe.weight_decay * present
        speed = momentum * speed + slope
        present = present - rates[:, None, None] * speed
    return present[:, :, 1] - layer.bias


def _golden(
    value: Callable[[Tensor], float], low: Tensor, high: Tensor
) -> tuple[float, float]:
    """Minimum of a function of a rate between two rates, by golden section."""
    a, b = float(low.log()), float(high.log())

    def at(place: float) -> float:
        return value(torch.tensor(math.exp(place), dtype=torch.float64))

    left, right = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    f_left, f_right = at(left), at(right)
    for _ in range(_NARROWINGS):
        if f_left <= f_right:
            b, right, f_right = right, left, f_left
            left = b - _GOLDEN * (b - a)
            f_left = at(left)
        else:
            a, left, f_left = left, right, f_right
            right = a + _GOLDEN * (b - a)
            f_right = at(right)
    return math.exp((a + b) / 2), min(f_left, f_right)


# --- images and the rate together ----------------------------------------------------

_Energy = tuple[Tensor, Tensor]  # (T,), (T, size)


class _Fit:
    """Latents of the images, descending with a rate that is fitted along."""

    def __init__(self, update: SharedUpdate, prior: ImagePrior, rival: _Rival):
        self.rival, self.lowest = rival, math.inf
        start = _at(update, rival.lr)
        self.posterior = Posterior(start, prior, rival.labels, order=rival.order)
        like = self.posterior.like
        by_adam = update.training.optimiser == "adam"
        if by_adam and like.dtype == torch.float32 and like.device.type != "mps":
            self.posterior = self.posterior.double()  # its slope is lost in float32
        self.point = self.posterior.like.new_zeros(1, self.posterior.size)

    @property
    def lr(self) -> float:
        """The rate at the present point."""
        return self.posterior.training.rate

    def descend(self, level: float) -> None:
        """Minimise the energy of images and rate at one level."""
        there = with_free_rate(self.posterior, self.point, level, self.rival.lr)

        def energy(points: Tensor, _: Tensor) -> _Energy:
            return there.energy(points, level)

        self.point, self.lowest = _minimised(energy, self.point, _ITERATIONS)
        self.posterior = with_fitted_rate(there, self.point)

    def misfit(self) -> float:
        """Relative distance to the update at the present point."""
        return float(self.posterior.misfit(self.point)[0].sqrt())


def _minimised(
    energy: Callable[[Tensor, Tensor], _Energy], start: Tensor, iterations: int
) -> tuple[Tensor, float]:
    """L-BFGS from a point (1, size): where it ends, and the energy there."""

    def inspect(_: int, state: TrialState) -> str:
        if len(state.trace) > iterations:
            return "all iterations used"
        if len(state.trace) > _PATIENCE:
            gained = state.trace[-1 - _PATIENCE] - state.trace[-1]
            return "flat" if gained < _FLAT * state.trace[-1] else ""
        return ""

    (state,) = Minimiser(
        energy, start, inspect=inspect, replace=lambda trial, state: None
    ).run()
    return state.point[None].clone(), float(state.loss)


# --- common ---------------------------------------------------------------------------


def _check(update: SharedUpdate) -> None:
    """Refuse updates whose length says nothing of the rate."""
    encoding = update.encoding
    got = "a gradient" if update.kind == "gradient" else ""
    got = "normalised clients" if update.normalized else got
    if encoding is not None and not encoding.exact:
        got = f"one that is encoded ({encoding.kind})"
    if got:
        raise InputError("update", "a weight change, whose length is known", got)


def _checked_labels(
    labels: Tensor | Sequence[int], update: SharedUpdate, layer: LastLayer
) -> Tensor:
    found = torch.as_tensor(labels).cpu()
    right = found.dtype == torch.int64 and found.shape == (update.num_samples,)
    if not right or not 0 <= int(found.min()) <= int(found.max()) < layer.num_classes:
        expected = f"{update.num_samples} labels from 0 to {layer.num_classes - 1}"
        raise InputError("labels", expected, labels)
    return found


def _shares(labels: Tensor, num_classes: int) -> Tensor:
    """Share of every class (K,)."""
    return F.one_hot(labels, num_classes).double().mean(0)


def _steps(update: SharedUpdate) -> int:
    """Most local steps of a client."""
    return max(update.training.num_steps(size) for size in update.group_sizes or ())


def _source(update: SharedUpdate) -> str:
    """What is asked first."""
    by_adam = update.training.optimiser == "adam"
    return "largest entry" if by_adam else "last layer"


def _one_client(update: SharedUpdate) -> bool:
    return len(update.group_sizes or ()) == 1


def _at(update: SharedUpdate, lr: float) -> SharedUpdate:
    """The update with another learning rate in its recipe."""
    return update.replace_tensors(
        update.tensors, training=replace(update.training, lr=lr)
    )


def _estimate(
    rival: _Rival, lr: float, misfit: float, source: str
) -> LearningRateEstimate:
    return LearningRateEstimate(
        lr=lr,
        first=rival.lr,
        labels=rival.labels,
        order=rival.order,
        misfit=misfit,
        source=source,
    )
