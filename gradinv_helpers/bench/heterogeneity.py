"""Suite ``heterogeneity``: how uneven data change training, and what leaks when.

Ten clients train an MLP by FedAvg. Their images are dealt out in equal mixes, by
Dirichlet draws, or in shards. Measured are the accuracy after every round, the error of
the class proportions that the server infers from a client's update, and the images
that it recovers from small clients at the start and at the end of training.

The server's labelled examples, ten of each class, belong to no client. Attacked images
are from the ``test`` split.

Taught in: notebooks/07_iid_noniid.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradinv_helpers.attacks.class_proportions import infer_class_proportions
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.bench.suite import (
    Record,
    Report,
    Setting,
    Suite,
    Task,
    chosen,
    distinct,
    fingerprint,
    markdown,
    mean_difference,
    mean_with_interval,
    stop_if_interrupted,
    with_interval,
)
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.heterogeneity import label_histograms, total_variation
from gradinv_helpers.federated.rounds import RoundReport, train_federated
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.partition import Client, Scheme, partition
from gradinv_helpers.plots import FLOOR_COLOUR, PALETTE
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, ROUNDS, SIZE = 10, 40, 16
ATTACKED = 2  # clients of a round whose proportions are inferred
PUBLIC = 10  # examples of each class
CAP = 60.0  # dB; beyond this an image is exact
LOOKS = (1, 5, 20)  # rounds whose updates are attacked
RUN, RECIPE, IMAGE = "run", "recipe", "image"
CENTRAL, IID, SHARDS = "centralised", "iid", "shards"
ALPHAS = (100.0, 10.0, 1.0, 0.1, 0.01)
FEDAVG = LocalTraining(sends="delta", lr=0.3, epochs=5, batch_size=32)
FEDSGD = LocalTraining(lr=0.3)
RECIPES: dict[str, LocalTraining] = {
    "one gradient": FEDSGD,
    "1 epoch, batch 32": LocalTraining(sends="delta", lr=0.3, batch_size=32),
    "5 epochs, whole batch": LocalTraining(sends="delta", lr=0.3, epochs=5),
    "5 epochs, batch 32": FEDAVG,
    "5 epochs, batch 8": LocalTraining(sends="delta", lr=0.1, epochs=5, batch_size=8),
    "5 epochs, batch 32, Adam": LocalTraining(
        sends="delta", lr=0.003, epochs=5, batch_size=32, optimiser="adam"
    ),
}
RECIPE_ALPHA = 0.1
KINDS: dict[str, LocalTraining] = {
    "gradient": FEDSGD,
    "5 epochs": LocalTraining(sends="delta", lr=0.1, epochs=5),
}
ERRORS = ("examples", "counts", "guess")
MIXES = ("several classes", "one class")
FIRST, LAST = "untrained", "trained"


def schemes() -> list[str]:
    """Names of all ways to deal out the images, from central to most uneven."""
    return [CENTRAL, IID, *(f"alpha {a:g}" for a in ALPHAS), SHARDS]


@dataclass(frozen=True)
class _Bench:
    """Images of the suite: what the clients hold, what is public, what is held out."""

    setting: Setting
    private: Images
    public: Images
    held_out: Images

    def run(self, scheme: str, number: int) -> Record:
        """Train one federation and infer proportions on the way."""
        found: list[Record] = []
        seed = self.setting.seed + number
        clients = self.clients(scheme, seed, FEDAVG)
        rounds = 2 if self.setting.quick else ROUNDS
        keep = functools.partial(self.keep_distances, clients, found, seed)
        run = train_federated(
            clients,
            self.model(seed),
            rounds=rounds,
            evaluate=self.held_out,
            seed=seed,
            on_round=None if scheme == CENTRAL else keep,
        )
        return {
            "what": RUN,
            "scheme": scheme,
            "number": number,
            "accuracy": [accuracy for _, accuracy in run.accuracies],
            "bytes_per_round": run.rounds[0].bytes_up + run.rounds[0].bytes_down,
            "seconds": sum(report.seconds for report in run.rounds),
            "distances": found,
        }

    def recipe(self, name: str, number: int) -> Record:
        """Infer proportions under another recipe, early and late."""
        found: list[Record] = []
        seed = self.setting.seed + number
        clients = self.clients(f"alpha {RECIPE_ALPHA:g}", seed, RECIPES[name])
        keep = functools.partial(self.keep_distances, clients, found, seed)
        rounds = 1 if self.setting.quick else LOOKS[1]
        train_federated(
            clients, self.model(seed), rounds=rounds, seed=seed, on_round=keep
        )
        return {"what": RECIPE, "recipe": name, "number": number, "distances": found}

    def keep_distances(
        self,
        clients: Sequence[Client],
        found: list[Record],
        seed: int,
        report: RoundReport,
        updates: Sequence[SharedUpdate],
    ) -> None:
        """Total variation of inferred proportions to the true ones, and of guesses."""
        if report.round not in LOOKS:
            return
        histograms = label_histograms(clients)
        everyone = histograms.sum(0)
        draw = torch.Generator().manual_seed(seed)
        wanted = 1 if self.setting.quick else ATTACKED
        for index in torch.randperm(len(clients), generator=draw)[:wanted].tolist():
            inferred = {
                "examples": infer_class_proportions(
                    updates[index],
                    examples=self.public.pixels,
                    example_labels=self.public.labels,
                    seed=seed,
                ),
                "counts": infer_class_proportions(updates[index], seed=seed),
                "guess": everyone,
            }
            distances = {
                name: float(total_variation(shares, histograms[index]))
                for name, shares in inferred.items()
            }
            found.append(
                {
                    "round": report.round,
                    "images": int(histograms[index].sum()),
                    **distances,
                }
            )

    def image(self, kind: str, mix: str, stage: str, number: int) -> Record:
        """Attack a client of few test images."""
        seed = self.setting.seed + number
        model = self.model(seed)
        if stage == LAST:
            rounds = 1 if self.setting.quick else LOOKS[-1]
            clients = self.clients(IID, seed, FEDAVG)
            model = train_federated(clients, model, rounds=rounds, seed=seed).model
        wanted = self.setting.numbers["images"]
        order = torch.randperm(
            len(self.held_out), generator=torch.Generator().manual_seed(seed)
        )
        labels = self.held_out.labels[order]
        if mix == "one class":
            own = order[labels == labels[0]][:wanted]
        else:
            firsts = [order[labels == k][:1] for k in labels.unique().tolist()]
            shuffle = torch.Generator().manual_seed(seed)
            picked = torch.randperm(len(firsts), generator=shuffle)[:wanted]
            own = torch.cat(firsts)[picked]
        truth = self.held_out[own]
        update = local_update(model, truth, KINDS[kind], seed=seed)
        facts = {
            "what": IMAGE,
            "kind": kind,
            "mix": mix,
            "stage": stage,
            "number": number,
        }
        try:
            reconstruction = invert(update, iterations=40, restarts=1, seed=seed)
        except InputError as error:
            return {**facts, "failed": str(error)}
        stop_if_interrupted(reconstruction)
        result = score(reconstruction, truth, others=self.held_out)
        return {
            **facts,
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
        }

    def clients(self, scheme: str, seed: int, training: LocalTraining) -> list[Client]:
        """The federation of a scheme; a single client holds everything if central."""
        if scheme == CENTRAL:
            return [Client(self.private, training)]
        kind: Scheme = "dirichlet"
        alpha: float | None = None
        if scheme == IID or scheme == SHARDS:
            kind = "iid" if scheme == IID else "shards"
        else:
            alpha = float(scheme.removeprefix("alpha "))
        return partition(
            self.private,
            clients=CLIENTS,
            scheme=kind,
            alpha=alpha,
            seed=seed,
            training=training,
        )

    def model(self, seed: int) -> nn.Module:
        """The server's first model."""
        channels, side, _ = self.private.shape
        classes = self.private.num_classes
        return build_model(
            "mlp",
            in_channels=channels,
            image_size=side,
            num_classes=classes,
            seed=seed,
        )


def _bench(setting: Setting) -> _Bench:
    """Set some training images of every class aside for the server."""
    train, held_out = (
        load_images(
            setting.dataset, data_root=setting.data_root, split=split, image_size=SIZE
        )
        for split in ("train", "test")
    )
    setting.notes["images_sha256"] = {
        "train": fingerprint(train),
        "test": fingerprint(held_out),
    }
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train), generator=draw)
    labels = train.labels[order]
    public = torch.cat([order[labels == k][:PUBLIC] for k in range(train.num_classes)])
    private = torch.ones(len(train), dtype=torch.bool)
    private[public] = False
    return _Bench(setting, train[private.nonzero()[:, 0]], train[public], held_out)


def _tasks(setting: Setting) -> list[Task]:
    bench = _bench(setting)
    quick = setting.quick
    repeats = range(setting.numbers["repeats"])
    ways = [CENTRAL, IID, "alpha 0.1"] if quick else schemes()
    recipes = list(RECIPES)[:2] if quick else list(RECIPES)
    tasks = []
    for k in repeats:
        for way in ways:
            call = functools.partial(bench.run, way, k)
            tasks.append(Task(f"{RUN}, {way}, {k}", call))
        for name in recipes:
            call = functools.partial(bench.recipe, name, k)
            tasks.append(Task(f"{RECIPE}, {name}, {k}", call))
        for kind in KINDS:
            for mix in MIXES:
                for stage in (FIRST,) if quick else (FIRST, LAST):
                    call = functools.partial(bench.image, kind, mix, stage, k)
                    tasks.append(Task(f"{IMAGE}, {kind}, {mix}, {stage}, {k}", call))
    return tasks


# --- what comes of it -------------------------------------------------------------


def _report(records: Sequence[Record], setting: Setting) -> Report:
    runs, run_rows = _runs(chosen(records, what=RUN))
    distances, distance_rows = _distances(chosen(records, what=RUN), "scheme")
    recipes, recipe_rows = _distances(chosen(records, what=RECIPE), "recipe")
    images, image_rows = _images(chosen(records, what=IMAGE))
    shares = [
        "round",
        "updates",
        "guess of the global mix",
        "with examples",
        "guess minus examples",
        "by counts",
    ]
    table = "\n\n".join(
        [
            markdown(
                [
                    "data",
                    "runs",
                    f"accuracy after {ROUNDS} rounds, % (95 %)",
                    "below centralised, points (95 %)",
                    "round 1",
                    "round 5",
                    "round 20",
                ],
                run_rows,
            ),
            "Error of inferred class proportions: total variation, 0 to 1 (95 %).",
            markdown(["data", *shares], distance_rows),
            f"The same under other recipes, alpha {RECIPE_ALPHA:g}.",
            markdown(["recipe", *shares], recipe_rows),
            markdown(
                ["client", "classes", "model", "PSNR, dB", "above the floor, dB"],
                image_rows,
            ),
            _note(setting),
        ]
    )
    summary = {
        "accuracy": runs,
        "proportions": distances,
        "recipes": recipes,
        "images": images,
    }
    return Report(summary, table, _figure(runs, distances))


def _note(setting: Setting) -> str:
    return (
        f"{CLIENTS} clients, an MLP of 256 hidden units, FedAvg with {FEDAVG.epochs} "
        f"local epochs of batches of {FEDAVG.batch_size} and SGD with learning rate "
        f"{FEDAVG.lr:g}; centralised: the same recipe on one client with all images. "
        "Data, model and order are drawn anew in every run; means with bootstrap "
        f"intervals. Proportions: {ATTACKED} clients of a round; the server has "
        f"{PUBLIC} labelled examples of every class that no client holds; the guess "
        "knows the true mix of all clients. Adam is counted without examples. Images: "
        f"clients of {setting.numbers['images']} test images in one batch, attack "
        f"'auto' with inferred labels, PSNR cut at {CAP:g} dB; the floor of one is "
        "the best of a constant image, another image, and the mean of the client's."
    )


def _runs(records: Sequence[Record]) -> tuple[list[Record], list[list[str]]]:
    cases, rows = [], []
    central = [100 * r["accuracy"][-1] for r in chosen(records, scheme=CENTRAL)]
    for scheme in distinct(records, "scheme"):
        found = chosen(records, scheme=scheme)
        curves = [record["accuracy"] for record in found]
        curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        finals = [100 * values[-1] for values in curves]
        final = mean_with_interval(finals)
        lag = mean_difference(central, finals)
        cases.append(
            {
                "scheme": scheme,
                "runs": len(found),
                "final": final,
                "lag": lag,
                "curve": curve,
                "bytes_per_round": found[0]["bytes_per_round"],
            }
        )
        early = [f"{100 * curve[min(look, len(curve)) - 1]:.1f}" for look in LOOKS]
        rows.append(
            [scheme, f"{len(found)}", with_interval(final), with_interval(lag), *early]
        )
    return cases, rows


def _distances(
    records: Sequence[Record], by: str
) -> tuple[list[Record], list[list[str]]]:
    cases, rows = [], []
    for name in distinct(records, by):
        found = [d for r in chosen(records, **{by: name}) for d in r["distances"]]
        for round_ in sorted({d["round"] for d in found}):
            looks = chosen(found, round=round_)
            values = {k: [d[k] for d in looks] for k in ERRORS}
            gain = mean_difference(values["guess"], values["examples"])
            means = {k: mean_with_interval(v) for k, v in values.items()}
            cases.append(
                {
                    by: name,
                    "round": round_,
                    "updates": len(looks),
                    **means,
                    "gain": gain,
                }
            )
            rows.append(
                [
                    name,
                    f"{round_}",
                    f"{len(looks)}",
                    with_interval(means["guess"], 2),
                    with_interval(means["examples"], 2),
                    with_interval(gain, 2),
                    with_interval(means["counts"], 2),
                ]
            )
    return cases, rows


def _images(records: Sequence[Record]) -> tuple[list[Record], list[list[str]]]:
    cases, rows = [], []
    for kind in distinct(records, "kind"):
        for mix in distinct(records, "mix"):
            for stage in distinct(records, "stage"):
                facts: Record = {"kind": kind, "mix": mix, "stage": stage}
                found = chosen(records, **facts)
                works = [r for r in found if "psnr" in r]
                line = [f"{kind}, {len(works)} of {len(found)} attacks", mix, stage]
                if not works:
                    cases.append({**facts, "clients": 0})
                    rows.append([*line, "–", "–"])
                    continue
                psnr = [statistics.fmean(min(v, CAP) for v in r["psnr"]) for r in works]
                floors = [_floor(r) for r in works]
                case: dict[str, Any] = {
                    **facts,
                    "clients": len(works),
                    "psnr": mean_with_interval(psnr),
                    "gain": mean_difference(psnr, floors),
                }
                cases.append(case)
                numbers = [with_interval(case["psnr"]), with_interval(case["gain"])]
                rows.append([*line, *numbers])
    return cases, rows


def _floor(record: Record) -> float:
    """Mean over a client's images of the best guess of each."""
    lists = record["floors"].values()
    return statistics.fmean(max(values) for values in zip(*lists, strict=True))


def _figure(runs: Sequence[Record], distances: Sequence[Record]) -> Figure:
    """Accuracy over rounds, and errors over alpha at each look."""
    from matplotlib.figure import Figure

    looks = distinct(distances, "round")
    columns = 1 + len(looks)
    figure = Figure(
        figsize=(3.0 * columns, 3.0), facecolor="white", layout="constrained"
    )
    first, *others = figure.subplots(1, columns, squeeze=False)[0]
    for colour, case in zip(PALETTE * 2, runs, strict=False):
        dashed = "--" if case["scheme"] == SHARDS else "-"
        rounds = range(1, len(case["curve"]) + 1)
        first.plot(rounds, case["curve"], dashed, color=colour, label=case["scheme"])
    first.set(xlabel="round", ylabel="held-out accuracy")
    for axes, round_ in zip(others, looks, strict=True):
        cases = [
            case
            for case in chosen(distances, round=round_)
            if case["scheme"].startswith("alpha")
        ]
        alphas = [float(case["scheme"].removeprefix("alpha ")) for case in cases]
        for colour, name in zip((*PALETTE[:2], FLOOR_COLOUR), ERRORS, strict=True):
            dashed = "--" if name == "guess" else "o-"
            values = [case[name]["value"] for case in cases]
            axes.plot(alphas, values, dashed, color=colour, label=name)
        axes.set(xlabel="alpha", xscale="log", ylim=(0, 1), title=f"round {round_}")
    others[0].set_ylabel("error of class proportions (TV)")
    for axes in (first, others[0]):
        axes.legend(frameon=False, fontsize=8)
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


SUITE = Suite(
    numbers={"repeats": 5, "images": 4},
    quick={"repeats": 1, "images": 2},
    tasks=_tasks,
    report=_report,
)
