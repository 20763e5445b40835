r"""How many directions of its images an update determines: counted, measured, rounded.

Near given images an update is linear in them, with the Jacobian J. Three questions
about J, none of which needs the truth:

- *counted*: how many equations does the architecture alone promise? A walk through the
  layers, from the logits down, answers without any derivative;
- *measured*: how many singular values of J are not zero? Exactly by a pivoted Cholesky
  factorisation of :math:`J^\top J` where that matrix fits, otherwise estimated from
  products with J and :math:`J^\top`;
- *rounded*: how many of them stand out of the rounding of the numbers that travel, and
  how many bits of the images is that?

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.gradients import (
    _Activation,
    _chain_layers,
    _Conv,
    _Flatten,
    _Layer,
    _Linear,
    _MaxPool,
    _pair,
    _step_back,
    gradient_map,
)
from gradinv_helpers.attacks.jacobian import (
    Linearisation,
    linearise_gradient,
    singular_values,
)
from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)

# Standard deviation of a pixel of a photograph in [0, 1].
PRIOR_STD = 0.25
# Bits of the mantissa behind the point, and the exponent of the smallest normal number.
_FLOATS = {
    "float64": (52, -1022),
    "float32": (23, -126),
    "bfloat16": (7, -126),
    "float16": (10, -14),
}
FORMATS: tuple[str, ...] = (*_FLOATS, "int8")
# Pivots of J^T J below this share of its largest diagonal entry are rounding. In J: a
# millionth of its longest column.
_PIVOT = 1e-12


class LinearOperator(Protocol):
    """A matrix (equations, unknowns) that is only known by its products."""

    @property
    def unknowns(self) -> int:
        """Number n of columns."""

    @property
    def equations(self) -> int:
        """Number m of rows."""

    def along(self, directions: Tensor) -> Tensor:
        """Products (k, m) of the matrix with directions (k, n)."""

    def back(self, cotangents: Tensor) -> Tensor:
        """Products (k, n) of the transpose with cotangents (k, m)."""


# --- counted ----------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCount:
    """What one layer with weights tells about its own inputs.

    Args:
        layer: What it is, such as ``Conv2d 3 to 12``.
        inputs: Numbers at its input, all images together.
        equations: Independent equations that its gradient adds.
        known: Directions of its input that are determined, its own and the ones that
            come down from the layers above.

    Taught in: notebooks/04_aggregated_gradients.
    """

    layer: str
    inputs: int
    equations: int
    known: int


@dataclass(frozen=True)
class EquationCount:
    """How many directions of the images an architecture promises to determine.

    Args:
        rank: The prediction, at most ``unknowns``.
        unknowns: Pixels of all images.
        layers: One entry per layer with weights, from the last to the first; empty
            for models that are no chain, whose parameters were merely counted.

    Taught in: notebooks/04_aggregated_gradients.
    """

    rank: int
    unknowns: int
    layers: tuple[LayerCount, ...]

    @property
    def missing(self) -> int:
        """Directions in which the images can move and the gradient stays."""
        return self.unknowns - self.rank


@torch.no_grad()
def count_equations(model: nn.Module, images: Tensor) -> EquationCount:
    r"""Predict the rank of a batch gradient's Jacobian from the architecture alone.

    Walk from the logits down. Let E be how many directions of a layer's outputs are
    determined, and d how many of the others can move. Going through the layer to its
    :math:`n_{in}` inputs, all images together,

    .. math:: E \leftarrow \min(n_{in},\; E + (w - r) + \min(d, r + b + s)),

    where

    - the weight gradient, a sum of errors times inputs, is
      :math:`w = c_{in} \min(c_{out} k^2, q)` equations for inputs at q places of all
      images. A linear layer has k = 1 and one place per image; the last layer has one
      row fewer, because its errors add up to zero; with a stride, every residue of the
      places is read by taps of its own, and the minimum is taken for each;
    - r of them repeat what is known: where outputs z and errors e are, the weights
      times the weight gradient give all :math:`\langle e_o, z_{o'} \rangle`, so that
      :math:`r = c_{out} \min(c_{out}, p)` for outputs at p places of all images.
      Behind ReLU it is :math:`\langle e_o, z_o \rangle` only, :math:`r = c_{out}`;
    - errors that are unknown themselves bring back those r, the :math:`b = c_{out}`
      entries of the bias gradient, and the s = :math:`c_{in} c_{out} k^2 - w` others,
      as far as the d unknown directions go. Behind ReLU no error moves once the last
      layer gives its inputs away, and this term is missing.

    Through ReLU and pooling only the E of what passes counts. On the LeNet of DLG and
    2 to 4 images of 32x32 pixels this is 768 B + (3,600 - 144) + 912 = 768 B + 4,368,
    the measured rank.

    Args:
        model: Any classifier. For what is no chain of common layers the rank is
            bounded by the number of parameters, those of linear layers counted by
            the rank of their gradients.
        images: Shape (B, C, H, W); only their number and shape count, and for ReLU
            and max-pooling which units they switch on.

    Returns:
        The prediction, and how it comes about.

    Raises:
        InputError: The images have another shape.

    Taught in: notebooks/04_aggregated_gradients.
    """
    if images.dim() != 4:
        raise InputError("images", "shape (B, C, H, W)", tuple(images.shape))
    layers = _chain_layers(model)
    if layers is None:
        return EquationCount(_count_parameters(model, images), images.numel(), ())
    trace = _trace(layers, images.to(next(model.parameters())))
    weighted = [i for i, s in enumerate(trace) if isinstance(s.layer, _Linear | _Conv)]
    known, visible, found = 0, 0, []
    smooth, errors_known = False, False
    mask = torch.ones_like(trace[-1].output)
    for index in reversed(range(weighted[0], len(trace))):
        step, layer = trace[index], trace[index].layer
        if not isinstance(layer, _Linear | _Conv):
            # What passes: the derivative of the sum of all outputs is not zero there.
            mask = _step_back(layer, mask, step.input, step.extra)
            visible = min(visible, int(mask.count_nonzero()))
            if isinstance(layer, _Activation):
                smooth = layer.second is not None
            known = min(known, visible)
            continue
        last = index == weighted[-1]
        outputs, channels = layer.layer.weight.shape[:2]
        live = int(_by_channel(mask).any(1).sum())
        rows = outputs - 1 if last else live  # softmax: all errors add up to zero
        new = _weight_equations(layer, step.moves, rows)
        everything = channels * rows * math.prod(layer.layer.weight.shape[2:])
        everything += rows * (layer.layer.bias is not None)
        if last:
            new = min(everything, new + rows)
        else:
            repeated = outputs * min(outputs, _by_channel(mask).shape[1])
            new = max(0, new - (repeated if smooth else rows))
            if smooth or not errors_known:
                new += min(visible - known, everything - new)
        visible = int(step.moves.sum())
        known = min(visible, known + new)
        name = f"{type(layer.layer).__name__} {channels} to {outputs}"
        found.append(LayerCount(name, step.input.numel(), new, known))
        errors_known = known == visible if last else errors_known
        smooth, mask = False, torch.ones_like(step.input)
    return EquationCount(known, images.numel(), tuple(found))


@dataclass(frozen=True)
class _Step:
    """One layer on the way up: what it saw, made, and must remember.

    ``moves`` is 1 where an entry of the input follows the last outputs of weights.
    """

    layer: _Layer
    input: Tensor
    moves: Tensor
    output: Tensor
    extra: Any


def _trace(layers: Sequence[_Layer], a: Tensor) -> list[_Step]:
    steps, after = [], torch.ones_like(a)
    extra: Any
    for layer in layers:
        below, moves, extra = a, after, None
        match layer:
            case _Activation():
                a = layer.function(below)
                extra = (layer.first(below, a), None)
                after = moves * (extra[0] != 0)
            case _MaxPool():
                a, extra = layer.pool(below)
                after = moves.flatten(2).gather(2, extra.flatten(2)).view_as(a)
            case _Flatten():
                a, after = below.flatten(1), moves.flatten(1)
            case _Linear() | _Conv():
                a = layer.forward(below)
                after = torch.ones_like(a)
            case _:
                a = layer.forward(below)
                after = (layer.tangent(moves) != 0).to(a)
        steps.append(_Step(layer, below, moves, a, extra))
    return steps


def _weight_equations(layer: _Linear | _Conv, moves: Tensor, rows: int) -> int:
    """Equations for the inputs where the errors of ``rows`` channels are known.

    Each input channel and each residue of its places is read by taps of its own.
    """
    if isinstance(layer, _Linear):
        return int(moves.sum(0).clamp_max(rows).sum())
    conv, total = layer.layer, 0
    sides = list(
        zip(
            conv.kernel_size,
            conv.stride,
            _pair(conv.padding),
            conv.dilation,
            strict=True,
        )
    )
    down, across = conv.stride
    for row, column in itertools.product(range(down), range(across)):
        taps = math.prod(
            sum((t * dilation - padding) % stride == residue for t in range(kernel))
            for residue, (kernel, stride, padding, dilation) in zip(
                (row, column), sides, strict=True
            )
        )
        entries = moves[:, :, row::down, column::across].sum((0, 2, 3))
        total += int(entries.clamp_max(rows * taps).sum())
    return total


def _by_channel(x: Tensor) -> Tensor:
    """(B, C, ...) to (C, all else)."""
    return x.transpose(0, 1).flatten(1)


def _count_parameters(model: nn.Module, images: Tensor) -> int:
    batch = len(images)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    of_linear = {id(m.weight): m.weight.shape for m in linear}
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = of_linear.get(id(parameter))
            rank = parameter.numel() if shape is None else batch * sum(shape)
            total += min(parameter.numel(), rank)
    return min(total, images.numel())


# --- measured ---------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a Jacobian: all of them, or a sample that stands for all.

    Args:
        unknowns: Columns n of the Jacobian.
        equations: Rows m.
        values: Shape (p, k): all values for p = 1 where exact, otherwise nodes of one
            quadrature rule per random probe.
        weights: Shape (p, k): how many singular values each node stands for; every
            row adds up to min(m, n).
        exact: Whether these are all singular values.

    Taught in: notebooks/04_aggregated_gradients.
    """

    unknowns: int
    equations: int
    values: Tensor
    weights: Tensor
    exact: bool

    @property
    def largest(self) -> float:
        """The largest singular value."""
        return float(self.values.max())

    def limited_to(self, rank: int) -> Spectrum:
        """The spectrum where only ``rank`` singular values are not zero.

        Probes give what has no direction at all to the smallest of their nodes: that
        weight is taken away.
        """
        excess = (self.weights.sum(1, keepdim=True) - rank).clamp_min(0)
        order = self.values.argsort(1)
        weights = self.weights.gather(1, order)
        before = weights.cumsum(1) - weights
        weights = weights - (excess - before).clamp_min(0).minimum(weights)
        return replace(self, values=self.values.gather(1, order), weights=weights)

    def sum_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Sum of a function of all singular values, and its standard error."""
        per_probe = (self.weights * function(self.values)).sum(1)
        probes = len(per_probe)
        error = float(per_probe.std() / probes**0.5) if probes > 1 else 0.0
        return float(per_probe.mean()), error

    def count_above(self, value: float) -> tuple[float, float]:
        """How many singular values exceed ``value``, and the standard error."""
        return self.sum_of(lambda values: (values > value).to(values))

    def bits(self, noise_std: float, prior_std: float = PRIOR_STD) -> float:
        """As the function ``bits``, from a sample where these are not all values."""
        _check_stds(noise_std, prior_std)
        return self.sum_of(lambda s: _bits_each(s, noise_std, prior_std))[0]

    def determined(
        self, noise_std: float, prior_std: float = PRIOR_STD
    ) -> tuple[float, float]:
        """Directions that stand out of the noise, and the standard error."""
        _check_stds(noise_std, prior_std)
        return self.count_above(noise_std / prior_std)


def exact_spectrum(linear: Linearisation) -> Spectrum:
    """Compute all singular values of a gradient's Jacobian.

    Args:
        linear: The gradient near a batch of images.

    Returns:
        All of them, min(m, n).

    Raises:
        InputError: The Jacobian does not fit into memory.

    Taught in: notebooks/04_aggregated_gradients.
    """
    equations = len(linear.gradient)
    values = singular_values(linear)[: min(linear.unknowns, equations)][None]
    weights = torch.ones_like(values)
    return Spectrum(linear.unknowns, equations, values, weights, exact=True)


def gradient_operator(
    model: nn.Module, images: Tensor, targets: Tensor
) -> LinearOperator:
    """Give the Jacobian of a batch gradient as products, in double precision.

    Args:
        model: Any classifier, as for ``linearise_gradient``.
        images: Shape (B, C, H, W), where the Jacobian is taken.
        targets: Class probabilities (B, K).

    Returns:
        Products with the Jacobian and with its transpose.

    Raises:
        InputError: As for ``linearise_gradient``.

    Taught in: notebooks/04_aggregated_gradients.
    """
    return _GradientOperator(model, images, targets)


class _GradientOperator:
    """Tangents by a linearisation, cotangents by the pull-back of the same map."""

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor):
        self.linear = linearise_gradient(model, images, targets)
        self.map = gradient_map(copy.deepcopy(model).double())
        self.images, self.targets = images.detach().double(), targets.detach().double()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.shapes = [p.shape for p in trained]

    @property
    def unknowns(self) -> int:
        return self.linear.unknowns

    @property
    def equations(self) -> int:
        return len(self.linear.gradient)

    def along(self, directions: Tensor) -> Tensor:
        return self.linear.along(directions)

    def back(self, cotangents: Tensor) -> Tensor:
        rows = []
        for row in cotangents.to(
            self.images
        ):  # one trial at a time keeps one graph in memory
            parts = row.split([math.prod(shape) for shape in self.shapes])
            pairs = zip(parts, self.shapes, strict=True)
            _, pullback = self.map(self.images[None], self.targets[None])
            rows.append(pullback([p.view(1, *s) for p, s in pairs])[0].flatten())
        return torch.stack(rows)


@torch.no_grad()
def estimate_spectrum(
    operator: LinearOperator, *, steps: int = 40, probes: int = 4, seed: int = 0
) -> Spectrum:
    """Sample the spectrum of a matrix from products with it and its transpose.

    Every random probe starts a Golub-Kahan bidiagonalisation with full
    reorthogonalisation. The singular values of the small bidiagonal matrix are the
    nodes of a Gauss quadrature rule for the spectrum as the probe sees it, and are not
    squared on the way. Counts above a level are good to a few percent of all values
    where the level lies among many; the rank itself is not to be had this way, because
    the smallest singular values come out last.

    Args:
        operator: A matrix known by its products, in double precision.
        steps: Length of every recursion: products with the matrix and its transpose.
        probes: Number of probes; they are carried together.
        seed: Seed of the probes.

    Returns:
        Nodes and weights; ``sum_of`` and its kin give numbers with standard errors
        over the probes.

    Raises:
        InputError: A count is out of range.

    Source: Golub and Kahan (1965) for the recursion; Ubaru et al. (2017) for the
    quadrature with random probes.
    Taught in: notebooks/04_aggregated_gradients.
    """
    check_count("steps", steps)
    check_count("probes", probes)
    check_seed("seed", seed)
    along: Callable[[Tensor], Tensor] = operator.along
    back: Callable[[Tensor], Tensor] = operator.back
    if operator.equations < operator.unknowns:  # a basis of the shorter side is kept
        along, back = back, along
    size = min(operator.equations, operator.unknowns)
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(probes, size, generator=generator, dtype=torch.float64)
    u = along(v / v.norm(dim=1, keepdim=True))  # also tells the device
    v = (v / v.norm(dim=1, keepdim=True)).to(u)
    basis = v.new_zeros(steps, probes, size)
    small = v.new_zeros(probes, steps, steps)
    for step in range(steps):
        basis[step] = v
        if step:
            u = along(v) - small[:, step - 1, step, None] * u
        u, small[:, step, step] = _unit(u)
        if step + 1 == steps:
            break
        v = back(u) - small[:, step, step, None] * v
        own = basis[: step + 1]
        for _ in range(2):
            v = v - torch.einsum("sp,spn->pn", torch.einsum("spn,pn->sp", own, v), own)
        scale = small.abs().amax((1, 2))
        v, small[:, step, step + 1] = _unit(v, 1e-14 * scale)
    _, values, right = torch.linalg.svd(small)
    weights = size * right[:, :, 0].square()
    return Spectrum(operator.unknowns, operator.equations, values, weights, exact=False)


def _unit(rows: Tensor, least: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of norm 1 and their former norms; rows that are rounding become zero."""
    norms = rows.norm(dim=1)
    norms = torch.where(norms > least, norms, torch.zeros_like(norms))
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    return rows * ((norms > 0) / safe)[:, None], norms


def cholesky_rank(normal: Tensor) -> tuple[int, Tensor]:
    r"""Find the rank of a Jacobian from :math:`J^\top J`, and a factor of that.

    Much faster than all eigenvalues. A pivot counts where it exceeds 1e-12 of the
    largest diagonal entry: a millionth of the longest column of J.

    Args:
        normal: Shape (n, n), symmetric and positive semi-definite.

    Returns:
        The rank r, and a matrix R (r, n) with :math:`R^\top R = J^\top J` up to what
        was cut off; it has the singular values of J.

    Raises:
        InputError: The matrix is not square.

    Source: Higham (1990) for the rank by complete pivoting.
    Taught in: notebooks/04_aggregated_gradients.
    """
    from scipy.linalg import lapack

    if normal.dim() != 2 or normal.shape[0] != normal.shape[1]:
        raise InputError("normal", "shape (n, n)", tuple(normal.shape))
    largest = float(normal.diagonal().max())
    if largest <= 0:
        return 0, normal[:0]
    # LAPACK reads columns: its lower triangle is ours above the diagonal.
    matrix = normal.detach().cpu().double().numpy().T
    lower, pivots, rank, _ = lapack.dpstrf(matrix, tol=_PIVOT * largest, lower=1)
    ours = torch.from_numpy(lower[:, :rank]).tril()
    factor = torch.empty_like(ours.T)
    factor[:, torch.from_numpy(pivots.astype("int64")) - 1] = ours.T
    return int(rank), factor.to(normal.device)


@dataclass(frozen=True)
class DenseOperator:
    """A matrix (m, n) in memory as an operator.

    Taught in: notebooks/04_aggregated_gradients.
    """

    matrix: Tensor

    @property
    def unknowns(self) -> int:
        """Number n of columns."""
        return self.matrix.shape[1]

    @property
    def equations(self) -> int:
        """Number m of rows."""
        return self.matrix.shape[0]

    def along(self, directions: Tensor) -> Tensor:
        """Products (k, m) with directions (k, n)."""
        return directions.to(self.matrix) @ self.matrix.T

    def back(self, cotangents: Tensor) -> Tensor:
        """Products (k, n) with cotangents (k, m)."""
        return cotangents.to(self.matrix) @ self.matrix


# --- rounded ----------------------------------------------------------------------


def bits(
    singular_values: Tensor, *, noise_std: float, prior_std: float = PRIOR_STD
) -> float:
    r"""Say how many bits about the images an update with noise gives away.

    For pixels of standard deviation :math:`\sigma_x` and noise :math:`\sigma` on
    every entry, both Gaussian and independent, it is
    :math:`\tfrac12 \sum_i \log_2 (1 + (s_i \sigma_x / \sigma)^2)`, the mutual
    information.

    Args:
        singular_values: Those of the Jacobian, any shape.
        noise_std: Standard deviation of the noise of an entry, positive.
        prior_std: Standard deviation of a pixel, positive.

    Returns:
        Bits, all images together.

    Raises:
        InputError: A standard deviation is not positive.

    Source: Shannon (1948) for a Gaussian channel.
    Taught in: notebooks/04_aggregated_gradients.
    """
    _check_stds(noise_std, prior_std)
    return float(_bits_each(singular_values.double(), noise_std, prior_std).sum())


def determined(
    singular_values: Tensor, *, noise_std: float, prior_std: float = PRIOR_STD
) -> int:
    """Count the directions in which an update with noise tells more than the prior.

    Args:
        singular_values: Those of the Jacobian.
        noise_std: Standard deviation of the noise of an entry, positive.
        prior_std: Standard deviation of a pixel, positive.

    Returns:
        How many singular values exceed noise_std / prior_std.

    Raises:
        InputError: A standard deviation is not positive.

    Taught in: notebooks/04_aggregated_gradients.
    """
    _check_stds(noise_std, prior_std)
    return int((singular_values * prior_std > noise_std).sum())


def rounding_std(tensor: Tensor, number_format: str) -> Tensor:
    r"""Give the standard deviation of the error that a number format makes.

    Rounding to the nearest of numbers a step apart errs by up to half a step, evenly:
    a standard deviation of step / :math:`\sqrt{12}`. The step of a float is
    :math:`2^{e - p}` for an entry between :math:`2^e` and :math:`2^{e+1}` and p bits
    behind the point, and no smaller than that of the smallest normal number; the step
    of ``int8`` is 1/127 of the largest entry of the tensor.

    Args:
        tensor: What is sent.
        number_format: One of ``FORMATS``.

    Returns:
        Standard deviations of the shape of ``tensor``, in double precision.

    Raises:
        InputError: The format is unknown.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_choice("number_format", number_format, FORMATS)
    size = tensor.detach().double().abs()
    if number_format == "int8":
        step = (size.max() / 127).expand_as(size)
    else:
        digits, smallest = _FLOATS[number_format]
        _, exponent = torch.frexp(size)  # size = m * 2**exponent with m in [0.5, 1)
        exponent = (exponent - 1).clamp_min(smallest)
        step = torch.ldexp(torch.ones_like(size), exponent - digits)
    return step / math.sqrt(12)


def _bits_each(values: Tensor, noise_std: float, prior_std: float) -> Tensor:
    return torch.log1p((values * (prior_std / noise_std)).square()) / math.log(4)


def _check_stds(noise_std: float, prior_std: float) -> None:
    check_number("noise_std", noise_std, exclusive=True)
    check_number("prior_std", prior_std, exclusive=True)
