"""What an update says about the last linear layer, where the labels enter.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.compute import private_randomness
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate

NUM_DUMMIES = 32
_MOMENTUM = 0.9


@dataclass(frozen=True)
class LastLayer:
    """The last linear layer and what was sent for it, in float64 on the CPU.

    Args:
        weight: Its weights (K, d) in the server's model.
        bias: Its bias (K,); zeros where it has none.
        sent_weight: The update's tensor for the weights, (K, d).
        sent_bias: The update's tensor for the bias, (K,); ``None`` where the layer
            has no bias or does not train it.
    """

    weight: Tensor
    bias: Tensor
    sent_weight: Tensor
    sent_bias: Tensor | None

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.weight)


def last_linear(update: SharedUpdate) -> str:
    """Name of the last linear layer that the update trains.

    Raises:
        InputError: There is none.
    """
    found = None
    for name, module in update.model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and parameter_name(name, "weight") in update.tensors
        ):
            found = name
    if found is None:
        raise InputError(
            "update",
            "a model that ends with a trainable torch.nn.Linear",
            type(update.model).__name__,
            "use the attack 'dlg', or pass labels= if they are known",
        )
    return found


def read_last_layer(update: SharedUpdate) -> LastLayer:
    """Take the last linear layer out of model and update.

    Raises:
        InputError: The model has no trainable linear layer.
    """
    name = last_linear(update)
    module = update.model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    sent_bias = update.tensors.get(parameter_name(name, "bias"))
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return LastLayer(
        weight=_float64(module.weight),
        bias=_float64(bias),
        sent_weight=_float64(update.tensors[parameter_name(name, "weight")]),
        sent_bias=None if sent_bias is None else _float64(sent_bias),
    )


def groups_of(update: SharedUpdate, num_samples: int) -> tuple[int, ...]:
    """Samples of each client, or of one client where another number is supposed."""
    if num_samples == update.num_samples:
        return update.group_sizes or (num_samples,)
    return (num_samples,)


def mean_gradient(
    update: SharedUpdate, layer: LastLayer, group_sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the last layer, averaged over samples and local steps.

    It is exact for a gradient and for one SGD step. Over several steps of SGD, with
    or without momentum, it is the mean along the way; weight decay is then taken off
    at the middle of the way. Of normalised clients it has an unknown positive factor.

    Args:
        update: What the server saw.
        layer: Its last layer.
        group_sizes: Samples of each client.

    Returns:
        Weight gradient (K, d), and bias gradient (K,) or ``None``.

    Raises:
        InputError: The change comes from Adam, or weight decay cannot be told from
            the gradient because the scale is unknown.
    """
    recipe = update.training
    if update.kind == "gradient":
        return layer.sent_weight, layer.sent_bias
    if recipe.optimiser == "adam" or (update.normalized and recipe.weight_decay):
        what = "Adam" if recipe.optimiser == "adam" else "normalised weight decay"
        raise InputError(
            "update",
            "a gradient, or a weight change by SGD of known scale",
            f"a change by {what}",
            "" if update.normalized else "use method 'trajectory'",
        )
    scale = 1.0 if update.normalized else recipe.rate * mean_gain(recipe, group_sizes)
    steps = max(recipe.num_steps(size) for size in group_sizes)
    half = 0.5 if steps > 1 else 0.0

    def without_decay(sent: Tensor, start: Tensor) -> Tensor:
        return -sent / scale - recipe.weight_decay * (start + half * sent)

    bias = layer.sent_bias
    return (
        without_decay(layer.sent_weight, layer.weight),
        None if bias is None else without_decay(bias, layer.bias),
    )


def gains(recipe: LocalTraining, num_steps: int) -> Tensor:
    """How often SGD counts the gradient of every step in the end, shape (steps,).

    Once without momentum; with momentum mu the step t of T counts
    (1 - mu^(T - t)) / (1 - mu) times.
    """
    left = num_steps - torch.arange(num_steps, dtype=torch.float64)
    if recipe.optimiser != "momentum":
        return torch.ones_like(left)
    return (1 - _MOMENTUM**left) / (1 - _MOMENTUM)


def mean_gain(recipe: LocalTraining, group_sizes: tuple[int, ...]) -> float:
    """Sum of ``gains`` over the steps of a client, averaged over the samples."""
    total = sum(
        size * float(gains(recipe, recipe.num_steps(size)).sum())
        for size in group_sizes
    )
    return total / sum(group_sizes)


def bias_noise(
    update: SharedUpdate, layer: LastLayer, group_sizes: tuple[int, ...]
) -> float:
    """Standard deviation of noise and rounding in the mean bias gradient.

    A weight change is a difference of weights that were rounded at every step.
    """
    if update.kind == "gradient":
        return update.noise_std
    precision = torch.finfo(next(iter(update.tensors.values())).dtype).eps
    steps = max(update.training.num_steps(size) for size in group_sizes)
    rounding = precision * float(layer.bias.abs().max()) * steps**0.5
    scale = update.training.rate * mean_gain(update.training, group_sizes)
    return max(update.noise_std, rounding) / scale


def dummy_images(update: SharedUpdate, seed: int) -> Tensor:
    """Images (32, C, H, W) that owe nothing to any data set.

    Every image is a level of grey plus noise of its own strength; half of the images
    are smoothed, so that neighbouring pixels agree as in photographs.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(update.tensors.values()))
    channels, height, width = update.image_shape
    half = NUM_DUMMIES // 2
    fine = torch.rand(half, channels, height, width, generator=generator)
    small = (math.ceil(height / 4), math.ceil(width / 4))
    coarse = torch.rand(half, channels, *small, generator=generator)
    coarse = F.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
    noise = torch.cat([fine, coarse]) - 0.5
    level, strength = torch.rand(2, NUM_DUMMIES, 1, 1, 1, generator=generator)
    images = (level + 2 * strength * noise).clamp(0, 1)
    return images.to(first.device, first.dtype)


def dummy_features(update: SharedUpdate, seed: int) -> Tensor:
    """What the last linear layer is fed when dummy images pass the server's model.

    Returns:
        Features (32, d) in float64 on the CPU.

    Raises:
        InputError: The layer does not turn one vector per image into the logits.
    """
    model = copy.deepcopy(update.model)  # batch statistics may change on the way
    layer = model.get_submodule(last_linear(update))
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0], output))

    layer.register_forward_hook(keep)
    images = dummy_images(update, seed)
    with private_randomness(seed, images.device), torch.no_grad():
        logits = model(images)
    if not seen or seen[-1][1].shape != logits.shape or logits.dim() != 2:
        raise InputError(
            "update",
            "a model whose last torch.nn.Linear makes the logits (N, K)",
            type(update.model).__name__,
        )
    return _float64(seen[-1][0])


def parameter_name(layer: str, parameter: str) -> str:
    """Name of a layer's parameter in the model; the layer may be the model itself."""
    return f"{layer}.{parameter}" if layer else parameter


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def last_layer_input(model: nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer of a model is given for images (N, C, H, W): (N, d).

    Raises:
        InputError: The model has no linear layer, or does not use it.

    Taught in: notebooks/04_aggregated_gradients.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError("model", "a linear layer at the end", "none")
    caught: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    try:
        model(images)
    finally:
        hook.remove()
    if not caught:
        raise InputError("model", "a last linear layer that is used", "one that is not")
    return caught[-1]
