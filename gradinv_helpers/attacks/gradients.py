r"""Gradients of many dummy batches at once, and the way back to the images.

Gradient matching needs two things in every step: the gradient :math:`g(x, y)` that a
dummy batch would send, and the derivative of the matching loss D with respect to x
and y. With :math:`v = \partial D / \partial g` the second one is

.. math:: \nabla_x D = \nabla_x \langle g(x, y), v \rangle ,

one pull-back of v through the map g. Both are formed here for T independent trials
(restarts, clients) of B images each, as one tensor program.

Chains of convolutions, linear layers and activations (LeNet, MLP, ConvNet) use a
hand-written pair of sweeps that keeps no graph. All other modules use
``torch.func.vmap`` over trials, or a loop where vmap does not apply.
Taught in: notebooks/02_dlg_four_steps.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradinv_helpers.errors import InputError, check_count
from gradinv_helpers.models import Normalize

Gradients = list[Tensor]  # one (T, *parameter shape) per trainable parameter
Pullback = Callable[[Gradients], tuple[Tensor, Tensor]]
GradientMap = Callable[[Tensor, Tensor], tuple[Gradients, Pullback]]

# Memory of a trial: gradients, their targets, the derivative of the loss and a
# difference on one side; on the other the graph, and as much again on the way back.
_LISTS_PER_TRIAL, _GRAPHS_PER_TRIAL = 4, 2
# A convolution of fewer multiplications is done before a custom function is set up.
_LARGE_CONVOLUTION = 40_000_000
# Up to so many entries, products with columns are faster than convolutions on a CPU.
_FEW_COLUMNS = 25_000


def gradient_map(model: nn.Module) -> GradientMap:
    """Build the map from dummy batches to the gradients they would send.

    Layers that torch can differentiate only once (``nn.Hardsigmoid``, fused
    attention) are evaluated by equal functions that it can differentiate twice.

    Args:
        model: Any classifier from (N, C, H, W) to logits (N, K), in the mode (train
            or eval) in which the client used it. It is not changed.

    Returns:
        A function of ``images`` (T, B, C, H, W) and class probabilities ``targets``
        (T, B, K). It returns, per trainable parameter, the gradients of the mean
        cross-entropy of every trial (T, ...), and a pull-back from such a list to
        the gradients with respect to images and targets. The pull-back may be used
        once.

    Source: Pearlmutter (1994), whose product rule gives the pull-back of a chain.
    Taught in: notebooks/02_dlg_four_steps.
    """
    return _map_of(model)


def trials_at_once(
    model: nn.Module, batch_shape: tuple[int, ...], *, budget_bytes: int
) -> int:
    """Count the trials whose gradient map and pull-back fit into some memory.

    One trial is run to see how much it keeps. The estimate is meant for splitting
    many trials: on the models of ``build_model`` it is 0.9 to 1.3 times the memory
    by which a process on a CPU was measured to grow per trial.

    Args:
        model: As for ``gradient_map``.
        batch_shape: Shape (B, C, H, W) of the images of one trial.
        budget_bytes: Memory to stay below, in bytes.

    Returns:
        A number of trials, at least 1.

    Raises:
        InputError: The budget is no positive integer.

    Taught in: notebooks/03_stronger_matching.
    """
    check_count("budget_bytes", budget_bytes)
    like = next(p for p in model.parameters() if p.requires_grad)
    images = torch.full(batch_shape, 0.5, dtype=like.dtype, device=like.device)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    graph = _map_of(model).graph_bytes(images)
    one_trial = _GRAPHS_PER_TRIAL * graph + _LISTS_PER_TRIAL * gradients
    return max(1, budget_bytes // one_trial)


def _map_of(model: nn.Module) -> _ChainMap | _AutogradMap:
    layers = _chain_layers(model)
    return _ChainMap(layers) if layers is not None else _AutogradMap(model)


def _storage_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Memory behind some tensors besides others, shared parts counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = {s.data_ptr(): s.nbytes() for s in storages}
    others = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(size for place, size in sizes.items() if place not in others)


# --- any module -----------------------------------------------------------------


class _AutogradMap:
    """Differentiate any module twice, with vmap over trials where it applies."""

    def __init__(self, model: nn.Module):
        self.model = model
        named = dict(model.named_parameters())
        self.trained = {n: p.detach() for n, p in named.items() if p.requires_grad}
        self.fixed = {n: p.detach() for n, p in named.items() if not p.requires_grad}
        self.buffers = {n: b.detach() for n, b in model.named_buffers()}
        # Batch statistics and dropout change state inside vmap, which it refuses.
        self.training = any(module.training for module in model.modules())
        self.use_vmap = not self.training
        self.vmap_checked = False

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        images = images.detach().requires_grad_()
        targets = targets.detach().requires_grad_()
        with torch.enable_grad(), _twice_differentiable(len(images)):
            gradients = self._gradients(images, targets)

        def pullback(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            pairs = [
                (g, v)
                for g, v in zip(gradients, cotangents, strict=True)
                if g.requires_grad
            ]
            with _named_layers():
                back = torch.autograd.grad(
                    [g for g, _ in pairs],
                    [images, targets],
                    [v for _, v in pairs],
                    allow_unused=True,
                )
            to_images, to_targets = (
                torch.zeros_like(x) if b is None else b
                for b, x in zip(back, (images, targets), strict=True)
            )
            return to_images, to_targets

        return [g.detach() for g in gradients], pullback

    def graph_bytes(self, images: Tensor) -> int:
        """What the graph of one trial with images (B, C, H, W) keeps alive."""
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        images = images.detach().requires_grad_()
        with torch.enable_grad(), _twice_differentiable(1), hooks:
            logits = functional_call(self.model, self._state(self.trained), (images,))
            targets = torch.full_like(logits, 1 / logits.shape[-1])
            self._one(images, targets)
        return _storage_bytes(kept, besides=self.trained.values())

    def _gradients(self, images: Tensor, targets: Tensor) -> Gradients:
        if self.use_vmap and len(images) > 1 and not self.vmap_checked:
            self.use_vmap = self._vmap_agrees(images[:2, :2], targets[:2, :2])
            self.vmap_checked = True
        if self.use_vmap and len(images) > 1:
            try:
                with warnings.catch_warnings():  # of operations that vmap loops over
                    warnings.simplefilter("ignore", UserWarning)
                    per_trial = vmap(grad(self._loss), in_dims=(None, 0, 0))(
                        self.trained, images, targets
                    )
                return list(per_trial.values())
            except RuntimeError:
                self.use_vmap = False  # in-place or data-dependent operations
        rows = [self._one(x, y) for x, y in zip(images, targets, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    @torch.no_grad()
    def _vmap_agrees(self, images: Tensor, targets: Tensor) -> bool:
        """Whether vmap and the loop have the same pull-back, in double precision.

        For some layers (normalisation by statistics of the input) torch's vmap
        silently leaves out a part of the second derivative.
        """
        device = "cpu" if images.device.type == "mps" else images.device
        x, y = images.to(device, torch.float64), targets.to(device, torch.float64)
        found = []
        try:
            probe = _AutogradMap(copy.deepcopy(self.model).to(device, torch.float64))
            probe.vmap_checked = True
            for _ in range(2):
                gradients, pullback = probe(x, y)
                found.append(pullback(gradients)[0])
                probe.use_vmap = False
        except RuntimeError:  # constants of another precision, for one
            return False
        if not bool(found[1].isfinite().all()):  # such images say nothing
            return True
        tolerance = 1e-6 * float(found[1].abs().max())
        return torch.allclose(found[0], found[1], rtol=1e-6, atol=tolerance)

    def _one(self, images: Tensor, targets: Tensor) -> Gradients:
        weights = {n: p.detach().requires_grad_() for n, p in self.trained.items()}
        found = torch.autograd.grad(
            self._loss(weights, images, targets),
            list(weights.values()),
            create_graph=True,
            allow_unused=True,
        )
        pairs = zip(found, weights.values(), strict=True)
        return [torch.zeros_like(w) if g is None else g for g, w in pairs]

    def _loss(
        self, weights: dict[str, Tensor], images: Tensor, targets: Tensor
    ) -> Tensor:
        logits = functional_call(self.model, self._state(weights), (images,))
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()

    def _state(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = self.buffers
        if self.training:  # forward would overwrite running statistics
            buffers = {n: b.clone() for n, b in buffers.items()}
        return {**weights, **self.fixed, **buffers}


# --- functions that are differentiated twice --------------------------------------


class _Replacements(TorchFunctionMode):
    """Evaluate some functions by equal ones with a better second derivative."""

    def __init__(self, trials: int):
        super().__init__()
        self.trials = trials

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return _convolve(self.trials, *args, **kwargs)
        if func is F.batch_norm:
            return _normalise_batch(*args, **kwargs)
        if func is F.layer_norm:
            return _normalise_layer(*args, **kwargs)
        if func is F.hardsigmoid:
            return _hard_sigmoid(*args, **kwargs)
        return func(*args, **kwargs)


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """torch has no second derivative of ``F.hardsigmoid``."""
    return F.relu6(input + 3) / 6


def _normalise_batch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With fixed statistics it is affine, cheaper than torch's general derivative."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    shape = (1, -1, *(1,) * (input.dim() - 2))
    scale = torch.rsqrt(running_var + eps)
    out = (input - running_mean.view(shape)) * scale.view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _normalise_layer(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The second derivative that vmap has of ``F.layer_norm`` is wrong."""
    own = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(own, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(own, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def _convolve(
    trials: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``, by ``_Convolution`` where that pays."""
    if isinstance(padding, str) or input.dim() != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    (down, right), padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    places = input[0, 0].numel() // (down * right)
    if trials * len(input) * places * weight.numel() < _LARGE_CONVOLUTION:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    settings = (down, right), padding, dilation, groups
    return _Convolution.apply(input, weight, bias, *settings)


def _pair(value: Any) -> tuple[int, int]:
    """Both sides of a setting that torch takes as one number or as several."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Convolution(torch.autograd.Function):
    """A convolution that is differentiated as two separate operations.

    The second derivative of ``aten::convolution_backward`` always forms a derivative
    with respect to the weights. Nothing here asks for it, and it can cost two fifths of
    a pull-back. The two halves of the first derivative do not do so.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> tuple:
        (e,) = derivatives
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            windows = zip(
                e.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
            reached = [
                (m - 1) * s - 2 * p + d * (k - 1) + 1 for m, k, s, p, d in windows
            ]
            rest = [n - m for n, m in zip(input.shape[2:], reached, strict=True)]
            to_input = F.conv_transpose2d(
                e, weight, None, stride, padding, rest, groups, dilation
            )
        if ctx.needs_input_grad[1]:
            to_weight = _weight_gradient(e, input, weight, *ctx.settings)
        if ctx.needs_input_grad[2]:
            to_bias = e.sum((0, 2, 3))
        return to_input, to_weight, to_bias, None, None, None, None


def _weight_gradient(
    e: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Derivative of a convolution's weights from e, that of its output."""
    return torch.ops.aten.convolution_backward(
        e,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (False, True, False),
    )[1]


@contextmanager
def _twice_differentiable(trials: int = 1) -> Iterator[None]:
    """Let functions in the block be differentiated twice, attention included."""
    with _named_layers(), sdpa_kernel(SDPBackend.MATH), _Replacements(trials):
        yield


@contextmanager
def _named_layers() -> Iterator[None]:
    """Say clearly where torch lacks the second derivative of a layer."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "derivative" not in reason or "not implemented" not in reason:
            raise
        raise InputError(
            "model",
            "layers that torch can differentiate twice",
            reason,
            "replace that layer by one made of ordinary tensor operations",
        ) from error


# --- chains of layers -----------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    layer: nn.Linear

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.layer.weight, self.layer.bias)

    def tangent(self, a_dot: Tensor) -> Tensor:
        return a_dot @ self.layer.weight.T

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        return e @ self.layer.weight

    def weight_gradient(self, a: Tensor, e: Tensor, trials: int) -> Tensor:
        return _per_trial(e, trials).mT @ _per_trial(a, trials)

    def apply_per_trial(self, a: Tensor, v: Tensor) -> Tensor:
        return (_per_trial(a, len(v)) @ v.mT).flatten(0, 1)

    def transpose_per_trial(self, e: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return (_per_trial(e, len(v)) @ v).flatten(0, 1)


@dataclass(frozen=True)
class _Conv:
    layer: nn.Conv2d

    def _settings(self) -> dict:
        conv = self.layer
        return {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
        }

    def forward(self, a: Tensor) -> Tensor:
        return F.conv2d(a, self.layer.weight, self.layer.bias, **self._settings())

    def tangent(self, a_dot: Tensor) -> Tensor:
        return F.conv2d(a_dot, self.layer.weight, None, **self._settings())

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        return self._backward(e, a, self.layer.weight, 1, wants_input=True)

    def weight_gradient(self, a: Tensor, e: Tensor, trials: int) -> Tensor:
        weight = self.layer.weight
        if trials > 1:
            weight = weight.repeat(trials, 1, 1, 1)
        found = self._backward(
            _to_groups(e, trials), _to_groups(a, trials), weight, trials
        )
        return found.unflatten(0, (trials, -1))

    def apply_per_trial(self, a: Tensor, v: Tensor) -> Tensor:
        trials = len(v)
        z = F.conv2d(
            _to_groups(a, trials), v.flatten(0, 1), groups=trials, **self._settings()
        )
        return _from_groups(z, trials)

    def transpose_per_trial(self, e: Tensor, v: Tensor, a: Tensor) -> Tensor:
        trials = len(v)
        r = self._backward(
            _to_groups(e, trials),
            _to_groups(a, trials),
            v.flatten(0, 1),
            trials,
            wants_input=True,
        )
        return _from_groups(r, trials)

    def _backward(
        self,
        e: Tensor,
        a: Tensor,
        weight: Tensor,
        groups: int,
        *,
        wants_input: bool = False,
    ) -> Tensor:
        conv = self.layer
        to_input, to_weight, _ = torch.ops.aten.convolution_backward(
            e,
            a,
            weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            (0, 0),
            groups,
            (wants_input, not wants_input, False),
        )
        return to_input if wants_input else to_weight


@dataclass(frozen=True)
class _Unfold:
    """From images to columns (N, C*k*k, P), one for each place of a convolution."""

    layer: nn.Conv2d

    def forward(self, a: Tensor) -> Tensor:
        (rows, columns), (down, right) = self.layer.kernel_size, self.layer.stride
        above, left = _pair(self.layer.padding)
        a = F.pad(a, (left, left, above, above))
        windows = a.unfold(2, rows, down).unfold(3, columns, right)
        return windows.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2)

    def tangent(self, a_dot: Tensor) -> Tensor:
        return self.forward(a_dot)

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        conv = self.layer
        padding = _pair(conv.padding)
        size = (a.shape[2], a.shape[3])
        return F.fold(e, size, conv.kernel_size, 1, padding, conv.stride)


@dataclass(frozen=True)
class _Columns:
    """What a convolution does to columns (N, C*k*k, P); ``size`` is that of images."""

    layer: nn.Conv2d
    size: tuple[int, int]

    @property
    def matrix(self) -> Tensor:
        return self.layer.weight.flatten(1)

    def forward(self, a: Tensor) -> Tensor:
        z = self.tangent(a)
        bias = self.layer.bias
        return z if bias is None else z.add_(bias.view(-1, 1, 1))

    def tangent(self, a_dot: Tensor) -> Tensor:
        return (self.matrix @ a_dot).unflatten(2, self.size)

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        return self.matrix.T @ e.flatten(2)

    def weight_gradient(self, a: Tensor, e: Tensor, trials: int) -> Tensor:
        found = e.flatten(2) @ a.mT
        if len(found) > trials:
            found = _per_trial(found, trials).sum(1)
        return found.unflatten(2, self.layer.weight.shape[1:])

    def apply_per_trial(self, a: Tensor, v: Tensor) -> Tensor:
        z = v.flatten(2)[:, None] @ _per_trial(a, len(v))
        return z.flatten(0, 1).unflatten(2, self.size)

    def transpose_per_trial(self, e: Tensor, v: Tensor, a: Tensor) -> Tensor:
        back = v.flatten(2).mT[:, None] @ _per_trial(e.flatten(2), len(v))
        return back.flatten(0, 1)


@dataclass(frozen=True)
class _Normalize:
    layer: Normalize

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a)

    def tangent(self, a_dot: Tensor) -> Tensor:
        return a_dot / self.layer.std

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        return e / self.layer.std


@dataclass(frozen=True)
class _AvgPool:
    layer: nn.AvgPool2d

    def forward(self, a: Tensor) -> Tensor:
        return self.layer(a)

    def tangent(self, a_dot: Tensor) -> Tensor:
        return self.layer(a_dot)

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        pool = self.layer
        return torch.ops.aten.avg_pool2d_backward(
            e,
            a,
            _pair(pool.kernel_size),
            _pair(pool.stride),
            _pair(pool.padding),
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
        )


@dataclass(frozen=True)
class _GlobalAvgPool:
    def forward(self, a: Tensor) -> Tensor:
        return a.mean((2, 3), keepdim=True)

    def tangent(self, a_dot: Tensor) -> Tensor:
        return self.forward(a_dot)

    def transpose(self, e: Tensor, a: Tensor) -> Tensor:
        return (e / a[0, 0].numel()).expand_as(a)


@dataclass(frozen=True)
class _Activation:
    """An elementwise function, with its first two derivatives from input z, output a.

    ``second`` is ``None`` where it is zero almost everywhere.
    """

    function: Callable[[Tensor], Tensor]
    first: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor, Tensor], Tensor] | None


def _sigmoid_slope(z: Tensor, a: Tensor) -> Tensor:
    return torch.addcmul(a, a, a, value=-1)  # a (1 - a)


def _sigmoid_bend(z: Tensor, a: Tensor) -> Tensor:
    slope = _sigmoid_slope(z, a)
    return torch.addcmul(slope, slope, a, value=-2)  # a (1 - a) (1 - 2 a)


def _silu_slope(z: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s + a * (1 - s)


def _silu_bend(z: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _bell(z: Tensor) -> Tensor:
    """Density of the standard normal distribution, whose integral GELU uses."""
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Sigmoid: _Activation(torch.sigmoid, _sigmoid_slope, _sigmoid_bend),
    nn.Tanh: _Activation(
        torch.tanh,
        lambda z, a: 1 - a * a,
        lambda z, a: -2 * a * (1 - a * a),
    ),
    nn.ReLU: _Activation(F.relu, lambda z, a: (z > 0).to(z.dtype), None),
    nn.SiLU: _Activation(F.silu, _silu_slope, _silu_bend),
}


def _activation(module: nn.Module) -> _Activation | None:
    """The entry of the table, or one made for the constants of the module."""
    if type(module) is nn.LeakyReLU:
        slope = module.negative_slope
        return _Activation(
            lambda z: F.leaky_relu(z, slope),
            lambda z, a: torch.ones_like(z).masked_fill_(z <= 0, slope),
            None,
        )
    if type(module) is nn.ELU:
        alpha = module.alpha
        return _Activation(
            lambda z: F.elu(z, alpha),
            lambda z, a: torch.where(z > 0, 1, a + alpha),
            lambda z, a: torch.where(z > 0, 0, a + alpha),
        )
    if type(module) is nn.GELU and module.approximate == "none":
        return _Activation(
            F.gelu,
            lambda z, a: torch.special.ndtr(z) + z * _bell(z),
            lambda z, a: (2 - z * z) * _bell(z),
        )
    if type(module) is nn.Softplus:
        beta, threshold = module.beta, module.threshold

        def share(z: Tensor) -> Tensor:
            return torch.sigmoid(beta * z)

        return _Activation(
            lambda z: F.softplus(z, beta, threshold),
            lambda z, a: torch.where(beta * z > threshold, 1, share(z)),
            lambda z, a: torch.where(
                beta * z > threshold, 0, beta * share(z) * share(-z)
            ),
        )
    return _ACTIVATIONS.get(type(module))


@dataclass(frozen=True)
class _MaxPool:
    layer: nn.MaxPool2d

    def pool(self, a: Tensor) -> tuple[Tensor, Tensor]:
        pool = self.layer
        return F.max_pool2d(
            a,
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.dilation,
            ceil_mode=pool.ceil_mode,
            return_indices=True,
        )


@dataclass(frozen=True)
class _Flatten:
    pass


_Weighted = _Linear | _Conv | _Columns  # with weights, and linear in its input
_Fixed = _Normalize | _AvgPool | _GlobalAvgPool | _Unfold  # affine, without weights
_Layer = _Weighted | _Fixed | _Activation | _MaxPool | _Flatten


def is_plain_chain(model: nn.Module) -> bool:
    """Whether a model is no more than its layers, one after the other.

    Subclasses of ``nn.Sequential``, hooks, frozen or shared weights say no, and so do
    layers other than the common ones.
    """
    return _chain_layers(model) is not None


def _chain_layers(model: nn.Module) -> list[_Layer] | None:
    """The layers of a plain chain, or ``None`` where the model is something else."""
    if type(model) is not nn.Sequential:  # a subclass may do more than its layers
        return None
    modules = modules_in_order(model)
    layers: list[_Layer] = []
    for module in modules:
        layer = _chain_layer(module)
        silent = isinstance(module, nn.Dropout) and not module.training
        if layer is not None:
            layers.append(layer)
        elif not (silent or type(module) is nn.Identity):
            return None
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    frozen = any(not p.requires_grad for p in model.parameters())
    first_flatten = next(
        (i for i, layer in enumerate(layers) if isinstance(layer, _Flatten)), None
    )
    first_linear = next(
        (i for i, layer in enumerate(layers) if isinstance(layer, _Linear)), None
    )
    ends_right = bool(layers) and isinstance(layers[-1], _Linear)
    flat_first = (
        first_flatten is not None
        and first_linear is not None
        and first_flatten < first_linear
    )
    # Shared weights stand twice among the layers' own, loose ones not at all.
    own = sorted(id(p) for module in modules for p in module.parameters())
    shared = own != sorted(id(p) for p in model.parameters())
    plain = ends_right and flat_first and not (hooked or frozen or shared)
    return layers if plain else None


def modules_in_order(model: nn.Sequential) -> list[nn.Module]:
    """The modules that a batch passes, those that are used twice also twice."""
    return [
        inner
        for module in model
        for inner in (
            modules_in_order(module) if type(module) is nn.Sequential else [module]
        )
    ]


def _chain_layer(module: nn.Module) -> _Layer | None:
    if type(module) is nn.Linear:
        return _Linear(module)
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return _Conv(module) if plain and not isinstance(module.padding, str) else None
    if type(module) is nn.MaxPool2d:
        return _MaxPool(module)
    if type(module) is nn.AvgPool2d:
        return _AvgPool(module)
    if type(module) is nn.AdaptiveAvgPool2d:
        return _GlobalAvgPool() if module.output_size in (1, (1, 1)) else None
    if type(module) is Normalize:
        return _Normalize(module)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return _Flatten()
    return _activation(module)


@dataclass
class _Trace:
    """What a pull-back needs of the sweeps before it, per layer.

    ``inputs`` is what each layer saw, ``extras`` what else it must remember, and
    ``arriving`` the derivative of the loss by its output.
    """

    trials: int
    layers: list[_Layer] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)
    arriving: list[Any] = field(default_factory=list)
    p: Tensor = field(default_factory=lambda: torch.empty(0))


class _ChainMap:
    """Forward, backward, tangent and adjoint sweeps through a chain of layers."""

    def __init__(self, layers: Sequence[_Layer]):
        self.layers = layers

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        trace = self._forward(images)
        gradients = self._backward(trace, targets)

        def pullback(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            return self._pullback(trace, cotangents)

        return gradients, pullback

    def graph_bytes(self, images: Tensor) -> int:
        """What the sweeps of one trial with images (B, C, H, W) keep alive."""
        trace = self._forward(images[None])
        self._backward(trace, torch.zeros_like(trace.p)[None])
        kept = [*trace.inputs, *trace.arriving]
        for extra in trace.extras:
            kept += extra if isinstance(extra, tuple) else [extra]
        return _storage_bytes(t for t in kept if t is not None)

    @torch.no_grad()
    def _forward(self, images: Tensor) -> _Trace:
        trace = _Trace(trials=len(images))
        a = images.flatten(0, 1)  # (T*B, C, H, W)
        for chained in self.layers:
            for layer in _steps(chained, a):
                trace.layers.append(layer)
                trace.inputs.append(a)
                extra: Any = None
                match layer:
                    case _Activation():
                        z, a = a, layer.function(a)
                        bend = layer.second and layer.second(z, a)
                        extra = (layer.first(z, a), bend)
                    case _MaxPool():
                        a, extra = layer.pool(a)
                    case _Flatten():
                        a = a.flatten(1)
                    case _:
                        a = layer.forward(a)
                trace.extras.append(extra)
        trace.p = torch.softmax(a, dim=-1)
        return trace

    @torch.no_grad()
    def _backward(self, trace: _Trace, targets: Tensor) -> Gradients:
        e = (trace.p - targets.flatten(0, 1)) / targets.shape[1]
        trace.arriving = [None] * len(trace.layers)
        lowest = min(
            i for i, layer in enumerate(trace.layers) if isinstance(layer, _Weighted)
        )
        gradients: Gradients = []
        for index in reversed(range(lowest, len(trace.layers))):
            layer, a = trace.layers[index], trace.inputs[index]
            trace.arriving[index] = e
            if isinstance(layer, _Weighted):
                if layer.layer.bias is not None:
                    gradients.append(_bias_gradient(e, trace.trials))
                gradients.append(layer.weight_gradient(a, e, trace.trials))
            if index > lowest:
                e = _step_back(layer, e, a, trace.extras[index])
        gradients.reverse()
        return gradients

    @torch.no_grad()
    def _pullback(self, trace: _Trace, cotangents: Gradients) -> tuple[Tensor, Tensor]:
        # Tangent sweep: move the weights along v and watch every layer's output move.
        remaining = iter(cotangents)
        v_weights: list[Tensor | None] = []
        tangents: list[Tensor | None] = []
        a_dot: Tensor | None = None
        steps = zip(trace.layers, trace.inputs, trace.extras, strict=True)
        for layer, a, extra in steps:
            tangents.append(a_dot)
            v_weights.append(None)
            match layer:
                case _Linear() | _Conv() | _Columns():
                    along = next(remaining)
                    v_weights[-1] = along
                    z_dot = layer.apply_per_trial(a, along)
                    if layer.layer.bias is not None:
                        z_dot = _add_bias(z_dot, next(remaining))
                    a_dot = z_dot if a_dot is None else z_dot.add_(layer.tangent(a_dot))
                case _ if a_dot is None:
                    pass
                case _Activation():
                    a_dot = a_dot * extra[0]
                case _MaxPool():
                    a_dot = a_dot.flatten(2).gather(2, extra.flatten(2))
                    a_dot = a_dot.unflatten(2, extra.shape[2:])
                case _Flatten():
                    a_dot = a_dot.flatten(1)
                case _:
                    a_dot = layer.tangent(a_dot)

        # Adjoint sweep: mu is the derivative of <g, v> with respect to each output.
        trials, p = trace.trials, trace.p
        batch = p.shape[0] // trials
        assert a_dot is not None  # a chain ends with a linear layer
        centred = a_dot - (p * a_dot).sum(-1, keepdim=True)
        to_targets = (-centred / batch).unflatten(0, (trials, batch))
        mu = p * centred / batch
        for index in reversed(range(len(trace.layers))):
            layer, extra = trace.layers[index], trace.extras[index]
            a, e, v = trace.inputs[index], trace.arriving[index], v_weights[index]
            tangent = tangents[index]
            mu = _step_back(layer, mu, a, extra)
            if isinstance(layer, _Weighted) and v is not None:
                mu = mu.add_(layer.transpose_per_trial(e, v, a))
            elif isinstance(layer, _Activation) and tangent is not None:
                if extra[1] is not None:
                    mu = mu.addcmul_(extra[1] * tangent, e)
        return mu.unflatten(0, (trials, batch)), to_targets


class ChainProducts:
    r"""Products with the Jacobian of a chain's gradients, both ways, by sweeps.

    Beside the gradients stands the input of the last layer (T, B, d), which moves with
    the images as well.

    Args:
        model: A plain chain, as ``is_plain_chain`` says.
        images: Where the gradients are linearised, (T, B, C, H, W).
        targets: Class probabilities (T, B, K).

    Raises:
        InputError: The model is something else.

    Source: Pearlmutter (1994). Taught in: notebooks/04_aggregated_gradients.
    """

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor):
        layers = _chain_layers(model)
        if layers is None:
            raise InputError("model", "a plain chain of layers", type(model).__name__)
        self.chain, self.batch = _ChainMap(layers), images.shape[1]
        self.trace = self.chain._forward(images)
        self.chain._backward(self.trace, targets)

    @torch.no_grad()
    def along(self, movements: Tensor) -> tuple[Gradients, Tensor]:
        """How gradients and last inputs move with the images (T, B, C, H, W)."""
        trace, trials = self.trace, self.trace.trials
        a_dot, moved = movements.flatten(0, 1), []
        for layer, extra in zip(trace.layers, trace.extras, strict=True):
            moved.append(a_dot)
            match layer:
                case _Activation():
                    a_dot = a_dot * extra[0]
                case _MaxPool():
                    a_dot = a_dot.flatten(2).gather(2, extra.flatten(2))
                    a_dot = a_dot.unflatten(2, extra.shape[2:])
                case _Flatten():
                    a_dot = a_dot.flatten(1)
                case _:
                    a_dot = layer.tangent(a_dot)
        centred = a_dot - (trace.p * a_dot).sum(-1, keepdim=True)
        e_dot = trace.p * centred / self.batch
        gradients: Gradients = []
        for index in reversed(range(len(trace.layers))):
            layer, a = trace.layers[index], trace.inputs[index]
            extra, e = trace.extras[index], trace.arriving[index]
            if e is None:  # below the first weights
                break
            if isinstance(layer, _Weighted):
                if layer.layer.bias is not None:
                    gradients.append(_bias_gradient(e_dot, trials))
                of_errors = layer.weight_gradient(a, e_dot, trials)
                of_inputs = layer.weight_gradient(moved[index], e, trials)
                gradients.append(of_errors + of_inputs)
            e_dot = _step_back(layer, e_dot, a, extra)
            if isinstance(layer, _Activation) and extra[1] is not None:
                e_dot = e_dot.addcmul_(extra[1] * moved[index], e)
        gradients.reverse()
        return gradients, moved[-1].unflatten(0, (trials, self.batch))

    def back(self, cotangents: Gradients) -> Tensor:
        """What gradients pull back to the images (T, B, C, H, W)."""
        return self.chain._pullback(self.trace, cotangents)[0]

    @torch.no_grad()
    def back_from_last(self, cotangents: Tensor) -> Tensor:
        """What inputs of the last layer (T, B, d) pull back to the images."""
        trace, mu = self.trace, cotangents.flatten(0, 1)
        for index in reversed(range(len(trace.layers) - 1)):
            mu = _step_back(
                trace.layers[index], mu, trace.inputs[index], trace.extras[index]
            )
        return mu.unflatten(0, (trace.trials, self.batch))


def _steps(layer: _Layer, a: Tensor) -> list[_Layer]:
    """A layer as it is run on input a: convolutions may be taken column by column."""
    if not isinstance(layer, _Conv) or a.device.type != "cpu":
        return [layer]
    conv = layer.layer
    if conv.dilation != (1, 1):
        return [layer]
    edges = zip(
        a.shape[2:],
        conv.kernel_size,
        conv.stride,
        _pair(conv.padding),
        strict=True,
    )
    rows, columns = (1 + (n + 2 * p - k) // s for n, k, s, p in edges)
    entries = len(a) * conv.weight[0].numel() * rows * columns
    if entries > _FEW_COLUMNS:
        return [layer]
    return [_Unfold(conv), _Columns(conv, (rows, columns))]


def _step_back(layer: _Layer, e: Tensor, a: Tensor, extra: Any) -> Tensor:
    """Carry a derivative from a layer's output to its input a."""
    match layer:
        case _Activation():
            return e * extra[0]
        case _MaxPool():
            back = torch.zeros_like(a).flatten(2)
            back.scatter_add_(2, extra.flatten(2), e.flatten(2))
            return back.view_as(a)
        case _Flatten():
            return e.view_as(a)
        case _:
            return layer.transpose(e, a)


def _per_trial(x: Tensor, trials: int) -> Tensor:
    return x.unflatten(0, (trials, -1))


def _to_groups(x: Tensor, trials: int) -> Tensor:
    """(T*B, C, H, W) to (B, T*C, H, W), so that each trial is one group."""
    if trials == 1:
        return x
    return x.unflatten(0, (trials, -1)).transpose(0, 1).flatten(1, 2)


def _from_groups(x: Tensor, trials: int) -> Tensor:
    """(B, T*C, H, W) back to (T*B, C, H, W)."""
    if trials == 1:
        return x
    return x.unflatten(1, (trials, -1)).transpose(0, 1).flatten(0, 1)


def _bias_gradient(e: Tensor, trials: int) -> Tensor:
    per_trial = _per_trial(e, trials)  # (T, B, O) or (T, B, O, H, W)
    return per_trial.sum(1) if per_trial.dim() == 3 else per_trial.sum((1, 3, 4))


def _add_bias(z: Tensor, v: Tensor) -> Tensor:
    """Add one bias vector per trial, v (T, O), to outputs z (T*B, O, ...)."""
    trials, outputs = v.shape
    shape = (trials, 1, outputs) + (1,) * (z.dim() - 2)
    return (_per_trial(z, trials) + v.view(shape)).flatten(0, 1)
