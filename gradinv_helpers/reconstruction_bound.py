r"""How often any attack can reconstruct a sample behind a private sum, at most.

An *informed* adversary knows the model, every other sample of the sum, and a prior
:math:`\pi` of the sample z that it is after. It sees :math:`\theta`, the clipped sum
with noise of :math:`\sigma C`, and succeeds if its answer R is close to z, in whatever
sense. Let :math:`\kappa` be the largest success of an answer that does not look at
:math:`\theta`: guessing among M equally likely candidates has
:math:`\kappa = 1/M`.

Write P for the law of :math:`\theta` with z, Q for that without z, which does not
depend on z, and E for the answers that count as close to z. Then

1. averaged over z, :math:`Q(E) \le \kappa`, because under Q the answer does not look
   at z;
2. P is Q moved by at most C. By Neyman and Pearson the event with the largest P(E) for
   a given Q(E) is a half-space, so that with :math:`\mu = 1 / \sigma`

   .. math:: P(E) \le \Phi(\Phi^{-1}(Q(E)) + \mu);

3. the right side is concave and rises with Q(E); by Jensen's inequality the average of
   P(E), which is the success of the attack, is at most

   .. math:: \gamma = \Phi(\Phi^{-1}(\kappa) + \mu).

T sums without sampling have :math:`\mu = \sqrt T / \sigma`. With Poisson sampling of
rate q, P is a mixture, and :math:`\gamma = \inf_{\varepsilon} e^{\varepsilon} \kappa +
\delta(\varepsilon)` over all real :math:`\varepsilon`, with the privacy profile
:math:`\delta` of the composition: convex duality.

Source: Balle, Cherubin and Hayes (2022), Reconstructing training data with informed
adversaries, for reconstruction robustness; Hayes, Mahloujifar and Balle (2023),
Bounding training data reconstruction in DP-SGD, for the bound; Kaissis et al. (2023),
Bounding data reconstruction attacks with the hypothesis testing interpretation of
differential privacy, for closed forms.
Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError, check_count, check_number
from gradinv_helpers.privacy import (
    check_share,
    clipping_factors,
    per_sample_gradients,
    privacy_profile,
)
from gradinv_helpers.updates import SharedUpdate


def reconstruction_bound(
    prior_success: float,
    *,
    noise_multiplier: float,
    sample_rate: float = 1.0,
    steps: int = 1,
) -> float:
    r"""Bound the success of any attack that reconstructs one sample.

    See the module for the derivation. The bound is about one sample of the sum, when
    all others are known to the attacker, and so it holds for weaker attackers, too. It
    needs clipping to C and noise of :math:`\sigma C` on the sum, and no assumption on
    the model or the attack. It says nothing of what the prior tells without any
    update: that is kappa.

    Args:
        prior_success: Probability kappa in (0, 1) that the best guess without the
            update counts as a success. For n tries among M candidates, n / M.
        noise_multiplier: Standard deviation of the noise on the sum, in units of the
            clipping norm; without noise the bound is 1.
        sample_rate: Probability in (0, 1] that the sample is in the sum.
        steps: Number of sums that the attacker sees.

    Returns:
        A probability gamma, at least kappa.

    Raises:
        InputError: A value is out of range, or with sampling over several steps, so
            little noise that the composition does not fit into memory.

    Source: Hayes, Mahloujifar and Balle (2023).
    Taught in: notebooks/08_differential_privacy.

    >>> round(reconstruction_bound(0.01, noise_multiplier=1.0), 3)
    0.092
    """
    kappa = check_share("prior_success", prior_success)
    sigma = check_number("noise_multiplier", noise_multiplier)
    rate = check_share("sample_rate", sample_rate, closed=True)
    check_count("steps", steps)
    if sigma == 0:
        seen = 1 - (1 - rate) ** steps
        return kappa + seen * (1 - kappa)
    if rate == 1:
        return _moved(kappa, math.sqrt(steps) / sigma)
    if steps == 1:  # the likelihood ratio rises along one direction still
        return (1 - rate) * kappa + rate * _moved(kappa, 1 / sigma)
    epsilons, deltas = privacy_profile(
        noise_multiplier=sigma, sample_rate=rate, steps=steps
    )
    values = torch.exp(epsilons + math.log(kappa)) + deltas
    return min(1.0, max(kappa, float(values.min())))


def reconstruction_bound_of_epsilon(
    prior_success: float, *, epsilon: float, delta: float
) -> float:
    r"""Bound the success of any attack by epsilon and delta alone.

    By the definition of differential privacy :math:`P(E) \le e^{\varepsilon} Q(E) +
    \delta`, hence :math:`\gamma = e^{\varepsilon} \kappa + \delta`. It holds for every
    mechanism, and is looser than ``reconstruction_bound``, which knows the mechanism.

    Args:
        prior_success: Probability kappa in (0, 1) of success without the update.
        epsilon: At least 0.
        delta: Probability in (0, 1).

    Returns:
        A probability; 1 where epsilon promises nothing.

    Source: Balle, Cherubin and Hayes (2022).
    Taught in: notebooks/08_differential_privacy.

    >>> round(reconstruction_bound_of_epsilon(0.01, epsilon=1.0, delta=1e-5), 3)
    0.027
    """
    kappa = check_share("prior_success", prior_success)
    check_share("delta", delta)
    if epsilon == math.inf:
        return 1.0
    exponent = check_number("epsilon", epsilon) + math.log(kappa)
    return 1.0 if exponent >= 0 else min(1.0, math.exp(exponent) + delta)


def candidate_bound(
    model: nn.Module,
    candidates: Images,
    *,
    clip_norm: float,
    noise_multiplier: float,
) -> float:
    r"""Bound how often any attack names the right one of these candidates.

    In the derivation Q may be any law that does not depend on the sample. Tell the
    attacker the label, which can only help, and take for Q the noise about the mean
    clipped gradient of the class: with :math:`R_y` the largest distance from it,
    :math:`\mu_y = R_y / (\sigma C)` and :math:`\kappa_y = 1 / n_y` for :math:`n_y`
    candidates of class y. The bound is the mean over the candidates.

    It can be far below ``reconstruction_bound``, where gradients of one class are
    alike, and also above it. It speaks of this model and these candidates only: no
    promise can rest on it.

    Args:
        model: The model before the update.
        candidates: Equally likely images with labels.
        clip_norm: Largest L2 norm C of a sample's gradient.
        noise_multiplier: Standard deviation of the noise on the sum, in units of C.

    Returns:
        A probability.

    Source: Hayes, Mahloujifar and Balle (2023) for the bound about zero.
    Taught in: notebooks/08_differential_privacy.
    """
    bound = check_number("clip_norm", clip_norm, exclusive=True)
    sigma = check_number("noise_multiplier", noise_multiplier, exclusive=True)
    gradients = _clipped_gradients(model, candidates, bound)
    total = 0.0
    for label in candidates.labels.unique():
        own = gradients[candidates.labels == label]
        radius = float((own - own.mean(0)).norm(dim=1).max())
        alone = len(own) == 1
        shift = radius / (sigma * bound)
        total += 1.0 if alone else len(own) * _moved(1 / len(own), shift)
    return total / len(candidates)


def candidate_likelihoods(
    update: SharedUpdate, candidates: Images, *, known: Images | None = None
) -> Tensor:
    r"""Weigh candidates for the one unknown sample: the informed adversary's attack.

    The log-likelihood of candidate z is :math:`-\|g - \bar g(z)\|^2 / 2 s^2`, up to a
    constant, where :math:`\bar g(z)` is the clipped mean gradient of z and all known
    samples and s the noise that the update states. With equally likely candidates the
    largest is the best answer there is: no attack names z more often.

    Args:
        update: A gradient of n samples.
        candidates: M images with labels, one of which may be the unknown sample.
        known: The other n - 1 samples of the update; ``None`` for n = 1.

    Returns:
        Log-likelihoods (M,), float64, on the CPU; the largest is 0. An update
        without noise gives minus the squared distances.

    Raises:
        InputError: The update is no plain gradient, or the number of known samples
            does not fit.

    Source: Hayes, Mahloujifar and Balle (2023), for the attack with such a prior.
    Taught in: notebooks/08_differential_privacy.
    """
    if update.kind != "gradient" or update.normalized:
        got = "a normalised one" if update.normalized else "a weight change"
        raise InputError("update", "a gradient", got)
    given = 0 if known is None else len(known)
    if given != update.num_samples - 1:
        raise InputError("known", f"{update.num_samples - 1} images", given)
    bound = update.training.clip_norm
    sent = torch.cat([t.flatten().double() for t in update.tensors.values()])
    rest = update.num_samples * sent
    if known is not None:
        rest = rest - _clipped_gradients(update.model, known, bound).sum(0)
    gaps = (_clipped_gradients(update.model, candidates, bound) - rest).square().sum(1)
    gaps = gaps / update.num_samples**2
    scale = 2 * update.noise_std**2 if update.noise_std else 1.0
    return ((gaps.min() - gaps) / scale).cpu()


def _moved(kappa: float, shift: float) -> float:
    """Phi(Phi^-1(kappa) + shift)."""
    start = torch.special.ndtri(torch.tensor(kappa, dtype=torch.float64))
    return float(torch.special.ndtr(start + shift))


def _clipped_gradients(model: nn.Module, images: Images, bound: float | None) -> Tensor:
    """Gradients (M, p) of images, each on its own, as the client clips them."""
    found = per_sample_gradients(model, images)
    flat = torch.cat([g.flatten(1).double() for g in found.values()], 1)
    return flat if bound is None else flat * clipping_factors(found, bound)[:, None]
