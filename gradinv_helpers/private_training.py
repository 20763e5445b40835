"""Training under differential privacy: accuracy, epsilon and what travels, as one.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from gradinv_helpers.classifier import accuracy
from gradinv_helpers.compute import private_randomness
from gradinv_helpers.data import Images
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)
from gradinv_helpers.privacy import (
    Accountant,
    check_share,
    clipping_factors,
    epsilon_spent,
    gradient_chunks,
)
from gradinv_helpers.updates import (
    LocalTraining,
    Optimiser,
    SharedUpdate,
    local_optimiser,
)

Trust = Literal["central", "local"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PrivateStep:
    """Where private training stands after a step.

    Args:
        step: Number of the step, from 1.
        epsilon: Privacy spent so far.
        accuracy: Share of right predictions on held-out images, in [0, 1].

    Taught in: notebooks/08_differential_privacy.
    """

    step: int
    epsilon: float
    accuracy: float


@dataclass(frozen=True)
class PrivateTraining:
    """A model trained with differential privacy, and what it cost.

    Args:
        model: The trained model, in evaluation mode.
        history: Epsilon and accuracy along the way, the last step included.
        delta: Probability for which the promise need not hold.
        updates: What an observer saw at the steps that were to be kept: one update
            per step under central, one per client under local privacy.
        members: For the same steps, the indices of the images behind each update:
            for those who evaluate an attack, not for the attacker.

    Taught in: notebooks/08_differential_privacy.
    """

    model: nn.Module
    history: tuple[PrivateStep, ...]
    delta: float
    updates: Mapping[int, tuple[SharedUpdate, ...]]
    members: Mapping[int, tuple[Tensor, ...]]

    @property
    def epsilon(self) -> float:
        """Privacy spent over all steps."""
        return self.history[-1].epsilon

    @property
    def accuracy(self) -> float:
        """Accuracy after the last step."""
        return self.history[-1].accuracy


def train_private(
    model: nn.Module,
    images: Images,
    test: Images,
    *,
    clip_norm: float,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    lr: float = 0.5,
    optimiser: Optimiser = "momentum",
    trust: Trust = "central",
    client_size: int = 1,
    delta: float = 1e-5,
    accountant: Accountant = "rdp",
    evaluations: int = 1,
    keep: Sequence[int] = (),
    seed: int = 0,
) -> PrivateTraining:
    r"""Train by DP-SGD: sample, clip, sum, add noise, step.

    Every step takes each client with probability q (Poisson sampling, as the
    accountants assume), clips the gradients of its samples to norm C and divides the
    noisy sum by the *expected* number of samples q N. What the optimiser does with it
    costs no privacy.

    Under ``central`` trust the server adds noise :math:`\sigma C` once, sampling
    hides who took part, and epsilon counts the steps at rate q. Under ``local``
    trust every client adds noise :math:`\sigma C` to its own sum and the server sees
    each message: sampling hides nothing from it, and epsilon counts the messages of
    the client that took part most often. The unit is one sample, added or removed
    (or set to zero, where counts are public).

    Args:
        model: Where training starts; it is left as it was.
        images: Training images.
        test: Held-out images, for the accuracy.
        clip_norm: Largest L2 norm C of a sample's gradient.
        noise_multiplier: Standard deviation of the noise on a sum, in units of C; 0
            trains with clipping only.
        sample_rate: Probability q in (0, 1] that a client takes part in a step.
        steps: Number of steps.
        lr: Step size.
        optimiser: ``sgd``, ``momentum`` (0.9) or ``adam``.
        trust: ``central`` or ``local``: whoever adds the noise.
        client_size: Consecutive images that form one client; 1 under central trust,
            where samples are drawn one by one.
        delta: Probability in (0, 1) for which the promise need not hold.
        accountant: As for ``epsilon_spent``.
        evaluations: How often epsilon and accuracy are recorded, evenly spread.
        keep: Steps, counted from 1, whose updates are kept as an observer sees them.
        seed: Seed of the sampling, the noise and any dropout.

    Returns:
        The model with its accuracy, its epsilon, and the updates kept.

    Raises:
        InputError: A value is out of range, or BatchNorm in train mode.

    Source: Abadi et al. (2016), Algorithm 1.
    Taught in: notebooks/08_differential_privacy.
    """
    bound = check_number("clip_norm", clip_norm, exclusive=True)
    check_number("noise_multiplier", noise_multiplier)
    check_share("sample_rate", sample_rate, closed=True)
    check_count("steps", steps)
    check_number("lr", lr, exclusive=True)
    check_choice("trust", trust, ("central", "local"))
    check_count("client_size", client_size)
    check_count("evaluations", evaluations, maximum=steps)
    check_seed("seed", seed)
    for step in keep:
        check_count("keep", step, maximum=steps)
    if trust == "central" and client_size != 1:
        raise InputError("client_size", "1 under central trust", client_size)
    worker = copy.deepcopy(model)
    run = _Run(worker, images, bound, noise_multiplier * bound, seed)
    recipe = LocalTraining(lr=lr, optimiser=optimiser, clip_norm=bound)
    optimise = local_optimiser(recipe, list(run.weights.values()))
    clients = torch.arange(len(images)).split(client_size)
    taken = torch.zeros(len(clients), dtype=torch.int64)
    expected = sample_rate * len(images)
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    history: list[PrivateStep] = []
    updates: dict[int, tuple[SharedUpdate, ...]] = {}
    members: dict[int, tuple[Tensor, ...]] = {}

    def spent(step: int) -> float:
        by_sampling = trust == "central"
        return epsilon_spent(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate if by_sampling else 1.0,
            steps=step if by_sampling else int(taken.max()),
            delta=delta,
            accountant=accountant,
        )

    with private_randomness(seed, run.device):
        for step in range(1, steps + 1):
            there = torch.rand(len(clients), generator=run.generator) < sample_rate
            taken += there
            groups = [clients[k] for k in there.nonzero().flatten().tolist()]
            if trust == "central" and groups:
                groups = [torch.cat(groups)]
            sums = run.noisy_sums(groups)
            if step in keep:
                members[step] = tuple(groups)
                updates[step] = run.messages(sums, groups, recipe)
            for name, weight in run.weights.items():
                weight.grad = sums[name].sum(0) / expected
            optimise.step()
            if step in marks:
                share = accuracy(worker, test)
                history.append(PrivateStep(step, spent(step), share))
    return PrivateTraining(
        model=worker.eval(),
        history=tuple(history),
        delta=delta,
        updates=MappingProxyType(updates),
        members=MappingProxyType(members),
    )


class _Run:
    """The worker's side of a step: clipped sums with noise, one per message."""

    def __init__(
        self, worker: nn.Module, images: Images, bound: float, std: float, seed: int
    ):
        named = worker.named_parameters()
        self.weights = {name: p for name, p in named if p.requires_grad}
        if not self.weights:
            raise InputError("model", "at least one trainable parameter", "none")
        self.worker, self.images, self.bound, self.std = worker, images, bound, std
        self.device = next(iter(self.weights.values())).device
        self.generator = torch.Generator().manual_seed(seed)

    def noisy_sums(self, groups: Sequence[Tensor]) -> Tensors:
        """One noisy sum per group of indices; noise alone where there is no group."""
        count = max(1, len(groups))  # an empty batch looks like any other
        sums = {n: w.new_zeros(count, *w.shape) for n, w in self.weights.items()}
        for name, total in sums.items():
            drawn = torch.randn(total.shape, generator=self.generator)
            sums[name] = self.std * drawn.to(total)
        if groups:
            self._add_gradients(sums, groups)
        return sums

    def _add_gradients(self, sums: Tensors, groups: Sequence[Tensor]) -> None:
        who = torch.cat(list(groups))
        sizes = torch.tensor([len(group) for group in groups])
        owner = torch.arange(len(groups)).repeat_interleave(sizes)
        images = self.images[who]
        for chosen, parts in gradient_chunks(self.worker, images.pixels, images.labels):
            factors = clipping_factors(parts, self.bound)
            into = owner[chosen].to(self.device)
            for name, part in parts.items():
                scale = factors.view(-1, *(1,) * (part.dim() - 1))
                sums[name].index_add_(0, into, part * scale)

    def messages(
        self, sums: Tensors, groups: Sequence[Tensor], recipe: LocalTraining
    ) -> tuple[SharedUpdate, ...]:
        """What an observer sees of every group: the mean and its noise."""
        return tuple(
            SharedUpdate(
                model=self.worker,
                tensors={name: total[k] / len(group) for name, total in sums.items()},
                num_samples=len(group),
                image_shape=self.images.shape,
                training=recipe,
                noise_std=self.std / len(group),
            )
            for k, group in enumerate(groups)
        )
