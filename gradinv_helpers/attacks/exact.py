r"""One image out of one gradient by linear algebra, layer by layer.

For a single image every layer's input solves linear equations once the layers above
it are known, so that the network is opened from the top down:

- a linear layer: its weight gradient is :math:`e\,a^\top` with e its bias gradient,
  hence :math:`a = (\partial L/\partial W)^\top e / \|e\|^2`;
- a convolution: its output z is known from the activation above (the inverse of a
  sigmoid, say), and so is the error e that arrives at it. Both :math:`W * a + b = z`
  and :math:`\partial L/\partial W = e \star a` are linear in the input a, and
  together they usually have full rank.

Nothing is searched for, and no start is drawn. Whether the answer is *the* answer is
certified by its own numbers: see ``Certificate``.
Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.analytic import solve_linear_layer
from gradinv_helpers.attacks.gradients import (
    gradient_map,
    is_plain_chain,
    modules_in_order,
)
from gradinv_helpers.attacks.matching import squared_error
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import SharedUpdate

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

# Activations at their limits have no inverse; this far inside it is still accurate.
_EDGE = 1e-12
_RIDGE = 1e-14  # share of the mean diagonal, against rounding in the factorisation


@dataclass(frozen=True)
class LayerSolution:
    """How well one layer determined its input.

    Args:
        layer: Name of the layer in the model.
        unknowns: Entries of the input.
        equations: Linear equations for them.
        condition: Condition number of the equations; infinite where they do not
            determine the input in double precision.
    """

    layer: str
    unknowns: int
    equations: int
    condition: float

    @property
    def determined(self) -> bool:
        """Whether the equations have full rank, up to rounding."""
        return self.condition < 1e7  # its square is what double precision can hold


@dataclass(frozen=True)
class Certificate:
    """What an exact answer can prove of itself, without the truth.

    Args:
        residual: Relative squared distance between the gradient of the answer and
            the update.
        layers: One entry per layer that was solved, from the last to the first.
    """

    residual: float
    layers: tuple[LayerSolution, ...]

    @property
    def determined(self) -> bool:
        """Whether every layer determined its input."""
        return all(layer.determined for layer in self.layers)

    @property
    def exact(self) -> bool:
        """Whether the answer explains the update and no other image would."""
        return self.determined and self.residual < 1e-6

    def __str__(self) -> str:
        weak = [layer.layer for layer in self.layers if not layer.determined]
        if weak:
            verdict = f"not exact: layer {', '.join(weak)} leaves its input open"
        elif self.exact:
            verdict = "exact: the only image with this gradient"
        else:
            verdict = "not exact: noise or rounding was amplified on the way down"
        return f"residual {self.residual:.1e}, {verdict}"


def invert_layer_by_layer(update: SharedUpdate) -> tuple[Tensor, Tensor, Certificate]:
    """Solve for the single image behind a gradient.

    Works for chains of convolutions and linear layers with biases, sigmoid, tanh or
    ReLU between them, and no pooling. Noise is amplified from layer to layer: the
    residual of the certificate tells.

    Args:
        update: A gradient, or the weight change of one SGD step, of one sample.

    Returns:
        The image (1, C, H, W), in double precision and not clamped; its label (1,);
        the certificate.

    Raises:
        InputError: Several samples, or a model of another kind.

    Source: Zhu and Blaschko (2021), R-GAP, Section 3; here one least-squares problem
    per layer with both kinds of equations at once.
    Taught in: notebooks/02_dlg_four_steps.
    """
    if update.num_samples != 1:
        raise InputError(
            "update",
            "an update of one sample for attack 'exact'",
            f"one of {update.num_samples} samples",
            "use attack='dlg'",
        )
    layers = _supported_layers(update.model)
    gradient = {name: g.double() for name, g in update.gradient().items()}
    shapes = _input_shapes(layers, update.image_shape)
    solved: list[LayerSolution] = []
    error: Tensor | None = None  # dL/d(output of the current layer)
    known: tuple[Tensor, Tensor] | None = None  # that output, and the slope after it
    label = torch.zeros(1, dtype=torch.long)
    value = torch.zeros(0)
    first = next(
        i for i, (_, m) in enumerate(layers) if isinstance(m, nn.Linear | nn.Conv2d)
    )
    for index in range(len(layers) - 1, first - 1, -1):
        name, layer = layers[index]
        shape = shapes[index]
        if isinstance(layer, nn.Linear):
            error = gradient[f"{name}.bias"]
            label = error.argmin().reshape(1).cpu() if not solved else label
            if not bool(error.any()):
                raise InputError("update", f"a gradient in layer {name}", "all zeros")
            weight_gradient = gradient[f"{name}.weight"]
            value = solve_linear_layer(weight_gradient, error)
            equations = weight_gradient.numel()
            solved.append(LayerSolution(name, len(value), equations, 1.0))
            error = layer.weight.detach().double().T @ error
        elif isinstance(layer, nn.Conv2d):
            assert error is not None
            weight_gradient = gradient[f"{name}.weight"]
            value, solution = _solve_convolution(
                name, layer, shape, known, error, weight_gradient
            )
            solved.append(solution)
            error = _transpose(layer, error, shape)
        elif isinstance(layer, nn.Flatten):
            value = value.reshape(shape)
            error = error.reshape(shape) if error is not None else None
            continue
        else:
            assert error is not None
            known = _undo(layer, value)
            error = error * known[1]
            continue
        value, known = value.reshape(shape), None
    image = value.reshape(1, *update.image_shape)
    return image, label, Certificate(_residual(update, image, label), tuple(solved))


def _supported_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers in order, or an error that names the first one without an inverse."""
    kinds = (nn.Linear, nn.Conv2d, nn.Flatten, nn.Sigmoid, nn.Tanh, nn.ReLU)
    if type(model) is not nn.Sequential:
        raise _unsupported(type(model).__name__)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [(names[id(module)], module) for module in modules_in_order(model)]
    for name, layer in layers:
        weighted = isinstance(layer, nn.Linear | nn.Conv2d)
        biased = not weighted or getattr(layer, "bias", None) is not None
        if not isinstance(layer, kinds) or not biased:
            raise _unsupported(f"layer {name}: {layer}")
    if not is_plain_chain(model):
        raise _unsupported(
            "a chain with hooks, frozen or shared weights, unusual settings of a "
            "layer, or no linear layer at its end"
        )
    return layers


def _unsupported(got: str) -> InputError:
    return InputError(
        "attack 'exact'",
        "a chain of convolutions, linear layers with biases, sigmoid, tanh and ReLU",
        got,
        "use attack='auto'",
    )


def _input_shapes(
    layers: list[tuple[str, nn.Module]], image_shape: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Shape of the input of every layer, without the batch."""
    shapes = []
    weight = next(p for _, m in layers for p in m.parameters())
    x = weight.new_zeros(1, *image_shape)
    with torch.no_grad():
        for _, layer in layers:
            shapes.append(tuple(x.shape[1:]))
            x = layer(x)
    return shapes


def _undo(layer: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    """Input of an activation and its slope there, from its output.

    Where ReLU is off the input is not known: NaN.
    """
    if isinstance(layer, nn.Sigmoid):
        inside = value.clamp(_EDGE, 1 - _EDGE)
        return torch.logit(inside), inside * (1 - inside)
    if isinstance(layer, nn.Tanh):
        inside = value.clamp(-1 + _EDGE, 1 - _EDGE)
        return torch.atanh(inside), 1 - inside.square()
    on = value > _EDGE
    return torch.where(on, value, float("nan")), on.to(value)


def _transpose(conv: nn.Conv2d, error: Tensor, shape: tuple[int, ...]) -> Tensor:
    """dL/d(input) of a convolution from dL/d(output)."""
    with torch.enable_grad():
        a = error.new_zeros(1, *shape).requires_grad_()
        z = F.conv2d(
            a,
            conv.weight.detach().double(),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        return torch.autograd.grad(z, a, error[None])[0][0]


def _solve_convolution(
    name: str,
    conv: nn.Conv2d,
    shape: tuple[int, ...],
    known: tuple[Tensor, Tensor] | None,
    error: Tensor,
    weight_gradient: Tensor,
) -> tuple[Tensor, LayerSolution]:
    """Least squares for the input of a convolution.

    ``known`` is its output (NaN where unknown) and the slope of the activation that
    follows. A flat activation magnifies errors of its inverse, so equations of the
    output count by that slope.
    """
    import numpy as np
    from scipy import linalg
    from scipy.sparse import diags, vstack

    channels = len(error)
    e = error.reshape(channels, -1).cpu().numpy()
    taps = _taps(conv, shape)
    blocks, sides = [], []
    if known is not None:
        z, slope = (t.reshape(channels, -1).cpu().numpy() for t in known)
        weight = conv.weight.detach().double().reshape(channels, -1).cpu().numpy()
        assert conv.bias is not None
        there = ~np.isnan(z).reshape(-1)
        trust = slope.reshape(-1)[there]
        side = (z - conv.bias.detach().double().cpu().numpy()[:, None]).reshape(-1)
        equations = _forward_equations(weight, taps, shape)[there]
        blocks.append(diags(trust) @ equations)
        sides.append(trust * side[there])
    blocks.append(_gradient_equations(e, taps, shape))
    sides.append(weight_gradient.reshape(-1).cpu().numpy())
    # Each kind of equation is scaled to the same mean square, so that none is lost.
    for i, block in enumerate(blocks):
        scale = np.sqrt(block.multiply(block).sum() / max(1, block.shape[0]))
        if scale > 0:
            blocks[i] = diags(np.full(block.shape[0], 1 / scale)) @ block
            sides[i] = sides[i] / scale
    matrix, side = vstack(blocks).tocsr(), np.concatenate(sides)
    unknowns = matrix.shape[1]
    normal = (matrix.T @ matrix).toarray()
    size = np.abs(normal).sum(0).max()
    normal[np.diag_indices(unknowns)] += _RIDGE * np.trace(normal) / unknowns
    factor, lower = linalg.cho_factor(normal, lower=True, check_finite=False)
    answer = linalg.cho_solve((factor, lower), matrix.T @ side, check_finite=False)
    correction = matrix.T @ (side - matrix @ answer)
    answer += linalg.cho_solve((factor, lower), correction, check_finite=False)
    reciprocal, _ = linalg.lapack.dpocon(factor, size, uplo="L")
    condition = float(1 / np.sqrt(max(reciprocal, 1e-300)))
    if reciprocal < 1e-13:  # the ridge alone holds the factor together
        condition = float("inf")
    solution = LayerSolution(name, unknowns, matrix.shape[0], condition)
    return torch.from_numpy(answer).to(error.device), solution


def _taps(conv: nn.Conv2d, shape: tuple[int, ...]) -> np.ndarray:
    """Input entry under every kernel tap at every output place: (C*k*k, P), -1 none."""
    entries = torch.arange(1, 1 + shape[0] * shape[1] * shape[2], dtype=torch.float64)
    columns = F.unfold(
        entries.reshape(1, *shape),
        conv.kernel_size,
        conv.dilation,
        conv.padding,  # type: ignore[arg-type]
        conv.stride,
    )
    return columns[0].long().numpy() - 1


def _forward_equations(
    weight: np.ndarray, taps: np.ndarray, shape: tuple[int, ...]
) -> csr_matrix:
    """Sparse rows (output channel, place) of W * a; weight (O, C*k*k)."""
    tap, place = (taps >= 0).nonzero()
    return _assemble(taps[tap, place], place, weight[:, tap], taps.shape[1], shape)


def _gradient_equations(
    error: np.ndarray, taps: np.ndarray, shape: tuple[int, ...]
) -> csr_matrix:
    """Sparse rows (output channel, tap) of e correlated with a; error (O, P)."""
    tap, place = (taps >= 0).nonzero()
    return _assemble(taps[tap, place], tap, error[:, place], taps.shape[0], shape)


def _assemble(
    column: np.ndarray,
    row: np.ndarray,
    data: np.ndarray,
    height: int,
    shape: tuple[int, ...],
) -> csr_matrix:
    """Stack one block of ``height`` rows per output channel; data (O, entries)."""
    import numpy as np
    from scipy.sparse import csr_matrix

    channels = len(data)
    rows = (np.arange(channels)[:, None] * height + row).reshape(-1)
    columns = np.tile(column, channels)
    size = (channels * height, math.prod(shape))
    return csr_matrix((data.reshape(-1), (rows, columns)), shape=size)


def _residual(update: SharedUpdate, image: Tensor, label: Tensor) -> float:
    """Relative squared distance between the answer's gradient and the update."""
    model = copy.deepcopy(update.model).double()
    stated = update.gradient()
    classes = list(model.parameters())[-1].shape[0]
    target = F.one_hot(label, classes).to(image)[None]
    gradients, _ = gradient_map(model)(image[None], target)
    loss, _ = squared_error(gradients, [g.double()[None] for g in stated.values()])
    return float(loss)
