"""Soteria: what a fully connected layer saw, with its telling entries left out.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from gradinv_helpers.data import Images
from gradinv_helpers.encoding import Encoding
from gradinv_helpers.errors import InputError, check_number
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

_SMALLEST = 1e-10  # of an entry that something is divided by


def soteria_update(
    model: nn.Module,
    images: Images,
    *,
    share: float,
    layer: str | None = None,
    training: LocalTraining | None = None,
) -> SharedUpdate:
    r"""Compute a gradient whose defended layer hides part of what it was fed.

    The gradient of a linear layer's weight is the product of an error and of the
    representation r that entered it. The columns of the entries with the largest
    :math:`\| r_i (\partial r_i / \partial x)^{-1} \|` are set to zero, those whose
    loss moves the reconstruction of the image x furthest; as in the released code the
    inverse is taken to be :math:`1 / \| \partial r_i / \partial x \|`, and the
    entries' scores are summed over the images. Nothing else of the update changes, and
    which columns are missing can be seen.

    Args:
        model: The model received from the server; it is left as it was.
        images: The client's private images.
        share: Share of the representation's entries that are left out, at least 0 and
            below 1.
        layer: Name of the defended ``nn.Linear``; the first one where ``None``.
        training: As for ``local_update``; only recipes that send a gradient.

    Returns:
        The defended update.

    Raises:
        InputError: The share is out of range, or the model has no such layer.

    Source: Sun et al. (2021).
    Taught in: notebooks/08_differential_privacy.
    """
    if check_number("share", share) >= 1:
        raise InputError("share", "a number of at least 0 and below 1", share)
    training = training or LocalTraining()
    if training.sends != "gradient":
        raise InputError("training.sends", "'gradient'", repr(training.sends))
    name = _linear_layer(model, layer)
    update = local_update(model, images, training)
    weight = f"{name}.weight" if name else "weight"
    if weight not in update.tensors:
        raise InputError("layer", "a layer that is trained", repr(name))
    scores = _telling(update.model, images, name)
    count = round(share * len(scores))
    if not count:
        return update
    hidden = scores.topk(count).indices
    pruned = update.tensors[weight].clone()
    pruned[:, hidden] = 0
    return update.replace_tensors(
        {**update.tensors, weight: pruned},
        encoding=Encoding("pruned", {weight: math.inf}),
    )


def _linear_layer(model: nn.Module, asked: str | None) -> str:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not names or (asked is not None and asked not in names):
        expected = f"one of {', '.join(map(repr, names))}" if names else "an nn.Linear"
        raise InputError("layer", expected, repr(asked) if names else "none")
    return names[0] if asked is None else asked


def _telling(model: nn.Module, images: Images, layer: str) -> Tensor:
    """Score (d,) of every entry of a layer's input, summed over the images."""
    model = copy.deepcopy(model).eval()
    like = next(model.parameters())
    caught: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: caught.append(given[0])
    )
    total = torch.zeros((), dtype=torch.float64)
    for pixels in images.pixels.to(like.device, like.dtype).split(1):
        caught.clear()
        with torch.enable_grad():
            free = pixels.clone().requires_grad_()
            model(free)
            entries = caught[-1].flatten()
        eye = torch.eye(len(entries), dtype=entries.dtype, device=entries.device)
        (slopes,) = torch.autograd.grad(entries, free, eye, is_grads_batched=True)
        lengths = slopes.flatten(1).norm(dim=1).double()
        scores = entries.detach().double().abs() / lengths.clamp_min(_SMALLEST)
        total = total.to(scores) + scores
    return total
