r"""GradInversion: gradient matching with the statistics that BatchNorm keeps.

For a batch of images behind a deep network the gradient alone leaves too much open.
Two terms are added to the cosine, the total variation and the box of Inverting
Gradients:

.. math::

    \frac{1}{L} \sum_l \frac{1}{C_l} \sum_c
    \frac{(\mu_{lc} - \hat\mu_{lc})^2 + (\sigma_{lc} - \hat\sigma_{lc})^2}
    {\hat\sigma_{lc}^2}
    \qquad\text{and}\qquad \frac{1}{n} \|x_t - \bar x\|^2 .

The first compares mean and standard deviation of the dummy batch in front of every
BatchNorm layer with what the attacker knows of them: the moments of the very batch,
where the client sends its buffers, otherwise the running statistics of the model. It is
the squared Wasserstein distance of two Gaussians per channel, in units of the known
variance. The moments of the batch are equations that only the true images fulfil. The
running statistics are a prior, and a weak one: a small batch is far from the average of
many.

The second pulls the restarts x_t of one update to their mean image. They err in
different ways, and what they agree on is more often true than what one of them says.
Images of a class may change places for it. The original also registers shapes, matches
squared errors and adds noise to every step; all three are left out here. Behind ReLU
the cosine is easier to minimise, and noise of a fifth of a step changed a batch by 0.3
dB only.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.alignment import align_images, reorder
from gradinv_helpers.attacks.optimise import TrialState
from gradinv_helpers.attacks.plan import Plan
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.attacks.replay import replay_map
from gradinv_helpers.errors import check_number
from gradinv_helpers.updates import LocalTraining, SharedUpdate

_BatchNorm = nn.modules.batchnorm._BatchNorm
_SMALLEST = 1e-5  # variance, as in BatchNorm


@dataclass(frozen=True)
class GradInversionWeights:
    """What the terms of ``gradinversion`` weigh beside a cosine distance.

    Args:
        sent: Moments of the batch itself, from buffers that the client sends.
        running: Running statistics of the model, per image of the batch.
        group: Squared distance to the mean image of all restarts.
        energy: Mean squared distance of the pixels to grey.

    Raises:
        InputError: A weight is negative or not finite.

    Taught in: notebooks/04_aggregated_gradients.
    """

    sent: float = 1.0
    running: float = 0.001
    group: float = 10.0
    energy: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("sent", "running", "group", "energy"):
            check_number(name, getattr(self, name))


@dataclass(frozen=True)
class BatchMoments:
    """What is known of the inputs of one BatchNorm layer.

    Args:
        layer: Name of the layer in the model.
        mean: Mean per channel (C,).
        variance: Unbiased variance per channel (C,).
        exact: Whether they are those of the client's batch; otherwise they are
            averages over earlier batches.
    """

    layer: str
    mean: Tensor
    variance: Tensor
    exact: bool


def known_moments(update: SharedUpdate) -> list[BatchMoments]:
    r"""Read what an update tells about the inputs of its BatchNorm layers.

    A layer in train mode moves its running statistics by
    :math:`s' = (1 - m)\,s + m\,\hat s` with the moments :math:`\hat s` of the batch,
    so whoever sees s and s' knows them. Where the buffers are kept back, or the layer
    is in evaluation mode, the running statistics s of the model are what is left.

    Args:
        update: A gradient, or the weight change of one local step. Of an aggregate,
            the moments are the mean of those of the clients.

    Returns:
        One entry per layer of which something is known, in the order of the model.
        Layers whose statistics are still those of a new model are left out.

    Source: Yin et al. (2021) for the running statistics.
    Taught in: notebooks/04_aggregated_gradients.
    """
    found = []
    for name, layer in update.model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        mean, variance = layer.running_mean, layer.running_var
        if mean is None or variance is None:
            continue
        sent = update.buffers if layer.training else None
        if sent is not None:
            share = _share_of_the_batch(layer)
            mean = mean + (sent[f"{name}.running_mean"] - mean) / share
            variance = variance + (sent[f"{name}.running_var"] - variance) / share
        elif not mean.any() and bool((variance == 1).all()):
            continue
        exact = sent is not None
        found.append(BatchMoments(name, mean, variance.clamp_min(0), exact))
    return found


class MomentReader:
    """Mean and unbiased variance in front of BatchNorm layers.

    Args:
        model: The model, in the mode in which the client uses it. It is copied.
        layers: Names of the layers.

    Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.layers = list(layers)
        self._seen: dict[str, Tensor] = {}
        self._batches = 1
        for name, layer in self.model.named_modules():
            if isinstance(layer, _BatchNorm):
                layer.momentum = 0.0  # what it has stored stays
            if name in self.layers:
                layer.register_forward_pre_hook(functools.partial(self._look, name))

    def __call__(
        self, images: Tensor, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Moments of T batches.

        Args:
            images: Shape (T, B, C, H, W).
            sizes: Images of every client, in order; one client by default. In train
                mode each of them sees its own only, and their mean is returned.

        Returns:
            One tensor (2, T, channels) per layer, means and variances, which can be
            differentiated. With a single value per channel the variance is 0.
        """
        if not any(module.training for module in self.model.modules()):
            return self._read(images)
        rows = [self._of_clients(batch, sizes or (len(batch),)) for batch in images]
        return [torch.cat(column, 1) for column in zip(*rows, strict=True)]

    def _of_clients(self, batch: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Mean over the clients of the moments of their own images."""
        parts = [self._read(own[None]) for own in batch.split(list(sizes))]
        shares = batch.new_tensor(sizes) / len(batch)
        return [
            torch.stack([w * m for w, m in zip(shares, column, strict=True)]).sum(0)
            for column in zip(*parts, strict=True)
        ]

    def _read(self, images: Tensor) -> list[Tensor]:
        """Moments (2, T, channels) of every layer, in one pass of all images."""
        self._seen, self._batches = {}, len(images)
        self.model(images.flatten(0, 1))
        return [self._seen[name] for name in self.layers]

    def _look(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].unflatten(0, (self._batches, -1))  # (T, B, channels, ...)
        values = values.transpose(1, 2).flatten(2)
        variance = values.var(2, correction=min(1, values.shape[2] - 1))
        self._seen[name] = torch.stack([values.mean(2), variance])


class GradInversionProblem(MatchingProblem):
    """The matching loss with BatchNorm and group terms.

    Args:
        updates: As for ``MatchingProblem``.
        plan: As for ``MatchingProblem``.
        weights: What the terms weigh.

    Source: Yin et al. (2021), Section 3, with the changes that the module states.
    Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(
        self,
        updates: Sequence[SharedUpdate],
        plan: Plan,
        weights: GradInversionWeights | None = None,
    ):
        self.weights = weights or GradInversionWeights()
        super().__init__(updates, plan)

    def _prepare(self) -> None:
        super()._prepare()
        first = self.updates[0]
        training = any(module.training for module in self.model.modules())
        self.sizes = list(first.group_sizes or ()) if training else None
        if self.sizes and len(self.sizes) > 1 and not first.normalized:
            self.map = replay_map(  # every client normalises by its own statistics
                self.model, LocalTraining(), self.num_samples, group_sizes=self.sizes
            )
        self._learn_moments()

    def _learn_moments(self) -> None:
        """What is known of every layer: mean, variance and weight of every client."""
        told = [{m.layer: m for m in known_moments(u)} for u in self.updates]
        names = list(dict.fromkeys(name for known in told for name in known))
        self.reader = MomentReader(self.model, names)
        self.known: list[tuple[Tensor, Tensor, Tensor]] = []
        for name in names:
            example = next(known[name] for known in told if name in known)
            column = [known.get(name, example) for known in told]
            weights = [
                (self._weight(known[name]) if name in known else 0.0) / len(names)
                for known in told
            ]
            mean = torch.stack([m.mean for m in column]).to(self.like)
            variance = torch.stack([m.variance for m in column]).to(self.like)
            self.known.append((mean, variance, self.like.new_tensor(weights)))

    def _weight(self, moments: BatchMoments) -> float:
        if moments.exact:
            return self.weights.sent
        return self.weights.running * self.num_samples

    def evaluate(self, points: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (A,) and gradient (A, n) of points (A, n), which form the groups."""
        loss, gradient = super().evaluate(points, clients)
        gaps = self.gaps(points, clients)
        weight = self.weights.group / self.num_pixels
        gradient[:, : self.num_pixels] += 2 * weight * gaps
        return loss + weight * gaps.square().sum(1), gradient

    def gaps(self, points: Tensor, clients: Tensor) -> Tensor:
        """Differences (A, pixels) to the mean image of all points of the client.

        Images of a class change places until they are closest to those of the first
        point; in train mode only with those of the same sender.
        """
        images = self.images(points.detach())
        gaps = torch.zeros_like(images)
        for client in clients.unique().tolist():
            rows = (clients == client).nonzero()[:, 0]
            if len(rows) == 1:
                continue
            own = images[rows]
            order = align_images(own, own[0], self._alike(client))
            consensus = reorder(own, order).mean(0)
            gaps[rows] = own - reorder(consensus.expand_as(own), order.argsort(1))
        return gaps.flatten(1)

    def _alike(self, client: int) -> Tensor:
        """Numbers (B,) that are equal for images which may change places."""
        sizes = torch.tensor(self.sizes or (self.num_samples,))
        senders = torch.arange(len(sizes)).repeat_interleave(sizes)
        if self.plan.labels is None:
            return senders
        return senders * self.num_classes + self.plan.labels[client]

    def misfit(self, state: TrialState, client: int) -> float:
        """The distance alone, without the other terms."""
        who = torch.tensor([client], device=self.like.device)
        point = state.point[None].to(self.like)
        gradients, _ = self.map(self.images(point), self._targets(point, who))
        return float(self.distance(gradients, [t[who] for t in self.targets])[0])

    def moment_gap(self, images: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted distance (A,) to the known moments, and its slope like images."""
        if not self.known:
            return images.new_zeros(len(images)), torch.zeros_like(images)
        with torch.enable_grad():
            free = images.detach().requires_grad_()
            cost = images.new_zeros(len(images))
            found = self.reader(free, self.sizes)
            for (mean, variance), known in zip(found, self.known, strict=True):
                means, variances, weights = (part[clients] for part in known)
                spread = variances + _SMALLEST
                away = (mean - means).square()
                away = away + ((variance + _SMALLEST).sqrt() - spread.sqrt()).square()
                cost = cost + weights * (away / spread).mean(1)
            (slope,) = torch.autograd.grad(cost.sum(), free)
        return cost.detach(), slope

    def _penalty(self, images: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Cost (A,) of box, total variation, energy and moments, and its slope."""
        cost, slope = super()._penalty(images, clients)
        gap, away = self.moment_gap(images, clients)
        grey = images - 0.5
        weight = self.weights.energy
        cost = cost + gap + weight * grey.square().flatten(1).mean(1)
        return cost, slope + away + 2 * weight / self.num_pixels * grey


def _share_of_the_batch(layer: nn.modules.batchnorm._BatchNorm) -> float:
    """How much of its statistics a layer replaces by those of one batch."""
    if layer.momentum is not None:
        return layer.momentum
    assert layer.num_batches_tracked is not None
    return 1 / (int(layer.num_batches_tracked) + 1)
