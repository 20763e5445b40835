"""Suite ``defences``: every defence with the naive and with the adaptive attack.

A client with a random LeNet defends its update. The naive attack takes the numbers that
arrive at face value, the adaptive one knows what the protocol makes public; both are
``gaussian-map`` under the same prior, a Gaussian fitted to the public images, and
neither knows labels. What a defence costs is measured on a network that is trained with
it.

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradinv_helpers.attacks.laplace import laplace_approximation
from gradinv_helpers.attacks.map_search import MapEstimate, map_estimate
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.reconstruction import Reconstruction
from gradinv_helpers.attacks.unmixing import mixing_weights, unmix
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
from gradinv_helpers.defences import (
    Defence,
    GaussianNoise,
    Sign,
    StochasticQuantisation,
    TopK,
    defend,
    mixup_update,
    soteria_update,
)
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, apply_update
from gradinv_helpers.federated.rounds import evaluate_model
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.partition import partition
from gradinv_helpers.priors.gaussian import ImagePrior, fit_gaussian
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAIVE, ADAPTIVE = "naive", "adaptive"
SIDE, QUICK_SIDE = 16, 8  # pixels
BATCHES, QUICK_BATCHES = (1, 4), (1, 2)
_LAST_LEVEL = 1e-3  # share of a layer: beyond 35 dB where nothing is defended
_BITS_UP_TO = 1  # images: the decomposition of more takes longer than the attack
# Training with a defence: clients, images of each per round, rounds, step size.
_CLIENTS, _PER_ROUND, _ROUNDS, _LR = 4, 8, 200, 0.3
_EPOCHS = 4

Compute = Callable[[nn.Module, Images, torch.Generator], SharedUpdate]


def _after(defence: Defence) -> Compute:
    def compute(
        model: nn.Module, images: Images, generator: torch.Generator
    ) -> SharedUpdate:
        return defend(local_update(model, images), defence, generator=generator)

    return compute


def _plain(
    model: nn.Module, images: Images, generator: torch.Generator
) -> SharedUpdate:
    return local_update(model, images)


def _soteria(
    model: nn.Module, images: Images, generator: torch.Generator
) -> SharedUpdate:
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return soteria_update(model, images, share=0.8, layer=last)


def _mixup(
    model: nn.Module, images: Images, generator: torch.Generator
) -> SharedUpdate:
    return mixup_update(model, images, alpha=1.0, generator=generator)


def _local_epochs(
    model: nn.Module, images: Images, generator: torch.Generator
) -> SharedUpdate:
    training = LocalTraining(sends="delta", lr=_LR, epochs=_EPOCHS)
    return local_update(model, images, training)


def _without_noise(update: SharedUpdate) -> SharedUpdate:
    return dataclasses.replace(update, noise_std=0.0)


def _without_encoding(update: SharedUpdate) -> SharedUpdate:
    return dataclasses.replace(update, encoding=None)


def _as_one_step(update: SharedUpdate) -> SharedUpdate:
    """The change as if one longer step along the gradient had made it."""
    training = LocalTraining(sends="delta", lr=_LR * _EPOCHS)
    return dataclasses.replace(update, training=training)


@dataclass(frozen=True)
class Case:
    """One defence.

    Args:
        name: What it is.
        compute: From model, images and a generator to what travels.
        face_value: What a naive attacker takes the update for; ``None`` where there is
            nothing to be naive about.
        bits: Whether its likelihood is Gaussian, so that its information is a number.
        smallest: Images that it needs.
    """

    name: str
    compute: Compute
    face_value: Callable[[SharedUpdate], SharedUpdate] | None = _without_encoding
    bits: bool = True
    smallest: int = 1

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks to compare."""
        return (ADAPTIVE,) if self.face_value is None else (NAIVE, ADAPTIVE)


CASES: tuple[Case, ...] = (
    Case("none", _plain, None),
    Case(
        "noise of 10 % of the norm",
        _after(GaussianNoise(0.1, relative=True)),
        _without_noise,
    ),
    Case("top 10 %", _after(TopK(0.1))),
    Case("signs", _after(Sign()), bits=False),
    Case("2 bits", _after(StochasticQuantisation(2))),
    Case("4 bits", _after(StochasticQuantisation(4))),
    Case("Soteria, 80 %", _soteria),
    Case("mixup, alpha 1", _mixup, bits=False, smallest=2),
    Case("4 local epochs", _local_epochs, _as_one_step, bits=False),
)
QUICK_CASES = tuple(c for c in CASES if c.name in ("none", "signs", "mixup, alpha 1"))


@dataclass(frozen=True)
class _Bench:
    """Images of the suite; victim k has the model of seed k."""

    setting: Setting
    public: Images
    pool: Images

    @functools.cached_property
    def prior(self) -> ImagePrior:
        return fit_gaussian(self.public.pixels, form="covariance")

    def network(self, name: str, seed: int) -> nn.Module:
        channels, side, _ = self.pool.shape
        return build_model(
            name,
            in_channels=channels,
            image_size=side,
            num_classes=self.pool.num_classes,
            seed=seed,
        ).to(self.setting.device)

    def attack(self, case: Case, count: int, attack: str, number: int) -> Record:
        """Defend and attack one client."""
        seed = self.setting.seed + number
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)
        truth = self.pool[order[:count]]
        update = case.compute(self.network("lenet", seed), truth, generator)
        known = update
        if attack == NAIVE and case.face_value is not None:
            known = case.face_value(update)
        estimate = map_estimate(
            known,
            prior=self.prior,
            iterations=self.setting.numbers["iterations"],
            restarts=2,
            seed=seed,
            last_level=_LAST_LEVEL,
        )
        stop_if_interrupted(estimate.reconstruction)
        found, apart = _taken_apart(estimate)
        result = score(found, truth, others=self.pool)
        right = result.label_correct or ()
        bits = None
        if attack == ADAPTIVE and case.bits and count <= _BITS_UP_TO:
            bits = self._bits(known, estimate)
        return {
            "what": "attack",
            "defence": case.name,
            "images": count,
            "attack": attack,
            "number": number,
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "identified": sum(result.identified or ()),
            "chance": result.summary()["identified_by_chance"],
            "labels_right": sum(right),
            "unmixed": apart,
            "bits": bits,
            "bytes": update.num_bytes,
        }

    def _bits(self, update: SharedUpdate, estimate: MapEstimate) -> float:
        posterior = Posterior(update, self.prior, estimate.reconstruction.labels)
        posterior.noise = estimate.noise
        return laplace_approximation(posterior, estimate.latents).bits

    def train(self, case: Case, number: int) -> Record:
        """Train a network on public images with the defence in every round."""
        seed = self.setting.seed + number
        model = self.network("mlp", seed)
        clients = partition(self.public, clients=_CLIENTS, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2 if self.setting.quick else _ROUNDS):
            updates = []
            for client in clients:
                size = len(client.images)
                drawn = torch.randperm(size, generator=generator)[:_PER_ROUND]
                updates.append(case.compute(model, client.images[drawn], generator))
            apply_update(model, aggregate(updates), lr=_LR)
        accuracy, loss = evaluate_model(model, self.pool)
        return {
            "what": "training",
            "defence": case.name,
            "number": number,
            "accuracy": accuracy,
            "loss": loss if math.isfinite(loss) else None,
        }


def _taken_apart(estimate: MapEstimate) -> tuple[Reconstruction, bool]:
    """The images, unmixed where the labels of mixtures tell how."""
    found = estimate.reconstruction
    if estimate.label_shares is None:
        return found, False
    try:
        images = unmix(found.images, mixing_weights(estimate.label_shares))
    except InputError:
        return found, False
    return dataclasses.replace(found, images=images.clamp(0, 1)), True


def _scope(setting: Setting) -> tuple[Sequence[Case], Sequence[int]]:
    """The defences and the numbers of images."""
    return (QUICK_CASES, QUICK_BATCHES) if setting.quick else (CASES, BATCHES)


def _tasks(setting: Setting) -> list[Task]:
    splits = {
        split: load_images(
            setting.dataset,
            data_root=setting.data_root,
            split="train" if split == "train" else "test",
            image_size=QUICK_SIDE if setting.quick else SIDE,
        )
        for split in ("train", "test")
    }
    digests = {split: fingerprint(images) for split, images in splits.items()}
    setting.notes["images_sha256"] = digests
    bench = _Bench(setting, splits["train"], splits["test"])
    tasks = []
    cases, batches = _scope(setting)
    for number in range(setting.numbers["repeats"]):
        for case in cases:
            name = f"{case.name}, {number}"
            run = functools.partial(bench.train, case, number)
            tasks.append(Task(f"training, {name}", run))
            for count in batches:
                if count < case.smallest:
                    continue
                for attack in case.attacks:
                    run = functools.partial(bench.attack, case, count, attack, number)
                    tasks.append(Task(f"{attack} attack, {count} images, {name}", run))
    return tasks


# --- what comes of it -------------------------------------------------------------

_HEAD = [
    "defence",
    "images",
    "naive, dB above the floor (95 %)",
    "adaptive, dB above the floor (95 %)",
    "adaptive, mean PSNR in dB",
    "identified, naive",
    "identified, adaptive",
    "labels right, adaptive",
    "bits per image",
    "bytes",
    "accuracy (95 %)",
]


def _report(records: Sequence[Record], setting: Setting) -> Report:
    rows, cases = [], []
    defences, batches = _scope(setting)
    for case in defences:
        trained = chosen(records, what="training", defence=case.name)
        accuracy = mean_with_interval([r["accuracy"] for r in trained])
        for count in batches:
            if count < case.smallest:
                continue
            found = chosen(records, what="attack", defence=case.name, images=count)
            by_attack = {a: _attack(chosen(found, attack=a)) for a in case.attacks}
            bits = [r["bits"] for r in found if r["bits"] is not None]
            cases.append(
                {
                    "defence": case.name,
                    "images": count,
                    "attacks": by_attack,
                    "bits": statistics.fmean(bits) if bits else None,
                    "bytes": statistics.fmean(r["bytes"] for r in found),
                    "accuracy": accuracy,
                }
            )
            rows.append(_row(cases[-1]))
    chance = chosen(records, what="attack")[0]["chance"]
    note = (
        "Client: a random LeNet, the gradient of so many images (of 4 epochs: the "
        "change of its weights). Naive: gaussian-map on the numbers as they arrive. "
        "Adaptive: the same attack with what the protocol makes public, and nothing "
        "else; labels are inferred. Means over images with their bootstrap intervals; "
        "the floor of an image is the best of a constant image, another image, and the "
        "mean of the client's; identified by chance: "
        f"{chance:.2%}. Bits: information of the update about one image under the "
        "prior, by Laplace's method, where the likelihood is Gaussian. Bytes: of the "
        "attacked update as it is encoded. Accuracy: held-out images after "
        f"{_ROUNDS} rounds of {_CLIENTS} clients with {_PER_ROUND} images each, of a "
        "network with one hidden layer that is trained with the defence at a learning "
        f"rate of {_LR:g}; the LeNet of the attack does not learn by plain SGD."
    )
    return Report(
        {"cases": cases}, f"{markdown(_HEAD, rows)}\n\n{note}", _figure(cases)
    )


def _attack(found: Sequence[Record]) -> Record:
    psnr = [value for record in found for value in record["psnr"]]
    floors = [
        max(values)
        for record in found
        for values in zip(*record["floors"].values(), strict=True)
    ]
    return {
        "psnr": mean_with_interval(psnr),
        "gain": mean_difference(psnr, floors),
        "identified": sum(record["identified"] for record in found),
        "labels_right": sum(record["labels_right"] for record in found),
        "unmixed": sum(record["unmixed"] for record in found),
        "of": len(psnr),
    }


def _row(case: Record) -> list[str]:
    adaptive, naive = case["attacks"][ADAPTIVE], case["attacks"].get(NAIVE)
    of = adaptive["of"]
    return [
        case["defence"],
        str(case["images"]),
        with_interval(naive["gain"]) if naive else "–",
        with_interval(adaptive["gain"]),
        f"{adaptive['psnr']['value']:.1f}",
        f"{naive['identified']:.0f} of {of}" if naive else "–",
        f"{adaptive['identified']:.0f} of {of}",
        f"{adaptive['labels_right']} of {of}",
        "–" if case["bits"] is None else f"{case['bits']:.0f}",
        f"{case['bytes']:,.0f}",
        with_interval(case["accuracy"], 3),
    ]


def _figure(cases: Sequence[Record]) -> Figure:
    """Gain over the floor of both attacks, for every defence."""
    from matplotlib.figure import Figure

    from gradinv_helpers.plots import FLOOR_COLOUR, PALETTE

    names, batches = distinct(cases, "defence"), distinct(cases, "images")
    figure = Figure(figsize=(8.0, 4.4), facecolor="white", layout="constrained")
    grid = figure.subplots(1, len(batches), sharex=True, sharey=True)
    for axes, count in zip(grid, batches, strict=True):
        for k, attack in enumerate((NAIVE, ADAPTIVE)):
            shown = [c for c in chosen(cases, images=count) if attack in c["attacks"]]
            gains = [c["attacks"][attack]["gain"] for c in shown]
            axes.barh(
                [names.index(c["defence"]) + 0.4 * k - 0.2 for c in shown],
                [gain["value"] for gain in gains],
                height=0.38,
                color=PALETTE[k],
                label=attack,
            )
        axes.axvline(0, color=FLOOR_COLOUR, linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{count} image" + "s" * (count > 1))
        axes.set_xlabel("PSNR above the floor (dB)")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].invert_yaxis()
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


SUITE = Suite(
    numbers={"repeats": 5, "iterations": 12},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
