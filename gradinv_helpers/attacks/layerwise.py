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

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.analytic import solve_linear_layer
from gradinv_helpers.attacks.certificate import (
    Certificate,
    LayerSolution,
    gradient_residual,
)
from gradinv_helpers.attacks.gradients import is_plain_chain, modules_in_order
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import Normalize
from gradinv_helpers.updates import SharedUpdate

# Activations at their limits have no inverse; this far inside it is still accurate.
_EDGE = 1e-12
# Shares of the mean diagonal that are added to it, against rounding in the
# factorisation; one after the other until it succeeds.
_RIDGES = (1e-14, 1e-11, 1e-8)
# Below this reciprocal condition the ridge alone holds the factor together.
_SINGULAR = 1e-13
# The dense matrix of more unknowns than this does not fit: 6 GiB.
_MOST_UNKNOWNS = 28_000

METHOD = "layer by layer"


def invert_layer_by_layer(update: SharedUpdate) -> tuple[Tensor, Tensor, Certificate]:
    """Solve for the single image behind a gradient.

    Works for chains of convolutions and linear layers with biases, sigmoid, tanh or
    ReLU between them, no pooling, and a ``Normalize`` layer in front if there is one.
    Noise is amplified from layer to layer: the residual of the certificate tells.

    Args:
        update: A gradient, or the weight change of one SGD step, of one sample.

    Returns:
        The image (1, C, H, W), in double precision and not clamped; its label (1,);
        the certificate. Its rank is that of all pixels where every layer determined
        its input, and 0 (nothing is shown) where one of them did not.

    Raises:
        InputError: Several samples, a normalised update, or a model of another kind.

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
    if update.normalized:
        raise InputError(
            "update",
            "a gradient of known length",
            "a normalised one",
            "the errors of all layers need its scale; use attack='auto'",
        )
    layers = chain_to_solve(update.model)
    gradient = {name: g.double() for name, g in update.gradient().items()}
    shapes = _input_shapes(layers, update.image_shape)
    solved: list[LayerSolution] = []
    error = value = slope = torch.zeros(0)  # of the current layer's output
    label = torch.zeros(1, dtype=torch.long)
    for (name, layer), shape in zip(reversed(layers), reversed(shapes), strict=True):
        if isinstance(layer, nn.Linear):
            error = gradient[f"{name}.bias"]
            if not solved:
                label = error.argmin().reshape(1).cpu()
            if not bool(error.any()):
                raise InputError("update", f"a gradient in layer {name}", "all zeros")
            weight_gradient = gradient[f"{name}.weight"]
            value = solve_linear_layer(weight_gradient, error)
            count = weight_gradient.numel()
            solved.append(LayerSolution(name, len(value), count, 1.0))
            error = layer.weight.detach().double().T @ error
        elif isinstance(layer, nn.Conv2d):
            weight_gradient = gradient[f"{name}.weight"]
            equations = _Convolution(layer, shape, value, slope, error, weight_gradient)
            value, solution = equations.solve(name)
            value = value.to(error.device)
            solved.append(solution)
            error = _transpose(layer, error, shape)
        elif isinstance(layer, nn.Flatten):
            error = error.reshape(shape)
        elif isinstance(layer, Normalize):
            value = value * layer.std[0].double() + layer.mean[0].double()
            error = error / layer.std[0].double()
        else:
            value, slope = _undo(layer, value)
            error = error * slope
            continue
        value = value.reshape(shape)
        slope = torch.ones_like(value)
    image = value[None]
    return image, label, _certify(update, image, label, tuple(solved))


def _certify(
    update: SharedUpdate,
    image: Tensor,
    label: Tensor,
    layers: tuple[LayerSolution, ...],
) -> Certificate:
    unknowns = image.numel()
    determined = all(layer.determined for layer in layers)
    return Certificate(
        method=METHOD,
        residual=gradient_residual(update, image, label),
        unknowns=unknowns,
        rank=unknowns if determined else 0,
        condition=max(layer.condition for layer in layers),
        layers=layers,
    )


def chain_to_solve(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and layers of a chain that can be solved layer by layer, in order.

    Args:
        model: Any classifier.

    Raises:
        InputError: The model is another one; the first layer without an inverse is
            named.

    Taught in: notebooks/03_stronger_matching.
    """
    kinds = (nn.Linear, nn.Conv2d, nn.Flatten, nn.Sigmoid, nn.Tanh, nn.ReLU, Normalize)
    if type(model) is not nn.Sequential:
        raise _unsupported(type(model).__name__)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [
        (names[id(module)], module)
        for module in modules_in_order(model)
        if not _is_silent(module)
    ]
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


def _is_silent(module: nn.Module) -> bool:
    """Whether a module does nothing here."""
    idle = isinstance(module, nn.Dropout) and not module.training
    return idle or type(module) is nn.Identity


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
    # Outputs of ReLU are never negative: those that are show how far the others err.
    on = value > max(_EDGE, 30 * float(-value.min()))
    return torch.where(on, value, float("nan")), on.to(value)


class _Convolution:
    """The linear equations for the input of one convolution, on the CPU.

    Args:
        conv: The layer.
        shape: Shape (C, H, W) of its input.
        output: What it gave (O, h, w); NaN where that is not known.
        slope: Slope of the activation behind it. A flat activation magnifies errors of
            its inverse, so equations of the output count by that slope.
        error: dL/d(output), same shape.
        weight_gradient: dL/d(weight), (O, C, k, k).
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        shape: tuple[int, ...],
        output: Tensor,
        slope: Tensor,
        error: Tensor,
        weight_gradient: Tensor,
    ):
        assert conv.bias is not None
        self.conv, self.shape = conv, shape
        self.weight = conv.weight.detach().double().cpu()
        bias = conv.bias.detach().double().cpu().view(-1, 1, 1)
        side = (output.cpu() - bias).nan_to_num(0.0)
        trust = torch.where(output.isnan(), 0.0, slope).cpu()
        self.taps = _taps(conv, shape)
        columns = _gradient_rows(error.cpu(), self.taps, math.prod(shape[1:]))
        moments = weight_gradient.cpu().flatten(2).transpose(0, 1).flatten(1)
        # Each kind of equation is scaled to mean square one, so that none is lost.
        self.known = int((trust != 0).sum())
        ones = torch.ones(1, *shape, dtype=torch.float64)
        squares = F.conv2d(ones, self.weight.square(), None, **_settings(conv))[0]
        size = (trust.square() * squares).sum() / max(1, self.known)
        self.trust = trust / size.sqrt() if size > 0 else trust
        self.side = side * self.trust
        size = columns.square().sum() / len(columns)
        scale = 1 / size.sqrt() if size > 0 else 1.0
        self.rows, self.moments = columns * scale, moments * scale

    @property
    def unknowns(self) -> int:
        """Entries of the input."""
        return math.prod(self.shape)

    def solve(self, name: str) -> tuple[Tensor, LayerSolution]:
        """The least-squares input (C, H, W), and how well it is determined."""
        from scipy.linalg import lapack

        if self.unknowns > _MOST_UNKNOWNS:
            raise InputError(
                "model",
                f"at most {_MOST_UNKNOWNS:,} numbers as input of a convolution",
                f"{self.unknowns:,} in layer {name}",
                "their equations do not fit into memory; use attack='auto'",
            )
        for ridge in _RIDGES:
            normal = self._normal_matrix(ridge).numpy()  # symmetric: any order
            size = lapack.dlange("1", normal.T)
            factor, failed = lapack.dpotrf(normal.T, lower=1, clean=0, overwrite_a=1)
            if not failed:
                break
        answer = torch.zeros(self.shape, dtype=torch.float64)
        for _ in range(0 if failed else 2):  # the second time for what rounding left
            gap = self._back(*self._missing(answer)).reshape(-1).numpy()
            step, _ = lapack.dpotrs(factor, gap, lower=1)
            answer += torch.from_numpy(step).view(self.shape)
        condition = math.inf
        if not failed and ridge == _RIDGES[0]:
            reciprocal, _ = lapack.dpocon(factor, size, uplo="L")
            condition = float(reciprocal**-0.5 if reciprocal > _SINGULAR else math.inf)
        equations = self.known + self.moments.numel()
        return answer, LayerSolution(name, self.unknowns, equations, condition)

    def _missing(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """What input ``a`` leaves open in both kinds of equations."""
        z = F.conv2d(a[None], self.weight, None, **_settings(self.conv))[0]
        return self.side - self.trust * z, self.moments - a.flatten(1) @ self.rows.T

    def _back(self, output: Tensor, moments: Tensor) -> Tensor:
        """The transpose of all equations, from their right sides to an input."""
        to_input = _transpose(self.conv, self.trust * output, self.shape)
        return to_input + (moments @ self.rows).view(self.shape)

    def _normal_matrix(self, ridge: float) -> Tensor:
        """The equations multiplied by their transpose, with a ridge on its diagonal."""
        channels, area = self.shape[0], math.prod(self.shape[1:])
        normal = torch.zeros(self.unknowns, self.unknowns, dtype=torch.float64)
        weight = self.weight.flatten(1)  # (O, C*k*k)
        spread = torch.arange(channels)[:, None, None] * area
        entries = torch.where(self.taps >= 0, self.taps + spread, -1).flatten(0, 1)
        matrix = normal.numpy()
        for entry, trust in zip(entries.T, self.trust.flatten(1).T, strict=True):
            local = weight * trust[:, None]  # the rows of one output place
            there = entry >= 0
            local, entry = local[:, there], entry[there]
            matrix[np.ix_(entry, entry)] += (local.T @ local).numpy()
        own = self.rows.T @ self.rows  # of every channel
        for c in range(0, self.unknowns, area):
            normal[c : c + area, c : c + area] += own
        diagonal = normal.diagonal()
        diagonal += ridge * diagonal.mean()
        return normal


def _taps(conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """Pixel under every kernel tap at every output place: (k*k, places), -1 none."""
    area = shape[1] * shape[2]
    numbers = torch.arange(1, 1 + area, dtype=torch.float64).view(1, 1, *shape[1:])
    columns = F.unfold(
        numbers,
        conv.kernel_size,
        conv.dilation,
        conv.padding,  # type: ignore[arg-type]
        conv.stride,
    )
    return columns[0].long() - 1


def _gradient_rows(error: Tensor, taps: Tensor, area: int) -> Tensor:
    """Rows (output channel, tap) of e correlated with one input channel."""
    tap, place = (taps >= 0).nonzero(as_tuple=True)
    rows = error.new_zeros(len(error), len(taps), area)
    rows[:, tap, taps[tap, place]] = error.flatten(1)[:, place]
    return rows.flatten(0, 1)


def _settings(conv: nn.Conv2d) -> dict:
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
    }


def _transpose(conv: nn.Conv2d, error: Tensor, shape: tuple[int, ...]) -> Tensor:
    """dL/d(input) of a convolution from dL/d(output)."""
    weight = conv.weight.detach().to(error)
    with torch.enable_grad():
        a = error.new_zeros(1, *shape).requires_grad_()
        z = F.conv2d(a, weight, None, **_settings(conv))
        return torch.autograd.grad(z, a, error[None])[0][0]
