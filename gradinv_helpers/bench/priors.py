"""Suite ``priors``: what learned priors add to Gaussian ones, and to none.

Digits of 16x16 pixels behind one gradient of a LeNet or an MLP, clean or with noise.
Every method meets the same batches with the same labels, inferred from the update.
Beside them stand guesses that see the labels and no gradient. Smaller parts ask what
wrong labels cost, what a prior of other classes is worth, and what the weight of the
prior does.

Taught in: notebooks/05_vae_prior and notebooks/06_diffusion_prior.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.diffusion_latent import diffusion_latent
from gradinv_helpers.attacks.diffusion_posterior import diffusion_posterior
from gradinv_helpers.attacks.gradinvdiff import gradinvdiff
from gradinv_helpers.attacks.guidance import Guide, polish
from gradinv_helpers.attacks.invert import invert
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.laplace import laplace_approximation
from gradinv_helpers.attacks.map_search import map_estimate
from gradinv_helpers.attacks.posterior import Posterior
from gradinv_helpers.attacks.sampling import sample_posterior
from gradinv_helpers.bench.figures import Lines, panels
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
    timed,
    with_interval,
)
from gradinv_helpers.bench.trained import model_at
from gradinv_helpers.classifier import Classifier, train_classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.diffusion import DiffusionPrior
from gradinv_helpers.priors.gaussian import ImagePrior, fit_gaussian
from gradinv_helpers.priors.vae import VAEPrior
from gradinv_helpers.priors.vae_training import train_vae
from gradinv_helpers.updates import SharedUpdate, local_update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 16  # pixels
NOISE = 0.01  # norm of the noise, as a share of the gradient's
EPOCHS = {"untrained": 0, "10 epochs": 10}
_RATES = {"lenet": 1e-2, "mlp": 3e-3}  # largest steps of the training
_QUICK_IMAGES = 100  # to train on
MAIN, LABELS, CLASSES, WEIGHT = "methods", "labels", "classes", "weight"
INFERRED, GIVEN = "inferred", "given"

# --- methods ------------------------------------------------------------------------

PIXELS, TV, SPECTRUM = "pixels", "pixels, TV", "gaussian-map, spectrum"
COVARIANCE, HARD, SOFT = "gaussian-map, covariance", "vae-map, hard", "vae-map, soft"
MEAN, EXACT = "vae-posterior mean", "exact"
GUIDED, POLISHED = "diffusion-posterior", "diffusion-posterior, polished"
POLISH, LATENT, OPTIMISED = "polish alone", "diffusion-latent", "gradinvdiff"
CLASS_MEAN, VAE_ALONE, DIFFUSION_ALONE = "class mean", "VAE alone", "diffusion alone"
GUESSES = (CLASS_MEAN, VAE_ALONE, DIFFUSION_ALONE)  # from the labels, no gradient
OTHER, SAME = "VAE of classes 0 to 4", "VAE of classes 5 to 9"

# The best of 1e-5, 1e-4, 1e-3 and 1e-2 on a batch of eight that is not measured here.
_TV_WEIGHTS = {"clean": 1e-5, "noisy": 1e-3}
_TEMPERING = 1e-2  # of the draws where an update states no noise
_CHAINS = 2
_DRAWS = 2  # of the guided diffusion
_STEPS, _DECODING_STEPS = 50, 5  # of a diffusion; in every step of a latent search
_MOST_FOR_BITS = {0.0: 4, NOISE: 8}  # images whose draws and bits are affordable
_HALF_EPOCHS = 60  # of a VAE that sees half of the classes


@dataclass(frozen=True, eq=False)
class Priors:
    """What the attacker knows of digits.

    Args:
        setting: Seed and folder; trained priors are kept there.
        train: Images to learn from; no victim is among them.
    """

    setting: Setting
    train: Images

    def load(self) -> None:
        """Have all priors ready, so that no method is charged for them."""
        for prior in (self.vae, self.diffusion, self.covariance):
            assert prior.image_shape == self.train.shape
        for first in (0,) if self.setting.quick else (0, 5):
            self.half(first)

    @functools.cached_property
    def vae(self) -> VAEPrior:
        """The VAE that ships."""
        return VAEPrior.load("vae-digits")

    @functools.cached_property
    def diffusion(self) -> DiffusionPrior:
        """The diffusion model that ships."""
        return DiffusionPrior.load("diffusion-digits")

    @functools.cached_property
    def covariance(self) -> ImagePrior:
        """A Gaussian with the covariance of the training images."""
        return fit_gaussian(self.train.pixels, form="covariance")

    @functools.cached_property
    def class_means(self) -> Tensor:
        """Mean training image of every class (K, C, H, W)."""
        pixels, labels = self.train.pixels, self.train.labels
        means = [pixels[labels == k].mean(0) for k in range(self.train.num_classes)]
        return torch.stack(means)

    @functools.cache  # noqa: B019 - lives as long as the suite
    def half(self, first: int) -> VAEPrior:
        """A VAE that has seen five classes only, and is not told which."""
        images = self.train[_rows(self.train, first)]
        epochs = 1 if self.setting.quick else _HALF_EPOCHS
        parts = ["vae", self.setting.dataset, f"classes{first}to{first + 4}"]
        parts += [f"{epochs}epochs", f"seed{self.setting.seed}", fingerprint(images)]
        folder = self.setting.folder / "models" / "_".join(parts)
        if folder.is_dir():
            return VAEPrior.load(folder)
        self.setting.say(f"training a VAE on classes {first} to {first + 4}")
        prior = train_vae(
            images, epochs=epochs, seed=self.setting.seed, conditional=False
        )
        if prior.about["training"]["interrupted"]:
            raise KeyboardInterrupt
        prior.save(folder)
        return prior


@dataclass(frozen=True, eq=False)
class Scene:
    """One update under attack.

    Args:
        update: What the server saw.
        labels: Labels that all methods start from (N,).
        priors: What the attacker knows.
        iterations: Most iterations of a search, of 20 updates each.
        seed: Seed of everything random.
    """

    update: SharedUpdate
    labels: Tensor
    priors: Priors
    iterations: int
    seed: int


@dataclass(frozen=True, eq=False)
class Made:
    """Images (N, C, H, W) of a method, and what else it tells.

    Args:
        images: In [0, 1].
        facts: Plain values for the record.
        latents: Latents under the soft VAE, where they are the mode.
    """

    images: Tensor
    facts: Record = field(default_factory=dict)
    latents: Tensor | None = None


Method = Callable[[Scene], Made]


def _pixels(scene: Scene, smooth: bool = False) -> Made:
    kind = "noisy" if scene.update.noise_std else "clean"
    found = invert(
        scene.update,
        attack="dlg",
        labels=scene.labels,
        iterations=scene.iterations,
        restarts=1,
        tv_weight=_TV_WEIGHTS[kind] if smooth else 0.0,
        seed=scene.seed,
    )
    stop_if_interrupted(found)
    return Made(found.images, _ended(found.stopped))


def _ended(stopped: str) -> Record:
    """Whether a search would have gone on."""
    return {"out_of_iterations": stopped == "all iterations used"}


def _exact(scene: Scene) -> Made:
    """Images that algebra did not find are grey."""
    found = invert(scene.update, attack="exact", labels=scene.labels, seed=scene.seed)
    missing = len(scene.labels) - len(found.images)
    grey = torch.full((max(0, missing), *found.images.shape[1:]), 0.5)
    return Made(torch.cat([found.images, grey]))


def _map(scene: Scene, prior: ImagePrior | str) -> Made:
    estimate = map_estimate(
        scene.update,
        prior=prior,
        labels=scene.labels,
        iterations=scene.iterations,
        seed=scene.seed,
    )
    stop_if_interrupted(estimate.reconstruction)
    ended = _ended(estimate.reconstruction.stopped)
    facts = {"misfit": estimate.stages[-1].misfit, **ended}
    return Made(estimate.reconstruction.images, facts, estimate.latents)


def _posterior_mean(scene: Scene) -> Made:
    """Mean of draws that start about the mode."""
    soft = scene.priors.vae.soft()
    mode = _map(scene, soft).latents
    assert mode is not None
    moves = 5 * scene.iterations
    found = sample_posterior(
        scene.update,
        prior=soft,
        labels=scene.labels,
        level=None if scene.update.noise_std else _TEMPERING,
        chains=_CHAINS,
        warmup=moves,
        draws=moves,
        start=mode,
        seed=scene.seed,
    )
    stop_if_interrupted(found)
    facts = {
        "accepted": float(found.acceptance.mean()),
        "worst_r_hat": float(found.r_hat.max()),
        "residual": float(found.residuals.mean()),
    }
    return Made(found.mean.clamp(0, 1), facts)


def _guided(scene: Scene, polished: bool = False) -> Made:
    found = diffusion_posterior(
        scene.update,
        scene.priors.diffusion,
        labels=scene.labels,
        steps=_steps(scene),
        draws=_DRAWS,
        polish=_polishing(scene) if polished else 0,
        seed=scene.seed,
    )
    stop_if_interrupted(found)
    return Made(found.images)


def _polish(scene: Scene) -> Made:
    """The control of the polish: from the mean training image, without diffusion."""
    guide = Guide(scene.update, scene.priors.diffusion, scene.labels)
    start = scene.priors.train.pixels.mean(0).expand(len(scene.labels), -1, -1, -1)
    return Made(polish(guide, start, _polishing(scene)))


def _polishing(scene: Scene) -> int:
    """Iterations of a polish: it has three levels, fewer than a search."""
    return max(1, 3 * scene.iterations // 4)


def _latent(scene: Scene, prior_weight: float = 2.0) -> Made:
    found = diffusion_latent(
        scene.update,
        scene.priors.diffusion,
        labels=scene.labels,
        prior_weight=prior_weight,
        steps=_steps(scene),
        decoding_steps=_DECODING_STEPS,
        seed=scene.seed,
    )
    stop_if_interrupted(found)
    return Made(found.images)


def _optimised(scene: Scene) -> Made:
    found = gradinvdiff(
        scene.update,
        scene.priors.diffusion,
        labels=scene.labels,
        steps=_steps(scene),
        seed=scene.seed,
    )
    stop_if_interrupted(found)
    return Made(found.images)


def _class_mean(scene: Scene) -> Made:
    return Made(scene.priors.class_means[scene.labels.cpu()])


def _vae_alone(scene: Scene) -> Made:
    """What the decoder draws for the classes at the middle of its latents."""
    vae = scene.priors.vae.given(scene.labels.cpu())
    middle = torch.zeros(len(scene.labels), vae.size)
    with torch.no_grad():
        return Made(vae.decode(middle).clamp(0, 1))


def _diffusion_alone(scene: Scene) -> Made:
    told = scene.priors.diffusion.given(scene.labels.cpu())
    return Made(told.sample(1, seed=scene.seed, steps=_steps(scene))[0])


def _steps(scene: Scene) -> int:
    """Steps of a diffusion, or of the search over its noise."""
    return min(_STEPS, 5 * scene.iterations)


METHODS: dict[str, Method] = {
    CLASS_MEAN: _class_mean,
    VAE_ALONE: _vae_alone,
    DIFFUSION_ALONE: _diffusion_alone,
    PIXELS: _pixels,
    TV: functools.partial(_pixels, smooth=True),
    EXACT: _exact,
    SPECTRUM: functools.partial(_map, prior="spectrum"),
    COVARIANCE: lambda scene: _map(scene, scene.priors.covariance),
    HARD: lambda scene: _map(scene, scene.priors.vae),
    SOFT: lambda scene: _map(scene, scene.priors.vae.soft()),
    MEAN: _posterior_mean,
    GUIDED: _guided,
    POLISHED: functools.partial(_guided, polished=True),
    POLISH: _polish,
    LATENT: _latent,
    OPTIMISED: _optimised,
    OTHER: lambda scene: _map(scene, scene.priors.half(0).soft()),
    SAME: lambda scene: _map(scene, scene.priors.half(5).soft()),
    **{
        f"{LATENT}, weight {weight:g}": functools.partial(_latent, prior_weight=weight)
        for weight in (0.0, 2.0, 20.0)
    },
}


# --- cases --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Batches of one kind.

    Args:
        what: The question: ``methods``, or one of the smaller parts.
        model: For ``build_model``.
        stage: One of ``EPOCHS``.
        images: Images of the batch.
        noise: Norm of the noise, as a share of the gradient's; 0 or ``NOISE``.
        labels: ``inferred``, or ``given`` by the client.
        first_class: Victims are of this class and those after it.
    """

    what: str
    model: str
    stage: str
    images: int
    noise: float
    labels: str = INFERRED
    first_class: int = 0

    @property
    def facts(self) -> Record:
        """What its records hold."""
        return dict(vars(self))

    @property
    def tells_bits(self) -> bool:
        """Whether the mode is one of a smooth law whose width is stated."""
        small = self.noise > 0 and self.images <= _MOST_FOR_BITS[self.noise]
        smooth = self.model == "lenet" and self.stage == "untrained"
        return self.what == MAIN and smooth and small

    @property
    def title(self) -> str:
        """The case in words, its number of images left aside."""
        name = {"lenet": "LeNet", "mlp": "MLP"}[self.model]
        noisy = f"noise {self.noise:g}" if self.noise else "clean"
        return f"{self.what}: {name}, {self.stage}, {noisy}, labels {self.labels}"

    def __str__(self) -> str:
        return f"{self.title}, {self.images} images"


_QUICK_METHODS = (PIXELS, SPECTRUM, SOFT, POLISHED)
_CHEAP = (PIXELS, TV, SPECTRUM, COVARIANCE, HARD, SOFT, POLISHED, POLISH)
_FEW = (PIXELS, SPECTRUM, COVARIANCE, HARD, SOFT, POLISHED)
_OF_LABELS = (SPECTRUM, SOFT, POLISHED)
_OF_CLASSES = (SPECTRUM, SOFT, OTHER, SAME)
_OF_WEIGHT = tuple(f"{LATENT}, weight {weight:g}" for weight in (0.0, 2.0, 20.0))


def cases(quick: bool = False) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """All cases with the methods that meet them, guesses left aside."""
    if quick:
        yield Case(MAIN, "lenet", "untrained", 1, 0.0), _QUICK_METHODS
        yield Case(MAIN, "lenet", "untrained", 2, NOISE), _QUICK_METHODS
        yield Case(CLASSES, "lenet", "untrained", 1, NOISE, first_class=5), (OTHER,)
        return
    for noise, size in itertools.product((0.0, NOISE), (1, 4, 8, 16, 32)):
        yield Case(MAIN, "lenet", "untrained", size, noise), _of_lenet(size, noise)
    for noise in (0.0, NOISE):
        yield Case(MAIN, "lenet", "10 epochs", 8, noise), _FEW
    for size in (8, 32):
        yield Case(MAIN, "mlp", "untrained", size, 0.0), (EXACT, *_FEW)
    for size in (1, 4, 8, 16, 32):
        yield Case(MAIN, "mlp", "untrained", size, NOISE), (EXACT, *_FEW)
    yield Case(MAIN, "mlp", "10 epochs", 8, NOISE), (EXACT, *_FEW)
    yield Case(LABELS, "lenet", "10 epochs", 8, NOISE, labels=GIVEN), _OF_LABELS
    yield Case(CLASSES, "lenet", "untrained", 8, NOISE, first_class=5), _OF_CLASSES
    yield Case(WEIGHT, "lenet", "untrained", 4, NOISE), _OF_WEIGHT


def _of_lenet(size: int, noise: float) -> tuple[str, ...]:
    """Methods that a batch of this size is worth."""
    if size <= 8:
        sampled = (MEAN,) if size <= _MOST_FOR_BITS[noise] else ()
        return (*_CHEAP, *sampled, GUIDED, LATENT, OPTIMISED)
    return (*_CHEAP, GUIDED) if size <= 16 else _FEW


# --- measuring ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Bench:
    """Victims, priors and the judge; batch k is behind the model of seed k."""

    setting: Setting
    test: Images
    priors: Priors
    judge: Classifier

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the suite
    def model(self, name: str, stage: str, seed: int) -> nn.Module:
        """A network, trained on the train split where the stage asks for it."""
        train = self.priors.train
        channels, side, _ = train.shape
        model = build_model(
            name,
            in_channels=channels,
            image_size=side,
            num_classes=train.num_classes,
            seed=seed,
        )
        if EPOCHS[stage]:
            self.setting.say(f"training {name}, {stage}")
            model = train_classifier(
                train, model=model, epochs=EPOCHS[stage], lr=_RATES[name], seed=seed
            ).model
        return model.to(self.setting.device)

    def truth(self, case: Case, number: int) -> Images:
        """The images of one batch."""
        rows = _rows(self.test, case.first_class, last=self.test.num_classes)
        generator = torch.Generator().manual_seed(self.setting.seed + number)
        order = torch.randperm(len(rows), generator=generator)
        return self.test[rows[order[: case.images]]]

    @functools.lru_cache(maxsize=1)  # noqa: B019 - lives as long as the suite
    def scene(self, case: Case, number: int) -> Scene:
        """What the attacker of one batch has."""
        seed = self.setting.seed + number
        truth = self.truth(case, number)
        update = local_update(self.model(case.model, case.stage, seed), truth)
        if case.noise:
            generator = torch.Generator().manual_seed(seed)
            noise = GaussianNoise(case.noise, relative=True)
            update = defend(update, noise, generator=generator)
        labels = truth.labels if case.labels == GIVEN else infer_labels(update)
        iterations = self.setting.numbers["iterations"]
        return Scene(update, labels.cpu(), self.priors, iterations, seed)

    def measure(self, case: Case, method: str, number: int) -> Record:
        """What one method makes of one batch."""
        scene, truth = self.scene(case, number), self.truth(case, number)
        begun = time.process_time()
        made, seconds = timed(lambda: METHODS[method](scene), self.setting.device)
        spent = time.process_time() - begun
        found = Images(made.images.cpu(), scene.labels, truth.class_names)
        result = score(found, truth, others=self.test, judge=self.judge)
        assert result.identification is not None
        assert result.class_correct is not None
        facts = made.facts
        if made.latents is not None and method == SOFT and case.tells_bits:
            facts = facts | _bits(scene, made.latents)
        return {
            **case.facts,
            "method": method,
            "number": number,
            "psnr": list(result.psnr),
            "floors": {name: list(f.psnr) for name, f in result.floors.items()},
            "identified": sum(rank == 1 for rank in result.identification.ranks),
            "candidates": result.identification.pool_size,
            "class_right": sum(result.class_correct),
            "labels_right": common(scene.labels, truth.labels),
            "seconds": seconds,
            "cpu_seconds": spent,
            **facts,
        }


def _bits(scene: Scene, latents: Tensor) -> Record:
    """What the update tells about the images, in the eyes of the soft VAE."""
    posterior = Posterior(scene.update, scene.priors.vae.soft(), scene.labels)
    found = laplace_approximation(posterior, latents, seed=scene.seed)
    return {
        "bits": found.bits,
        "bits_error": found.bits_error,
        "identifiable": found.identifiable,
        "unknowns": latents.numel(),
    }


def common(labels: Tensor, others: Tensor) -> int:
    """How many labels two batches have in common, whatever their order."""
    size = 1 + int(max(labels.max(), others.max()))
    counts = [torch.bincount(one, minlength=size) for one in (labels, others)]
    return int(torch.minimum(*counts).sum())


def _rows(images: Images, first: int, last: int | None = None) -> Tensor:
    """Rows of the images of five classes from the first, or up to ``last``."""
    end = first + 5 if last is None else last
    return ((images.labels >= first) & (images.labels < end)).nonzero()[:, 0]


def _tasks(setting: Setting) -> list[Task]:
    if setting.dataset != "digits":
        expected = "'digits', which the learned priors of the suite are of"
        raise InputError("dataset", expected, repr(setting.dataset))
    bench = _bench(setting)
    wanted = list(cases(setting.quick))
    return [
        Task(
            f"{case}, batch {number}, {method}",
            functools.partial(bench.measure, case, method, number),
        )
        for number in range(setting.numbers["repeats"])
        for case, methods in wanted
        for method in (*GUESSES, *methods)
    ]


def _bench(setting: Setting) -> _Bench:
    train, test = (
        load_images(setting.dataset, split=split, image_size=SIZE)
        for split in ("train", "test")
    )
    digests = setting.notes.setdefault("images_sha256", {})
    digests |= {"train": fingerprint(train), "test": fingerprint(test)}
    judge = Classifier(model_at(setting, "convnet", "trained", train, test).cpu())
    if setting.quick:
        train = train[:_QUICK_IMAGES]
    priors = Priors(setting, train)
    priors.load()
    return _Bench(setting, test, priors, judge)


# --- what comes of it ---------------------------------------------------------------

_HEAD = [
    "method",
    "images",
    "batches",
    "PSNR, dB (95 %)",
    "above the floor, dB (95 %)",
    "above the spectrum's MAP, dB (95 %)",
    "identified",
    "class seen",
    "bits per image",
    "out of iterations",
    "CPU seconds",
]
_DRAWN = (PIXELS, SPECTRUM, COVARIANCE, HARD, SOFT, POLISHED)  # lines of the figure


def _report(records: Sequence[Record], setting: Setting) -> Report:
    summaries, parts = [], []
    for title, group in _by_title(records):
        rows, labels = [], []
        for case in group:
            found = chosen(records, **case.facts)
            labels.append(_labels(case, found))
            for method in distinct(found, "method"):
                summary = _summary(found, method)
                summaries.append({**case.facts, "method": method, **summary})
                rows.append(_row(case, method, summary))
        right = f"Labels right: {', '.join(labels)}."
        parts.append(f"### {title}\n\n{markdown(_HEAD, rows)}\n\n{right}")
    parts.append(_note(setting))
    return Report({"cases": summaries}, "\n\n".join(parts), _figure(summaries))


def _note(setting: Setting) -> str:
    return (
        "Means over batches with bootstrap intervals over batches; batch k is behind "
        "the model of seed k. The floor of an image is the best of: its own mean "
        "colour, another image, the mean of the batch, and the guesses from the "
        "labels alone (mean of the class, VAE and diffusion without a gradient). "
        "Differences are of the same batches. Identified: the true image is nearer "
        "than all other test images. Class seen: an independent classifier sees the "
        "true class. Labels are those that the update gives away, the same for all "
        "methods, where they are not said to be given. Searches take at most "
        f"{setting.numbers['iterations']} iterations of 20 updates; pixels from one "
        "start, and maps from four where images of one class may be exchanged; out of "
        "iterations: the share of searches that would have gone on. "
        f"Noise {NOISE:g}: the norm of the noise as a share of the gradient's; it is "
        "stated. Bits: what the update tells in the eyes of the soft VAE."
    )


def _by_title(records: Sequence[Record]) -> Iterator[tuple[str, list[Case]]]:
    """Measured cases; those of one title differ in the number of images only."""
    names = [part.name for part in fields(Case)]
    measured = list(dict.fromkeys(Case(*(r[n] for n in names)) for r in records))
    for title in dict.fromkeys(case.title for case in measured):
        yield title, [case for case in measured if case.title == title]


def _labels(case: Case, found: Sequence[Record]) -> str:
    """Right labels of all batches of a case."""
    batches = {record["number"]: record["labels_right"] for record in found}
    return f"{sum(batches.values())} of {case.images * len(batches)}"


def _summary(found: Sequence[Record], method: str) -> Record:
    """One method on all batches of one case."""
    own = chosen(found, method=method)
    psnr, floors, data_free = [], [], []
    for record in own:
        batch = chosen(found, number=record["number"])
        psnr.append(statistics.fmean(record["psnr"]))
        floors.append(statistics.fmean(floor_of(batch)))
        data_free += [
            statistics.fmean(one["psnr"]) for one in chosen(batch, method=SPECTRUM)
        ]
    images = sum(len(record["psnr"]) for record in own)
    bits = [r["bits"] / len(r["psnr"]) for r in own if "bits" in r]
    return {
        "batches": len(own),
        "psnr": mean_with_interval(psnr),
        "floor": statistics.fmean(floors),
        "gain": mean_difference(psnr, floors),
        "gain_over_spectrum": mean_difference(psnr, data_free) if data_free else None,
        "of_images": images,
        "identified": sum(r["identified"] for r in own) / images,
        "identified_by_chance": statistics.fmean(1 / r["candidates"] for r in own),
        "class_right": sum(r["class_right"] for r in own) / images,
        "bits_per_image": statistics.fmean(bits) if bits else None,
        "out_of_iterations": _share(own, "out_of_iterations"),
        "cpu_seconds": statistics.fmean(r["cpu_seconds"] for r in own),
        "seconds": statistics.fmean(r["seconds"] for r in own),
    }


def _share(found: Sequence[Record], name: str) -> float | None:
    """Share of the records for which something is true, where it is told."""
    told = [record[name] for record in found if name in record]
    return statistics.fmean(told) if told else None


def floor_of(batch: Sequence[Record]) -> list[float]:
    """Best PSNR in dB that a guess has for every image of one batch.

    Args:
        batch: Records of all methods on it; those of guesses count.
    """
    rows = list(batch[0]["floors"].values())
    rows += [record["psnr"] for record in batch if record["method"] in GUESSES]
    return [max(column) for column in zip(*rows, strict=True)]


def _row(case: Case, method: str, summary: Record) -> list[str]:
    over, bits = summary["gain_over_spectrum"], summary["bits_per_image"]
    chance, spent = summary["identified_by_chance"], summary["out_of_iterations"]
    return [
        method,
        f"{case.images}",
        f"{summary['batches']}",
        with_interval(summary["psnr"]),
        with_interval(summary["gain"]),
        with_interval(over) if over and method != SPECTRUM else "–",
        f"{summary['identified']:.0%} (chance {chance:.1%})",
        f"{summary['class_right']:.0%}",
        "–" if bits is None else f"{bits:.0f}",
        "–" if spent is None else f"{spent:.0%}",
        f"{summary['cpu_seconds']:.1f}",
    ]


def _figure(summaries: Sequence[Record]) -> Figure:
    """PSNR over batch size: one chart per network and noise."""
    charts: dict[str, Lines] = {}
    untrained = chosen(summaries, what=MAIN, stage="untrained")
    for model in distinct(untrained, "model"):
        for noise in distinct(chosen(untrained, model=model), "noise"):
            group = chosen(untrained, model=model, noise=noise)
            lines = {
                method: _line(chosen(group, method=method), "psnr")
                for method in _DRAWN
                if chosen(group, method=method)
            }
            lines["floor"] = _line(chosen(group, method=SPECTRUM), "floor")
            name = {"lenet": "LeNet", "mlp": "MLP"}[model]
            charts[f"{name}, {f'noise {noise:g}' if noise else 'clean'}"] = lines
    return panels(
        charts,
        xlabel="images in the batch",
        ylabels=["mean PSNR (dB)"],
        columns=2,
        floor="floor",
    )


def _line(cases: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    heights = [case[name] for case in cases]
    values = [h["value"] if isinstance(h, dict) else h for h in heights]
    return [case["images"] for case in cases], values


SUITE = Suite(
    numbers={"repeats": 5, "iterations": 40},
    quick={"repeats": 1, "iterations": 1},
    tasks=_tasks,
    report=_report,
)
