r"""The posterior of the images behind an update, as an energy of latents.

An update g of n images, known up to Gaussian errors of variance v, and a prior under
which the images are a function D of independent standard normal latents u, give

.. math::

    -2 \log p(u \mid g) = \sum_i \frac{(g_i(D(u)) - g_i)^2}{v_i} + \|u\|^2
    + \mathrm{const}.

The variance is that of the noise that the protocol states, plus a tempering
:math:`\tau^2 \|g_l\|^2` in layer l: a large :math:`\tau` trusts the prior and has few
optima, a small one trusts the update to its last digit. Where a defence has encoded the
entries, the likelihood of the message takes the place of the square; where images were
mixed in pairs, their labels are unknowns beside the latents.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.clipping import clipped
from gradinv_helpers.attacks.free_rate import FreeRate
from gradinv_helpers.attacks.gradients import (
    GradientMap,
    Gradients,
    gradient_map,
    trials_at_once,
)
from gradinv_helpers.attacks.last_layer import last_layer_input
from gradinv_helpers.attacks.likelihood import (
    Gaussian,
    Pruned,
    Sign,
    likelihoods_of,
)
from gradinv_helpers.attacks.matching import (
    cosine_distance,
    normalized_groups,
    squared_norm,
)
from gradinv_helpers.attacks.problem import _MOST_BYTES
from gradinv_helpers.attacks.replay import (
    Order,
    moving_statistics,
    replay_map,
    shared_statistics,
)
from gradinv_helpers.compute import forward_work
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.gaussian import ImagePrior
from gradinv_helpers.updates import SharedUpdate

_CANCELLED = 16  # roundings of the largest gradient: smaller ones are nothing else
_SMALLEST = 1e-15  # standard deviation of the entries of a layer of zeros
# Labels of mixed images: the logits' standard deviation, and the share of its own label
# that an image is taken to have before anything is known.
_LOGIT, _OWN_LABEL = 2.0, 0.7


class Posterior:
    """Energy of the latents of an update's images, for many trials at once.

    Args:
        update: What the server saw.
        prior: What is known of images.
        labels: Label of every image (N,); of a mixture, the label it is likeliest to
            have most of.
        features: Input of the last layer for every image (N, d), where it is known:
            another set of equations, in which images do not mix.
        order: For several local steps, which images each of them takes, as for
            ``replay_map``; images and labels are then numbered by their place.

    Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(
        self,
        update: SharedUpdate,
        prior: ImagePrior,
        labels: Tensor,
        features: Tensor | None = None,
        order: Order = "sequential",
    ):
        self.update, self.prior, self.training = update, prior, update.training
        self.labels, self.features, self.order = labels, features, order
        self.model = copy.deepcopy(update.model)
        self.steps = _steps_to_replay(update)
        as_sent = self.steps > 0 or _has_statistics(update) or _is_encoded(update)
        self.as_sent = as_sent
        stated = _stated(update, as_sent=as_sent)
        self.num_gradients = len(stated)  # the rest are changes of statistics
        if _has_statistics(update):
            stated += shared_statistics(update)
        self.targets: Gradients = [tensor[None] for tensor in stated]
        encoding = update.encoding
        self.likelihoods = likelihoods_of(encoding, list(update.tensors))
        self.likelihoods += [Gaussian()] * (len(stated) - self.num_gradients)
        self.mixed = encoding is not None and encoding.kind == "mixed"
        # Of a change: what it is divided by to become a gradient.
        rate = update.training.rate if update.kind == "delta" and not as_sent else 1.0
        self.free_rate: FreeRate | None = None  # where the rate is an unknown, too
        self.noise = update.noise_std / rate
        self.rounding = _rounding(update, rate)
        with torch.no_grad():
            probe = copy.deepcopy(self.model).eval()
            grey = self.targets[0].new_zeros(2, *update.image_shape)
            self.num_classes = probe(grey).shape[1]
        self._prepare()

    def _prepare(self) -> None:
        self.like = self.targets[0]
        # Running statistics change as it reads features, those of the map must not.
        self.reader = copy.deepcopy(self.model)
        self.prior = self.prior.to(self.like).given(self.labels)
        pairs = zip(self.likelihoods, self.targets, strict=True)
        self.norms = [law.squared_norm(target) for law, target in pairs]
        if not any(self.norms):
            raise InputError("update", "a non-zero update", "all zeros")
        shape = (self.num_samples, *self.update.image_shape)
        fitting = trials_at_once(self.model, shape, budget_bytes=_MOST_BYTES)
        gradients = self.num_samples if self.update.training.clip_norm else 1
        self.together = max(1, fitting // max(1, self.steps, gradients))
        self.map = self._map()
        self.classes = self._one_hot()

    def _one_hot(self) -> Tensor:
        labels = self.labels.to(self.like.device)
        return F.one_hot(labels, self.num_classes).to(self.like)

    def _split(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (A, N, d) and class probabilities (A, N, K) of points (A, size)."""
        parts = points.unflatten(-1, (self.num_samples, self.width))
        latents = parts[..., : self.prior.size]
        if not self.mixed:
            return latents, self.classes.expand(len(points), -1, -1)
        mean = self.classes.mean(0, keepdim=True)
        start = _OWN_LABEL * self.classes + (1 - _OWN_LABEL) * mean
        start = (start + 1e-3 / self.num_classes).log()
        return latents, (start + _LOGIT * parts[..., self.prior.size :]).softmax(-1)

    def _join(
        self, points: Tensor, classes: Tensor, to_latents: Tensor, to_classes: Tensor
    ) -> Tensor:
        """The slope (A, size) of an energy by points, the prior's included."""
        if self.mixed:  # through the softmax
            mean = (classes * to_classes).sum(-1, keepdim=True)
            to_logits = _LOGIT * classes * (to_classes - mean)
            to_latents = torch.cat([to_latents, to_logits], -1)
        return to_latents.flatten(1) + 2 * points

    def _map(self) -> GradientMap:
        update, statistics = self.update, _has_statistics(self.update)
        if self.steps or statistics:
            sizes = update.group_sizes or ()
            return replay_map(
                self.model,
                self.training,
                self.num_samples,
                order=self.order,
                group_sizes=sizes if len(sizes) > 1 else None,
                normalized=update.normalized,
                statistics=statistics,
            )
        plain = gradient_map(self.model)
        if update.training.clip_norm is not None:
            plain = clipped(plain, update.training.clip_norm)
        if update.normalized:
            return normalized_groups(plain, update.group_sizes or ())
        return plain

    def rearranged(self, labels: Tensor, order: Order) -> Posterior:
        """The same posterior with other labels and another order of the images."""
        other = copy.copy(self)
        other.labels, other.order = labels, order
        other.prior = self.prior.given(labels)
        other.classes = other._one_hot()
        other.map = other._map()
        return other

    def with_rate(self, lr: float) -> Posterior:
        """The same posterior of a weight change, for another learning rate."""
        other = copy.copy(self)
        other.training = replace(self.training, lr=lr)
        if self.as_sent:  # the map trains at this rate
            other.map = other._map()
            return other
        ratio, decay = self.training.rate / lr, self.training.weight_decay
        weights = dict(self.model.named_parameters())
        starts = [decay * weights[name].detach() for name in self.update.tensors]
        pairs = zip(self.targets, starts, strict=True)
        other.targets = [ratio * (sent + start) - start for sent, start in pairs]
        rows = zip(self.likelihoods, other.targets, strict=True)
        other.norms = [law.squared_norm(target) for law, target in rows]
        other.noise = ratio * self.noise
        other.rounding = [ratio * std for std in self.rounding]
        return other

    def double(self) -> Posterior:
        """The same posterior in double precision."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.update.model).double()
        other.targets = [target.double() for target in self.targets]
        other._prepare()
        return other

    @property
    def num_samples(self) -> int:
        """Number of unknown images."""
        return self.update.num_samples

    @property
    def several_batches(self) -> bool:
        """Whether some client's images are spread over several local batches."""
        batch_size = self.update.training.batch_size
        largest = max(self.update.group_sizes or ())
        return self.steps > 1 and batch_size is not None and batch_size < largest

    @property
    def width(self) -> int:
        """Unknowns of one image: its latents, and the logits of a mixed label."""
        return self.prior.size + (self.num_classes if self.mixed else 0)

    @property
    def size(self) -> int:
        """Unknowns of all images together."""
        return self.num_samples * self.width

    @property
    def entry(self) -> float:
        """Root mean square of the entries of the update's gradient."""
        parts = self.targets[: self.num_gradients]
        count = sum(target.numel() for target in parts)
        return (sum(self.norms[: self.num_gradients]) / count) ** 0.5

    @property
    def feature_scale(self) -> float:
        """What squared errors of all features are divided by: their variance."""
        assert self.features is not None
        known = self.features.to(self.like)
        return float(known.numel() * known.var())

    @property
    def work(self) -> int:
        """Multiplications of one forward pass, at least roughly."""
        return forward_work(self.model, self.update.image_shape) * self.num_samples

    def images(self, points: Tensor) -> Tensor:
        """Images (..., N, C, H, W) of points (..., size), not yet clamped."""
        latents = points.unflatten(-1, (self.num_samples, self.width))
        return self.prior.decode(latents[..., : self.prior.size].to(self.like))

    def label_shares(self, points: Tensor) -> Tensor:
        """Class probabilities (A, N, K) of points (A, size)."""
        return self._split(points.to(self.like))[1]

    def energy(self, points: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Energy (A,) and its derivative (A, size) of points (A, size).

        Args:
            points: Latents of A trials.
            level: The tempering, as a share of every layer's norm.
        """
        found = [self._energy(some, level) for some in points.split(self.together)]
        return torch.cat([e for e, _ in found]), torch.cat([d for _, d in found])

    def _energy(self, points: Tensor, level: float) -> tuple[Tensor, Tensor]:
        latents, classes = self._split(points)
        images = self.prior.decode(latents)
        gradients, pullback = self.map(images, classes)
        energy, slopes = self.likelihood(gradients, level)
        energy = points.double().square().sum(1) + energy
        to_images, to_classes = pullback(slopes)
        if self.features is not None:
            gap_energy, slope = self._feature_gap(images)
            energy = energy + gap_energy.double() / level**2
            to_images = to_images + slope / level**2
        to_latents = self.prior.pull_back(latents, to_images)
        return energy, self._join(points, classes, to_latents, to_classes)

    def likelihood(
        self, gradients: Gradients, level: float
    ) -> tuple[Tensor, Gradients]:
        """-2 log likelihood (A,) of computed updates (A, ...), and its slopes."""
        energy = gradients[0].new_zeros(len(gradients[0]), dtype=torch.float64)
        slopes = []
        if self.free_rate is not None:
            gradients, surprise = self.free_rate.fitted(self, gradients)
            energy = energy + surprise
        for law, gradient, target, variance in zip(
            self.likelihoods,
            gradients,
            self.targets,
            self.variances(level),
            strict=True,
        ):
            part, slope = law.energy(gradient, target, variance)
            energy = energy + part
            slopes.append(slope)
        return energy, slopes

    def gaps(self, gradients: Gradients) -> Gradients:
        """How far computed updates are from the nearest that would be sent alike."""
        rows = zip(self.likelihoods, gradients, self.targets, strict=True)
        return [law.gap(gradient, target) for law, gradient, target in rows]

    def spreads(self, level: float) -> list[Tensor | float]:
        """Standard deviation of the entries of each layer, infinite where unsent.

        Raises:
            InputError: Only signs were sent, or labels are unknown shares.
        """
        got = "signs" if any(isinstance(x, Sign) for x in self.likelihoods) else ""
        got = "mixed labels" if self.mixed else got
        if got:
            expected = "a Gaussian likelihood of the latents alone"
            raise InputError("update", expected, got)
        rows = zip(self.likelihoods, self.targets, self.variances(level), strict=True)
        found = [law.spread(target[0], variance) for law, target, variance in rows]
        return [s.flatten() if isinstance(s, Tensor) else s for s in found]

    def variances(self, level: float) -> list[float]:
        """Variance of every entry of each layer: tempering, noise and rounding."""
        count = self.num_gradients  # noise is added to gradients, not to statistics
        noise = [self.noise] * count + [0.0] * (len(self.norms) - count)
        parts = zip(self.norms, noise, self.rounding, strict=True)
        return [level**2 * norm + n**2 + r**2 for norm, n, r in parts]

    def cosine_energy(self, points: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Energy of a gradient of unknown length: 2 (1 - cos) / level² + ||u||².

        Statistics of BatchNorm have a length: their mean relative squared error is
        added to the cosine's distance.
        """
        latents, classes = self._split(points)
        images = self.prior.decode(latents)
        gradients, pullback = self.map(images, classes)
        pairs = zip(self.targets, gradients, strict=True)
        targets = [target.expand_as(gradient) for target, gradient in pairs]
        count = self.num_gradients
        visible = self.visible(gradients[:count])
        distance, slopes = cosine_distance(visible, targets[:count])
        distance, slopes = distance.double(), self.visible(slopes)
        moved = list(zip(gradients, targets, self.norms, strict=True))[count:]
        for found, sent, norm in moved:  # lengths count here: relative squared errors
            weight = 0.5 / (len(moved) * max(norm, _SMALLEST))
            distance = distance + weight * squared_norm([found - sent]).double()
            slopes.append(2 * weight * (found - sent))
        to_images, to_classes = pullback(slopes)
        distance, to_images = 2 * distance, 2 * to_images
        if self.features is not None:
            gap, slope = self._feature_gap(images)
            distance, to_images = distance + gap.double(), to_images + slope
        energy = distance / level**2 + points.double().square().sum(1)
        to_latents = self.prior.pull_back(latents, to_images) / level**2
        to_classes = 2 * to_classes / level**2
        return energy, self._join(points, classes, to_latents, to_classes)

    def visible(self, tensors: Gradients) -> Gradients:
        """The entries that were sent of computed tensors, with zeros elsewhere."""
        rows = zip(self.likelihoods, tensors, self.targets, strict=False)
        return [
            tensor * (sent != 0) if isinstance(law, Pruned) else tensor
            for law, tensor, sent in rows
        ]

    def feature_energy(self, points: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Energy of the features alone: relative gap² / level² + ||u||²."""
        latents, classes = self._split(points)
        gap, to_images = self._feature_gap(self.prior.decode(latents))
        energy = gap.double() / level**2 + points.double().square().sum(1)
        to_latents = self.prior.pull_back(latents, to_images / level**2)
        nothing = torch.zeros_like(classes)
        return energy, self._join(points, classes, to_latents, nothing)

    def _feature_gap(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Relative squared error (A,) of the last layer's inputs, and its slope."""
        assert self.features is not None
        known, scale = self.features.to(self.like), self.feature_scale
        with torch.enable_grad():
            free = images.detach().requires_grad_()
            if self.reader.training:  # statistics are those of one trial's images
                found = torch.stack([last_layer_input(self.reader, x) for x in free])
            else:
                flat = last_layer_input(self.reader, free.flatten(0, 1))
                found = flat.unflatten(0, images.shape[:2])
            gaps = (found - known).square() / scale
            (slope,) = torch.autograd.grad(gaps.sum(), free)
        return gaps.detach().sum((1, 2)), slope

    def misfit(self, points: Tensor) -> Tensor:
        """Relative squared distance (A,) to the update, the prior left aside."""
        parts = []
        for some in points.split(self.together):
            latents, classes = self._split(some.to(self.like))
            gradients, _ = self.map(self.prior.decode(latents), classes)
            if self.free_rate is not None:
                gradients, _ = self.free_rate.fitted(self, gradients)
            gaps = self.gaps(gradients)
            parts.append(squared_norm(gaps) / squared_norm(self.targets))
        return torch.cat(parts)


def _steps_to_replay(update: SharedUpdate) -> int:
    """Local steps of a client whose change is not a gradient; 0 where it is one."""
    if update.kind == "gradient" or update.is_gradient:
        return 0
    return max(map(update.training.num_steps, update.group_sizes or ()))


def _is_encoded(update: SharedUpdate) -> bool:
    """Whether tensors hold messages instead of what was computed."""
    return update.encoding is not None and not update.encoding.exact


def _has_statistics(update: SharedUpdate) -> bool:
    """Whether the update shows how the statistics of BatchNorm have moved."""
    sent = update.buffers is not None and not update.normalized
    return sent and bool(moving_statistics(update.model))


def _stated(update: SharedUpdate, *, as_sent: bool) -> list[Tensor]:
    """The gradient that the update states, or the change itself."""
    if as_sent or (update.normalized and update.kind == "gradient"):
        return list(update.tensors.values())
    return list(update.gradient().values())


def _rounding(update: SharedUpdate, rate: float) -> list[float]:
    """Standard deviation of what rounding leaves of every layer's entries.

    A change is the difference of two weights, each rounded on its own. A gradient that
    cancels, as of a bias in front of BatchNorm, is nothing but rounding.
    """
    named = dict(update.model.named_parameters())
    sizes = {name: _size_of(sent) for name, sent in update.tensors.items()}
    found = []
    for name, sent in update.tensors.items():
        large = sent if update.kind == "gradient" else named[name].detach()
        eps = torch.finfo(sent.dtype).eps
        std = eps / 12**0.5 * _size_of(large)
        if sizes[name] < _CANCELLED * eps * max(sizes.values()):
            std = max(std, sizes[name])
        found.append(max(std / rate, _SMALLEST))
    if _has_statistics(update):  # differences of two averages
        before = dict(update.model.named_buffers())
        for name in moving_statistics(update.model):
            eps = torch.finfo(before[name].dtype).eps
            found.append(max(eps / 12**0.5 * _size_of(before[name]), _SMALLEST))
    return found


def _size_of(tensor: Tensor) -> float:
    """Root mean square of the entries."""
    return float(tensor.detach().double().square().mean().sqrt())
