"""Labels from an update, before any image.

Taught in: notebooks/02_dlg_four_steps and notebooks/03_stronger_matching.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradinv_helpers.attacks.label_counts import (
    bounds_of_one_step,
    counts_by_llg,
    counts_by_moments,
    counts_by_signs,
    dummy_impact,
)
from gradinv_helpers.attacks.last_layer import (
    LastLayer,
    dummy_features,
    groups_of,
    mean_gradient,
    read_last_layer,
)
from gradinv_helpers.attacks.separation import can_separate, separate, separate_batch
from gradinv_helpers.attacks.trajectory import counts_by_trajectory
from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.updates import SharedUpdate

LABEL_METHODS: tuple[str, ...] = (
    "auto",
    "idlg",
    "signs",
    "llg",
    "llg*",
    "moments",
    "exact",
    "trajectory",
)


def infer_labels(
    update: SharedUpdate,
    *,
    method: str = "auto",
    num_samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Read the labels of a batch off the gradient of the last linear layer.

    For softmax and cross-entropy the bias gradient of one sample is :math:`p - y`:
    negative at the true class only. Row k of the weight gradient is
    :math:`(p_k - y_k)\,h^\top`, so without a bias the true row is the one that points
    against all others. Where only two rows count, the features h must not be negative
    (as after sigmoid or ReLU). For several samples see ``infer_label_counts``.

    Args:
        update: What the server saw.
        method: ``idlg`` for one sample, or a method of ``infer_label_counts``.
        num_samples: Number of labels; ``update.num_samples`` where ``None``.
        seed: As for ``infer_label_counts``.

    Returns:
        The labels in ascending order, shape (N,). Which image bears which label is
        not in the gradient: the order within a batch has no meaning.

    Raises:
        InputError: As for ``infer_label_counts``; or, for one sample, no single class
            stands out.

    Source: Zhao et al. (2020), Section 3, for one sample.
    Taught in: notebooks/02_dlg_four_steps and notebooks/03_stronger_matching.
    """
    counts = infer_label_counts(
        update, method=method, num_samples=num_samples, seed=seed
    )
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def infer_label_counts(
    update: SharedUpdate,
    *,
    method: str = "auto",
    num_samples: int | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Count how often each class occurs among the labels behind an update.

    The bias gradient of the last layer is mean prediction minus label shares,
    :math:`g = \bar p - n / N`. Untrained models predict much the same for every
    image, so that :math:`\bar p` is easy to guess and counts of hundreds of labels
    are nearly exact. The surer a model is, the less its gradient says about a large
    batch: of many labels in equal shares it then tells no more than guessing equal
    counts does, but it still shows which class prevails.

    ========== =======================================================================
    method     what it does
    ========== =======================================================================
    idlg       One sample: the class whose bias gradient is negative.
    signs      At most one label per class: the N classes whose rows hold the lowest
               entries. Needs features that are not negative.
    llg        Takes labels out of the row sums one by one. Needs features that are
               not negative.
    llg*       The same; dummy images tell what one label takes out of a sum.
    moments    N times mean prediction minus bias gradient, within bounds that are
               certain. The features of each class, and with them its predictions,
               come from the gradient.
    exact      Takes the batch apart (see ``separate_batch``), where N is at most half
               the number of classes. Fails rather than being wrong.
    trajectory Several local steps of SGD, momentum or Adam: simulates the client.
    auto       Where it proves the counts, ``exact``; otherwise the method that was
               measured to be best: ``idlg`` for one sample, ``trajectory`` after
               several steps or Adam, and ``moments``. For normalised clients whose
               scale cannot be found, ``llg``.
    ========== =======================================================================

    Several steps by clients of unequal size count the labels of larger clients more
    than once, because these take more steps.

    Args:
        update: What the server saw; an aggregate counts the labels of all clients.
        method: One of ``LABEL_METHODS``.
        num_samples: Number N of labels; ``update.num_samples`` where ``None``.
        seed: Seed of dummy images, simulated orders and starting points.

    Returns:
        Counts (K,), integers of sum N.

    Raises:
        InputError: The method does not fit the update; the message says what does.

    Source: Zhao et al. (2020) for ``idlg``; Yin et al. (2021) for ``signs``; Wainakh
    et al. (2022) for ``llg``; Ma et al. (2023) for counts by features of each class;
    Chen and Vikalo (2024) for counts by simulated training.
    Taught in: notebooks/03_stronger_matching.
    """
    check_choice("method", method, LABEL_METHODS)
    count = update.num_samples if num_samples is None else num_samples
    check_count("num_samples", count)
    check_seed("seed", seed)
    layer = read_last_layer(update)
    if method == "auto":
        return _counts_of_the_best_method(update, layer, count, seed)
    if method == "idlg":
        return _idlg(update, layer, count)
    if method == "exact":
        labels = separate_batch(update, num_samples=count, seed=seed).labels
        return labels.bincount(minlength=layer.num_classes)
    if method == "trajectory":
        return counts_by_trajectory(update, layer, count, seed)
    if method == "moments":
        if not update.normalized:
            update.gradient()  # refuses what states none
        return counts_by_moments(update, layer, count, seed)
    weight, _ = mean_gradient(update, layer, groups_of(update, count))
    if not bool(weight.any()):
        raise InputError("update", "a non-zero gradient in the last layer", "all zeros")
    if method == "signs":
        return counts_by_signs(weight, count)
    if method == "llg":
        return counts_by_llg(weight, count)
    if update.normalized:
        raise InputError(
            "update",
            "an update of known scale for method 'llg*'",
            "normalised clients",
            "use method 'llg'",
        )
    impact, offset = dummy_impact(layer, dummy_features(update, seed), count)
    return counts_by_llg(weight, count, impact=impact, offset=offset)


def _counts_of_the_best_method(
    update: SharedUpdate, layer: LastLayer, num_samples: int, seed: int
) -> Tensor:
    """Counts (K,) by what was measured to be most accurate for such an update."""
    groups = groups_of(update, num_samples)
    one_step = update.training.optimiser != "adam" and all(
        update.training.num_steps(size) == 1 for size in groups
    )
    if one_step and num_samples == 1:
        return _idlg(update, layer, num_samples)
    if not one_step and not update.normalized:
        return counts_by_trajectory(update, layer, num_samples, seed)
    if one_step:
        proven = _proven_counts(update, layer, num_samples, seed)
        if proven is not None:
            return proven
    single = one_step and len(groups) == 1 and num_samples < layer.num_classes
    if update.normalized and not single:  # the scale stays unknown
        weight, _ = mean_gradient(update, layer, groups)
        return counts_by_llg(weight, num_samples)
    return counts_by_moments(update, layer, num_samples, seed)


def _proven_counts(
    update: SharedUpdate, layer: LastLayer, num_samples: int, seed: int
) -> Tensor | None:
    """Counts (K,) that leave no doubt, if bounds or separation give any."""
    if layer.sent_bias is not None and not update.normalized:
        lowest = bounds_of_one_step(update, layer, num_samples)
        if int(lowest.sum()) == num_samples:
            return lowest
    if can_separate(update, layer, num_samples):
        found = separate(update, layer, num_samples, seed)
        if found is not None:
            return found.labels.bincount(minlength=layer.num_classes)
    return None


def _idlg(update: SharedUpdate, layer: LastLayer, num_samples: int) -> Tensor:
    """Counts (K,) of one sample: a single one."""
    if num_samples != 1:
        raise InputError(
            "update",
            "an update of one sample for label inference by iDLG",
            f"one of {num_samples} samples",
            "let the attack 'dlg' fit the labels, or pass labels= if they are known",
        )
    if not update.normalized:
        update.gradient()  # refuses what states none
    weight, bias = mean_gradient(update, layer, (1,))
    scores = _scores_of_rows(weight) if bias is None else bias
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
    return torch.nn.functional.one_hot(scores.argmin(), layer.num_classes)


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
