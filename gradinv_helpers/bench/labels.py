"""Suite ``labels``: which labels an update gives away, before any image is searched.

Every method meets the same updates. What is counted is how many images of each class
are behind an update: right is the share of the N images that the estimated counts
have in common with the true ones, sum over k of min(n_k, estimate_k) / N.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.labels import LABEL_METHODS, infer_label_counts
from gradinv_helpers.bench import recipes
from gradinv_helpers.bench.figures import panels
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    last_weight_gradient,
    markdown,
    mean_with_interval,
)
from gradinv_helpers.bench.trained import STAGES, model_at
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

MODELS: tuple[str, ...] = ("lenet", "mlp", "convnet", "resnet20")
SIZES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
KINDS: tuple[str, ...] = ("unique", "repeated", "dominated")
PUBLISHED_ONE, PUBLISHED_UNIQUE = "iDLG as published", "GradInversion as published"
GUESS = "guess: equal counts"
GRADIENT = "gradient"
_DOMINANT = 0.75  # share of the one class in a dominated batch
_DELTA_SIZES = (8, 32, 128)
_DELTA_EPOCHS = (1, 5)
_DELTA_BATCH, _DELTA_LR = 8, 0.01


@dataclass(frozen=True)
class _Case:
    """Updates of one kind."""

    model: str
    stage: str
    kind: str
    sends: str  # GRADIENT, or how a weight change came about
    samples: int
    training: LocalTraining

    @property
    def key(self) -> str:
        parts = (self.model, self.stage, self.kind, self.sends)
        return ", ".join(parts) + f", {self.samples} samples"


def _cases(setting: Setting, num_classes: int) -> list[_Case]:
    models = ("mlp", "lenet") if setting.quick else MODELS
    stages = STAGES[:1] if setting.quick else STAGES
    sizes = (1, 4) if setting.quick else SIZES
    cases = [
        _Case(model, stage, kind, GRADIENT, samples, LocalTraining())
        for model in models
        for stage in stages
        for kind in KINDS
        for samples in sizes
        if _makes_sense(kind, samples, num_classes)
    ]
    for model in models[:1] if setting.quick else MODELS[:3]:
        for stage in ("untrained",) if setting.quick else ("untrained", "trained"):
            for epochs in _DELTA_EPOCHS:
                training = LocalTraining(
                    sends="delta", lr=_DELTA_LR, epochs=epochs, batch_size=_DELTA_BATCH
                )
                sends = f"weight change of {epochs} epoch" + "s" * (epochs > 1)
                cases += [
                    _Case(model, stage, "repeated", sends, samples, training)
                    for samples in _DELTA_SIZES[: 1 if setting.quick else None]
                ]
    return cases


def _makes_sense(kind: str, samples: int, num_classes: int) -> bool:
    """Whether a batch of this size can be of this kind."""
    return {
        "unique": samples <= num_classes,
        "repeated": samples >= 2,
        "dominated": samples >= 4,
    }[kind]


def _tasks(setting: Setting) -> list[Task]:
    test, train = setting.images(), setting.images("train")
    cases = _cases(setting, test.num_classes)
    models = {
        (case.model, case.stage): model_at(setting, case.model, case.stage, train, test)
        for case in cases
    }
    return [
        Task(
            case.key,
            functools.partial(
                _measure, case, models[case.model, case.stage], test, setting
            ),
        )
        for case in cases
    ]


# --- one case ---------------------------------------------------------------------


def _measure(case: _Case, model: nn.Module, pool: Images, setting: Setting) -> Record:
    """Let every method count the labels of the same updates."""
    found: dict[str, list[float]] = {}
    refusals: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    for batch in range(setting.numbers["repeats"]):
        seed = setting.seed + batch
        generator = torch.Generator().manual_seed(seed)
        labels = draw_labels(case.kind, case.samples, pool.num_classes, generator)
        images = draw_images(pool, labels, generator)
        update = local_update(model, images, case.training, seed=seed)
        truth = torch.bincount(labels, minlength=pool.num_classes)
        for method, count in _methods(update, pool.num_classes).items():
            begun = time.perf_counter()
            try:
                estimate = count()
            except InputError as error:
                refusals[method] = str(error)
                found.setdefault(method, [])
                continue
            seconds.setdefault(method, []).append(time.perf_counter() - begun)
            found.setdefault(method, []).append(right_share(estimate, truth))
    batches = setting.numbers["repeats"]
    return {
        "model": case.model,
        "stage": case.stage,
        "kind": case.kind,
        "sends": case.sends,
        "samples": case.samples,
        "batches": batches,
        "methods": {
            method: {
                "answered": len(shares) / batches,
                "right": mean_with_interval(shares) if shares else None,
                "exact": sum(s == 1 for s in shares) / batches,
                "seconds": statistics.median(seconds[method]) if shares else None,
                "refused": refusals.get(method),
            }
            for method, shares in found.items()
        },
    }


def _methods(
    update: SharedUpdate, num_classes: int
) -> Mapping[str, Callable[[], Tensor]]:
    """Ours, the published rules where they apply, and the floor."""
    samples = update.num_samples
    methods: dict[str, Callable[[], Tensor]] = {
        method: functools.partial(infer_label_counts, update, method=method)
        for method in LABEL_METHODS
    }
    sign = 1.0 if update.kind == "gradient" else -1.0  # a step goes against it
    weight = sign * last_weight_gradient(update.model, update.tensors)
    if samples == 1:
        methods[PUBLISHED_ONE] = lambda: torch.bincount(
            recipes.label_by_row_sums(weight), minlength=num_classes
        )
    if samples <= num_classes:
        methods[PUBLISHED_UNIQUE] = lambda: torch.bincount(
            recipes.labels_by_row_minima(weight, samples), minlength=num_classes
        )
    methods[GUESS] = lambda: equal_counts(samples, num_classes)
    return methods


def draw_labels(
    kind: str, samples: int, num_classes: int, generator: torch.Generator
) -> Tensor:
    """Labels of one batch: all different, independent, or mostly of one class.

    Args:
        kind: One of ``KINDS``.
        samples: Number N of labels; at most the classes for ``unique``.
        num_classes: Number of classes.
        generator: Source of randomness.

    Returns:
        Labels (N,), int64. In a dominated batch three quarters are of one class.

    Taught in: notebooks/03_stronger_matching.
    """
    if kind == "unique":
        return torch.randperm(num_classes, generator=generator)[:samples]
    labels = torch.randint(num_classes, (samples,), generator=generator)
    if kind == "dominated":
        labels[: math.ceil(_DOMINANT * samples)] = labels[0].clone()
    return labels


def draw_images(pool: Images, labels: Tensor, generator: torch.Generator) -> Images:
    """Images with the given labels, different ones as far as a class has enough.

    Args:
        pool: Images to draw from; it must hold every class that is asked for.
        labels: (N,).
        generator: Source of randomness.

    Returns:
        N images in the order of the labels.

    Raises:
        InputError: A class has no image.

    Taught in: notebooks/03_stronger_matching.
    """
    indices = torch.empty_like(labels)
    for label in labels.unique():
        own = torch.nonzero(pool.labels == label).flatten()
        if not len(own):
            name = pool.class_names[int(label)]
            raise InputError("dataset", f"test images of class {name!r}", "none")
        places = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(own), generator=generator)
        order = order.repeat(math.ceil(len(places) / len(own)))
        indices[places] = own[order[: len(places)]]
    return pool[indices]


def right_share(estimate: Tensor, truth: Tensor) -> float:
    """Share of the images whose class was counted: sum of min(n_k, estimate_k) / N.

    Args:
        estimate: Counts (K,); fractions are rounded.
        truth: True counts (K,).

    Returns:
        A share in [0, 1].

    Taught in: notebooks/03_stronger_matching.
    """
    counts = estimate.detach().cpu().double().round()
    return float(torch.minimum(counts, truth.double()).sum() / truth.sum())


def equal_counts(samples: int, num_classes: int) -> Tensor:
    """What one may guess without an update: N / K images of every class, rounded."""
    counts = torch.full((num_classes,), samples // num_classes)
    counts[: samples % num_classes] += 1
    return counts


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    methods = list(dict.fromkeys(m for r in records for m in r["methods"]))
    tables, charts = [], {}
    for sends in distinct(records, "sends"):
        for model in distinct(chosen(records, sends=sends), "model"):
            own = chosen(records, sends=sends, model=model)
            tables.append(f"### {model}, {sends}\n\n{_table(own, methods)}")
    for kind in distinct(records, "kind"):
        for stage in distinct(records, "stage"):
            if stage == "1 epoch":
                continue
            own = chosen(records, kind=kind, stage=stage, sends=GRADIENT)
            charts[f"{kind} labels, {stage} model"] = _lines(own, methods)
    figure = panels(
        charts,
        xlabel="images behind the gradient",
        ylabels=["labels right (mean over models)"],
        columns=max(1, len(charts) // len(KINDS)),
        floor=GUESS,
    )
    return Report(
        {"mean_right": _overall(records, methods)},
        "\n\n".join([_overall_table(records, methods), _NOTE, *tables]),
        figure,
    )


_NOTE = (
    "Labels right: share of the images whose class was counted, in percent, mean over "
    "the batches; in brackets the share of batches with all counts right. A dash: the "
    "method is not meant for such batches or refused all of them. A star: it refused "
    "some. Means are over what a method answered, so one that refuses large batches is "
    "measured on small ones. `guess` needs no update and is the floor; where labels "
    "are drawn evenly, it is the better the more images there are."
)


def _cell(found: Record | None) -> str:
    if not found or not found["right"]:
        return "–"
    right, exact = 100 * found["right"]["value"], 100 * found["exact"]
    star = "" if found["answered"] == 1 else "*"
    return f"{right:.0f}{star} ({exact:.0f})"


def _table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """One line per stage, kind and size; one column per method."""
    rows = [
        [
            f"{record['stage']}, {record['kind']}",
            f"{record['samples']}",
            *(_cell(record["methods"].get(method)) for method in methods),
        ]
        for record in records
    ]
    return markdown(["model, labels", "images", *methods], rows)


def _lines(
    records: Sequence[Record], methods: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Mean over models of the share that is right, by size, for every method."""
    lines = {}
    for method in methods:
        points = [
            (size, value)
            for size in distinct(records, "samples")
            if (value := _mean_right(chosen(records, samples=size), method)) is not None
        ]
        if points:
            lines[method] = ([x for x, _ in points], [y for _, y in points])
    return lines


def _mean_right(records: Sequence[Record], method: str) -> float | None:
    values = [
        record["methods"][method]["right"]["value"]
        for record in records
        if record["methods"].get(method, {}).get("right")
    ]
    return statistics.fmean(values) if values else None


def _overall(
    records: Sequence[Record], methods: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Mean of the share that is right for every kind of update and method."""
    found = {}
    for sends in distinct(records, "sends"):
        for stage in distinct(chosen(records, sends=sends), "stage"):
            for kind in distinct(chosen(records, sends=sends, stage=stage), "kind"):
                own = chosen(records, sends=sends, stage=stage, kind=kind)
                name = f"{kind} labels, {stage} model, {sends}"
                found[name] = {m: _mean_right(own, m) for m in methods}
    return found


def _overall_table(records: Sequence[Record], methods: Sequence[str]) -> str:
    """Means over models and sizes, one line per kind of update."""
    rows = [
        [name, *("–" if v is None else f"{100 * v:.0f}" for v in values.values())]
        for name, values in _overall(records, methods).items()
    ]
    return markdown(["mean over models and sizes, percent", *methods], rows)


SUITE = Suite(
    numbers={"repeats": 20},
    quick={"repeats": 2},
    tasks=_tasks,
    report=_report,
)
