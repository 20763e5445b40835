"""What an update determines about its images, before any attack runs.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import copy
import math
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.exact import _METHODS
from gradinv_helpers.attacks.gradients import _chain_layers, _Conv, _Linear
from gradinv_helpers.attacks.jacobian import RANK_THRESHOLD, linearise_gradient
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.learning_rate import with_learning_rate
from gradinv_helpers.attacks.levenberg_marquardt import MOST_UNKNOWNS
from gradinv_helpers.attacks.plan import has_kinks
from gradinv_helpers.attacks.spectrum import (
    FORMATS,
    DenseOperator,
    EquationCount,
    LinearOperator,
    Spectrum,
    cholesky_rank,
    count_equations,
    estimate_spectrum,
    exact_spectrum,
    gradient_operator,
    rounding_std,
)
from gradinv_helpers.compute import forward_work, private_randomness
from gradinv_helpers.encoding import EncodingKind
from gradinv_helpers.errors import InputError, check_choice, check_seed
from gradinv_helpers.updates import SharedUpdate

MEASURES: tuple[str, ...] = ("auto", "counted", "measured")

# Images up to so many pixels have all singular values computed, and up to so many the
# rank by a Cholesky factorisation: seconds each on one core.
_ALL_VALUES, _CHOLESKY = 3_200, 6_500
# Multiplications that "auto" spends on J^T J, and on products with J.
_NORMAL_WORK, _PRODUCT_WORK = 1e12, 1.2e11
_STEPS, _PROBES = 20, 2
# A product with the Jacobian or its transpose costs as much as this many forwards.
_PRODUCT = 6


_TEXT_WIDTH = 60  # of a printed row, without its label


@dataclass(frozen=True)
class AttackOutlook:
    """What one kind of attack can do with an update.

    Args:
        attack: Its name, as for ``invert``.
        works: Whether it can be expected to find the images themselves.
        reason: Why, or why not.

    Taught in: notebooks/04_aggregated_gradients.
    """

    attack: str
    works: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What was sent, what it determines, and which attacks that leaves.

    Args:
        kind: ``gradient`` or ``delta``.
        num_samples: Images behind the update.
        group_sizes: Images of each client.
        numbers: Entries of all tensors.
        num_bytes: Bytes that travel.
        dtype: Number format of the tensors.
        steps: Local steps of the client with the most.
        optimiser: Optimiser of these steps.
        noise_std: Known noise of a defence; 0 for none.
        labels: Where the labels of the reference batch come from.
        unknowns: Pixels of all images.
        count: The rank that the architecture promises.
        rank: Directions that one gradient of all images determines.
        rank_source: ``measured`` at reference images, or ``counted`` by the rule.
        condition: Largest singular value over the smallest, if all were computed and
            none is zero; otherwise ``None``.
        spectrum: Singular values, or a sample of them; ``None`` where only counted.
        precision_std: Standard deviation of noise and rounding of the update as it was
            sent, in units of the gradient.
        formats: Directions above the rounding of each number format; empty without a
            spectrum.
        bits: What the update as sent gives away, in bits; ``None`` likewise.
        attacks: What each kind of attack can do.
        verdict: The essence in one sentence.
        seconds: Time spent; no part of a comparison.
        encoding: How a defence encoded the tensors; ``None`` where they are as
            computed.

    Taught in: notebooks/04_aggregated_gradients.
    """

    kind: str
    num_samples: int
    group_sizes: tuple[int, ...]
    numbers: int
    num_bytes: int
    dtype: str
    steps: int
    optimiser: str
    noise_std: float
    labels: str
    unknowns: int
    count: EquationCount
    rank: int
    rank_source: str
    condition: float | None
    spectrum: Spectrum | None
    precision_std: float
    formats: Mapping[str, float]
    bits: float | None
    attacks: tuple[AttackOutlook, ...]
    verdict: str
    seconds: float
    encoding: EncodingKind | None = None

    @property
    def missing(self) -> int:
        """Directions in which the images can move and one gradient stays."""
        return self.unknowns - self.rank

    @property
    def determined(self) -> float | None:
        """Directions that stand out of noise and rounding; ``None`` if only counted."""
        if self.spectrum is None or self.precision_std <= 0:
            return None
        return self.spectrum.determined(self.precision_std)[0]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain_update(
    update: SharedUpdate, *, measure: str = "auto", seed: int = 0
) -> Explanation:
    """Say what an update determines about its images, before any attack runs.

    The Jacobian of the gradient is taken at random smooth images with the labels that
    the update gives away, never at the truth: its rank is the same at almost all
    images behind smooth activations, and similar behind ReLU. It is that of *one
    gradient* of all images at the weights before the update; for several local steps
    this is a stand-in, and the explanation says so. A learning rate that the recipe
    leaves open is read off the last layer.

    Args:
        update: What the server saw.
        measure: ``counted`` takes the rank from the architecture alone, at once;
            ``measured`` computes it, up to 6,500 pixels; ``auto`` measures where that
            takes seconds, otherwise counts, and estimates the spectrum from a few
            products where these are cheap.
        seed: Seed of reference images, labels that cannot be inferred, and probes.

    Returns:
        The explanation; ``print`` shows it as text.

    Raises:
        InputError: An unknown choice, or too many pixels to measure.

    Taught in: notebooks/04_aggregated_gradients.
    """
    check_choice("measure", measure, MEASURES)
    check_seed("seed", seed)
    begun = time.perf_counter()
    update, _ = with_learning_rate(update, refine=False, seed=seed)
    shape = (update.num_samples, *update.image_shape)
    images = reference_images(shape, seed).to(next(iter(update.tensors.values())))
    model = copy.deepcopy(update.model)  # batch statistics may change on the way
    with private_randomness(seed, images.device):
        count = count_equations(model, images)
        targets, label_source = _targets(update, model, images, seed)
        found, source, spectrum = _measured(model, images, targets, measure, seed)
    rank = count.rank if found is None else found
    noise, formats = _precision(update), {}
    if spectrum is not None:
        spectrum = spectrum.limited_to(rank)
        formats = {
            name: spectrum.determined(std)[0]
            for name, std in _format_stds(update).items()
            if std > 0
        }
    condition = None
    if spectrum is not None and spectrum.exact and rank == count.unknowns:
        condition = spectrum.largest / float(spectrum.values.min())  # none is zero
    plain = update.encoding is None or update.encoding.exact
    noisy = spectrum is not None and noise > 0 and plain
    attacks = _outlook(update, count.unknowns - rank)
    groups = update.group_sizes or (update.num_samples,)
    first = next(iter(update.tensors.values()))
    return Explanation(
        kind=update.kind,
        num_samples=update.num_samples,
        group_sizes=groups,
        numbers=sum(t.numel() for t in update.tensors.values()),
        num_bytes=update.num_bytes,
        dtype=str(first.dtype).removeprefix("torch."),
        steps=max(update.training.num_steps(size) for size in groups),
        optimiser=update.training.optimiser,
        noise_std=update.noise_std,
        labels=label_source,
        unknowns=count.unknowns,
        count=count,
        rank=rank,
        rank_source=source,
        condition=condition,
        spectrum=spectrum,
        precision_std=noise,
        formats=MappingProxyType(formats),
        bits=spectrum.bits(noise) if spectrum is not None and noisy else None,
        attacks=attacks,
        verdict=_verdict(update, rank, count.unknowns, source, attacks),
        seconds=time.perf_counter() - begun,
        encoding=None if update.encoding is None else update.encoding.kind,
    )


def reference_images(shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw smooth random images around grey, at which a Jacobian can be taken.

    Args:
        shape: (B, C, H, W).
        seed: Seed of the noise.

    Returns:
        Images in [0, 1] of the given shape, float32.

    Taught in: notebooks/04_aggregated_gradients.
    """
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.full(shape, 0.5)
    for cells, strength in ((8, 0.5), (4, 0.25), (1, 0.1)):
        small = (-(-height // cells), -(-width // cells))
        noise = torch.rand(batch, channels, *small, generator=generator) - 0.5
        noise = F.interpolate(
            noise, size=(height, width), mode="bilinear", align_corners=False
        )
        images += strength * noise
    return images.clamp(0, 1)


# --- labels, rank, precision ------------------------------------------------------


def _targets(
    update: SharedUpdate, model: nn.Module, images: Tensor, seed: int
) -> tuple[Tensor, str]:
    """Labels of the reference batch as probabilities, and where they come from."""
    with torch.no_grad():
        classes = model(images).shape[1]
    try:
        labels, source = infer_labels(update, seed=seed), "inferred from the update"
    except InputError:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (len(images),), generator=generator)
        source = "drawn at random: the update does not tell them"
    return F.one_hot(labels, classes).to(images), source


def _measured(
    model: nn.Module, images: Tensor, targets: Tensor, measure: str, seed: int
) -> tuple[int | None, str, Spectrum | None]:
    """Rank, what it is, and singular values, by what the size of the problem allows."""
    unknowns = images.numel()
    if measure == "counted":
        return None, "counted", None
    if measure == "measured" and unknowns > _CHOLESKY:
        raise InputError(
            "measure",
            f"at most {_CHOLESKY:,} pixels to measure a rank",
            f"{unknowns:,}",
            "use measure='auto' or 'counted'",
        )
    affordable = unknowns <= _CHOLESKY and _normal_work(model, images) <= _NORMAL_WORK
    if measure == "measured" or affordable:
        linear = linearise_gradient(model, images, targets)
        if unknowns <= _ALL_VALUES:
            spectrum = exact_spectrum(linear)
            values = spectrum.values
            rank = int((values > RANK_THRESHOLD * spectrum.largest).sum())
            return rank, "measured", spectrum
        rank, factor = cholesky_rank(linear.normal())
        return rank, "measured", _sampled(DenseOperator(factor), seed)
    if _PRODUCT * 2 * _STEPS * _PROBES * _forward_work(model, images) > _PRODUCT_WORK:
        return None, "counted", None
    return None, "counted", _sampled(gradient_operator(model, images, targets), seed)


def _sampled(operator: LinearOperator, seed: int) -> Spectrum:
    return estimate_spectrum(operator, steps=_STEPS, probes=_PROBES, seed=seed)


def _normal_work(model: nn.Module, images: Tensor) -> float:
    """Multiplications to form J^T J, roughly."""
    unknowns = images.numel()
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = _chain_layers(model)
    if layers is None:  # one reverse pass for every pixel
        return 2 * _PRODUCT * unknowns * _forward_work(model, images)
    by_tangents = weights * unknowns**2
    sizes: list[int] = []
    with torch.no_grad():
        handles = [
            layer.layer.register_forward_hook(
                lambda _, inputs, output: sizes.append(output.numel())
            )
            for layer in layers
            if isinstance(layer, _Conv | _Linear)
        ]
        model(images)
        for handle in handles:
            handle.remove()
    widest = max(sizes)
    by_layers = widest**2 * (widest + unknowns) if widest <= 8192 else math.inf
    return min(by_layers, 6.0 * by_tangents)


def _forward_work(model: nn.Module, images: Tensor) -> int:
    """Multiplications of a forward pass."""
    return forward_work(model, tuple(images.shape[1:])) * len(images)


def _precision(update: SharedUpdate) -> float:
    """Noise and rounding of an entry of the update, in units of the gradient."""
    dtype = str(next(iter(update.tensors.values())).dtype).removeprefix("torch.")
    rounding = _format_stds(update).get(dtype, 0.0)
    return math.hypot(rounding, update.noise_std / _scale(update))


def _format_stds(update: SharedUpdate) -> dict[str, float]:
    """Root mean square rounding of every number format, in units of the gradient.

    A change of weights is computed from weights that are rounded themselves.
    """
    weights = dict(update.model.named_parameters())
    found = {}
    for name in FORMATS:
        total, entries = 0.0, 0
        for key, tensor in update.tensors.items():
            total += float(rounding_std(tensor, name).square().sum())
            if update.kind == "delta" and name != "int8":
                total += float(rounding_std(weights[key], name).square().sum())
            entries += tensor.numel()
        found[name] = (total / entries) ** 0.5 / _scale(update)
    return found


def _scale(update: SharedUpdate) -> float:
    """How large the update is, roughly, where the gradient is 1."""
    if update.kind == "gradient":
        return 1.0
    groups = update.group_sizes or (update.num_samples,)
    return update.training.rate * max(update.training.num_steps(n) for n in groups)


# --- attacks ----------------------------------------------------------------------


def _outlook(update: SharedUpdate, missing: int) -> tuple[AttackOutlook, ...]:
    try:
        update.gradient()
        obstacle = ""
    except InputError as error:
        obstacle = f"the update is {error.got}, not one gradient"
    if not obstacle and update.normalized:
        obstacle = "the clients scaled their tensors to unit norm"
    search = "inverting-gradients" if has_kinks(update.model) else "dlg"
    return (
        _exact(update, obstacle, missing),
        _search(search, obstacle, missing),
        AttackOutlook(
            "gaussian-map",
            True,
            "weighs the equations by their noise and lets the statistics of "
            "photographs fill what they leave open"
            + ("; the likely, not the proven images" if missing or obstacle else ""),
        ),
    )


def _exact(update: SharedUpdate, obstacle: str, missing: int) -> AttackOutlook:
    if obstacle:
        return AttackOutlook("exact", False, obstacle)
    reasons = []
    for method in _METHODS:
        if not method.suits(update.num_samples):
            continue
        try:
            method.check(update.model)
        except InputError as error:
            reasons.append(f"{method.name}: {error.got}")
            continue
        if update.noise_std > 0:
            reason = f"{method.name} applies, but takes noise for signal"
            return AttackOutlook("exact", False, reason)
        if missing and method.name == "layer by layer":
            reason = f"{method.name} applies, but {missing:,} directions are missing"
            return AttackOutlook("exact", False, reason)
        return AttackOutlook("exact", True, f"{method.name}: {method.structure}")
    small = math.prod(update.image_shape) * update.num_samples <= MOST_UNKNOWNS
    if small and not has_kinks(update.model) and not missing and not update.noise_std:
        reason = "no algebra applies; Levenberg-Marquardt on all equations can"
        return AttackOutlook("exact", True, reason)
    if missing and small and not has_kinks(update.model):
        reason = (
            "Levenberg-Marquardt solves all equations, and ends at one of many batches "
            "with this gradient"
        )
        return AttackOutlook("exact", False, reason)
    return AttackOutlook("exact", False, "; ".join(reasons) or "no method applies")


def _search(name: str, obstacle: str, missing: int) -> AttackOutlook:
    if obstacle:
        return AttackOutlook(name, False, obstacle)
    if missing:
        reason = f"nothing in the gradient holds {missing:,} of the directions"
        return AttackOutlook(name, False, reason)
    reason = "every direction is in the gradient, if the search finds it"
    return AttackOutlook(name, True, reason)


def _verdict(
    update: SharedUpdate,
    rank: int,
    unknowns: int,
    source: str,
    attacks: tuple[AttackOutlook, ...],
) -> str:
    several = update.num_samples > 1
    images = f"the {update.num_samples} images" if several else "the image"
    share = rank / unknowns
    if attacks[0].works:
        return f"The update gives {images} away: attack 'exact' can compute them."
    if rank == unknowns:
        caution = "" if source == "measured" else " by this count"
        return (
            f"The update determines {images}{caution}; what is left to the attack is "
            "noise, rounding and optimisation."
        )
    return (
        f"The update determines {share:.0%} of {images}: the other "
        f"{unknowns - rank:,} directions can only come from a prior, so take "
        "attack 'gaussian-map' and compare with its floor."
    )


# --- text -------------------------------------------------------------------------


def _lines(told: Explanation) -> list[str]:
    clients = len(told.group_sizes)
    who = f"{clients} clients" if clients > 1 else "one client"
    sent = f"{told.kind} of {told.num_samples} samples, {who}: "
    sent += f"{told.numbers:,} numbers, {told.num_bytes:,} bytes, {told.dtype}"
    how = f"{told.steps} step{'s' * (told.steps > 1)} of {told.optimiser}"
    noise = f", noise of {told.noise_std:g} on every entry" if told.noise_std else ""
    rows = [
        ("sent", sent),
        ("made by", how + noise),
        ("labels", told.labels),
        ("unknowns", f"{told.unknowns:,} pixels against {told.numbers:,} numbers"),
        ("rank", _rank_text(told)),
    ]
    if told.steps > 1:
        stand_in = "rank and spectrum are those of a single gradient, a stand-in"
        rows.append(("caution", f"{stand_in} for {told.steps} steps"))
    if told.encoding == "mixed":
        rows.append(("encoded", "images were mixed in pairs: mixtures come back"))
    elif told.encoding is not None:
        limit = "rank and spectrum are those of what was computed, an upper bound"
        rows.append(("encoded", f"{told.encoding}: {limit}"))
    if told.condition is not None:
        rows.append(("condition", f"{told.condition:.2g} (measured)"))
    if told.formats:
        word = "measured" if told.spectrum and told.spectrum.exact else "estimated"
        counts = ", ".join(f"{k} {round(v):,}" for k, v in told.formats.items())
        rows.append(("above rounding", f"{counts} directions ({word})"))
    if told.bits is not None:
        per_pixel = told.bits / told.unknowns
        rows.append(("bits", f"{told.bits:,.0f}, {per_pixel:.1f} per pixel"))
    for outlook in told.attacks:
        word = "can work" if outlook.works else "cannot"
        rows.append((outlook.attack, f"{word}: {outlook.reason}"))
    rows.append(("verdict", told.verdict))
    width = max(len(name) for name, _ in rows)
    rows.append(("time", f"{told.seconds:.1f} s"))
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(text, _TEXT_WIDTH, break_on_hyphens=False)
        labels = [name, *[""] * (len(parts) - 1)]
        pairs = zip(labels, parts, strict=True)
        lines += [f"{label:<{width}}  {part}" for label, part in pairs]
    return lines


def _rank_text(told: Explanation) -> str:
    text = f"{told.rank:,} of {told.unknowns:,} directions ({told.rank_source})"
    if told.missing:
        text += f", {told.missing:,} missing"
    if told.rank_source == "measured":
        text += f"; the layers promise {told.count.rank:,} (counted)"
    return text
