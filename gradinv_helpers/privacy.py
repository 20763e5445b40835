r"""Differential privacy of updates: the mechanism, its price, and training under it.

A mechanism M is :math:`(\varepsilon, \delta)` differentially private if for all data
sets D and D' that differ in one *unit*, and all sets S of outputs,

.. math:: P[M(D) \in S] \le e^{\varepsilon} P[M(D') \in S] + \delta.

- *Unit*: one sample, or one client with everything it holds.
- *Differ*: the unit is there or not (add/remove). Where the number of units is public,
  as in ``SharedUpdate.num_samples``, a unit that is not there is one whose gradient
  is zero (zero-out); sums move by at most the clipping norm C either way, and the
  accountants give the same numbers. If the unit may be *replaced* by any other, sums
  move by up to 2 C: without sampling, that is the price of half the noise multiplier.

The noise is that of an ordinary random generator in floating point: right for studies,
not for the release of real data.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradinv_helpers.data import Images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
)
from gradinv_helpers.federated.aggregation import aggregate, check_same_round
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

Accountant = Literal["rdp", "prv", "gaussian"]

_PRV_ERROR = 0.01  # of epsilon, as opacus has it
_PRV_POINTS = 4_000_000  # of the grid of losses: beyond them memory runs out
_MOST_NOISE = 1e6
_PRECISION = 1e-3  # of a noise multiplier that is searched for
_CHUNK_ENTRIES = 2**24  # of gradients that are computed at once


# --- accountants ------------------------------------------------------------------


def epsilon_spent(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
) -> float:
    r"""Compute the epsilon of noisy sums of clipped gradients, over all steps.

    A step takes every unit into its batch with probability q, independently (Poisson
    sampling), and releases the sum of gradients of norm at most C with Gaussian noise
    of standard deviation :math:`\sigma C`. C cancels. A single message of a client that
    is known to take part has q = 1.

    Args:
        noise_multiplier: Standard deviation of the noise on the *sum*, in units of
            the clipping norm; without noise epsilon is infinite.
        sample_rate: Probability q in (0, 1] that a unit is in the batch of a step.
        steps: Number of steps; 0 for nothing spent.
        delta: Probability in (0, 1) for which the promise need not hold; choose it
            far below one over the number of units.
        accountant: ``rdp`` bounds Rényi divergences and converts them, ``prv``
            composes the distribution of the privacy loss numerically (tighter, and
            an upper bound up to its error of 0.01); both are those of opacus.
            ``gaussian`` is exact, for q = 1 only.

    Returns:
        Epsilon, an upper bound.

    Raises:
        InputError: A value is out of range, or too little noise for ``prv``.

    Source: Abadi et al. (2016); Mironov (2017) for ``rdp``; Gopi et al. (2021) for
    ``prv``; Balle and Wang (2018) for ``gaussian``.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("noise_multiplier", noise_multiplier)
    check_share("sample_rate", sample_rate, closed=True)
    check_count("steps", steps, minimum=0)
    check_share("delta", delta)
    check_choice("accountant", accountant, ("rdp", "prv", "gaussian"))
    if steps == 0:
        return 0.0
    if accountant == "gaussian" and sample_rate != 1:
        raise InputError(
            "sample_rate", "1 for accountant='gaussian'", sample_rate, "use 'prv'"
        )
    if noise_multiplier == 0:
        return math.inf
    if accountant == "gaussian":
        return gaussian_epsilon(math.sqrt(steps) / noise_multiplier, delta=delta)
    if accountant == "prv":
        _check_domain(noise_multiplier, sample_rate, steps, delta)
    return _epsilon_of_opacus(accountant, noise_multiplier, sample_rate, steps, delta)


def noise_multiplier_for(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: Accountant = "rdp",
) -> float:
    """Find the least noise that keeps within a privacy budget.

    Args:
        epsilon: The budget, above 0.
        delta: Probability in (0, 1) for which the promise need not hold.
        sample_rate: Probability in (0, 1] that a unit is in the batch of a step.
        steps: Number of steps, at least 1.
        accountant: As for ``epsilon_spent``.

    Returns:
        A noise multiplier whose epsilon is within the budget, at most 0.1 % above the
        least one.

    Raises:
        InputError: A value is out of range, or no noise up to 1e6 is enough.

    Taught in: notebooks/08_differential_privacy.
    """
    budget = check_number("epsilon", epsilon, exclusive=True)
    check_count("steps", steps)

    def spent(noise: float) -> float:
        return epsilon_spent(
            noise_multiplier=noise,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            accountant=accountant,
        )

    high = 1.0
    if accountant == "prv":  # little noise is beyond it: come from above
        high = noise_multiplier_for(
            epsilon=budget, delta=delta, sample_rate=sample_rate, steps=steps
        )
    while spent(high) > budget:
        high *= 2
        if high > _MOST_NOISE:
            raise InputError("epsilon", "a budget that some noise meets", epsilon)
    low = high / 2
    while spent(low) <= budget:
        high, low = low, low / 2
    while high > low * (1 + _PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high


def gaussian_epsilon(shift: float, *, delta: float) -> float:
    r"""Compute epsilon for telling N(0, 1) from N(shift, 1), exactly.

    It solves :math:`\Phi(\mu/2 - \varepsilon/\mu) - e^{\varepsilon}
    \Phi(-\mu/2 - \varepsilon/\mu) = \delta`. T releases of a sum that a unit moves by
    at most C, with noise :math:`\sigma C`, have :math:`\mu = \sqrt{T} / \sigma`.

    Args:
        shift: The distance mu in standard deviations, at least 0.
        delta: Probability in (0, 1) for which the promise need not hold.

    Returns:
        Epsilon, at least 0.

    Source: Balle and Wang (2018), Theorem 8.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("shift", shift)
    check_share("delta", delta)
    if gaussian_delta(shift, epsilon=0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(shift, epsilon=high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        above = gaussian_delta(shift, epsilon=middle) > delta
        low, high = (middle, high) if above else (low, middle)
    return high


def gaussian_delta(shift: float, *, epsilon: float) -> float:
    r"""Compute delta for telling N(0, 1) from N(shift, 1) at a given epsilon.

    Args:
        shift: The distance mu in standard deviations, at least 0.
        epsilon: The other half of the promise, at least 0.

    Returns:
        :math:`\Phi(\mu/2 - \varepsilon/\mu) - e^{\varepsilon}
        \Phi(-\mu/2 - \varepsilon/\mu)`, in [0, 1].

    Source: Balle and Wang (2018), Theorem 8.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("shift", shift)
    check_number("epsilon", epsilon)
    if shift == 0:
        return 0.0
    ends = (shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift)
    logs = torch.special.log_ndtr(torch.tensor(ends, dtype=torch.float64))
    kept, lost = float(logs[0]), float(logs[1]) + epsilon
    return math.exp(kept) * -math.expm1(min(0.0, lost - kept))


def privacy_profile(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta_error: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    r"""Compute delta for a grid of epsilons, negative ones included.

    With P and Q the laws of all noisy sums with and without one unit,
    :math:`\delta(\varepsilon) = \max_E P(E) - e^{\varepsilon} Q(E)`, and its errors are
    added, so that the profile is an upper bound.

    Args:
        noise_multiplier: Standard deviation of the noise on a sum, in units of the
            clipping norm; above 0.
        sample_rate: Probability in (0, 1] that a unit is in the batch of a step.
        steps: Number of steps.
        delta_error: Error of the composition that is added to delta.

    Returns:
        Epsilons in [-5, 50] in ascending order, and their deltas; float64, both (m,).

    Raises:
        InputError: A value is out of range, or so little noise that the composition
            does not fit into memory.

    Source: Gopi et al. (2021), as implemented in opacus.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("noise_multiplier", noise_multiplier, exclusive=True)
    check_share("sample_rate", sample_rate, closed=True)
    check_count("steps", steps)
    check_share("delta_error", delta_error)
    from opacus.accountants import PRVAccountant

    _check_domain(noise_multiplier, sample_rate, steps, 1000 * delta_error)
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            losses = accountant._get_dprv(_PRV_ERROR, delta_error)
        except RuntimeError as error:
            raise _too_little_noise(noise_multiplier, steps) from error
    grid = torch.as_tensor(losses.domain.ts, dtype=torch.float64)
    mass = torch.as_tensor(losses.pmf, dtype=torch.float64)
    kept = (grid >= -5) & (grid <= 50)
    above = mass[grid > 50].sum()
    grid, mass = grid[kept], mass[kept]

    def tail(values: Tensor) -> Tensor:
        return values.flip(0).cumsum(0).flip(0)

    deltas = tail(mass) + above - grid.exp() * tail(mass * (-grid).exp())
    return grid + _PRV_ERROR, deltas.clamp(0, 1) + delta_error


def check_share(argument: str, value: float, *, closed: bool = False) -> float:
    """Return a probability above 0 and below 1, or up to 1 where ``closed``.

    Raises:
        InputError: It is none.
    """
    number = check_number(argument, value, exclusive=True)
    if number > 1 or (number == 1 and not closed):
        end = "]" if closed else ")"
        raise InputError(argument, f"a probability in (0, 1{end}", repr(value))
    return number


def _epsilon_of_opacus(
    name: str, noise: float, sample_rate: float, steps: int, delta: float
) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism=name)
    accountant.history = [(noise, sample_rate, steps)]
    with warnings.catch_warnings():
        # An order at the end of its list, a zero in a logarithm: bounds all the same.
        warnings.simplefilter("ignore")
        try:
            return float(accountant.get_epsilon(delta=delta))
        except RuntimeError as error:
            raise _too_little_noise(noise, steps) from error


def _check_domain(noise: float, sample_rate: float, steps: int, delta: float) -> None:
    """Make sure that opacus' grid of privacy losses fits into memory."""
    error = delta / 1000
    most = _epsilon_of_opacus("rdp", noise, sample_rate, steps, error / 4)
    width = _PRV_ERROR / math.sqrt(steps * math.log(12 / error) / 2)
    if 2 * (most + 3) / width > _PRV_POINTS:
        raise _too_little_noise(noise, steps)


def _too_little_noise(noise: float, steps: int) -> InputError:
    return InputError(
        "noise_multiplier",
        "more noise for accountant='prv'",
        f"{noise:g} over {steps} steps",
        "epsilon is in the hundreds or more: use 'rdp', or 'gaussian' at rate 1",
    )


# --- one update -------------------------------------------------------------------


def per_sample_gradients(model: nn.Module, images: Images) -> dict[str, Tensor]:
    """Compute the gradient of the cross-entropy of every image on its own.

    Args:
        model: A classifier; BatchNorm must not be in train mode, because it mixes
            the images of a batch.
        images: Images (N, C, H, W) with labels.

    Returns:
        For every trainable parameter a tensor (N, ...).

    Raises:
        InputError: BatchNorm in train mode, or no trainable parameter.

    Taught in: notebooks/08_differential_privacy.
    """
    chunks = [part for _, part in gradient_chunks(model, images.pixels, images.labels)]
    return {name: torch.cat([part[name] for part in chunks]) for name in chunks[0]}


def gradient_chunks(
    model: nn.Module, pixels: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the gradients of a few samples at a time.

    Args:
        model: As for ``per_sample_gradients``.
        pixels: Images (N, C, H, W).
        labels: Their labels (N,).

    Yields:
        Indices (m,) of samples and, for every trainable parameter, their gradients
        (m, ...).
    """
    batch_norm = nn.modules.batchnorm._BatchNorm
    if any(isinstance(m, batch_norm) and m.training for m in model.modules()):
        hint = "call model.eval(), or use GroupNorm"
        raise InputError(
            "model", "BatchNorm in eval mode", "BatchNorm in train mode", hint
        )
    state = dict(model.named_parameters())
    weights = {name: p.detach() for name, p in state.items() if p.requires_grad}
    if not weights:
        raise InputError("model", "at least one trainable parameter", "none")
    rest = {name: p.detach() for name, p in state.items() if not p.requires_grad}
    rest |= dict(model.named_buffers())
    like = next(iter(weights.values()))

    def loss(own: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, own | rest, (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = vmap(grad(loss), (None, 0, 0), randomness="different")
    size = sum(weight.numel() for weight in weights.values())
    for chosen in torch.arange(len(pixels)).split(max(1, _CHUNK_ENTRIES // size)):
        images = pixels[chosen].to(like.device, like.dtype)
        yield chosen, gradients(weights, images, labels[chosen].to(like.device))


def clipping_factors(gradients: Mapping[str, Tensor], clip_norm: float) -> Tensor:
    """Compute what each sample's gradient is multiplied by, min(1, C / norm).

    Args:
        gradients: For every parameter, the gradients (N, ...) of the samples.
        clip_norm: Largest L2 norm C.

    Returns:
        Factors (N,) in (0, 1].
    """
    norms = torch.stack([g.flatten(1).double().norm(dim=1) for g in gradients.values()])
    factors = (clip_norm / norms.norm(dim=0).clamp_min(1e-300)).clamp_max(1)
    return factors.to(next(iter(gradients.values())))


@dataclass(frozen=True)
class PrivateNoise:
    r"""Add the Gaussian noise of a private mechanism to clipped gradients.

    A defence for ``defend``: the sum of n samples' gradients, each clipped to norm C
    by ``LocalTraining(clip_norm=C)``, gets noise of :math:`\sigma C`, its mean noise of
    :math:`\sigma C / n`. On a client's update that is local privacy, on an aggregate
    central privacy.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.

    Source: Abadi et al. (2016), Algorithm 1.
    Taught in: notebooks/08_differential_privacy.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        check_number("noise_multiplier", self.noise_multiplier)

    def __call__(
        self, update: SharedUpdate, *, generator: torch.Generator | None
    ) -> SharedUpdate:
        """The noisy update; it states the standard deviation, as the protocol does."""
        _check_clean("update", update)
        bound = update.training.clip_norm
        if bound is None:
            raise InputError(
                "update",
                "gradients of samples clipped to a norm",
                "no clipping",
                "use LocalTraining(clip_norm=...)",
            )
        std = self.noise_multiplier * bound / update.num_samples
        return defend(update, GaussianNoise(std), generator=generator)


def private_update(
    model: nn.Module,
    images: Images,
    *,
    clip_norm: float,
    noise_multiplier: float,
    generator: torch.Generator,
    training: LocalTraining | None = None,
) -> SharedUpdate:
    r"""Compute one client's gradient and make it private before it leaves.

    The client clips the gradient of every sample to norm C, adds Gaussian noise of
    standard deviation :math:`\sigma C` to their sum and sends the mean, so that every
    entry bears noise of :math:`\sigma C / n`. This is *local* differential privacy:
    it holds against the server. The unit is one sample of the client, the number n is
    public (zero-out adjacency), and one message costs ``epsilon_spent`` with
    ``sample_rate=1, steps=1``.

    Args:
        model: The model received from the server.
        images: The client's private images.
        clip_norm: Largest L2 norm C of a sample's gradient.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.
        generator: Source of the noise.
        training: The recipe, which must send a gradient; FedSGD by default.

    Returns:
        The update; ``training.clip_norm`` and ``noise_std`` say what was done, as the
        protocol does.

    Raises:
        InputError: A value is out of range, or the recipe sends a weight change.

    Source: Abadi et al. (2016), Algorithm 1.
    Taught in: notebooks/08_differential_privacy.
    """
    check_number("clip_norm", clip_norm, exclusive=True)
    noise = PrivateNoise(noise_multiplier)
    recipe = replace(training or LocalTraining(), clip_norm=clip_norm)
    return defend(local_update(model, images, recipe), noise, generator=generator)


def private_aggregate(
    updates: Sequence[SharedUpdate],
    *,
    clip_norm: float,
    noise_multiplier: float,
    generator: torch.Generator,
    unit: Literal["sample", "client"] = "sample",
) -> SharedUpdate:
    r"""Average updates and add noise once: central differential privacy.

    A trusted server, or secure aggregation, sees the updates as they are; the noise
    protects against whoever sees the result. With the unit ``sample`` the clients have
    clipped every sample's gradient (``LocalTraining(clip_norm=C)``) and the mean over
    all N samples bears noise of :math:`\sigma C / N`. With the unit ``client`` the
    whole update of every client is clipped here, each counts the same, and the mean
    over K clients bears noise of :math:`\sigma C / K`: everything that a client holds
    is protected at once. The same sum under local noise bears :math:`\sqrt K` times
    as much.

    Args:
        updates: Updates of one round, without noise.
        clip_norm: Largest L2 norm C of a unit's part in the sum.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.
        generator: Source of the noise.
        unit: What one unit is: a sample or a client.

    Returns:
        The aggregate with ``noise_std``. The clipping of samples is part of its
        recipe. That of clients of several samples is not: an attack then takes
        clipped gradients for plain ones.

    Raises:
        InputError: The samples were not clipped to C, updates bear noise or unequal
            weights, or statistics of BatchNorm are sent, which no noise covers.

    Source: Abadi et al. (2016), Algorithm 1, for samples; McMahan et al. (2018),
    Learning differentially private recurrent language models, for clients.
    Taught in: notebooks/08_differential_privacy.
    """
    bound = check_number("clip_norm", clip_norm, exclusive=True)
    check_number("noise_multiplier", noise_multiplier)
    check_choice("unit", unit, ("sample", "client"))
    check_same_round(updates)
    for number, update in enumerate(updates):
        _check_clean(f"updates[{number}]", update)
    if unit == "sample":
        stated = updates[0].training.clip_norm
        if stated is None or stated > bound:
            raise InputError(
                "updates",
                f"gradients of samples clipped to {bound:g}",
                "no clipping" if stated is None else f"clipping to {stated:g}",
                "use LocalTraining(clip_norm=...)",
            )
        mean = aggregate(updates)
        count = mean.num_samples
    else:
        sizes = {update.num_samples for update in updates}
        if len(sizes) > 1:
            raise InputError("updates", "equal numbers of samples", sorted(sizes))
        mean = aggregate([_clipped(update, bound) for update in updates])
        count = len(updates)
    std = noise_multiplier * bound / count
    return defend(mean, GaussianNoise(std), generator=generator)


def _check_clean(argument: str, update: SharedUpdate) -> None:
    """Make sure that noise on the tensors of an update is all that it needs."""
    if update.noise_std:
        raise InputError(argument, "no noise yet", f"noise of {update.noise_std:g}")
    if update.buffers is not None:
        raise InputError(
            argument,
            "no statistics of BatchNorm, which would travel without noise",
            "buffers",
            "call model.eval(), or use GroupNorm",
        )
    if update.normalized or update.encoding is not None:
        raise InputError(argument, "tensors as they were computed", "changed ones")


def _clipped(update: SharedUpdate, bound: float) -> SharedUpdate:
    """Scale a client's update down to the norm, if it is longer."""
    norm = float(
        torch.stack([t.double().norm() for t in update.tensors.values()]).norm()
    )
    scale = min(1.0, bound / max(norm, 1e-300))
    tensors = {name: scale * t for name, t in update.tensors.items()}
    training = update.training
    if update.num_samples == 1 and update.kind == "gradient":  # the two are the same
        training = replace(training, clip_norm=min(bound, training.clip_norm or bound))
    return update.replace_tensors(tensors, training=training)
