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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradinv_helpers.errors import InputError

Gradients = list[Tensor]  # one (T, *parameter shape) per trainable parameter
Pullback = Callable[[Gradients], tuple[Tensor, Tensor]]
GradientMap = Callable[[Tensor, Tensor], tuple[Gradients, Pullback]]


def gradient_map(model: nn.Module) -> GradientMap:
    """Build the map from dummy batches to the gradients they would send.

    Args:
        model: Any classifier from (N, C, H, W) to logits (N, K), in the mode (train
            or eval) in which the client used it. It is not changed.

    Returns:
        A function of ``images`` (T, B, C, H, W) and class probabilities ``targets``
        (T, B, K). It returns, per trainable parameter, the gradients of the mean
        cross-entropy of every trial (T, ...), and a pull-back from such a list to
        the gradients with respect to images and targets.

    Source: Pearlmutter (1994), whose product rule gives the pull-back of a chain.
    Taught in: notebooks/02_dlg_four_steps.
    """
    layers = _chain_layers(model)
    return _ChainMap(layers) if layers is not None else _AutogradMap(model)


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

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        images = images.detach().requires_grad_()
        targets = targets.detach().requires_grad_()
        with torch.enable_grad(), _twice_differentiable():
            gradients = self._gradients(images, targets)

        def pullback(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            pairs = [
                (g, v)
                for g, v in zip(gradients, cotangents, strict=True)
                if g.requires_grad
            ]
            with _twice_differentiable():
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

    def _gradients(self, images: Tensor, targets: Tensor) -> Gradients:
        if self.use_vmap:
            try:
                per_trial = vmap(grad(self._loss), in_dims=(None, 0, 0))(
                    self.trained, images, targets
                )
                return list(per_trial.values())
            except RuntimeError:
                self.use_vmap = False  # in-place or data-dependent operations
        rows = [self._one(x, y) for x, y in zip(images, targets, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _one(self, images: Tensor, targets: Tensor) -> Gradients:
        weights = {n: p.clone().requires_grad_() for n, p in self.trained.items()}
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
        buffers = self.buffers
        if self.training:  # forward would overwrite running statistics
            buffers = {n: b.clone() for n, b in buffers.items()}
        logits = functional_call(
            self.model, {**weights, **self.fixed, **buffers}, (images,)
        )
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


@contextmanager
def _twice_differentiable() -> Iterator[None]:
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
            "replace that layer by another one, such as nn.Sigmoid for nn.Hardsigmoid",
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
class _Activation:
    """An elementwise function, with its first two derivatives from input z, output a.

    ``second`` is ``None`` where it is zero almost everywhere.
    """

    function: Callable[[Tensor], Tensor]
    first: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor, Tensor], Tensor] | None


_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    nn.Sigmoid: _Activation(
        torch.sigmoid,
        lambda z, a: a * (1 - a),
        lambda z, a: a * (1 - a) * (1 - 2 * a),
    ),
    nn.Tanh: _Activation(
        torch.tanh,
        lambda z, a: 1 - a * a,
        lambda z, a: -2 * a * (1 - a * a),
    ),
    nn.ReLU: _Activation(F.relu, lambda z, a: (z > 0).to(z.dtype), None),
}


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


_Layer = _Linear | _Conv | _Activation | _MaxPool | _Flatten


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
        if layer is not None:
            layers.append(layer)
        elif not (isinstance(module, nn.Dropout) and not module.training):
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
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return _Flatten()
    return _ACTIVATIONS.get(type(module))


class _ChainMap:
    """Forward, backward, tangent and adjoint sweeps through a chain of layers."""

    def __init__(self, layers: Sequence[_Layer]):
        self.layers = layers

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Gradients, Pullback]:
        trials, batch = images.shape[:2]
        a = images.flatten(0, 1)  # (T*B, C, H, W)
        inputs, extras = [], []  # what each layer saw, and what it must remember
        for layer in self.layers:
            inputs.append(a)
            extra: Any = None
            match layer:
                case _Linear() | _Conv():
                    a = layer.forward(a)
                case _Activation():
                    z, a = a, layer.function(a)
                    extra = (layer.first(z, a), layer.second and layer.second(z, a))
                case _MaxPool():
                    a, extra = layer.pool(a)
                case _Flatten():
                    a = a.flatten(1)
            extras.append(extra)

        p = torch.softmax(a, dim=-1)
        e = (p - targets.flatten(0, 1)) / batch
        arriving: list[Tensor | None] = [None] * len(self.layers)
        gradients: Gradients = []
        for index in reversed(range(len(self.layers))):
            layer, a = self.layers[index], inputs[index]
            arriving[index] = e
            if isinstance(layer, _Linear | _Conv):
                if layer.layer.bias is not None:
                    gradients.append(_bias_gradient(e, trials))
                gradients.append(layer.weight_gradient(a, e, trials))
            if index > 0:
                e = _step_back(layer, e, a, extras[index])
        gradients.reverse()

        @torch.no_grad()
        def pullback(cotangents: Gradients) -> tuple[Tensor, Tensor]:
            return self._pullback(cotangents, trials, inputs, extras, arriving, p)

        return gradients, pullback

    def _pullback(
        self,
        cotangents: Gradients,
        trials: int,
        inputs: list[Tensor],
        extras: list[Any],
        arriving: list[Any],
        p: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Tangent sweep: move the weights along v and watch every layer's output move.
        remaining = iter(cotangents)
        v_weights: list[Tensor | None] = []
        tangents: list[Tensor | None] = []
        a_dot: Tensor | None = None
        for layer, a, extra in zip(self.layers, inputs, extras, strict=True):
            tangents.append(a_dot)
            v_weights.append(None)
            match layer:
                case _Linear() | _Conv():
                    along = next(remaining)
                    v_weights[-1] = along
                    z_dot = layer.apply_per_trial(a, along)
                    if layer.layer.bias is not None:
                        z_dot = _add_bias(z_dot, next(remaining))
                    a_dot = z_dot if a_dot is None else z_dot.add_(layer.tangent(a_dot))
                case _Activation() if a_dot is not None:
                    a_dot = a_dot * extra[0]
                case _MaxPool() if a_dot is not None:
                    a_dot = a_dot.flatten(2).gather(2, extra.flatten(2))
                    a_dot = a_dot.unflatten(2, extra.shape[2:])
                case _Flatten() if a_dot is not None:
                    a_dot = a_dot.flatten(1)

        # Adjoint sweep: mu is the derivative of <g, v> with respect to each output.
        batch = p.shape[0] // trials
        assert a_dot is not None  # a chain ends with a linear layer
        centred = a_dot - (p * a_dot).sum(-1, keepdim=True)
        to_targets = (-centred / batch).unflatten(0, (trials, batch))
        mu = p * centred / batch
        for index in reversed(range(len(self.layers))):
            layer, extra = self.layers[index], extras[index]
            a, e, v = inputs[index], arriving[index], v_weights[index]
            tangent = tangents[index]
            mu = _step_back(layer, mu, a, extra)
            if isinstance(layer, _Linear | _Conv) and v is not None:
                mu = mu + layer.transpose_per_trial(e, v, a)
            elif isinstance(layer, _Activation) and tangent is not None:
                if extra[1] is not None:
                    mu = mu + extra[1] * tangent * e
        return mu.unflatten(0, (trials, batch)), to_targets


def _step_back(layer: _Layer, e: Tensor, a: Tensor, extra: Any) -> Tensor:
    """Carry a derivative from a layer's output to its input a."""
    match layer:
        case _Linear() | _Conv():
            return layer.transpose(e, a)
        case _Activation():
            return e * extra[0]
        case _MaxPool():
            back = torch.zeros_like(a).flatten(2)
            back.scatter_add_(2, extra.flatten(2), e.flatten(2))
            return back.view_as(a)
        case _:
            return e.view_as(a)


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
