"""Images by algebra alone: which method a model allows, and what it proves.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.analytic import (
    class_fits,
    closed_form_image,
    linear_front,
)
from gradinv_helpers.attacks.certificate import (
    EXACT_RESIDUAL,
    Certificate,
    LayerSolution,
    gradient_residual,
)
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.layerwise import chain_to_solve, invert_layer_by_layer
from gradinv_helpers.attacks.levenberg_marquardt import MOST_UNKNOWNS, solve_dense
from gradinv_helpers.attacks.low_rank import invert_low_rank, relu_front
from gradinv_helpers.attacks.plan import has_kinks
from gradinv_helpers.errors import InputError, check_seed
from gradinv_helpers.updates import SharedUpdate

__all__ = [
    "Certificate",
    "ExactSolution",
    "invert_exactly",
    "invert_layer_by_layer",
]

_GIVEN = "given (upper bound)"
# Cosines between errors that differ by less do not tell classes apart.
_SAME_FIT = 1e-3


@dataclass(frozen=True)
class ExactSolution:
    """What algebra makes of one update.

    Args:
        images: Shape (N, C, H, W), in double precision and not clamped.
        labels: Shape (N,).
        certificate: What the answer proves of itself; its ``method`` is the one used.
        reason: Why this method was picked.
        label_source: Where the labels come from.

    Taught in: notebooks/03_stronger_matching.
    """

    images: Tensor
    labels: Tensor
    certificate: Certificate
    reason: str
    label_source: str


def invert_exactly(
    update: SharedUpdate,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    dense: bool = False,
) -> ExactSolution:
    """Compute the images behind an update by the method that the model allows.

    One sample behind a first linear layer has a closed form; one sample behind a chain
    of convolutions and linear layers is solved layer by layer; several samples behind
    a first linear layer with ReLU are taken apart by low rank and sparsity. Anything
    else can be handed to Levenberg-Marquardt, which needs dense matrices of all pixels
    and a few seconds to minutes.

    Args:
        update: A gradient, or the weight change of one SGD step.
        labels: True labels (N,), if the attacker is given them. They are not needed
            for the images, but Levenberg-Marquardt infers them first.
        seed: Seed of the random starts of the low-rank search and of
            Levenberg-Marquardt; the other methods draw nothing.
        dense: Whether Levenberg-Marquardt may be used where no algebra applies.

    Returns:
        Images, labels, certificate, and why the method was picked.

    Raises:
        InputError: The model and the number of samples fit none of the methods, or
            the update is not one gradient of known length.

    Source: Phong et al. (2018); Zhu and Blaschko (2021); Dimitrov et al. (2024).
    Taught in: notebooks/03_stronger_matching.
    """
    check_seed("seed", seed)
    if update.training.clip_norm is not None:
        raise InputError(
            "update",
            "a gradient without clipping, for 'exact'",
            f"clip_norm={update.training.clip_norm:g}",
            "use attack='auto'",
        )
    if labels is not None:
        labels = torch.as_tensor(labels).long().reshape(-1).cpu()
        if len(labels) != update.num_samples:
            wanted = f"{update.num_samples} labels, one per sample"
            raise InputError("labels", wanted, len(labels))
    sorry = []
    for method in _METHODS:
        if not method.suits(update.num_samples):
            continue
        try:
            method.check(update.model)
        except InputError as error:
            sorry.append(f"{method.name}: {error.got}")
            continue
        return method.solve(update, labels, seed)
    small = math.prod(update.image_shape) * update.num_samples <= MOST_UNKNOWNS
    if dense and small and not has_kinks(update.model):
        return _dense(update, labels, seed)
    samples = f"{update.num_samples} sample{'s' * (update.num_samples > 1)}"
    raise InputError(
        "attack 'exact'",
        "; or ".join(method.structure for method in _METHODS)
        + f"; or at most {MOST_UNKNOWNS:,} pixels behind a smooth model" * dense,
        f"{samples} of another model ({'; '.join(sorry)})",
        "use attack='auto'",
    )


# --- the methods, in the order in which they are tried ----------------------------


@dataclass(frozen=True)
class _Method:
    """A way to the images, and what it asks of the model.

    Args:
        name: As in ``Certificate.method``.
        structure: What it needs, in a few words.
        suits: Whether it takes this number of samples.
        check: Raises an ``InputError`` for models of another kind.
        solve: Solves an update for which ``check`` passes.
    """

    name: str
    structure: str
    suits: Callable[[int], bool]
    check: Callable[[nn.Module], object]
    solve: Callable[[SharedUpdate, Tensor | None, int], ExactSolution]


def _closed_form(
    update: SharedUpdate, labels: Tensor | None, seed: int
) -> ExactSolution:
    image = closed_form_image(update)
    source = _GIVEN
    if labels is None:
        labels, source = _label_of_one(update, image)
    front = linear_front(update.model)
    unknowns = image.numel()
    equations = front.layer.weight.numel() + front.layer.out_features
    return ExactSolution(
        image,
        labels,
        Certificate(
            method="closed form",
            residual=gradient_residual(update, image, labels),
            unknowns=unknowns,
            rank=unknowns,
            condition=1.0,
            layers=(LayerSolution(front.name, unknowns, equations, 1.0),),
        ),
        "one sample behind a linear layer: its weight gradient is a multiple of the "
        "image",
        source,
    )


def _label_of_one(update: SharedUpdate, image: Tensor) -> tuple[Tensor, str]:
    """The label of one sample whose image is known, and where it comes from."""
    try:
        label = infer_labels(update)
    except InputError:
        label = None
    if label is not None and gradient_residual(update, image, label) < EXACT_RESIDUAL:
        return label, "inferred (iDLG)"
    front = linear_front(copy.deepcopy(update.model).double())
    error = update.tensors[f"{front.name}.bias"].double()
    error = error if update.kind == "gradient" else -error
    fits, _ = class_fits(front, front.inputs(image), error[None])
    # Few active units may leave several classes: the whole gradient decides.
    likely = (fits[0] > fits.max() - _SAME_FIT).nonzero().cpu()
    residuals = [gradient_residual(update, image, label) for label in likely]
    label = likely[residuals.index(min(residuals))]
    return label, "inferred (error of the first layer)"


def _layer_by_layer(
    update: SharedUpdate, labels: Tensor | None, seed: int
) -> ExactSolution:
    image, label, certificate = invert_layer_by_layer(update)
    source = "inferred (last bias)"
    if labels is not None and not torch.equal(labels, label):
        residual = gradient_residual(update, image, labels)
        certificate = replace(certificate, residual=residual)
    if labels is not None:
        label, source = labels, _GIVEN
    reason = "one sample behind a chain of layers: each layer is solved in turn"
    return ExactSolution(image, label, certificate, reason, source)


def _low_rank(update: SharedUpdate, labels: Tensor | None, seed: int) -> ExactSolution:
    images, found, certificate = invert_low_rank(update, labels=labels, seed=seed)
    return ExactSolution(
        images,
        found,
        certificate,
        "several samples behind a linear layer and ReLU: low rank and sparsity take "
        "them apart",
        _GIVEN if labels is not None else "inferred (error of the first layer)",
    )


def _dense(update: SharedUpdate, labels: Tensor | None, seed: int) -> ExactSolution:
    source = "inferred (counts)" if labels is None else _GIVEN
    known = infer_labels(update) if labels is None else labels
    images, certificate, _ = solve_dense(update, known, seed=seed)
    return ExactSolution(
        images,
        known,
        certificate,
        "no algebra applies: all matching equations are solved by Levenberg-Marquardt",
        source,
    )


_METHODS: tuple[_Method, ...] = (
    _Method(
        name="closed form",
        structure="one sample and a linear layer with a bias first",
        suits=lambda samples: samples == 1,
        check=linear_front,
        solve=_closed_form,
    ),
    _Method(
        name="layer by layer",
        structure="one sample and a chain of convolutions and linear layers with "
        "biases, sigmoid, tanh and ReLU",
        suits=lambda samples: samples == 1,
        check=chain_to_solve,
        solve=_layer_by_layer,
    ),
    _Method(
        name="low rank",
        structure="several samples and a linear layer with a bias and ReLU first",
        suits=lambda samples: samples > 1,
        check=relu_front,
        solve=_low_rank,
    ),
)
