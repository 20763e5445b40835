"""Suite ``secagg``: what secure aggregation costs, and what its sums still show.

Cost: the whole protocol, all clients and the server in one process, on vectors of
random numbers. Leakage: clients of one image each behind a random LeNet add their
gradients up under the protocol; ``gaussian-map`` inverts the sum, and the difference of
two sums that differ in one client is inverted like the update of that client.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from gradinv_helpers.attacks.differencing import difference_updates
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.reconstruction import Reconstruction
from gradinv_helpers.attacks.spectrum import estimate_spectrum, gradient_operator
from gradinv_helpers.bench.figures import panels
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    fingerprint,
    markdown,
    mean_difference,
    mean_with_interval,
    stop_if_interrupted,
    timed,
    with_interval,
    with_quartiles,
)
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.federated.fixed_point import FixedPoint
from gradinv_helpers.federated.secure_aggregation import (
    paper_bytes,
    secure_aggregate,
    secure_sum,
)
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import SharedUpdate, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST, LEAK = "cost", "leak"
CLIENTS: tuple[int, ...] = (10, 30, 100)
ENTRIES: tuple[int, ...] = (1_000, 10_000, 100_000)
DROPPED = (0.0, 0.2)  # share of the clients who send no masked input
BITS = 32
COHORTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
SIZE = 16  # pixels
_COST_REPEATS = 3
# Rounding below this share of the entries does not keep features from being separated.
_NEGLIGIBLE = 1e-6


# --- cost -------------------------------------------------------------------------


def protocol_threshold(clients: int) -> int:
    """Two thirds of the clients, rounded up."""
    return -(-2 * clients // 3)


def measure_cost(
    setting: Setting, clients: int, entries: int, dropped: float, number: int
) -> Record:
    """Run the protocol once; seconds of CPU, bytes, and whether the sum is exact."""
    rng = np.random.default_rng(setting.seed + number)
    vectors = [rng.normal(size=entries) for _ in range(clients)]
    leaving = list(range(round(dropped * clients)))
    run = functools.partial(
        secure_sum,
        vectors,
        [1] * clients,
        threshold=protocol_threshold(clients),
        dropouts=leaving,
        seed=setting.seed + number,
        bits=BITS,
    )
    begun = time.process_time()
    found = run()
    seconds = time.process_time() - begun
    code = FixedPoint(clients, clients, BITS)
    plain = np.zeros(entries, code.dtype)
    for k in found.survivors:
        plain += code.encode(vectors[k], 1)
    return {
        "what": COST,
        "clients": clients,
        "entries": entries,
        "dropped": dropped,
        "number": number,
        "seconds": seconds,
        "exact": bool(np.array_equal(plain, found.residues)),
        "bytes_sent": int(found.sent[-1].sum()),
        "bytes_received": int(found.received[-1].sum()),
        "paper_bytes": paper_bytes(clients, entries, bits=BITS),
    }


def without_negligible_noise(update: SharedUpdate) -> SharedUpdate:
    """The update as an attacker takes it who leaves out noise of no consequence."""
    if update.noise_std > _NEGLIGIBLE * _typical(update):
        return update
    return replace(update, noise_std=0.0)


def _typical(update: SharedUpdate) -> float:
    """Root mean square of the entries."""
    entries = torch.cat([t.double().flatten() for t in update.tensors.values()])
    return float(entries.square().mean().sqrt())


# --- leakage ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """Images of the suite; cohort k is behind the model of seed k."""

    setting: Setting
    pool: Images

    def cohort(self, clients: int, number: int) -> tuple[list[SharedUpdate], Images]:
        """Updates of clients who hold one image each, and their images."""
        seed = self.setting.seed + number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)[:clients]
        truth = self.pool[order]
        channels, side, _ = self.pool.shape
        model = build_model(
            "lenet",
            in_channels=channels,
            image_size=side,
            num_classes=max(2, self.pool.num_classes),
            seed=seed,
        ).to(self.setting.device)
        return [local_update(model, truth[[k]]) for k in range(clients)], truth

    def leak(self, clients: int, number: int) -> Record:
        """Invert the sum of a cohort, and the difference to the sum of the others."""
        updates, truth = self.cohort(clients, number)
        seed = self.setting.seed + number
        secure = functools.partial(
            secure_aggregate, updates, threshold=max(1, clients // 2), bits=BITS
        )
        total = secure(seed=seed)
        attack = functools.partial(
            map_estimate,
            without_negligible_noise(total),
            iterations=self.setting.numbers["iterations"],
            restarts=1,
            seed=seed,
        )
        estimate, seconds = timed(attack, self.setting.device)
        alone = total
        if clients > 1:
            rest = secure(dropouts=[0], seed=seed + 1)
            alone = difference_updates(total, rest, same_noise=True)
        single = invert(alone, seed=seed)
        return {
            "what": LEAK,
            "clients": clients,
            "number": number,
            "seconds": seconds,
            "noise_std": total.noise_std,
            "bits": self._bits(total, truth),
            "sum": self._scores(estimate.reconstruction, truth),
            "difference": self._scores(single, truth[[0]]),
        }

    def _bits(self, update: SharedUpdate, truth: Images) -> float:
        """Bits per pixel that the sum states, at its rounding, near the truth."""
        targets = F.one_hot(truth.labels, self.pool.num_classes).double()
        pixels = truth.pixels.to(self.setting.device)
        operator = gradient_operator(update.model, pixels, targets.to(pixels.device))
        steps = 10 if self.setting.quick else 40
        found = estimate_spectrum(operator, steps=steps)
        # An even error of up to half an eps: 0.2 eps of the value on average.
        rounding = 0.2 * torch.finfo(torch.float32).eps * _typical(update)
        noise = math.hypot(update.noise_std, rounding)
        return found.bits(noise) / truth.pixels.numel()

    def _scores(self, found: Reconstruction, truth: Images) -> Record:
        stop_if_interrupted(found)
        result = score(found, truth, others=self.pool)
        labels = result.label_correct or ()
        return {
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "identified": [bool(hit) for hit in result.identified or ()],
            "identified_floor": max(
                sum(floor.identified or ()) for floor in result.floors.values()
            ),
            "labels_right": sum(labels),
        }


# --- the suite ----------------------------------------------------------------------


def _tasks(setting: Setting) -> list[Task]:
    pool = load_images(
        setting.dataset,
        data_root=setting.data_root,
        split="test",
        image_size=SIZE,
    )
    digests = setting.notes.setdefault("images_sha256", {})
    digests[f"test, {SIZE} pixels"] = fingerprint(pool)
    setting.notes["gallery"] = len(pool)
    bench = _Bench(setting, pool)
    sizes = (4,) if setting.quick else CLIENTS
    lengths = (1_000,) if setting.quick else ENTRIES
    cohorts = (1, 2) if setting.quick else COHORTS
    repeats = range(setting.numbers["repeats"])
    costs = itertools.product(sizes, lengths, DROPPED, range(_COST_REPEATS))
    return [
        *(
            Task(
                f"cost, {clients} clients, {entries}, {dropped:g} dropped, {k}",
                functools.partial(measure_cost, setting, clients, entries, dropped, k),
            )
            for clients, entries, dropped, k in costs
        ),
        *(
            Task(
                f"leak, {clients} clients, {k}",
                functools.partial(bench.leak, clients, k),
            )
            for k in repeats
            for clients in cohorts
        ),
    ]


# --- what comes of it ---------------------------------------------------------------

_COST_HEAD = [
    "clients × entries",
    "dropped",
    "exact",
    "CPU seconds, all parties (quartiles)",
    "bytes per client",
    "over the paper's formula",
    "over the update in float32",
]
_LEAK_HEAD = [
    "clients of one image",
    "cohorts",
    "bits per pixel",
    "PSNR of the sum in dB (95 %)",
    "above the floor, dB (95 %)",
    "identified",
    "by the best guess",
    "labels right",
    "PSNR of the difference in dB (95 %)",
    "identified",
]


def _report(records: Sequence[Record], setting: Setting) -> Report:
    costs = [_cost(found) for found in _groups(chosen(records, what=COST))]
    leaks = [_leak(found) for found in _groups(chosen(records, what=LEAK))]
    rows = [
        [
            f"{c['clients']} × {c['entries']:,}",
            f"{c['dropped']:.0%}",
            f"{c['exact']} of {c['runs']}",
            with_quartiles(c["seconds"], 2),
            f"{c['bytes']:,}",
            f"{c['over_paper']:.3f}",
            f"{c['over_plain']:.2f}",
        ]
        for c in costs
    ]
    pool_rows = [
        [
            f"{c['clients']}",
            f"{c['cohorts']}",
            f"{c['bits']:.1f}",
            with_interval(c["psnr"]),
            with_interval(c["gain"]),
            f"{c['identified']} of {c['images']}",
            f"{c['identified_floor']}",
            f"{c['labels_right']} of {c['images']}",
            with_interval(c["difference"]),
            f"{c['difference_identified']} of {c['cohorts']}",
        ]
        for c in leaks
    ]
    note = (
        f"Cost: threshold two thirds, {BITS} bits; all clients and the server in turn "
        "on one core; bytes that a client who stays sends and receives. Leakage: "
        f"images of {SIZE} × {SIZE} pixels behind a random LeNet, one gradient per "
        "client, labels inferred. The difference is that of two sums of the same model "
        "of which one lacks a client; for a cohort of one it is the client's own "
        "update. Bits: what the sum determines beyond its rounding, over all pixels of "
        "the cohort. The floor of an image is the best of a constant image, another "
        "image, and the mean of the cohort. Identified: nearest to its own image among "
        f"all {setting.notes.get('gallery', '')} of the test split."
    )
    table = (
        f"{markdown(_COST_HEAD, rows)}\n\n{markdown(_LEAK_HEAD, pool_rows)}\n\n{note}"
    )
    return Report({"costs": costs, "leaks": leaks}, table, _figure(costs, leaks))


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    """Repeats of one case together."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        names = ("clients", "entries", "dropped")
        groups.setdefault(tuple(record.get(n) for n in names), []).append(record)
    return list(groups.values())


def _cost(found: Sequence[Record]) -> Record:
    first = found[0]
    total = first["bytes_sent"] + first["bytes_received"]
    return {
        **{name: first[name] for name in ("clients", "entries", "dropped")},
        "runs": len(found),
        "exact": sum(record["exact"] for record in found),
        "seconds": [record["seconds"] for record in found],
        "bytes": total,
        "over_paper": total / first["paper_bytes"],
        "over_plain": total / (4 * first["entries"]),
    }


def _leak(found: Sequence[Record]) -> Record:
    psnr = [value for record in found for value in record["sum"]["psnr"]]
    floors = [
        max(values)
        for record in found
        for values in zip(*record["sum"]["floors"].values(), strict=True)
    ]
    differences = [record["difference"]["psnr"][0] for record in found]
    return {
        "clients": found[0]["clients"],
        "cohorts": len(found),
        "images": len(psnr),
        "bits": statistics.fmean(record["bits"] for record in found),
        "psnr": mean_with_interval(psnr),
        "floor": mean_with_interval(floors),
        "gain": mean_difference(psnr, floors),
        "identified": sum(sum(record["sum"]["identified"]) for record in found),
        "identified_floor": round(
            sum(record["sum"]["identified_floor"] for record in found)
        ),
        "labels_right": round(sum(record["sum"]["labels_right"] for record in found)),
        "difference": mean_with_interval(differences),
        "difference_identified": sum(
            sum(record["difference"]["identified"]) for record in found
        ),
        "seconds": statistics.median(record["seconds"] for record in found),
    }


def _figure(costs: Sequence[Record], leaks: Sequence[Record]) -> Figure:
    """Leakage and time, both over the number of clients."""
    sizes = [case["clients"] for case in leaks]
    leakage = {
        name: (sizes, [case[field]["value"] for case in leaks])
        for name, field in {
            "sum": "psnr",
            "difference of two sums": "difference",
            "floor": "floor",
        }.items()
    }
    complete = chosen(costs, dropped=0.0)
    seconds = {}
    for entries in dict.fromkeys(case["entries"] for case in complete):
        line = chosen(complete, entries=entries)
        seconds[f"{entries:,} entries"] = (
            [case["clients"] for case in line],
            [statistics.median(case["seconds"]) for case in line],
        )
    return panels(
        {"What a sum shows": leakage, "What the protocol takes": seconds},
        xlabel="clients",
        ylabels=["mean PSNR (dB)", "CPU seconds"],
        columns=2,
        floor="floor",
    )


SUITE = Suite(
    numbers={"repeats": 5, "iterations": 60},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
