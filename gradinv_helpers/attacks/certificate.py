"""What an exact answer can prove of itself, without the truth.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.matching import normalized_groups, squared_error
from gradinv_helpers.updates import SharedUpdate

# The square of this is what double precision can hold.
HIGHEST_CONDITION = 1e7
# Rounding a float32 gradient leaves 1e-14; badly conditioned answers stay below this.
EXACT_RESIDUAL = 1e-6


@dataclass(frozen=True)
class LayerSolution:
    """How well one layer determined its input.

    Args:
        layer: Name of the layer in the model.
        unknowns: Entries of the input.
        equations: Linear equations for them.
        condition: Condition number of the equations; infinite where they do not
            determine the input in double precision.

    Taught in: notebooks/03_stronger_matching.
    """

    layer: str
    unknowns: int
    equations: int
    condition: float

    @property
    def determined(self) -> bool:
        """Whether the equations have full rank, up to rounding."""
        return self.condition < HIGHEST_CONDITION


@dataclass(frozen=True)
class Certificate:
    """What an exact attack can prove of its answer, without the truth.

    A small residual says that the answer explains the update. Full rank says that no
    other answer near it does. Only both together make an answer exact.

    Args:
        method: How the answer was computed: ``closed form``, ``layer by layer``,
            ``low rank`` or ``levenberg-marquardt``.
        residual: Relative squared distance between the gradient of the answer and
            the update.
        unknowns: Pixels that were unknown.
        rank: Numerical rank of the Jacobian of the gradient with respect to these
            pixels at the answer, or a lower bound where ``layers`` were solved in
            turn and some of them left their input open.
        condition: Condition number of the equations that were solved, the worst one
            where there were several; infinite where the rank is not full.
        layers: One entry per layer that was solved on its own, from the last to the
            first.

    Taught in: notebooks/03_stronger_matching.
    """

    method: str
    residual: float
    unknowns: int
    rank: int
    condition: float
    layers: tuple[LayerSolution, ...] = ()

    @property
    def determined(self) -> bool:
        """Whether the update determines every unknown pixel."""
        return self.rank >= self.unknowns

    @property
    def exact(self) -> bool:
        """Whether the answer explains the update and no other one near it would."""
        return self.determined and self.residual < EXACT_RESIDUAL

    def __str__(self) -> str:
        weak = [layer.layer for layer in self.layers if not layer.determined]
        if self.exact:
            verdict = "exact"
        elif weak:
            verdict = f"not exact: layer {', '.join(weak)} leaves its input open"
        elif not self.determined:
            missing = self.unknowns - self.rank
            verdict = f"not exact: {missing:,} directions are not in the update"
        else:
            verdict = "not exact: the answer does not explain the update"
        size = f"rank {self.rank:,} of {self.unknowns:,}"
        return f"{self.method}: residual {self.residual:.1e}, {size}, {verdict}"


def gradient_residual(update: SharedUpdate, images: Tensor, labels: Tensor) -> float:
    """Relative squared distance between the gradient of an answer and an update.

    Args:
        update: A gradient, normalised or not, or the weight change of one SGD step.
        images: Shape (N, C, H, W), not clamped.
        labels: Shape (N,).

    Returns:
        The squared distance divided by the squared norm of the update, computed in
        double precision; infinity where the answer is not finite.

    Taught in: notebooks/03_stronger_matching.
    """
    loose = update.normalized and update.kind == "gradient"
    stated = dict(update.tensors) if loose else update.gradient()
    like = next(iter(stated.values()))
    model = copy.deepcopy(update.model).double()
    images = images.to(like.device).double()
    with torch.no_grad():
        classes = copy.deepcopy(model).eval()(images[:1]).shape[1]
    target = F.one_hot(labels.to(like.device), classes).to(images)[None]
    mapping = gradient_map(model)
    if loose:
        mapping = normalized_groups(mapping, update.group_sizes or ())
    gradients, _ = mapping(images[None], target)
    loss, _ = squared_error(gradients, [g.double()[None] for g in stated.values()])
    residual = float(loss)
    return residual if residual == residual else float("inf")
