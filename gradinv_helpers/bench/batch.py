"""Suite ``batch``: whole batches behind one gradient, with and without a prior.

Every batch is behind a random LeNet of its own. ``gaussian-map`` meets all batches.
Some of them it meets again with L-BFGS alone, in turns; pixels with L-BFGS, and cosine
with total variation and signed Adam, meet those, too, with the same labels and at least
as much time. Labels are inferred.

Taught in: notebooks/04_aggregated_gradients.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.reconstruction import Reconstruction
from gradinv_helpers.bench.figures import panels
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    markdown,
    stop_if_interrupted,
    timed,
    with_quartiles,
)
from gradinv_helpers.data import Images
from gradinv_helpers.intervals import bootstrap_interval
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update

BATCH_SIZES: tuple[int, ...] = (2, 3, 4, 8, 16)
# What the method has to reach, in dB: the median over batches of their mean PSNR.
TARGETS = {2: 40.0, 3: 33.0, 4: 27.0, 8: 21.0, 16: 17.0}
OURS = "gaussian-map"
BY_LBFGS = "gaussian-map, L-BFGS alone"
OTHERS = {"dlg": "pixels, L-BFGS", "inverting-gradients": "cosine, TV, signed Adam"}
_RIVAL_BATCHES = 2  # per batch size, for each of the others
_CALIBRATION = 3  # iterations that show how many fit into the time
_CANDIDATES = 500  # images among which the nearest to a reconstruction is sought


@dataclass
class _Bench:
    """Images of the suite; batch k of every size is behind the model of seed k."""

    setting: Setting
    pool: Images
    seconds: dict[tuple[int, int], float]

    def truth(self, size: int, number: int) -> Images:
        """The images of one batch."""
        generator = torch.Generator().manual_seed(self.setting.seed + number)
        order = torch.randperm(len(self.pool), generator=generator)
        return self.pool[order[:size]]

    def update(self, size: int, number: int) -> SharedUpdate:
        """What their client sends."""
        channels, side, _ = self.pool.shape
        model = build_model(
            "lenet",
            in_channels=channels,
            image_size=side,
            num_classes=max(2, self.pool.num_classes),
            seed=self.setting.seed + number,
        ).to(self.setting.device)
        return local_update(model, self.truth(size, number))

    def ours(self, size: int, number: int, *, solver: str = "auto") -> Record:
        """Measure the annealed MAP estimate."""
        attack = functools.partial(
            map_estimate,
            self.update(size, number),
            iterations=self.setting.numbers["iterations"],
            seed=self.setting.seed + number,
            solver=solver,
        )
        estimate, seconds = timed(attack, self.setting.device)
        found = estimate.reconstruction
        if solver == "auto":
            self.seconds[size, number] = seconds
        method = OURS if solver == "auto" else BY_LBFGS
        return {
            **self.scores(found, size, number, method, seconds),
            "misfit": estimate.stages[-1].misfit,
            "separated": estimate.separated,
        }

    def rival(self, size: int, number: int, attack: str, seconds: float) -> Record:
        """Measure another attack with about as much time."""
        update = self.update(size, number)
        call = functools.partial(
            invert,
            update,
            attack=attack,
            labels=map_estimate(update, iterations=1, restarts=1).reconstruction.labels,
            restarts=1,
            seed=self.setting.seed + number,
        )
        spent = timed(
            functools.partial(call, iterations=_CALIBRATION), self.setting.device
        )[1]
        iterations = max(1, int(_CALIBRATION * seconds / spent))
        if self.setting.quick:
            iterations = 2
        found, own = timed(
            functools.partial(call, iterations=iterations), self.setting.device
        )
        return self.scores(found, size, number, OTHERS[attack], own)

    def scores(
        self,
        found: Reconstruction,
        size: int,
        number: int,
        method: str,
        seconds: float,
    ) -> Record:
        """PSNR and rank of every image, with their floors."""
        stop_if_interrupted(found)
        truth = self.truth(size, number)
        others = self.pool[list(range(min(_CANDIDATES, len(self.pool))))]
        result = score(found, truth, others=others)
        labels = result.label_correct
        ranks = result.identification
        return {
            "batch_size": size,
            "number": number,
            "method": method,
            "psnr": list(result.psnr),
            "identified": ranks and sum(rank == 1 for rank in ranks.ranks),
            "candidates": ranks and ranks.pool_size,
            "labels_right": None if labels is None else sum(labels),
            "floors": {k: statistics.fmean(f.psnr) for k, f in result.floors.items()},
            "seconds": seconds,
            "stopped": found.stopped,
        }


def _tasks(setting: Setting) -> list[Task]:
    bench = _Bench(setting, setting.images(), {})
    tasks = []
    for number in range(setting.numbers["repeats"]):
        for size in BATCH_SIZES[:2] if setting.quick else BATCH_SIZES:
            run = functools.partial(bench.ours, size, number)
            tasks.append(Task(f"{size} images, batch {number}, {OURS}", run))
            if number < _RIVAL_BATCHES:
                run = functools.partial(bench.ours, size, number, solver="lbfgs")
                tasks.append(Task(f"{size} images, batch {number}, {BY_LBFGS}", run))
            for attack in OTHERS if number < _RIVAL_BATCHES else ():
                run = functools.partial(_rival, bench, size, number, attack)
                name = f"{size} images, batch {number}, {OTHERS[attack]}"
                tasks.append(Task(name, run))
    return tasks


def _rival(bench: _Bench, size: int, number: int, attack: str) -> Record:
    """With the seconds that ours took on the same batch, measured now if need be."""
    if (size, number) not in bench.seconds:  # the run was taken up again
        bench.ours(size, number)
    return bench.rival(size, number, attack, bench.seconds[size, number])


# --- what comes of it -------------------------------------------------------------

_HEAD = [
    "images",
    "attack",
    "batches",
    "median PSNR in dB (95 %)",
    "quartiles",
    "worst batch",
    "identified",
    "labels right",
    "floor, dB",
    "median seconds (quartiles)",
]


def _report(records: Sequence[Record], setting: Setting) -> Report:
    rows, cases = [], []
    for size in distinct(records, "batch_size"):
        for method in distinct(chosen(records, batch_size=size), "method"):
            found = chosen(records, batch_size=size, method=method)
            row, case = _case(found)
            rows.append([f"{size}", method, *row])
            cases.append({"batch_size": size, "method": method, **case})
    figure = panels(
        {"one gradient of LeNet": _lines(cases)},
        xlabel="images in the batch",
        ylabels=["median PSNR (dB)"],
        columns=1,
        floor="floor",
    )
    note = (
        "PSNR of a batch: mean over its images; the median over batches with its "
        "bootstrap interval. Identified: images whose nearest neighbour among the "
        f"candidates (up to {_CANDIDATES}) is the true one. Floor: the best of a "
        "constant image, another image, and the mean of the batch. Labels are "
        "inferred and given to all attacks alike; the others have one start and "
        "at least about as much time as ours took on the same batch. L-BFGS alone: "
        "without the Gauss-Newton steps, with as many iterations."
    )
    return Report({"cases": cases}, f"{markdown(_HEAD, rows)}\n\n{note}", figure)


def _lines(cases: Sequence[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """Median PSNR against batch size of every attack, and the floor of ours."""
    lines = {}
    for method in distinct(cases, "method"):
        own = chosen(cases, method=method)
        sizes = [float(case["batch_size"]) for case in own]
        lines[method] = (sizes, [case["median_psnr"] for case in own])
    ours = chosen(cases, method=OURS)
    floors = [case["floor"] for case in ours]
    return {**lines, "floor": (lines[OURS][0], floors)}


def _case(found: Sequence[Record]) -> tuple[list[str], Record]:
    psnr = [statistics.fmean(record["psnr"]) for record in found]
    low, high = bootstrap_interval(psnr, statistic="median")
    size = found[0]["batch_size"]
    shown = [r for r in found if r["identified"] is not None]
    identified = sum(r["identified"] for r in shown)
    right = sum(r["labels_right"] or 0 for r in found)
    floor = statistics.fmean(max(r["floors"].values()) for r in found)
    seconds = [record["seconds"] for record in found]
    case = {
        "batches": len(found),
        "median_psnr": statistics.median(psnr),
        "median_psnr_95": [low, high],
        "worst": min(psnr),
        "target": TARGETS.get(size),
        "identified_share": identified / (size * len(shown)) if shown else None,
        "labels_right": right,
        "floor": floor,
        "median_seconds": statistics.median(seconds),
    }
    row = [
        f"{len(found)}",
        f"{case['median_psnr']:.1f} ({low:.1f} to {high:.1f})",
        with_quartiles(psnr),
        f"{min(psnr):.1f}",
        f"{identified} of {size * len(shown)}",
        f"{right} of {size * len(found)}",
        f"{floor:.1f}",
        with_quartiles(seconds, 0),
    ]
    return row, case


SUITE = Suite(
    numbers={"repeats": 10, "iterations": 200},
    quick={"repeats": 1, "iterations": 3},
    tasks=_tasks,
    report=_report,
)
