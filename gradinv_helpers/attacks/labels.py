"""Labels from a gradient, before any image. Taught in: notebooks/02_dlg_four_steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradinv_helpers.errors import InputError, check_choice
from gradinv_helpers.updates import SharedUpdate


def infer_labels(
    update: SharedUpdate, *, method: Literal["auto", "idlg"] = "auto"
) -> Tensor:
    r"""Read the label of a single image off the gradient of the last linear layer.

    For softmax and cross-entropy the bias gradient is :math:`p - y`: negative at the
    true class only. Row k of the weight gradient is :math:`(p_k - y_k)\,h^\top`, so
    without a bias the true row is the one that points against all others. Where only
    two rows count, the features h must not be negative (as after sigmoid or ReLU).

    Args:
        update: A gradient, or the weight change of one SGD step, of one sample.
        method: ``idlg``; ``auto`` picks it.

    Returns:
        The label, shape (1,).

    Raises:
        InputError: The update holds several samples or several steps, the model has
            no linear last layer, or no single class stands out.

    Source: Zhao et al. (2020), Section 3. Taught in: notebooks/02_dlg_four_steps.
    """
    check_choice("method", method, ("auto", "idlg"))
    if update.num_samples != 1:
        raise InputError(
            "update",
            "an update of one sample for label inference by iDLG",
            f"one of {update.num_samples} samples",
            "let the attack 'dlg' fit the labels, or pass labels= if they are known",
        )
    if update.normalized or update.kind == "gradient":
        gradient = dict(update.tensors)  # a positive factor changes no sign
    else:
        gradient = update.gradient()
    weight_name, bias_name = _last_linear(update)
    weight = gradient[weight_name]
    scores = gradient[bias_name] if bias_name else _scores_of_rows(weight)
    negative = torch.nonzero(scores < 0).flatten()
    if len(negative) != 1:
        # Noise or rounding can flip small entries; the true one is by far the lowest.
        lowest = torch.topk(-scores, min(2, len(scores))).values
        if not len(negative) or (len(lowest) == 2 and lowest[0] < 2 * lowest[1]):
            raise InputError(
                "update",
                "one class with a negative gradient in the last layer",
                f"{len(negative)} such classes",
                "the update is not that of one hard label, or it is too noisy",
            )
    return scores.argmin().reshape(1).cpu()


def _scores_of_rows(weight: Tensor) -> Tensor:
    """One number per row (p_k - y_k) h, negative for the class that stands alone."""
    along = weight @ weight[weight.norm(dim=1).argmax()]
    up, down = along.clamp_min(0), (-along).clamp_min(0)
    # Both sides have the same sum; that of the true class has a single member.
    lead = down.max() * up.sum() - up.max() * down.sum()
    if abs(lead) > 1e-3 * up.sum() * down.sum():
        return along if lead > 0 else -along
    if bool(((weight >= 0).all(1) | (weight <= 0).all(1)).all()):
        return weight.sum(1)
    raise InputError(
        "update",
        "a bias, three classes in play, or features without negative values",
        "none of them",
        "use the attack 'dlg', or pass labels= if they are known",
    )


def _last_linear(update: SharedUpdate) -> tuple[str, str | None]:
    """Names of weight and bias of the last layer, where it is linear."""
    found: tuple[str, str | None] | None = None
    for name, module in update.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            prefix = f"{name}." if name else ""
            has_bias = f"{prefix}bias" in update.tensors
            if f"{prefix}weight" in update.tensors:
                found = (f"{prefix}weight", f"{prefix}bias" if has_bias else None)
    if found is None:
        raise InputError(
            "update",
            "a model that ends with a trainable torch.nn.Linear",
            type(update.model).__name__,
            "use the attack 'dlg', or pass labels= if they are known",
        )
    return found
