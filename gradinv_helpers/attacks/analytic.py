"""Images out of a gradient by algebra alone.

Taught in: notebooks/01_fl_guarantees and notebooks/03_stronger_matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.gradients import modules_in_order
from gradinv_helpers.errors import InputError
from gradinv_helpers.models import Normalize
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
    return solve_linear_layer(*_layer_gradients(update, layer))


def solve_linear_layer(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """Input (in_features,) of a linear layer, from its two gradients for one sample.

    The least-squares solution of ``weight_gradient = bias_gradient x^T``.
    """
    return weight_gradient.T @ bias_gradient / bias_gradient.square().sum()


def _layer_gradients(update: SharedUpdate, layer: str | None) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a linear layer, up to one common factor."""
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
    return weight, bias


@dataclass(frozen=True)
class LinearFront:
    """The front of a model whose first layer with weights is linear.

    Args:
        name: Name of that layer in the model.
        layer: The layer itself.
        before: What an image passes on its way to it: flattening, standardising.
        after: Everything behind it, in order.

    Taught in: notebooks/03_stronger_matching.
    """

    name: str
    layer: nn.Linear
    before: tuple[nn.Module, ...]
    after: nn.Sequential

    def images(self, inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Turn inputs of the layer (N, in_features) into images (N, C, H, W)."""
        images = inputs.reshape(-1, *shape)
        for module in reversed(self.before):
            if isinstance(module, Normalize):
                images = images * module.std.to(images) + module.mean.to(images)
        return images

    def inputs(self, images: Tensor) -> Tensor:
        """Turn images (N, C, H, W) into inputs of the layer (N, in_features)."""
        for module in self.before:
            images = module(images)
        return images


def linear_front(model: nn.Module) -> LinearFront:
    """Split a model into its first linear layer, what precedes it and what follows.

    The model must be an ``nn.Sequential``, because only there the order of the
    modules is the order of the computation. What follows the layer is free.

    Args:
        model: Any classifier.

    Raises:
        InputError: The first layer with weights is no linear layer with a trainable
            bias on flattened images, or hooks or shared weights hide what it does.

    Taught in: notebooks/03_stronger_matching.
    """
    expected = "an nn.Sequential that starts with a linear layer with a bias"
    hint = "use attack='auto'"
    if type(model) is not nn.Sequential:
        raise InputError("model", expected, type(model).__name__, hint)
    names = {id(module): name for name, module in model.named_modules()}
    modules = modules_in_order(model)
    place = next((i for i, m in enumerate(modules) if not _passes(m)), len(modules))
    before = tuple(modules[:place])
    layer = modules[place] if place < len(modules) else None
    problem = ""
    if type(layer) is not nn.Linear:
        problem = f"layer {names.get(id(layer), '')}: {layer}" if layer else "no layer"
    elif layer.bias is None:
        problem = f"layer {names[id(layer)]} without a bias"
    elif not (layer.weight.requires_grad and layer.bias.requires_grad):
        problem = f"frozen weights in layer {names[id(layer)]}"
    elif not any(isinstance(module, nn.Flatten) for module in before):
        problem = f"no Flatten before layer {names[id(layer)]}"
    elif any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        problem = "hooks"
    elif _shares_weights(layer, model):
        problem = f"layer {names[id(layer)]} used twice"
    if problem or not isinstance(layer, nn.Linear):
        raise InputError("model", expected, problem, hint)
    return LinearFront(
        names[id(layer)], layer, before, nn.Sequential(*modules[place + 1 :])
    )


def _passes(module: nn.Module) -> bool:
    """Whether a module hands every pixel on, so that it can be undone."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    if isinstance(module, nn.Dropout):
        return not module.training
    return type(module) in (Normalize, nn.Identity)


def _shares_weights(layer: nn.Linear, model: nn.Module) -> bool:
    own = {id(p) for p in layer.parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return sum(id(p) in own for _, p in everything) > len(own)


def class_fits(
    front: LinearFront, inputs: Tensor, errors: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare the errors of known inputs with those that each class would cause.

    Args:
        front: The front of a model in the precision of ``inputs``.
        inputs: What its layer was fed, (N, in_features).
        errors: Derivative of the loss by the outputs of that layer, (N, H).

    Returns:
        For every sample and class (N, K): the cosine between the sample's error and
        that of its cross-entropy with this class, and the factor between the two: the
        weight of the sample in the loss.

    Taught in: notebooks/03_stronger_matching.
    """
    outputs = front.layer(inputs).detach().requires_grad_()
    fits, weights = [], []
    with torch.enable_grad():
        logits = front.after(outputs.clone())  # which may work in place
        total = torch.logsumexp(logits, 1).sum()
        (mean,) = torch.autograd.grad(total, outputs, retain_graph=True)
        for k in range(logits.shape[1]):
            own = logits[:, k].sum()
            (slope,) = torch.autograd.grad(own, outputs, retain_graph=True)
            expected = mean - slope
            product = (expected * errors).sum(1)
            length = expected.norm(dim=1).clamp_min(1e-150)
            fits.append(product / (length * errors.norm(dim=1).clamp_min(1e-150)))
            weights.append(product / length.square())
    return torch.stack(fits, 1), torch.stack(weights, 1)


def closed_form_image(update: SharedUpdate) -> Tensor:
    """Compute the image of one sample behind a first linear layer.

    Args:
        update: An update of one sample and a model for which ``linear_front`` holds.

    Returns:
        The image (1, C, H, W), in double precision and not clamped.

    Raises:
        InputError: Several samples, another kind of model, or no active unit.

    Source: Phong et al. (2018), Section 3; Geiping et al. (2020), Proposition 3.1.
    Taught in: notebooks/03_stronger_matching.
    """
    if update.num_samples != 1:
        got = f"one of {update.num_samples} samples"
        raise InputError("update", "an update of one sample", got)
    front = linear_front(update.model)
    weight, bias = _layer_gradients(update, front.name)
    inputs = solve_linear_layer(weight.double(), bias.double())
    return front.images(inputs, update.image_shape)
