"""What an attack is made of, decided before it runs.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.matching import DISTANCES, Distance, squared_error
from gradinv_helpers.errors import InputError, check_choice, check_number
from gradinv_helpers.updates import SharedUpdate

ATTACKS: tuple[str, ...] = (
    "auto",
    "dlg",
    "idlg",
    "inverting-gradients",
    "gradinversion",
    "gaussian-map",
    "exact",
    "vae-map",
    "vae-posterior",
    "diffusion-latent",
    "diffusion-posterior",
    "gradinvdiff",
)
OPTIMISERS: tuple[str, ...] = ("l-bfgs", "adam", "signed-adam", "levenberg-marquardt")

# Layers whose slope jumps: the squared error behind them is jagged.
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool2d)
_TV_OF_INVERTING_GRADIENTS = 1e-2


@dataclass(frozen=True)
class Plan:
    """The attack that was picked, why, and what it is made of.

    Args:
        attack: Name of the recipe.
        reason: Why it was picked.
        label_source: Where the labels come from.
        labels: One tensor (N,) per update, or ``None`` where labels are unknowns.
        distance: How gradients are compared.
        optimiser: One of ``OPTIMISERS``.
        tv_weight: Weight of the total variation.
    """

    attack: str
    reason: str
    label_source: str
    labels: list[Tensor] | None
    distance: Distance
    optimiser: str
    tv_weight: float


def make_plan(
    updates: Sequence[SharedUpdate],
    attack: str = "auto",
    *,
    labels: Sequence[Tensor | Sequence[int]] | None = None,
    distance: str | Distance | None = None,
    optimiser: str | None = None,
    tv_weight: float | None = None,
) -> Plan:
    """Choose labels, distance and optimiser of a search.

    Args:
        updates: Updates of the same model with the same number of samples.
        attack: A recipe by name; ``auto`` takes ``inverting-gradients`` where the
            slope of the network jumps (ReLU, max-pooling), ``idlg`` for one sample
            behind a smooth network and ``dlg`` for several.
        labels: True labels of every update, if the attacker is given them.
        distance: A name from ``DISTANCES`` or a distance, instead of the recipe's.
        optimiser: One of ``OPTIMISERS``, instead of the recipe's.
        tv_weight: Weight of the total variation, instead of the recipe's.

    Returns:
        The plan.

    Raises:
        InputError: A name is unknown, a weight is out of range, labels do not fit, or
            the recipe needs a label that the update does not give away.

    Taught in: notebooks/03_stronger_matching.
    """
    check_choice("attack", attack, ATTACKS)
    if tv_weight is not None:
        check_number("tv_weight", tv_weight)
    if optimiser is not None:
        check_choice("optimiser", optimiser, OPTIMISERS)
    kinked = has_kinks(updates[0].model)
    name, reason = attack, "asked for"
    if attack == "auto" and kinked:
        name = "inverting-gradients"
        reason = "the slope of the network jumps, which the cosine forgives"
    elif attack == "auto":
        name = "idlg" if updates[0].num_samples == 1 else "dlg"
        reason = "a smooth network"
    known, source, hindrance = _labels(updates, attack, name, labels)
    if name == "idlg" and known is None:
        name = "dlg"
    if hindrance:
        reason += f"; the label cannot be read off: {hindrance}"
    by_cosine = name in ("inverting-gradients", "gradinversion")
    if optimiser == "levenberg-marquardt":
        if name == "gradinversion":
            expected = "an attack without further terms for 'levenberg-marquardt'"
            raise InputError("attack", expected, repr(name))
        _check_squares(updates, known, distance, tv_weight)
        by_cosine, tv_weight = False, 0.0
    if isinstance(distance, str):
        distance = DISTANCES[check_choice("distance", distance, tuple(DISTANCES))]
    usual = DISTANCES["cosine" if by_cosine else "squared"]
    smoothing = _TV_OF_INVERTING_GRADIENTS if by_cosine else 0.0
    return Plan(
        attack=name,
        reason=reason,
        label_source=source,
        labels=known,
        distance=distance or usual,
        optimiser=optimiser or ("signed-adam" if by_cosine else "l-bfgs"),
        tv_weight=smoothing if tv_weight is None else tv_weight,
    )


def has_kinks(model: nn.Module) -> bool:
    """Whether the slope of a network jumps, as with ReLU or max-pooling.

    Taught in: notebooks/03_stronger_matching.
    """
    return any(isinstance(module, _KINKED) for module in model.modules())


def _check_squares(
    updates: Sequence[SharedUpdate],
    labels: list[Tensor] | None,
    distance: str | Distance | None,
    tv_weight: float | None,
) -> None:
    """Refuse what is not a sum of squares of the images alone."""
    got = ""
    if labels is None:
        got = "labels to be fitted with the images"
    elif distance not in (None, "squared", squared_error):
        got = "another distance"
    elif tv_weight:
        got = f"total variation of weight {tv_weight:g}"
    elif updates[0].normalized:
        got = "normalised clients"
    elif updates[0].training.clip_norm is not None:
        got = "clipped gradients"
    if got:
        raise InputError(
            "optimiser",
            "known labels and the squared error alone for 'levenberg-marquardt'",
            got,
            "use 'l-bfgs'",
        )


def _labels(
    updates: Sequence[SharedUpdate],
    asked: str,
    attack: str,
    given: Sequence[Tensor | Sequence[int]] | None,
) -> tuple[list[Tensor] | None, str, str]:
    """Labels of every update, where they come from, and why they stay unknown."""
    if given is not None:
        if len(given) != len(updates):
            raise InputError(
                "labels", f"one entry for each of {len(updates)} updates", len(given)
            )
        pairs = zip(given, updates, strict=True)
        known = [_checked_labels(entry, update) for entry, update in pairs]
        return known, "given (upper bound)", ""
    unknown = "fitted with the images"
    one = updates[0].num_samples == 1
    if attack == "gradinversion":
        try:
            found = [infer_labels(update) for update in updates]
        except InputError as error:
            return None, unknown, str(error)
        return found, "inferred (counts)", ""
    if asked == "auto" and not one:
        try:  # for small batches; it fails rather than being wrong
            found = [infer_labels(update, method="exact") for update in updates]
        except InputError:
            return None, unknown, ""
        return found, "inferred (last layer taken apart)", ""
    if attack == "dlg" or (not one and asked != "idlg"):
        return None, unknown, ""
    try:
        found = [infer_labels(update, method="idlg") for update in updates]
        return found, "inferred (iDLG)", ""
    except InputError as error:
        if asked == "idlg":
            raise
        return None, unknown, str(error)


def _checked_labels(given: Tensor | Sequence[int], update: SharedUpdate) -> Tensor:
    labels = torch.as_tensor(given).reshape(-1)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError("labels", "integers", str(labels.dtype))
    labels = labels.long().cpu()
    if len(labels) != update.num_samples:
        raise InputError(
            "labels", f"{update.num_samples} labels, one per sample", len(labels)
        )
    if int(labels.min()) < 0:
        raise InputError("labels", "class indices of at least 0", int(labels.min()))
    return labels
