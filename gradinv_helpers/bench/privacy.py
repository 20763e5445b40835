"""Suite ``privacy``: how much noise is enough, and what does it cost?

Clients with a random LeNet clip the gradient of every sample to norm 1, add Gaussian
noise to the sum, and send the mean. For every noise: epsilon of that message, and of a
whole DP-SGD run with the same clipping and noise; the accuracy of that run; what comes
back under the right likelihood, and under one that leaves the clipping out; bits; and
the success of an informed adversary beside the bound that no attack exceeds.

A message of n samples with noise once is also what a trusted server publishes of n
clients of one sample (central privacy).

Taught in: notebooks/08_differential_privacy.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.label_search import infer_encoded_labels
from gradinv_helpers.attacks.laplace import laplace_approximation
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.bench.figures import _STYLE
from gradinv_helpers.bench.priors import common
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
from gradinv_helpers.intervals import share_interval
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.plots import FLOOR_COLOUR, PALETTE
from gradinv_helpers.priors.gaussian import ImagePrior, fit_gaussian, spectrum_prior
from gradinv_helpers.privacy import (
    Accountant,
    epsilon_spent,
    private_update,
)
from gradinv_helpers.private_training import Trust, train_private
from gradinv_helpers.reconstruction_bound import (
    candidate_bound,
    candidate_likelihoods,
    reconstruction_bound,
)
from gradinv_helpers.updates import SharedUpdate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 16  # pixels
CLIP, DELTA = 1.0, 1e-5
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
BATCHES = (1, 4, 8)
QUICK_NOISES, QUICK_BATCHES = (0.003, 3.0), (2,)
ATTACK, BITS, TRAINING = "attack", "bits", "training"
INFORMED, CANDIDATES = "informed", "candidates"
CLASS_MEAN, GAUSSIAN, VAE = "class mean", "gaussian-map", "vae-map"
NAIVE = "vae-map without clipping"
# A step of training takes a tenth of the samples; local clients hold eight of them.
_RATE, _STEPS, _LR, _LOCAL_CLIENT = 0.1, 150, 0.5, 8
_ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv", "gaussian")
_TRIALS = 30  # of the informed adversary, per noise and seed
_MOST_NAIVE = 4  # images: it finds nothing, and takes long about it


Attack = Callable[[SharedUpdate, Tensor, int], Tensor]  # labels, seed -> images


@dataclass(frozen=True, eq=False)
class _Bench:
    """Images of the suite, and what the attacker learned from the train split."""

    setting: Setting
    train: Images
    test: Images

    @functools.cached_property
    def covariance(self) -> ImagePrior:
        return fit_gaussian(self.train.pixels, form="covariance")

    @functools.cached_property
    def class_means(self) -> Tensor:
        pixels, labels = self.train.pixels, self.train.labels
        means = [pixels[labels == k].mean(0) for k in range(self.train.num_classes)]
        return torch.stack(means)

    def model(self, seed: int) -> nn.Module:
        channels, side, _ = self.test.shape
        built = build_model(
            "lenet",
            in_channels=channels,
            image_size=side,
            num_classes=self.test.num_classes,
            seed=seed,
        )
        return built.to(self.setting.device)

    def truth(self, count: int, number: int) -> Images:
        """The images of one client."""
        generator = torch.Generator().manual_seed(self.setting.seed + number)
        return self.test[torch.randperm(len(self.test), generator=generator)[:count]]

    def attack(self, noise: float, count: int, number: int) -> Record:
        """All attacks on one message."""
        seed, truth = self.setting.seed + number, self.truth(count, number)
        update = private_update(
            self.model(seed),
            truth,
            clip_norm=CLIP,
            noise_multiplier=noise,
            generator=torch.Generator().manual_seed(1000 * count + seed),
        )
        labels = infer_encoded_labels(update, spectrum_prior(truth.shape)).cpu()
        found: Record = {}
        for name, attack in self._attacks(count).items():
            begun = time.process_time()
            images = attack(update, labels, seed)
            spent = time.process_time() - begun
            made = Images(images.cpu().clamp(0, 1), labels, truth.class_names)
            result = score(made, truth, others=self.test)
            assert result.identification is not None
            found[name] = {
                "psnr": list(result.psnr),
                "identified": sum(rank == 1 for rank in result.identification.ranks),
                "cpu_seconds": spent,
            }
            floors = [list(floor.psnr) for floor in result.floors.values()]
        floors.append(found[CLASS_MEAN]["psnr"])  # the labels alone
        return {
            "what": ATTACK,
            "noise": noise,
            "images": count,
            "number": number,
            "labels_right": common(labels, truth.labels),
            "floor": [max(values) for values in zip(*floors, strict=True)],
            "methods": found,
        }

    def _attacks(self, count: int) -> dict[str, Attack]:
        def under(
            update: SharedUpdate, labels: Tensor, seed: int, **how: Any
        ) -> Tensor:
            iterations = self.setting.numbers["iterations"]
            found = invert(
                update,
                labels=labels,
                iterations=iterations,
                restarts=1,
                seed=seed,
                **how,
            )
            stop_if_interrupted(found)
            return found.images

        def naive(update: SharedUpdate, labels: Tensor, seed: int) -> Tensor:
            plain = replace(update.training, clip_norm=None)
            told = update.replace_tensors(update.tensors, training=plain)
            return under(told, labels, seed, attack="vae-map")

        known: dict[str, Attack] = {
            CLASS_MEAN: lambda update, labels, seed: self.class_means[labels],
            GAUSSIAN: functools.partial(
                under, attack="gaussian-map", prior=self.covariance
            ),
            VAE: functools.partial(under, attack="vae-map"),
        }
        return known | ({NAIVE: naive} if count <= _MOST_NAIVE else {})

    def bits(self, count: int, number: int) -> Record:
        """Bits of a message about its images, for every noise from one Jacobian."""
        seed, truth = self.setting.seed + number, self.truth(count, number)
        update = private_update(
            self.model(seed),
            truth,
            clip_norm=CLIP,
            noise_multiplier=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        posterior = Posterior(update, self.covariance, truth.labels)
        point = self.covariance.encode(truth.pixels)
        found = laplace_approximation(posterior, point, seed=seed)
        return {
            "what": BITS,
            "images": count,
            "number": number,
            "bits": [found.scaled(noise**2).bits for noise in _noises(self.setting)],
            "identifiable": [
                found.scaled(noise**2).identifiable for noise in _noises(self.setting)
            ],
        }

    def informed(self, noise: float, number: int) -> Record:
        """Whom an adversary names that knows the candidates, one of which it is."""
        seed = self.setting.seed + number
        model, generator = self.model(seed), torch.Generator().manual_seed(seed)
        victims = torch.randint(len(self.test), (_TRIALS,), generator=generator)
        hits = 0
        for victim in victims.tolist():
            update = private_update(
                model,
                self.test[[victim]],
                clip_norm=CLIP,
                noise_multiplier=noise,
                generator=generator,
            )
            hits += int(candidate_likelihoods(update, self.test).argmax()) == victim
        return {
            "what": INFORMED,
            "noise": noise,
            "number": number,
            "trials": _TRIALS,
            "hits": hits,
            "candidates": len(self.test),
        }

    def candidates(self, number: int) -> Record:
        """What no attack exceeds that names one of the candidates, for every noise."""
        model = self.model(self.setting.seed + number)
        bounds = [
            candidate_bound(model, self.test, clip_norm=CLIP, noise_multiplier=noise)
            for noise in _noises(self.setting)
        ]
        return {"what": CANDIDATES, "number": number, "bounds": bounds}

    def training(self, noise: float, trust: Trust, number: int) -> Record:
        """Accuracy and epsilon of a run with this clipping and noise."""
        begun = time.process_time()
        found = train_private(
            self.model(self.setting.seed + number),
            self.train,
            self.test,
            clip_norm=CLIP,
            noise_multiplier=noise,
            sample_rate=_RATE,
            steps=2 if self.setting.quick else _STEPS,
            lr=_LR,
            trust=trust,
            client_size=_LOCAL_CLIENT if trust == "local" else 1,
            delta=DELTA,
            seed=self.setting.seed + number,
        )
        return {
            "what": TRAINING,
            "noise": noise,
            "trust": trust,
            "number": number,
            "epsilon": found.epsilon,
            "accuracy": found.accuracy,
            "cpu_seconds": time.process_time() - begun,
        }


def _noises(setting: Setting) -> tuple[float, ...]:
    return QUICK_NOISES if setting.quick else NOISES


def _batches(setting: Setting) -> tuple[int, ...]:
    return QUICK_BATCHES if setting.quick else BATCHES


def _tasks(setting: Setting) -> list[Task]:
    if setting.dataset != "digits":
        expected = "'digits', which the learned prior of the suite is of"
        raise InputError("dataset", expected, repr(setting.dataset))
    train, test = (
        load_images("digits", split=split, image_size=SIZE)
        for split in ("train", "test")
    )
    digests = setting.notes.setdefault("images_sha256", {})
    digests |= {"train": fingerprint(train), "test": fingerprint(test)}
    bench = _Bench(setting, train, test)
    noises, batches = _noises(setting), _batches(setting)
    trusts: tuple[Trust, ...] = ("central", "local")
    tasks: list[Task] = []
    for number in range(setting.numbers["repeats"]):
        for noise in noises:
            for trust in trusts:
                run = functools.partial(bench.training, noise, trust, number)
                tasks.append(Task(f"train, {trust}, noise {noise:g}, {number}", run))
            run = functools.partial(bench.informed, noise, number)
            tasks.append(Task(f"informed, noise {noise:g}, {number}", run))
            for count in batches:
                run = functools.partial(bench.attack, noise, count, number)
                name = f"attack, noise {noise:g}, {count} images, {number}"
                tasks.append(Task(name, run))
        for count in batches:
            run = functools.partial(bench.bits, count, number)
            tasks.append(Task(f"bits, {count} images, {number}", run))
        run = functools.partial(bench.candidates, number)
        tasks.append(Task(f"candidates, {number}", run))
    return tasks


# --- what comes of it ---------------------------------------------------------------

_PRICE_HEAD = [
    "noise",
    "ε of a message: RDP",
    "PRV",
    "exact",
    "ε of training, central",
    "accuracy, central (95 %)",
    "ε of training, local",
    "accuracy, local (95 %)",
]
_LEAK_HEAD = [
    "noise",
    "images",
    "labels right",
    "above the floor, dB (95 %): vae-map",
    "gaussian-map",
    "vae-map without clipping",
    "identified by vae-map",
    "bits per image",
]
_BOUND_HEAD = [
    "noise",
    "bound",
    "bound for these candidates",
    "named by the informed adversary (95 %)",
    "identified from vae-map, 1 image",
    "guess",
]


def _report(records: Sequence[Record], setting: Setting) -> Report:
    noises = _noises(setting)
    prices = [_price(records, noise) for noise in noises]
    leaks = [
        _leak(records, noise, k, count)
        for k, noise in enumerate(noises)
        for count in _batches(setting)
    ]
    bounds = [_bound(records, noise, place) for place, noise in enumerate(noises)]
    parts = [
        "### What it costs\n\n"
        + markdown(_PRICE_HEAD, [_price_row(p) for p in prices]),
        "### What comes back\n\n" + markdown(_LEAK_HEAD, [_leak_row(r) for r in leaks]),
        "### What no attack exceeds\n\n"
        + markdown(_BOUND_HEAD, [_bound_row(b) for b in bounds]),
        _note(setting),
    ]
    summary = {"price": prices, "leak": leaks, "bound": bounds}
    return Report(summary, "\n\n".join(parts), _figure(prices, leaks, bounds))


def _price(records: Sequence[Record], noise: float) -> Record:
    found: Record = {"noise": noise}
    for name in _ACCOUNTANTS:
        try:
            found[name] = epsilon_spent(
                noise_multiplier=noise,
                sample_rate=1.0,
                steps=1,
                delta=DELTA,
                accountant=name,
            )
        except InputError:  # PRV has no grid for so little noise
            found[name] = None
    for trust in ("central", "local"):
        runs = chosen(records, what=TRAINING, noise=noise, trust=trust)
        found[trust] = {
            "epsilon": statistics.fmean(run["epsilon"] for run in runs),
            "accuracy": mean_with_interval([run["accuracy"] for run in runs]),
        }
    return found


def _leak(records: Sequence[Record], noise: float, place: int, count: int) -> Record:
    runs = chosen(records, what=ATTACK, noise=noise, images=count)
    floors = [value for run in runs for value in run["floor"]]
    methods = {}
    for name in runs[0]["methods"]:
        made = [run["methods"][name] for run in runs]
        psnr = [value for one in made for value in one["psnr"]]
        methods[name] = {
            "psnr": mean_with_interval(psnr),
            "gain": mean_difference(psnr, floors),
            "identified": sum(one["identified"] for one in made),
            "cpu_seconds": statistics.fmean(one["cpu_seconds"] for one in made),
        }
    bits = [run["bits"][place] for run in chosen(records, what=BITS, images=count)]
    return {
        "noise": noise,
        "images": count,
        "messages": len(runs),
        "floor": statistics.fmean(floors),
        "labels_right": sum(run["labels_right"] for run in runs),
        "methods": methods,
        "bits_per_image": mean_with_interval([value / count for value in bits]),
    }


def _bound(records: Sequence[Record], noise: float, place: int) -> Record:
    runs = chosen(records, what=INFORMED, noise=noise)
    hits, trials = (sum(run[name] for run in runs) for name in ("hits", "trials"))
    low, high = share_interval(hits, trials)
    guess = 1 / runs[0]["candidates"]
    alone = chosen(records, what=ATTACK, noise=noise, images=1)
    seen = sum(run["methods"][VAE]["identified"] for run in alone)
    near = [run["bounds"][place] for run in chosen(records, what=CANDIDATES)]
    return {
        "noise": noise,
        "guess": guess,
        "bound": reconstruction_bound(guess, noise_multiplier=noise),
        "bound_of_candidates": statistics.fmean(near),
        "informed": {"value": hits / trials, "low": low, "high": high},
        "trials": trials,
        "reconstructed": {"identified": seen, "images": len(alone)},
    }


def _price_row(found: Record) -> list[str]:
    row = [f"{found['noise']:g}"]
    for name in _ACCOUNTANTS:
        row.append("–" if found[name] is None else _epsilon(found[name]))
    for trust in ("central", "local"):
        row.append(_epsilon(found[trust]["epsilon"]))
        row.append(with_interval(found[trust]["accuracy"], 2))
    return row


def _leak_row(found: Record) -> list[str]:
    count, methods = found["images"] * found["messages"], found["methods"]
    gains = [
        with_interval(methods[name]["gain"]) if name in methods else "–"
        for name in (VAE, GAUSSIAN, NAIVE)
    ]
    return [
        f"{found['noise']:g}",
        f"{found['images']}",
        f"{found['labels_right']} of {count}",
        *gains,
        f"{methods[VAE]['identified']} of {count}",
        f"{found['bits_per_image']['value']:.3g}",
    ]


def _bound_row(found: Record) -> list[str]:
    seen = found["reconstructed"]
    share = f"{seen['identified']} of {seen['images']}" if seen["images"] else "–"
    return [
        f"{found['noise']:g}",
        f"{found['bound']:.3f}",
        f"{found['bound_of_candidates']:.3f}",
        with_interval(found["informed"], 3),
        share,
        f"{found['guess']:.4f}",
    ]


def _epsilon(value: float) -> str:
    return f"{value:.3g}" if value < 1e4 else f"{value:.1e}"


def _note(setting: Setting) -> str:
    return (
        f"`digits` at {SIZE}×{SIZE} pixels behind a random LeNet; samples clipped to "
        f"{CLIP:g}; noise: standard deviation on the sum in units of the clipping "
        f"norm; δ = {DELTA:g}. A message: one sum, all samples in it for certain. "
        f"Training: {_STEPS} steps at rate {_RATE:g}, step size {_LR:g}, ε by RDP; "
        f"local: clients of {_LOCAL_CLIENT} samples add the same noise each, and ε is "
        "that of the client which sent most messages. Labels are inferred, by the "
        "likelihood of the last layer. Means over images with their bootstrap "
        "intervals; the floor of an image is the best of a constant image, another "
        "image, the mean of the batch, and the mean training image of the inferred "
        f"class. Attacks have {setting.numbers['iterations']} iterations. Bits are "
        "those of the Laplace approximation at the true images under a Gaussian with "
        "the covariance of the training images. The informed adversary knows that the "
        "one image is among the 360 of the test split. The bound holds for gradients "
        "anywhere within the clipping norm; that for these candidates uses how far "
        "theirs lie from the mean of their class. With little noise sampling gains "
        "nothing: central training then counts all steps, local training only the "
        "messages that were sent."
    )


def _figure(
    prices: Sequence[Record], leaks: Sequence[Record], bounds: Sequence[Record]
) -> Figure:
    """Epsilon, accuracy, PSNR above the floor, bits and success over the noise."""
    noises = [price["noise"] for price in prices]
    gains = {}
    for count in distinct(leaks, "images"):
        line = chosen(leaks, images=count)
        gains[f"right likelihood, n = {count}"] = [
            one["methods"][VAE]["gain"]["value"] for one in line
        ]
    for count in (c for c in distinct(leaks, "images") if c <= _MOST_NAIVE):
        line = chosen(leaks, images=count)
        gains[f"clipping left out, n = {count}"] = [
            one["methods"][NAIVE]["gain"]["value"] for one in line
        ]
    bits = {
        f"n = {count}": [
            max(one["bits_per_image"]["value"], 1e-4)
            for one in chosen(leaks, images=count)
        ]
        for count in distinct(leaks, "images")
    }
    success = {
        "bound": [one["bound"] for one in bounds],
        "bound for these candidates": [one["bound_of_candidates"] for one in bounds],
        "informed adversary": [one["informed"]["value"] for one in bounds],
        "guess": [one["guess"] for one in bounds],
    }
    charts = {
        "privacy spent": (
            "ε",
            "log",
            {
                "one message": [price["gaussian"] for price in prices],
                "training, central": [price["central"]["epsilon"] for price in prices],
                "training, local": [price["local"]["epsilon"] for price in prices],
            },
        ),
        "accuracy of the trained model": (
            "accuracy",
            "linear",
            {
                "central": [price["central"]["accuracy"]["value"] for price in prices],
                "local": [price["local"]["accuracy"]["value"] for price in prices],
            },
        ),
        "images": ("dB above the floor", "linear", gains),
        "bits per image": ("bits", "log", bits),
        "success against one image": ("probability", "linear", success),
    }
    return _stacked(noises, charts)


Charts = Mapping[str, tuple[str, str, Mapping[str, Sequence[float]]]]


def _stacked(noises: Sequence[float], charts: Charts) -> Figure:
    """Charts over the noise: title -> label and scale of its axis, and its lines."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        size = (9.0, 2.7 * -(-len(charts) // 2) + 0.3)
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        grid = figure.subplots(-(-len(charts) // 2), 2, squeeze=False).flatten()
        for axes in grid[len(charts) :]:
            axes.set_visible(False)
        for axes, (title, (label, scale, lines)) in zip(
            grid, charts.items(), strict=False
        ):
            for number, (name, values) in enumerate(lines.items()):
                guess = name == "guess"
                axes.plot(
                    noises,
                    values,
                    label=name,
                    color=FLOOR_COLOUR if guess else PALETTE[number % len(PALETTE)],
                    linestyle="--" if guess else "-",
                    marker="" if guess else "o",
                )
            if title == "images":
                axes.axhline(0, color=FLOOR_COLOUR, linestyle="--")
            axes.set_xscale("log")
            axes.set_yscale(scale)
            axes.set_title(title)
            axes.set_ylabel(label)
            axes.set_xlabel("noise multiplier σ")
            axes.legend(fontsize=7.5)
    return figure


SUITE = Suite(
    numbers={"repeats": 5, "iterations": 30},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
