"""The matching loss of many trials as one function of flat vectors.

Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.clipping import clipped
from gradinv_helpers.attacks.gradients import (
    GradientMap,
    Gradients,
    gradient_map,
    trials_at_once,
)
from gradinv_helpers.attacks.jacobian import linearise_gradient
from gradinv_helpers.attacks.matching import (
    _like,
    normalized_groups,
    squared_error,
    squared_norm,
)
from gradinv_helpers.attacks.optimise import TrialState
from gradinv_helpers.attacks.plan import Plan
from gradinv_helpers.compute import forward_work
from gradinv_helpers.errors import InputError
from gradinv_helpers.priors.smoothness import total_variation
from gradinv_helpers.updates import SharedUpdate

_BOX_WEIGHT = 1.0
_TV_SMOOTHING = 1e-3
_MOST_BYTES = 3 * 2**30  # what all trials of one evaluation may keep together


class MatchingProblem:
    """The matching loss of all trials as one function of flat vectors.

    A trial's vector holds its images, then the logits of its labels where those are
    unknown.
    """

    def __init__(self, updates: Sequence[SharedUpdate], plan: Plan):
        first = updates[0]
        self.updates, self.plan, self.distance = updates, plan, plan.distance
        self.num_samples, self.shape = first.num_samples, first.image_shape
        # Normalised tensors cannot be turned into gradients, but a positive factor
        # does not matter once the dummy update is normalised as well.
        stated = [
            dict(u.tensors) if u.normalized and u.kind == "gradient" else u.gradient()
            for u in updates
        ]
        self.targets: Gradients = [
            torch.stack([gradient[name] for gradient in stated]) for name in stated[0]
        ]
        if not bool(squared_norm(self.targets).all()):
            raise InputError("update", "a non-zero update", "all zeros")
        # On the CPU: they are few, and MPS has no double precision.
        self.tv_weights = torch.full(
            (len(updates),), plan.tv_weight, dtype=torch.float64
        )
        # In units of the distance: what a gradient of zeros would cost.
        nothing = [torch.zeros_like(target) for target in self.targets]
        self.box_weights = _BOX_WEIGHT * self.distance(nothing, self.targets)[0]
        # A copy, because some models keep what passes through them.
        self.model = copy.deepcopy(first.model)
        self.num_classes = self._count_classes()
        self._prepare()
        if plan.labels is not None:
            highest = max(int(labels.max()) for labels in plan.labels)
            if highest >= self.num_classes:
                raise InputError(
                    "labels",
                    f"labels below the model's {self.num_classes} classes",
                    highest,
                )

    def _prepare(self) -> None:
        self.like = self.targets[0]
        first = self.updates[0]
        self.map: GradientMap = gradient_map(self.model)
        batch = (self.num_samples, *self.shape)
        self.together = trials_at_once(self.model, batch, budget_bytes=_MOST_BYTES)
        if first.training.clip_norm is not None:
            self.map = clipped(self.map, first.training.clip_norm)
            self.together = max(1, self.together // self.num_samples)
        if first.normalized:
            self.map = normalized_groups(self.map, first.group_sizes or ())

    def double(self) -> MatchingProblem:
        """The same problem in double precision."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.updates[0].model).double()
        other.targets = [target.double() for target in self.targets]
        other._prepare()
        other.box_weights = self.box_weights.double()
        other.tv_weights = self.tv_weights.clone()
        return other

    @property
    def first_order(self) -> bool:
        """Whether the optimiser follows gradients without curvature."""
        return self.plan.optimiser in ("adam", "signed-adam")

    @property
    def noise(self) -> list[float]:
        """Standard deviation of the noise that each client's protocol states."""
        first = self.updates[0]
        units = first.training.rate if first.kind == "delta" else 1.0  # of the gradient
        return [update.noise_std / units for update in self.updates]

    @property
    def num_entries(self) -> int:
        """Entries of one shared gradient."""
        return sum(target[0].numel() for target in self.targets)

    def _count_classes(self) -> int:
        grey = self.targets[0].new_full((2, *self.shape), 0.5)
        try:
            with torch.no_grad():
                logits = self._probe()(grey)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "image_shape",
                "a shape that the model takes",
                f"{self.shape}: {str(error).splitlines()[0]}",
            ) from error
        if logits.dim() != 2:
            raise InputError(
                "model", "logits of shape (N, classes)", tuple(logits.shape)
            )
        return logits.shape[1]

    def _probe(self) -> torch.nn.Module:
        """A copy of the model in evaluation mode, which may be run at will."""
        model = copy.deepcopy(self.updates[0].model).to(self.targets[0].dtype)
        return model.eval()

    @property
    def num_pixels(self) -> int:
        """Unknown pixels of one client."""
        return self.num_samples * math.prod(self.shape)

    @property
    def work(self) -> int:
        """Multiplications of one forward pass of one trial, at least roughly."""
        first = self.updates[0]
        return forward_work(first.model, self.shape) * self.num_samples

    def start(self, generator: torch.Generator, init_scale: float) -> Tensor:
        """Grey images plus noise; label logits start at random, as in DLG."""
        noise = torch.randn(self.num_pixels, generator=generator)
        parts = [0.5 + init_scale * noise]
        if self.plan.labels is None:
            size = self.num_samples * self.num_classes
            parts.append(torch.randn(size, generator=generator))
        return torch.cat(parts).to(self.like)

    def images(self, points: Tensor) -> Tensor:
        """The images of points (..., n): (..., B, C, H, W), not yet clamped."""
        return points[..., : self.num_pixels].unflatten(
            -1, (self.num_samples, *self.shape)
        )

    def labels(self, point: Tensor, client: int) -> Tensor:
        """The labels that a point (n,) stands for: (B,)."""
        if self.plan.labels is not None:
            return self.plan.labels[client]
        return self._logits(point[None])[0].argmax(-1).cpu()

    def evaluate(self, points: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (A,) and gradient (A, n) of points (A, n)."""
        parts = zip(
            points.split(self.together), clients.split(self.together), strict=True
        )
        found = [self._evaluate(some, theirs) for some, theirs in parts]
        return torch.cat([loss for loss, _ in found]), torch.cat([g for _, g in found])

    def _evaluate(self, points: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images(points)
        targets = self._targets(points, clients)
        gradients, pullback = self.map(images, targets)
        loss, derivatives = self.distance(gradients, [t[clients] for t in self.targets])
        to_images, to_targets = pullback(derivatives)

        penalty, slope = self._penalty(images, clients)
        loss, to_images = loss + penalty, to_images + slope
        parts = [to_images.flatten(1)]
        if self.plan.labels is None:  # through the softmax
            mean = (targets * to_targets).sum(-1, keepdim=True)
            parts.append((targets * (to_targets - mean)).flatten(1))
        return loss, torch.cat(parts, 1)

    def curvature(self, points: Tensor, clients: Tensor) -> Tensor:
        """Hessians (A, n, n) of the loss without second derivatives of residuals.

        For known labels, the squared error and double precision.
        """
        targets = self._targets(points, clients)
        scales = squared_norm(self.targets)
        found = points.new_empty(*points.shape, self.num_pixels)
        rows = zip(points, targets, clients.tolist(), strict=True)
        for row, (point, target, client) in enumerate(rows):
            images = self.images(point)
            normal = linearise_gradient(self.model, images, target).normal()
            torch.mul(normal, 2 / float(scales[client]), out=found[row])
            outside = ((point < 0) | (point > 1)).to(point)
            weight = 2 * float(self.box_weights[client]) / self.num_pixels
            found[row].diagonal().add_(weight * outside)
        return found

    def project(self, points: Tensor) -> Tensor:
        """The nearest points whose images lie in [0, 1]."""
        images = points[..., : self.num_pixels].clamp(0, 1)
        return torch.cat([images, points[..., self.num_pixels :]], -1)

    def misfit(self, state: TrialState, client: int) -> float:
        """The matching loss alone, without what the penalties add to the loss."""
        who = torch.tensor([client], device=self.like.device)
        penalty, _ = self._penalty(self.images(state.point)[None], who)
        return state.loss - float(penalty)

    def level(self, share: float, noise: Sequence[float] | None = None) -> list[float]:
        """The distance of a gradient whose entries are off by a share of themselves.

        This is how close to a match a distance of any kind and unit is. For the
        squared error it is the square of the share.

        Args:
            share: Standard deviation of the relative error of every entry.
            noise: Standard deviations of errors of every client's entries instead.
        """
        generator = torch.Generator().manual_seed(0)
        shared, moved = [], []
        for target in self.targets:
            exact = target.double()
            draw = torch.randn(target.shape[1:], generator=generator).to(exact)
            size = exact * share
            if noise is not None:
                size = exact.new_tensor(noise).view(-1, *(1,) * draw.dim())
            shared.append(exact)
            moved.append(exact + draw * size)
        return self.distance(moved, shared)[0].tolist()

    def squared_misfit(self, point: Tensor, client: int) -> float:
        """Relative squared distance of a point's gradient, whatever is minimised."""
        who = torch.tensor([client], device=self.like.device)
        points = point[None].to(self.like)
        gradients, _ = self.map(self.images(points), self._targets(points, who))
        return float(squared_error(gradients, [t[who] for t in self.targets])[0])

    def _targets(self, points: Tensor, clients: Tensor) -> Tensor:
        """Class probabilities (A, B, K) that points stand for."""
        if self.plan.labels is None:
            return torch.softmax(self._logits(points), -1)
        chosen = torch.stack(self.plan.labels).to(clients.device)[clients]
        return F.one_hot(chosen, self.num_classes).to(points)

    def _penalty(self, images: Tensor, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Cost (A,) of values outside [0, 1] and of total variation, and its slope."""
        outside = images - images.clamp(0, 1)
        weights = self.box_weights[clients].to(images)
        cost = weights * outside.square().flatten(1).mean(1)
        slope = _like(2 * weights / self.num_pixels, images) * outside
        if bool(self.tv_weights.any()):
            weights = self.tv_weights[clients.cpu()].to(images)
            with torch.enable_grad():
                free = images.detach().requires_grad_()
                roughness = total_variation(free, smoothing=_TV_SMOOTHING)
                (steepness,) = torch.autograd.grad(roughness.sum(), free)
            cost = cost + weights * roughness.detach()
            slope = slope + _like(weights, images) * steepness
        return cost, slope

    def _logits(self, points: Tensor) -> Tensor:
        return points[..., self.num_pixels :].unflatten(
            -1, (self.num_samples, self.num_classes)
        )
