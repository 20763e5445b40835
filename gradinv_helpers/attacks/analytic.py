"""Images out of a gradient by algebra alone. Taught in: notebooks/01_fl_guarantees."""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import SharedUpdate


def linear_layer_input(update: SharedUpdate, layer: str | None = None) -> Tensor:
    r"""Compute what a linear layer with a bias was fed, in closed form.

    For one sample, :math:`\partial L/\partial W = \delta\, x^\top` and
    :math:`\partial L/\partial b = \delta`, so every row i with a non-zero bias
    gradient gives :math:`x = (\partial L/\partial W)_i / (\partial L/\partial b)_i`.
    All rows together give the least-squares answer
    :math:`x = (\partial L/\partial W)^\top \delta / \|\delta\|^2`.

    For n samples the same formula returns a weighted sum of their inputs; where only
    one sample feeds a unit, its row alone still gives that sample.

    Args:
        update: A gradient, or a weight change. Of one sample, a change after any
            number of SGD steps will do, because every step adds a multiple of the
            same row.
        layer: Name of the ``torch.nn.Linear`` in the model; the first one with a bias
            where ``None``.

    Returns:
        The layer's input, shape (in_features,). For the first layer of an MLP these
        are the pixels.

    Raises:
        InputError: There is no such layer, or its bias gradient is zero.

    Source: Phong et al. (2018), Section 3; Geiping et al. (2020), Proposition 3.1.
    Taught in: notebooks/01_fl_guarantees.
    """
    modules = dict(update.model.named_modules())
    found = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and module.bias is not None
        and module.weight.requires_grad
        and module.bias.requires_grad
    ]
    if layer is None and found:
        layer = found[0]
    if layer not in found:
        raise InputError(
            "layer",
            "a torch.nn.Linear with a bias: " + (", ".join(found) or "there is none"),
            repr(layer),
        )
    prefix = f"{layer}." if layer else ""
    # A common factor cancels, and so does a sum over SGD steps on the same image.
    recipe = update.training
    plain = recipe.optimiser != "adam" and recipe.weight_decay == 0
    gradient = dict(update.tensors) if plain else update.gradient()
    weight, bias = gradient[f"{prefix}weight"], gradient[f"{prefix}bias"]
    if not bool(bias.any()):
        raise InputError(
            "update",
            f"a non-zero bias gradient in layer {layer!r}",
            "all zeros",
            "no unit of this layer was active; try another layer",
        )
    return solve_linear_layer(weight, bias)


def solve_linear_layer(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Input (in_features,) of a linear layer, from its two gradients for one sample.

    The least-squares solution of ``weight_gradient = bias_gradient x^T``.
    """
    return weight_gradient.T @ bias_gradient / bias_gradient.square().sum()
