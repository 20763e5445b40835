r"""How a gradient moves with the images behind it: the Jacobian, and its rank.

Whether an update determines its images is a question about one matrix, the Jacobian
:math:`J = \partial g / \partial x` of the gradient with respect to the n pixels. A
direction v with :math:`J v = 0` moves the images and leaves the gradient where it is,
so no attack that looks at the gradient alone can find where along v the truth lies.

Everything here is in double precision and comes in one of three forms:

- products :math:`J v` for many v at once, by tangent sweeps through a chain of layers,
  or by one more reverse pass through any other module;
- J itself, which is such a product for every pixel;
- :math:`J^\top J` of a chain without J. Let H be the Hessian of the loss with respect
  to a layer's output. The weight gradient pairs the error that arrives with the input
  a; it follows a movement of a by :math:`M = A H W + E`, where A pairs an error with
  the input and E an input with the error. The matrix :math:`N = J^\top J` of this
  layer and all above it, taken by its input, is therefore
  :math:`W^\top N' W + M^\top M`, with N' the one taken by its output.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import (
    _Activation,
    _AutogradMap,
    _chain_layers,
    _Conv,
    _Flatten,
    _Layer,
    _Linear,
    _MaxPool,
    _step_back,
    _twice_differentiable,
)
from gradinv_helpers.errors import InputError, check_number

# Singular values below this share of the largest one count as zero.
RANK_THRESHOLD = 1e-7
# A dense Jacobian beyond this does not fit beside what is computed from it.
_MOST_BYTES = 4 * 2**30
# Tangents that are carried together: more of them gain nothing and cost memory.
_CHUNK_BYTES = 128 * 2**20
# Hessians of layers with more outputs than this, all images together, do not fit.
_WIDEST = 8192
# A multiplication of the tangents' way costs as much as this many of the Hessians'.
_DEARER = 6
# Squared singular values carry a rounding of about 1e-15 of the largest. All of them
# stand where none is below the first share; otherwise those below the second are
# computed again without squaring.
_SAFE, _UNSAFE = 1e-11, 1e-9
_LEAST_THRESHOLD = 1e-10
_FEWEST_COLUMNS, _BLOCKS = 256, 6


@dataclass(frozen=True)
class JacobianRank:
    """How many of the unknown pixels a gradient determines near given images.

    Args:
        rank: Number of singular values of the Jacobian above the threshold.
        unknowns: Pixels of all images.
        condition: Largest singular value divided by the smallest; infinite where the
            rank is not full.
        singular_values: All of them, from the largest to the smallest (unknowns,).

    Taught in: notebooks/03_stronger_matching.
    """

    rank: int
    unknowns: int
    condition: float
    singular_values: Tensor

    @property
    def missing(self) -> int:
        """Directions in which the images can move and the gradient stays."""
        return self.unknowns - self.rank


class Linearisation(ABC):
    """The gradient of a batch as a linear function of its images, near given ones.

    Attributes:
        images: Where it is taken, (B, C, H, W) in double precision.
        gradient: Gradient of the mean cross-entropy with respect to all trainable
            parameters, as one vector (m,).

    Taught in: notebooks/03_stronger_matching.
    """

    images: Tensor
    gradient: Tensor

    @property
    def unknowns(self) -> int:
        """Number n of pixels of all images."""
        return self.images.numel()

    def along(self, directions: Tensor) -> Tensor:
        """How the gradient moves when the images move along ``directions``.

        Args:
            directions: Shape (k, n), one movement of all pixels per row.

        Returns:
            Shape (k, m): the products of the Jacobian with the directions.
        """
        return self._moved(directions)

    def gram_along(self, directions: Tensor) -> Tensor:
        """Scalar products (k, k) of the movements along ``directions`` (k, n)."""
        return gram(self._moved(directions, compressed=True).T)

    def dense(self) -> Tensor:
        """The Jacobian (m, n).

        Raises:
            InputError: It does not fit into memory.
        """
        return self._moved(None).T

    def normal(self) -> Tensor:
        """The matrix of the normal equations, J^T J (n, n).

        Raises:
            InputError: It is formed from J, which does not fit into memory.
        """
        return gram(self._moved(None, compressed=True).T)

    def _moved(self, directions: Tensor | None, *, compressed: bool = False) -> Tensor:
        """Products with ``directions``, or with the unit vectors of all pixels."""
        count = self.unknowns if directions is None else len(directions)
        length = self._length(compressed)
        _check_memory(length, count)
        found = self.images.new_empty(count, length)
        step = max(1, _CHUNK_BYTES // self._tangent_bytes)
        for first in range(0, count, step):
            stop = min(count, first + step)
            if directions is None:
                places = torch.arange(first, stop, device=self.images.device)
                part = F.one_hot(places, count).to(self.images)
            else:
                part = directions[first:stop].to(self.images)
            found[first:stop] = self._along(part, compressed)
        return found

    @property
    @abstractmethod
    def _tangent_bytes(self) -> int:
        """Memory that one direction needs on its way, roughly."""

    def _length(self, compressed: bool) -> int:
        """Length of a product, or of a shorter vector with the same geometry."""
        return len(self.gradient)

    @abstractmethod
    def _along(self, directions: Tensor, compressed: bool) -> Tensor:
        """``along`` for a few directions at once."""


def linearise_gradient(
    model: nn.Module, images: Tensor, targets: Tensor
) -> Linearisation:
    """Describe how the gradient of a batch moves with its images.

    Args:
        model: Any classifier from (N, C, H, W) to logits (N, K) that torch can
            differentiate twice. It is not changed.
        images: Shape (B, C, H, W), around which the gradient is linearised.
        targets: Class probabilities (B, K).

    Returns:
        The gradient, products with its Jacobian, the Jacobian and its normal
        matrix, in double precision. Chains of common layers take hand-written
        sweeps, all other models automatic differentiation.

    Raises:
        InputError: Images or targets of another shape, or a layer without a second
            derivative.

    Source: Pearlmutter (1994) for the products.
    Taught in: notebooks/03_stronger_matching.
    """
    if images.dim() != 4:
        raise InputError("images", "shape (B, C, H, W)", tuple(images.shape))
    if targets.dim() != 2 or len(targets) != len(images):
        expected = f"shape ({len(images)}, K), one row per image"
        raise InputError("targets", expected, tuple(targets.shape))
    model = copy.deepcopy(model).double()
    images, targets = images.detach().double(), targets.detach().double()
    layers = _chain_layers(model)
    if layers is None:
        return _AutogradLinearisation(model, images, targets)
    return _ChainLinearisation(layers, images, targets)


def gradient_jacobian(
    model: nn.Module, images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a batch's gradient and its Jacobian with respect to the images.

    Args:
        model: Any classifier, as for ``linearise_gradient``.
        images: Shape (B, C, H, W).
        targets: Class probabilities (B, K).

    Returns:
        The gradient of the mean cross-entropy with respect to all trainable
        parameters, as one vector (m,), and its Jacobian (m, B*C*H*W), both in double
        precision.

    Raises:
        InputError: As for ``linearise_gradient``, or the Jacobian does not fit into
            memory.

    Taught in: notebooks/03_stronger_matching.
    """
    linear = linearise_gradient(model, images, targets)
    return linear.gradient, linear.dense()


def jacobian_rank(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    threshold: float = RANK_THRESHOLD,
) -> JacobianRank:
    """Count the directions in image space that a batch gradient determines.

    Args:
        model: Any classifier, as for ``linearise_gradient``.
        images: Shape (B, C, H, W): the point at which the rank is taken.
        targets: Class probabilities (B, K).
        threshold: Share of the largest singular value below which one counts as
            zero; at least 1e-10, which is what ``singular_values`` can tell from zero.

    Returns:
        The rank, the condition and all singular values.

    Raises:
        InputError: As for ``gradient_jacobian``, or the threshold is too small.

    Taught in: notebooks/03_stronger_matching.
    """
    check_number("threshold", threshold, minimum=_LEAST_THRESHOLD)
    values = singular_values(linearise_gradient(model, images, targets))
    rank = int((values > threshold * values[0]).sum())
    full = 0 < rank == len(values)
    condition = float(values[0] / values[-1]) if full else math.inf
    return JacobianRank(rank, len(values), condition, values)


def singular_values(linear: Linearisation) -> Tensor:
    r"""Compute all singular values of a Jacobian, to 1e-10 of the largest one.

    The eigenvalues of :math:`J^\top J` are their squares, of which those below about
    1e-15 of the largest are rounding. Where some come near that, J is applied to their
    eigenvectors: the products are small, and so is the rounding of their squares.

    Args:
        linear: The gradient near a batch of images.

    Returns:
        Shape (n,), from the largest to the smallest; n minus the number of parameters
        of them are zero, where that is positive.

    Taught in: notebooks/03_stronger_matching.
    """
    normal = linear.normal()
    squares = torch.linalg.eigvalsh(normal)
    if not bool(squares[0] > _SAFE * squares[-1]):
        squares, vectors = torch.linalg.eigh(normal)
        few = int((squares <= _UNSAFE * squares[-1]).sum())
        again = linear.gram_along(vectors[:, :few].T)
        squares[:few] = torch.linalg.eigvalsh(again)
        squares = squares.sort().values
    return squares.clamp_min(0).sqrt().flip(0)


def gram(matrix: Tensor) -> Tensor:
    """Multiply a matrix by its transpose from the left, at little over half the cost.

    Args:
        matrix: Shape (m, n).

    Returns:
        Shape (n, n), exactly symmetric.

    Taught in: notebooks/03_stronger_matching.
    """
    half = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    _add_half_gram(half, matrix)
    return half + half.T


def _add_half_gram(half: Tensor, matrix: Tensor) -> None:
    """Add to ``half`` so that half + half.T grows by the Gram matrix (n, n)."""
    columns = matrix.shape[1]
    width = max(_FEWEST_COLUMNS, -(-columns // _BLOCKS))
    for first in range(0, columns, width):
        rows = slice(first, first + width)
        own, later = matrix[:, rows], slice(first + width, columns)
        half[rows, rows].addmm_(own.T, own, alpha=0.5)
        half[rows, later].addmm_(own.T, matrix[:, later])


def _check_memory(rows: int, columns: int) -> None:
    if rows * columns * 8 > _MOST_BYTES:
        size = rows * columns * 8 / 2**30
        raise InputError(
            "model",
            f"a Jacobian of at most {_MOST_BYTES / 2**30:.0f} GiB",
            f"{rows:,} gradient entries times {columns:,} pixels, {size:.0f} GiB",
            "take fewer or smaller images, or a smaller model",
        )


# --- any module -----------------------------------------------------------------


class _AutogradLinearisation(Linearisation):
    """Products by a reverse pass through the derivative of the loss by the images.

    Mixed second derivatives are symmetric: the movement of the weight gradient along
    v is the derivative of <dL/dx, v> with respect to the weights.
    """

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor):
        mapping = _AutogradMap(model)
        trained = mapping.trained.items()
        self.images = images
        self.weights = {n: p.clone().requires_grad_() for n, p in trained}
        free = images.clone().requires_grad_()
        with torch.enable_grad(), _twice_differentiable():
            loss = mapping._loss(self.weights, free, targets)
            self.slope, *gradient = torch.autograd.grad(
                loss,
                [free, *self.weights.values()],
                create_graph=True,
                materialize_grads=True,
            )
        self.gradient = torch.cat([g.detach().flatten() for g in gradient])

    @property
    def _tangent_bytes(self) -> int:
        return 8 * (self.unknowns + 4 * len(self.gradient))

    def _along(self, directions: Tensor, compressed: bool) -> Tensor:
        shaped = directions.view(-1, *self.images.shape)
        # One by one is the faster way on a CPU; a GPU needs more to do at once.
        if self.images.device.type == "cpu":
            rows = [self._back(direction) for direction in shaped]
            return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        found = self._back(shaped, batched=True)
        return torch.cat([g.flatten(1) for g in found], 1)

    def _back(self, directions: Tensor, *, batched: bool = False) -> Sequence[Tensor]:
        with _twice_differentiable():
            return torch.autograd.grad(
                self.slope,
                list(self.weights.values()),
                directions,
                retain_graph=True,
                is_grads_batched=batched,
                materialize_grads=True,
            )


# --- chains of layers -----------------------------------------------------------


@dataclass(frozen=True)
class _Pairing:
    """What a layer's weight gradient is made of, with kernel taps t and places.

    The gradient of the weight from input channel c to output channel o at tap t is
    the sum over output places p of ``error[o, p] * patches[c, t, p]``, and as well the
    sum over input places q of ``footprint[o, t, q] * input[c, q]``. A linear layer
    has one tap and one place.

    Args:
        patches: Inputs under the taps (B, C, T, P).
        footprint: Errors that the taps carry to the inputs (B, O, T, Q).
        biased: Whether the layer has a bias, whose input is 1.
    """

    patches: Tensor
    footprint: Tensor
    biased: bool

    @property
    def weights(self) -> int:
        """Entries of the gradient of weight and bias together."""
        inputs = self.patches.shape[1] * self.patches.shape[2] + self.biased
        return self.footprint.shape[1] * inputs

    def inputs(self) -> Tensor:
        """Patches and the input of the bias, if there is one: (B, C*T + 1, P)."""
        flat = self.patches.flatten(1, 2)
        return (
            torch.cat([flat, torch.ones_like(flat[:, :1])], 1) if self.biased else flat
        )

    def movement(self, e_dot: Tensor, a_dot: Tensor) -> Tensor:
        """Movement (k, weights) of the gradient with errors and inputs (k, B, ...)."""
        taps = self.patches.shape[2]
        e_dot = e_dot.flatten(3) if e_dot.dim() > 3 else e_dot[..., None]
        a_dot = a_dot.flatten(3) if a_dot.dim() > 3 else a_dot[..., None]
        patches = self.patches.flatten(1, 2).mT.flatten(0, 1)  # (B*P, C*T)
        weight = e_dot.transpose(1, 2).flatten(2) @ patches  # (k, O, C*T)
        weight = weight.unflatten(2, (-1, taps))
        footprint = self.footprint.flatten(1, 2).mT.flatten(0, 1)  # (B*Q, O*T)
        back = a_dot.transpose(1, 2).flatten(2) @ footprint  # (k, C, O*T)
        weight = weight + back.unflatten(2, (-1, taps)).transpose(1, 2)
        parts = [weight.flatten(1)]
        if self.biased:
            parts.append(e_dot.sum((1, 3)))
        return torch.cat(parts, 1)


class _ChainLinearisation(Linearisation):
    """Tangent sweeps and normal matrices of a chain of layers."""

    @torch.no_grad()
    def __init__(self, layers: Sequence[_Layer], images: Tensor, targets: Tensor):
        self.layers, self.images = layers, images
        self.inputs: list[Tensor] = []  # what each layer saw
        self.extras: list[Any] = []  # what it must remember
        a = images
        for layer in layers:
            self.inputs.append(a)
            extra: Any = None
            match layer:
                case _Activation():
                    z, a = a, layer.function(a)
                    extra = (layer.first(z, a), layer.second and layer.second(z, a))
                case _MaxPool():
                    a, extra = layer.pool(a)
                case _Flatten():
                    a = a.flatten(1)
                case _:
                    a = layer.forward(a)
            self.extras.append(extra)
        self.p = torch.softmax(a, dim=-1)
        self.errors: list[Tensor] = [a] * len(layers)  # dL/d(output of each layer)
        e = (self.p - targets) / len(images)
        gradients: list[Tensor] = []
        for index in reversed(range(len(layers))):
            layer, a = layers[index], self.inputs[index]
            self.errors[index] = e
            if isinstance(layer, _Linear | _Conv):
                if layer.layer.bias is not None:
                    gradients.append(e.sum(0) if e.dim() == 2 else e.sum((0, 2, 3)))
                gradients.append(layer.weight_gradient(a, e, 1))
            if index > 0:
                e = _step_back(layer, e, a, self.extras[index])
        self.gradient = torch.cat([g.flatten() for g in reversed(gradients)])
        self.pairings = {
            index: _pairing(layer, self.inputs[index], self.errors[index])
            for index, layer in enumerate(layers)
            if isinstance(layer, _Linear | _Conv)
        }
        self.first = min(self.pairings)

    # Tangent sweeps: the images move, and all activations and errors follow.

    @property
    def _tangent_bytes(self) -> int:
        return 8 * (2 * sum(a.numel() for a in self.inputs) + len(self.gradient))

    def _length(self, compressed: bool) -> int:
        if not compressed:
            return len(self.gradient)
        return sum(
            (self._subspaces(index) or (pairing.weights,))[0]
            for index, pairing in self.pairings.items()
        )

    @torch.no_grad()
    def _along(self, directions: Tensor, compressed: bool) -> Tensor:
        batch = len(self.images)
        a_dot = directions.reshape(-1, *self.images.shape[1:])  # (k*B, C, H, W)
        moved: list[Tensor] = []
        for layer, extra in zip(self.layers, self.extras, strict=True):
            moved.append(a_dot)
            match layer:
                case _Activation():
                    a_dot = (_by_image(a_dot, batch) * extra[0]).flatten(0, 1)
                case _MaxPool():
                    places = _repeated(extra, a_dot).flatten(2)
                    a_dot = a_dot.flatten(2).gather(2, places)
                    a_dot = a_dot.unflatten(2, extra.shape[2:])
                case _Flatten():
                    a_dot = a_dot.flatten(1)
                case _:
                    a_dot = layer.tangent(a_dot)
        z_dot = _by_image(a_dot, batch)
        centred = z_dot - (self.p * z_dot).sum(-1, keepdim=True)
        e_dot = (self.p * centred / batch).flatten(0, 1)
        parts = []
        for index in reversed(range(self.first, len(self.layers))):
            layer, a_dot, extra = self.layers[index], moved[index], self.extras[index]
            match layer:
                case _Linear() | _Conv():
                    pair = _by_image(e_dot, batch), _by_image(a_dot, batch)
                    parts.append(self._movement(index, *pair, compressed))
                    if index > self.first:
                        e_dot = layer.transpose(e_dot, a_dot)
                case _Activation():
                    e_dot = _by_image(e_dot, batch) * extra[0]
                    if extra[1] is not None:
                        bent = extra[1] * self.errors[index]
                        e_dot = e_dot + bent * _by_image(a_dot, batch)
                    e_dot = e_dot.flatten(0, 1)
                case _MaxPool():
                    e_dot = _step_back(layer, e_dot, a_dot, _repeated(extra, e_dot))
                case _:
                    e_dot = _step_back(layer, e_dot, a_dot, extra)
        return torch.cat(parts[::-1], 1)

    def _movement(
        self, index: int, e_dot: Tensor, a_dot: Tensor, compressed: bool
    ) -> Tensor:
        """How one layer's gradient moves, (k, weights) or compressed."""
        subspaces = self._subspaces(index) if compressed else None
        if subspaces is None:
            return self.pairings[index].movement(e_dot, a_dot)
        # e_dot a^T + e a_dot^T has no part outside both column space and row space.
        _, of_inputs, of_errors = subspaces
        a, e = self.inputs[index], self.errors[index]
        inside = a_dot @ of_inputs  # (k, B, r)
        along_inputs = torch.einsum("kbo,br->kor", e_dot, a @ of_inputs)
        along_inputs += torch.einsum("bo,kbr->kor", e, inside)
        rest = a_dot - inside @ of_inputs.T
        along_errors = torch.einsum("br,kbf->krf", e @ of_errors, rest)
        parts = [along_inputs.flatten(1), along_errors.flatten(1)]
        if self.pairings[index].biased:
            parts.append(e_dot.sum(1))
        return torch.cat(parts, 1)

    def _subspaces(self, index: int) -> tuple[int, Tensor, Tensor] | None:
        """Bases of the inputs and errors of a linear layer, if they make it shorter.

        The gradient of B samples has rank B, and no entries outside these spaces
        move with the images. Also the number of entries that remain.
        """
        if not isinstance(self.layers[index], _Linear):
            return None
        pairing = self.pairings[index]
        of_inputs = torch.linalg.qr(self.inputs[index].T).Q  # (F, r)
        of_errors = torch.linalg.qr(self.errors[index].T).Q  # (O, r)
        (inputs, r), (outputs, s) = of_inputs.shape, of_errors.shape
        length = outputs * r + s * inputs + pairing.biased * outputs
        return (length, of_inputs, of_errors) if length < pairing.weights else None

    # Normal matrices: from the logits down, by the Hessians of the loss.

    def normal(self) -> Tensor:
        # Hessians of the layers, or movements of the gradient: whichever is cheaper.
        widest = max(self.errors[index].numel() for index in self.pairings)
        by_layers = widest**2 * (widest + self.unknowns)
        by_tangents = self._length(compressed=True) * self.unknowns**2
        if widest > _WIDEST or by_layers > _DEARER * by_tangents:
            return super().normal()
        return self._normal_by_layers()

    @torch.no_grad()
    def _normal_by_layers(self) -> Tensor:
        """Carry the Hessian (B, n, n) and half the normal matrix (B, B, n, n) down.

        The loss is a mean over images, so its Hessian has no entries between them.
        Half the matrix is one that gives it when its transpose is added.
        """
        batch, classes = self.p.shape
        hessian = torch.diag_embed(self.p) - self.p[:, :, None] * self.p[:, None, :]
        hessian = hessian / batch
        half = hessian.new_zeros(batch, batch, classes, classes)
        for index in reversed(range(len(self.layers))):
            layer, extra = self.layers[index], self.extras[index]
            below = index > self.first  # whether further weights need the Hessian
            match layer:
                case _Linear() | _Conv():
                    half = self._half_of_inputs(index, half, hessian)
                    if below:
                        hessian = self._pull(index, self._pull(index, hessian).mT)
                case _Activation():
                    slope = extra[0].flatten(1)
                    half.mul_(slope[:, None, :, None]).mul_(slope[:, None])
                    if below:
                        hessian.mul_(slope[:, :, None]).mul_(slope[:, None])
                        if extra[1] is not None:
                            bent = (extra[1] * self.errors[index]).flatten(1)
                            hessian.diagonal(dim1=1, dim2=2).add_(bent)
                case _Flatten():
                    pass
                case _:
                    half = self._pull(index, _swap(self._pull(index, half)))
                    if below:
                        hessian = self._pull(index, self._pull(index, hessian).mT)
        half = half.transpose(1, 2).reshape(self.unknowns, self.unknowns)
        return half + half.T

    def _half_of_inputs(self, index: int, half: Tensor, hessian: Tensor) -> Tensor:
        """Add a layer's own weights to the normal matrix and take it by its inputs."""
        pairing, batch = self.pairings[index], len(self.images)
        outputs = self.errors[index][0].numel()
        inputs = self.inputs[index][0].numel()
        channels = pairing.patches.shape[1]
        errors = hessian.unflatten(1, (pairing.footprint.shape[1], -1))
        # Either M itself, whose products cost more the more weights there are ...
        if pairing.weights * inputs < 2 * outputs**2 * (1 + outputs / inputs):
            half = self._pull(index, _swap(self._pull(index, half)))
            own = self._pull(index, pairing.inputs()[:, None] @ errors)
            weight = own[:, :, : channels * pairing.patches.shape[2]]
            weight = weight.unflatten(2, (channels, -1)).unflatten(4, (channels, -1))
            weight.diagonal(dim1=2, dim2=4).add_(pairing.footprint[..., None])
            own = own.flatten(1, 2)  # (B, weights, inputs)
            for row in range(batch):
                _add_half_gram(half[row, row], own[row])
                for column in range(row + 1, batch):
                    half[row, column].addmm_(own[row].T, own[column])
            return half
        # ... or its products, expanded, none of which is larger than the layer:
        # W' (N + H A'A H) W + W' H A'E + E'A H W + E'E.
        seen = pairing.inputs()
        alike = torch.einsum("bcp,dcq->bdpq", seen, seen)[:, :, None]  # A'A
        own = (alike @ errors).flatten(2, 3)
        half = self._pull(index, half + hessian[:, None] @ own / 2)
        cross = torch.einsum("bctp,dotq->bdopcq", pairing.patches, pairing.footprint)
        cross = cross.flatten(4).flatten(2, 3)  # A'E, (B, B, outputs, inputs)
        half = self._pull(index, _swap(half + hessian[:, None] @ cross))
        back = torch.einsum("botq,dotr->bdqr", pairing.footprint, pairing.footprint)
        blocks = half.unflatten(3, (channels, -1)).unflatten(2, (channels, -1))
        blocks.diagonal(dim1=2, dim2=4).add_(back[..., None] / 2)  # E'E
        return half

    def _pull(self, index: int, rows: Tensor) -> Tensor:
        """Take derivatives by a layer's outputs, (..., B, any, n), by its inputs."""
        layer, a = self.layers[index], self.inputs[index]
        if isinstance(layer, _Linear):
            return rows @ layer.layer.weight
        if isinstance(layer, _MaxPool):
            channels = torch.arange(a.shape[1], device=a.device)[:, None]
            first = channels * (a.shape[2] * a.shape[3])
            places = (self.extras[index].flatten(2) + first).flatten(1)
            back = rows.new_zeros(*rows.shape[:-1], a[0].numel())
            return back.scatter_add_(-1, places[:, None].expand_as(rows), rows)
        e = rows.reshape(-1, *self.errors[index].shape[1:])
        back = _step_back(layer, e, e.new_empty(len(e), *a.shape[1:]), None)
        return back.reshape(*rows.shape[:-1], -1)


def _pairing(layer: _Linear | _Conv, a: Tensor, e: Tensor) -> _Pairing:
    biased = layer.layer.bias is not None
    if isinstance(layer, _Linear):
        return _Pairing(a[:, :, None, None], e[:, :, None, None], biased)
    taps = math.prod(layer.layer.kernel_size)
    patches = _unfold(layer.layer, a).unflatten(1, (-1, taps))  # (B, C, T, P)
    # Number the input places from 1; 0 is what the padding reads.
    numbers = torch.arange(1, 1 + a.shape[2] * a.shape[3]).to(a)
    seen = _unfold(layer.layer, numbers.view(1, 1, *a.shape[2:])).long()  # (1, T, P)
    errors = e.flatten(2)[:, :, None].expand(-1, -1, taps, -1)
    footprint = e.new_zeros(*errors.shape[:3], 1 + len(numbers))
    footprint.scatter_(3, seen[:, None].expand_as(errors), errors)
    return _Pairing(patches, footprint[..., 1:].contiguous(), biased)


def _unfold(conv: nn.Conv2d, a: Tensor) -> Tensor:
    return F.unfold(
        a,
        conv.kernel_size,
        conv.dilation,
        conv.padding,  # type: ignore[arg-type]
        conv.stride,
    )


def _by_image(x: Tensor, batch: int) -> Tensor:
    """Movements (k*B, ...) as (k, B, ...)."""
    return x.unflatten(0, (-1, batch))


def _repeated(places: Tensor, x: Tensor) -> Tensor:
    """Places in every image (B, ...) for all movements x (k*B, ...)."""
    repeats = len(x) // len(places)
    return places.expand(repeats, *places.shape).flatten(0, 1)


def _swap(blocks: Tensor) -> Tensor:
    """Transpose a matrix held as blocks (B, B, n, m)."""
    return blocks.transpose(0, 1).mT
