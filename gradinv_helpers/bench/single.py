"""Suite ``single``: how well, how often and how fast one image comes back.

Every image is the only one behind its update. Without noise, ``auto`` meets all
images and the published DLG some of them, in turns. With Gaussian noise of a
thousandth of the gradient's norm, every attack on single images meets the same ones.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.bench import recipes
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    image_scores,
    markdown,
    mean_difference,
    ratio_of_medians,
    spread,
    spread_of,
    stop_if_interrupted,
    timed,
    victim_numbers,
    with_interval,
    with_quartiles,
)
from gradinv_helpers.data import Images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.intervals import share_interval
from gradinv_helpers.models import build_model
from gradinv_helpers.plots import strip
from gradinv_helpers.updates import SharedUpdate, local_update

RECIPE = "DLG as published"
METHODS = ("dlg", "idlg", "exact", "inverting-gradients", "auto")
NOISE = 1e-3  # of the gradient's norm
TARGET_DB = 40.0
MODEL_SEEDS = 5  # image i is behind the model with seed i mod 5
_RECIPE_ITERATIONS = 300
_QUICK_ITERATIONS = 2


@dataclass(frozen=True)
class _Bench:
    """Images and models of the suite."""

    setting: Setting
    victims: Images
    models: Sequence[nn.Module]

    def update(self, image: int, noise: float) -> SharedUpdate:
        """What the client with this image sends."""
        model = self.models[image % len(self.models)]
        update = local_update(model, self.victims[[image]])
        if not noise:
            return update
        generator = torch.Generator().manual_seed(self.setting.seed + image)
        defence = GaussianNoise(noise, relative=True)
        return defend(update, defence, generator=generator)

    def warm_up(self) -> None:
        """Load what is loaded late, so that no measurement waits for it."""
        update = self.update(0, 0.0)
        gradient = list(update.tensors.values())
        invert(update)
        shape = update.image_shape
        recipes.deep_leakage(update.model, gradient, shape, iterations=1)

    def recipe(self, image: int, noise: float) -> Record:
        """Measure the published attack."""
        update = self.update(image, noise)
        attack = functools.partial(
            recipes.deep_leakage,
            update.model,
            list(update.tensors.values()),
            update.image_shape,
            iterations=_QUICK_ITERATIONS if self.setting.quick else _RECIPE_ITERATIONS,
            seed=self.setting.seed + image,
        )
        found, seconds = timed(attack, self.setting.device)
        return {
            **self.case(image, noise, RECIPE),
            "seconds": seconds,
            "evaluations": found.evaluations,
            "loss": found.loss,
            "stopped": "diverged" if found.diverged else "all iterations used",
            **self.scores(found, image),
        }

    def attack(self, image: int, noise: float, method: str) -> Record:
        """Measure one of ours; an attack that refuses is a record without scores."""
        update = self.update(image, noise)
        searched = method in ("dlg", "idlg", "inverting-gradients")
        attack = functools.partial(
            invert,
            update,
            attack=method,
            iterations=(_QUICK_ITERATIONS if self.setting.quick and searched else None),
            seed=self.setting.seed + image,
        )
        case = self.case(image, noise, method)
        try:
            found, seconds = timed(attack, self.setting.device)
        except InputError as error:
            return {**case, "psnr": None, "refused": str(error)}
        stop_if_interrupted(found)
        return {
            **case,
            "seconds": seconds,
            "loss": found.loss,
            "ran": found.attack,
            "stopped": found.stopped,
            **self.scores(found, image),
        }

    def case(self, image: int, noise: float, method: str) -> Record:
        """What is measured."""
        return {"noise": noise, "method": method, "image": image}

    def scores(self, found: recipes.RecipeResult, image: int) -> Record:
        """How well the image came back."""
        return image_scores(found, self.victims[[image]], self.victims)


def _tasks(setting: Setting) -> list[Task]:
    numbers = setting.numbers
    pool = setting.images()
    chosen_images = victim_numbers(setting.dataset, len(pool), numbers["images"])
    victims = pool[chosen_images]
    for name in ("recipe_images", "noise_images"):
        if numbers[name] > len(victims):
            raise InputError(name, f"at most --images {len(victims)}", numbers[name])
    channels, size, _ = pool.shape
    seeds = range(setting.seed, setting.seed + MODEL_SEEDS)
    models = [
        build_model(
            "lenet",
            in_channels=channels,
            image_size=size,
            num_classes=max(2, pool.num_classes),
            seed=seed,
        ).to(setting.device)
        for seed in seeds
    ]
    setting.notes["model_seeds"] = list(seeds)
    setting.notes["image_numbers"] = chosen_images
    bench = _Bench(setting, victims, models)
    bench.warm_up()
    tasks = []
    compared = set(spread(len(victims), numbers["recipe_images"]))
    for image in range(len(victims)):
        if image in compared:
            run = functools.partial(bench.recipe, image, 0.0)
            tasks.append(Task(f"noise 0, {RECIPE}, image {image}", run))
        run = functools.partial(bench.attack, image, 0.0, "auto")
        tasks.append(Task(f"noise 0, auto, image {image}", run))
    for image in spread(len(victims), numbers["noise_images"]):
        for method in METHODS:
            run = functools.partial(bench.attack, image, NOISE, method)
            tasks.append(Task(f"noise {NOISE:g}, {method}, image {image}", run))
    return tasks


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    summary: Record = {"target_db": TARGET_DB, "cases": []}
    rows, groups, floors = [], {}, {}
    for noise in distinct(records, "noise"):
        for method in distinct(chosen(records, noise=noise), "method"):
            found = chosen(records, noise=noise, method=method)
            row, case = _case(found, chosen(records, noise=noise, method=RECIPE))
            rows.append([f"{noise:g}", method, *row])
            summary["cases"].append({"noise": noise, "method": method, **case})
            answered = [r for r in found if r["psnr"] is not None]
            if answered:
                group = f"{method}\nnoise {noise:g}"
                groups[group] = [r["psnr"] for r in answered]
                floors[group] = _floor(answered, "constant")
    comparison = _auto_against_best(chosen(records, noise=NOISE))
    summary["auto_minus_best_single_db"] = comparison
    return Report(
        summary,
        "\n\n".join([_table(rows), _floors_line(records), _verdict(comparison)]),
        strip(
            groups,
            ylabel="PSNR (dB)",
            floor=floors,
            floor_label="best constant image",
            target=TARGET_DB,
            target_label=f"{TARGET_DB:g} dB",
        ),
    )


def _case(
    found: Sequence[Record], recipe: Sequence[Record]
) -> tuple[list[str], Record]:
    """One line of the table, and the same as numbers."""
    answered = [r for r in found if r["psnr"] is not None]
    psnr = [r["psnr"] for r in answered]
    seconds = [r["seconds"] for r in answered]
    above = sum(p >= TARGET_DB for p in psnr)
    right = sum(bool(r["label_right"]) for r in answered)
    case: Record = {
        "images": len(found),
        "refused": len(found) - len(answered),
        "above_target": above,
        "above_target_share_95": share_interval(above, len(found)),
        "labels_right": right,
    }
    faster = {"": "–", "_where_it_succeeded": "–"}
    if answered:
        case |= {"psnr": spread_of(psnr), "seconds": spread_of(seconds)}
        case["floors"] = {n: _floor(answered, n) for n in answered[0]["floors"]}
    if answered and answered[0]["method"] != RECIPE:
        succeeded = [r for r in recipe if r["psnr"] >= TARGET_DB]
        for name, runs in (("", recipe), ("_where_it_succeeded", succeeded)):
            both = _pairs(runs, answered, "seconds")
            if both:
                ratio = ratio_of_medians(*both)
                case[f"recipe_seconds_over_ours{name}"] = ratio
                faster[name] = with_interval(ratio)
    row = [
        f"{len(found)}",
        _share(above, len(found)),
        with_quartiles(psnr),
        f"{min(psnr):.1f}" if psnr else "–",
        f"{right}",
        with_quartiles(seconds, 2),
        *faster.values(),
    ]
    return row, case


def _share(count: int, of: int) -> str:
    low, high = share_interval(count, of)
    return f"{count} ({100 * low:.0f} to {100 * high:.0f} %)"


def _pairs(
    first: Sequence[Record], second: Sequence[Record], field: str
) -> tuple[list[float], list[float]] | None:
    """Values of both on the images that both have, in the same order."""
    others = {r["image"]: r[field] for r in second}
    pairs = [(r[field], others[r["image"]]) for r in first if r["image"] in others]
    return ([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _floor(records: Sequence[Record], name: str) -> float:
    return statistics.fmean(record["floors"][name] for record in records)


def _auto_against_best(noisy: Sequence[Record]) -> Record | None:
    """Mean PSNR of ``auto`` minus that of the single attack with the best median."""
    answered = [r for r in noisy if r["psnr"] is not None]
    auto = chosen(answered, method="auto")
    names = [m for m in distinct(answered, "method") if m != "auto"] if answered else []
    if not auto or not names:
        return None
    best = max(
        names,
        key=lambda m: statistics.median(r["psnr"] for r in chosen(answered, method=m)),
    )
    pairs = _pairs(auto, chosen(answered, method=best), "psnr")
    return None if pairs is None else {"best": best, **mean_difference(*pairs)}


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = [
        "noise",
        "attack",
        "images",
        f"≥ {TARGET_DB:g} dB (95 %)",
        "median PSNR in dB (quartiles)",
        "worst",
        "labels right",
        "median seconds (quartiles)",
        "times faster than published (95 %)",
        "the same where published succeeded",
    ]
    return markdown(head, rows)


def _floors_line(records: Sequence[Record]) -> str:
    answered = [r for r in records if r["psnr"] is not None]
    names = {"constant": "best constant image", "random_image": "another image"}
    parts = [
        f"{names[name]} {_floor(answered, name):.1f} dB"
        for name in names
        if name in answered[0]["floors"]
    ]
    return (
        f"Floors: {', '.join(parts)}. Noise is in units of the gradient's norm. Times "
        "are compared on the same images, as a ratio of medians with its bootstrap "
        f"interval, once more for those where the published attack reached "
        f"{TARGET_DB:g} dB, because its failures may end early. Image i is behind the "
        f"model of seed i mod {MODEL_SEEDS}; the published attack starts once, "
        "searches of ours three times."
    )


def _verdict(comparison: Record | None) -> str:
    if comparison is None:
        return "No attack answered at noise 0.001."
    return (
        f"With noise, `auto` is {with_interval(comparison, 2)} dB above the best "
        f"single attack, `{comparison['best']}` (mean of the differences, 95 %)."
    )


SUITE = Suite(
    numbers={"images": 100, "recipe_images": 10, "noise_images": 10},
    quick={"images": 2, "recipe_images": 1, "noise_images": 1},
    tasks=_tasks,
    report=_report,
)
