"""How many samples are behind an update, if the protocol does not say.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.label_counts import mean_prediction
from gradinv_helpers.attacks.last_layer import (
    dummy_features,
    dummy_images,
    last_linear,
    parameter_name,
    read_last_layer,
)
from gradinv_helpers.compute import private_randomness
from gradinv_helpers.errors import InputError, check_count, check_seed
from gradinv_helpers.updates import SharedUpdate

_WHOLE = 0.1  # root mean square distance to integers that passes for whole numbers
_LARGEST_SPREAD = 0.08  # mean total variation distance between predictions
_NOISE_MARGIN = 1.5
_ROUNDING = 3.0  # in units of the last digit
_GAP = 5.0


@dataclass(frozen=True)
class BatchSize:
    """An estimate of the number of samples behind an update.

    Args:
        estimate: The number, or ``None`` where the update does not tell.
        lowest: A number that is certain: that many samples at least.
        reason: Where the estimate comes from, or why there is none.

    Taught in: notebooks/03_stronger_matching.
    """

    estimate: int | None
    lowest: int
    reason: str


def infer_num_samples(
    update: SharedUpdate, *, maximum: int = 256, seed: int = 0
) -> BatchSize:
    """Estimate the number of samples without looking at ``update.num_samples``.

    Every sample adds one to the rank of the gradient of a linear layer that is fed
    one vector per image, until the layer is full: the last layer at K - 1, a hidden
    one at its width. Below that the rank is the number of samples, unless some are
    equal, or so well predicted that rounding hides them. Where all layers are full,
    that many samples are certain, and the estimate is the smallest number that makes
    the label counts whole numbers; this needs a model that predicts much the same
    for all images, as untrained ones do, and it gives up where no number fits.

    After several steps of SGD without weight decay only a layer that is fed the
    images themselves tells: its rank never exceeds the number of samples.

    Args:
        update: What the server saw.
        maximum: Largest number that is tried for the label counts.
        seed: Seed of dummy images.

    Returns:
        Estimate, certain lower bound and reason.

    Raises:
        InputError: The model has no trainable linear layer, or local training mixed
            the gradients of several steps beyond recognition.

    Taught in: notebooks/03_stronger_matching.
    """
    check_count("maximum", maximum)
    check_seed("seed", seed)
    last_linear(update)  # refuses models without one
    layers = _usable_layers(update, seed)
    if not layers:
        raise InputError(
            "update",
            "one SGD step, or a first linear layer that is fed the images",
            f"{update.training.optimiser} over several steps",
            "no rank of such an update is bounded by the number of samples",
        )
    noise = _noise(update)
    ranks = {name: _rank(update, name, noise) for name in layers}
    lowest = max(1, *(rank for rank, _ in ranks.values()))
    telling = [name for name, (rank, clear) in ranks.items() if clear]
    best = next((name for name in telling if ranks[name][0] == lowest), None)
    ranked = BatchSize(lowest, lowest, f"rank of layer {best!r}")
    if best is not None and best != last_linear(update):
        return ranked
    try:
        gradient = update.gradient()
    except InputError:
        reason = "the rank of no layer ends with a gap, and there is no single gradient"
        return BatchSize(None, lowest, reason) if best is None else ranked
    size, why = _smallest_whole(update, gradient, lowest, maximum, seed)
    if best is not None and size in (None, lowest):
        return ranked
    reason = "the rank of the last layer is " + ("too low; " if best else "full; ")
    return BatchSize(size, lowest, reason + why)


def _usable_layers(update: SharedUpdate, seed: int) -> list[str]:
    """Linear layers, fed one vector per image, whose rank counts samples."""
    recipe = update.training
    steps = max(recipe.num_steps(size) for size in update.group_sizes or ())
    if recipe.optimiser == "adam" or (recipe.weight_decay and update.normalized):
        return []
    inputs = _layer_inputs(update, update.model, seed)
    if steps == 1:
        return list(inputs)
    if recipe.weight_decay:
        return []
    moved = copy.deepcopy(update.model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in update.tensors:
                parameter.add_(update.tensors[name])
    after = _layer_inputs(update, moved, seed)
    return [name for name in inputs if torch.equal(inputs[name], after[name])]


def _layer_inputs(
    update: SharedUpdate, model: nn.Module, seed: int
) -> dict[str, Tensor]:
    """What trained linear layers are fed for dummy images, where it is (N, d)."""
    model, found = copy.deepcopy(model), {}
    images = dummy_images(update, seed)
    for name, module in model.named_modules():
        trained = parameter_name(name, "weight") in update.tensors
        if isinstance(module, nn.Linear) and trained:

            def keep(
                _: nn.Module, inputs: tuple[Tensor, ...], name: str = name
            ) -> None:
                if inputs[0].dim() == 2 and len(inputs[0]) == len(images):
                    found[name] = inputs[0].detach()

            module.register_forward_pre_hook(keep)
    with private_randomness(seed, images.device), torch.no_grad():
        model(images)
    return found


def _gradient_of_layer(update: SharedUpdate, name: str) -> Tensor:
    """Gradient of weight and bias of a layer side by side, up to a factor."""
    recipe, columns = update.training, []
    start = dict(update.model.named_parameters())
    for key in (parameter_name(name, "weight"), parameter_name(name, "bias")):
        if key in update.tensors:
            sent = update.tensors[key].double().cpu()
            if update.kind == "delta" and recipe.weight_decay:
                decay = recipe.rate * recipe.weight_decay
                sent = sent + decay * start[key].detach().double().cpu()
            columns.append(sent.reshape(len(sent), -1))
    return torch.cat(columns, 1)


def _noise(update: SharedUpdate) -> float:
    """Standard deviation of the noise in the update.

    The rows of the last layer's gradient add up to zero; what they do add up to is
    noise.
    """
    gradient = _gradient_of_layer(update, last_linear(update))
    seen = float(gradient.sum(0).norm() / gradient.numel() ** 0.5)
    return max(seen, update.noise_std)


def _rank(update: SharedUpdate, name: str, noise: float) -> tuple[int, bool]:
    """Rank of a layer's gradient above noise, and whether it counts samples clearly.

    It does where the layer could hold more of them, and the next singular value is
    far below.
    """
    gradient = _gradient_of_layer(update, name)
    values = torch.linalg.svdvals(gradient)
    weight = update.model.get_parameter(parameter_name(name, "weight"))
    rounding = _ROUNDING * torch.finfo(weight.dtype).eps
    if update.kind == "delta":  # a difference of weights that were rounded every step
        steps = max(update.training.num_steps(n) for n in update.group_sizes or ())
        noise = max(noise, rounding * float(weight.detach().abs().max()) * steps**0.5)
    largest_of_noise = noise * sum(side**0.5 for side in gradient.shape)
    floor = max(rounding * float(values[0]), _NOISE_MARGIN * largest_of_noise)
    rank = int((values > floor).sum())
    used = min(int(gradient.any(1).sum()), int(gradient.any(0).sum()))
    clear = 0 < rank < used - 1 and float(values[rank - 1]) > _GAP * float(values[rank])
    return rank, clear


def _smallest_whole(
    update: SharedUpdate,
    gradient: dict[str, Tensor],
    lowest: int,
    maximum: int,
    seed: int,
) -> tuple[int | None, str]:
    """The smallest number of samples whose label counts are whole, and a reason."""
    layer, name = read_last_layer(update), last_linear(update)
    if layer.sent_bias is None:
        return None, "the last layer has no bias"
    bias = gradient[parameter_name(name, "bias")].double().cpu()
    weight = gradient[parameter_name(name, "weight")].double().cpu()
    features = dummy_features(update, seed)
    predictions = (features @ layer.weight.T + layer.bias).softmax(1)
    distance = (predictions - predictions.mean(0)).abs().sum(1).mean() / 2
    if float(distance) > _LARGEST_SPREAD:
        return None, "predictions differ too much between images to count labels"
    share = mean_prediction((weight, bias), layer, features) - bias
    for size in range(lowest, maximum + 1):
        counts = size * share
        off = (counts - counts.round()).square().mean().sqrt()
        if float(off) < _WHOLE and float(counts.min()) > -3 * _WHOLE:
            return size, f"{size} makes whole label counts"
    return None, "no number makes whole label counts"
