"""Suite ``networks``: what comes back from deeper networks, from one image to eight.

Random ConvNets and ResNet-18s, each with a batch of its own behind its gradient. The
attack is ``auto`` with a budget of updates; labels are inferred where they can be, else
fitted. No published recipe runs beside it: the floors are the comparison.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    markdown,
    mean_difference,
    mean_with_interval,
    spread_of,
    stop_if_interrupted,
    timed,
    with_interval,
    with_quartiles,
)
from gradinv_helpers.data import Images
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.plots import strip
from gradinv_helpers.updates import local_update

MODELS: tuple[str, ...] = ("convnet", "resnet18")
BATCH_SIZES: tuple[int, ...] = (1, 4, 8)
_BATCHES = {1: 4, 4: 2, 8: 2}  # per image asked for: large batches hold many images
_UPDATES_PER_ITERATION = 20


@dataclass(frozen=True)
class _Bench:
    """Images and models of the suite; batch k is behind the models of seed k."""

    setting: Setting
    pool: Images

    def model(self, name: str, seed: int) -> nn.Module:
        """A random network."""
        channels, size, _ = self.pool.shape
        model = build_model(
            name,
            in_channels=channels,
            image_size=size,
            num_classes=max(2, self.pool.num_classes),
            seed=seed,
        )
        return model.to(self.setting.device)

    def measure(self, name: str, batch_size: int, number: int) -> Record:
        """Attack one batch behind one network."""
        seed = self.setting.seed + number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)
        truth = self.pool[order[:batch_size]]
        update = local_update(self.model(name, seed), truth)
        updates = self.setting.numbers["iterations"]
        attack = functools.partial(
            invert,
            update,
            iterations=max(1, updates // _UPDATES_PER_ITERATION),
            restarts=1,
            seed=seed,
        )
        found, seconds = timed(attack, self.setting.device)
        stop_if_interrupted(found)
        result = score(found, truth, others=self.pool)
        return {
            "model": name,
            "batch_size": batch_size,
            "number": number,
            "psnr": list(result.psnr),
            "labels_right": result.label_correct and sum(result.label_correct),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "ran": found.attack,
            "stopped": found.stopped,
            "seconds": seconds,
        }


def _tasks(setting: Setting) -> list[Task]:
    bench = _Bench(setting, setting.images())
    sizes = BATCH_SIZES[:2] if setting.quick else BATCH_SIZES
    tasks = []
    for name in MODELS[:1] if setting.quick else MODELS:
        for size in sizes:
            for number in range(_BATCHES[size] * setting.numbers["repeats"]):
                run = functools.partial(bench.measure, name, size, number)
                tasks.append(Task(f"{name}, {size} images, batch {number}", run))
    return tasks


def _report(records: Sequence[Record], setting: Setting) -> Report:
    rows, cases, groups, floors = [], [], {}, {}
    for name in distinct(records, "model"):
        for size in distinct(chosen(records, model=name), "batch_size"):
            found = chosen(records, model=name, batch_size=size)
            row, case = _case(found)
            rows.append([name, f"{size}", *row])
            cases.append({"model": name, "batch_size": size, **case})
            groups[f"{name}\nB = {size}"] = _images(found)
            floors[f"{name}\nB = {size}"] = case["floor"]["value"]
    figure = strip(
        groups,
        ylabel="PSNR (dB)",
        floor=floors,
        floor_label="best floor of each image",
    )
    note = (
        "One point per image; means with bootstrap intervals over images. The floor of "
        "an image is the best of: a constant image, another image, the mean of the "
        "batch. Batch k is behind the network of seed k. Budget: "
        f"{setting.numbers['iterations']} updates, one start. Labels are "
        "inferred where the last layer gives them away, else fitted with the images."
    )
    return Report({"cases": cases}, f"{markdown(_HEAD, rows)}\n\n{note}", figure)


_HEAD = [
    "network",
    "batch size",
    "batches",
    "PSNR, dB (95 %)",
    "floor, dB (95 %)",
    "above the floor, dB (95 %)",
    "images above their floor",
    "labels right",
    "attack",
    "seconds (quartiles)",
]


def _images(found: Sequence[Record]) -> list[float]:
    return [psnr for record in found for psnr in record["psnr"]]


def _case(found: Sequence[Record]) -> tuple[list[str], Record]:
    """One line of the table, and the same as numbers."""
    psnr = _images(found)
    lowest = [
        max(values)
        for record in found
        for values in zip(*record["floors"].values(), strict=True)
    ]
    right = sum(record["labels_right"] or 0 for record in found)
    seconds = [record["seconds"] for record in found]
    above = sum(a > b for a, b in zip(psnr, lowest, strict=True))
    case = {
        "batches": len(found),
        "psnr": mean_with_interval(psnr),
        "floor": mean_with_interval(lowest),
        "gain": mean_difference(psnr, lowest),
        "above_floor": above,
        "labels_right": right,
        "seconds": spread_of(seconds),
    }
    row = [
        f"{len(found)}",
        with_interval(case["psnr"]),
        with_interval(case["floor"]),
        with_interval(case["gain"]),
        f"{above} of {len(psnr)}",
        f"{right} of {len(psnr)}",
        ", ".join(distinct(found, "ran")),
        with_quartiles(seconds, 0),
    ]
    return row, case


SUITE = Suite(
    numbers={"repeats": 1, "iterations": 600},
    quick={"repeats": 1, "iterations": 20},
    tasks=_tasks,
    report=_report,
)
