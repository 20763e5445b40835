"""The attack as one call: what it finds, what it reports, what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from gradinv_helpers.attacks import invert as module
from gradinv_helpers.attacks import optimise
from gradinv_helpers.attacks.invert import (
    Reconstruction,
    Step,
    invert,
    invert_clients,
)
from gradinv_helpers.attacks.matching import gaussian_likelihood
from gradinv_helpers.attacks.plan import make_plan
from gradinv_helpers.attacks.problem import MatchingProblem
from gradinv_helpers.attacks.search import Search
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.priors.smoothness import total_variation
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update


def photos(*indices: int, size: int = 16) -> Images:
    return load_images("photos", split="test", image_size=size)[list(indices)]


def digits(*indices: int) -> Images:
    return load_images("digits", split="test")[list(indices)]


def model_for(images: Images, name: str = "lenet", seed: int = 0) -> nn.Module:
    channels, size, _ = images.shape
    return build_model(
        name, in_channels=channels, image_size=size, num_classes=10, seed=seed
    )


def update_of(images: Images, name: str = "lenet", **settings) -> SharedUpdate:
    return local_update(model_for(images, name), images, LocalTraining(**settings))


def psnr(found: Reconstruction, truth: Images) -> list[float]:
    return list(score(found, truth).psnr)


def same(one: Reconstruction, other: Reconstruction) -> None:
    """Equal in everything but the time."""
    for field in dataclasses.fields(one):
        if field.name == "seconds":
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def search(update: SharedUpdate, **settings) -> Reconstruction:
    """Invert by a search where ``auto`` would solve a single image by algebra."""
    settings.setdefault("attack", "idlg" if update.num_samples == 1 else "dlg")
    return invert(update, **settings)


def search_clients(updates: list[SharedUpdate], **settings) -> list[Reconstruction]:
    settings.setdefault("attack", "idlg" if updates[0].num_samples == 1 else "dlg")
    return invert_clients(updates, **settings)


# --- it works ---------------------------------------------------------------------


def test_one_photo_of_24_pixels() -> None:
    truth = photos(6, size=24)
    found = search(update_of(truth), restarts=1)
    result = score(found, truth)
    (value,) = result.psnr
    floors = [floor.psnr[0] for floor in result.floors.values()]
    assert value > 40
    assert value > max(floors) + 20
    assert found.labels.tolist() == truth.labels.tolist()
    assert found.loss < 1e-9
    assert found.stopped == "matched"
    assert (found.attack, found.label_source) == ("idlg", "inferred (iDLG)")


@pytest.mark.parametrize("index", [0, 3, 8])
def test_photos_of_16_pixels(index: int) -> None:
    truth = photos(index)
    found = search(update_of(truth), restarts=2)
    assert min(psnr(found, truth)) > 40
    assert found.labels.tolist() == truth.labels.tolist()


def test_a_digit_and_labels_fitted_with_the_image() -> None:
    truth = digits(4)
    found = search(update_of(truth), attack="dlg")
    assert (found.attack, found.label_source) == ("dlg", "fitted with the images")
    assert found.labels.tolist() == truth.labels.tolist()
    assert min(psnr(found, truth)) > 40


def test_two_images_are_two_images() -> None:
    truth = digits(0, 7)
    found = search(update_of(truth))
    assert found.images.shape == (2, 1, 8, 8)
    assert found.attack == "dlg"
    assert sorted(found.labels.tolist()) == sorted(truth.labels.tolist())
    result = score(found, truth)
    assert min(result.psnr) > 35
    assert min(result.label_correct) == 1


@pytest.mark.parametrize(
    ("sizes", "normalised"), [((1, 1), False), ((1, 1), True), ((2, 1), True)]
)
def test_an_aggregate_gives_all_its_images(sizes, normalised: bool) -> None:
    images = digits(0, 7, 15)[list(range(sum(sizes)))]
    model = model_for(images)
    ends = list(itertools.accumulate(sizes))
    parts = [
        local_update(model, images[list(range(end - size, end))])
        for size, end in zip(sizes, ends, strict=True)
    ]
    if normalised:
        parts = [normalize(part) for part in parts]
    found = search(aggregate(parts), restarts=2, iterations=25)
    assert found.images.shape == (sum(sizes), 1, 8, 8)
    assert sorted(found.labels.tolist()) == sorted(images.labels.tolist())
    assert found.loss < 1e-5
    if len(images) == 2:
        assert min(psnr(found, images)) > 30


def test_shape_type_and_range_of_the_result() -> None:
    found = search(update_of(digits(1, 2)), iterations=2, restarts=2)
    assert found.images.dtype == torch.float32
    assert found.images.device.type == "cpu"
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    assert found.labels.shape == (2,)
    assert found.labels.dtype == torch.int64
    assert not found.images.requires_grad
    assert found.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.images = None  # type: ignore[misc]


def test_a_result_holds_no_truth() -> None:
    names = {field.name for field in dataclasses.fields(Reconstruction)}
    assert {"images", "labels", "losses", "trials", "label_source", "seed"} <= names
    forbidden = ("tru", "victim", "psnr", "mse", "ssim", "score", "update")
    assert not [name for name in names for part in forbidden if part in name]


@pytest.mark.parametrize(
    "recipe",
    [
        {"sends": "delta", "lr": 0.05},
        {"sends": "delta", "lr": 0.5, "optimiser": "momentum", "weight_decay": 0.01},
    ],
)
def test_weight_change_of_one_step(recipe: dict) -> None:
    truth = digits(11)
    found = search(update_of(truth, **recipe), restarts=2)
    assert found.labels.tolist() == truth.labels.tolist()
    assert min(psnr(found, truth)) > 30


def test_the_truth_can_be_gone() -> None:
    """The victim's tensors are freed before the attack begins."""
    truth = digits(3)
    kept = truth.pixels.clone(), truth.labels.clone()
    model = model_for(truth)
    update = local_update(model, truth)
    gone = [weakref.ref(truth.pixels), weakref.ref(truth.labels), weakref.ref(model)]
    del truth, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    found = search(update, restarts=1)
    assert min(psnr(found, Images(*kept, tuple("0123456789")))) > 40


def test_the_update_is_left_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)
    ).train()
    frozen = nn.BatchNorm2d(1).eval()
    model.insert(0, frozen)
    update = local_update(model, digits(1, 2))
    modes = [m.training for m in update.model.modules()]
    assert modes.count(False) == 1
    before = {k: v.clone() for k, v in update.model.state_dict().items()}
    tensors = {k: v.clone() for k, v in update.tensors.items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    search(update, iterations=1, restarts=1)
    assert torch.equal(torch.rand(2), expected)
    assert [m.training for m in update.model.modules()] == modes
    for name, value in update.model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in update.tensors.items():
        assert torch.equal(value, tensors[name])


def test_frozen_norms_of_a_training_model_stay_frozen() -> None:
    """Modes of single layers reach the attacker's own computation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(1).eval(),
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(108, 10),
    )
    model[0].running_mean.fill_(0.3)
    model[0].running_var.fill_(0.2)
    truth = digits(1, 2)
    update = local_update(model, truth)
    plan = make_plan([update], "dlg", labels=[truth.labels])
    problem = MatchingProblem([update], plan)
    point = truth.pixels.reshape(1, -1)
    loss, _ = problem.evaluate(point, torch.tensor([0]))
    assert float(loss) < 1e-9


class Caching(nn.Module):
    """A model that remembers what passed through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 20), nn.Linear(20, 10)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.sigmoid(self.first(x.flatten(1)))
        return self.head(self.last)


def test_a_model_with_a_cache() -> None:
    torch.manual_seed(0)
    truth = digits(6)
    update = local_update(Caching(), truth)
    found = search(update, restarts=2, iterations=40)
    assert min(psnr(found, truth)) > 30
    assert update.model.last is None
    defend(update, GaussianNoise(0.1), generator=torch.Generator())


@pytest.fixture
def short_iterations(monkeypatch) -> None:
    """Three updates per iteration instead of twenty, for large models."""
    monkeypatch.setattr(optimise, "UPDATES_PER_ITERATION", 3)


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenet_v2", 16), ("squeezenet1_1", 32)]
)
def test_any_model_of_torchvision(name: str, size: int, short_iterations) -> None:
    from torchvision import models

    torch.manual_seed(0)
    model = getattr(models, name)(weights=None, num_classes=10).eval()
    update = local_update(model, photos(1, size=size))
    found = invert(update, attack="dlg", iterations=1, restarts=1)
    assert found.images.shape == (1, 3, size, size)
    assert torch.isfinite(found.images).all()
    assert found.losses[-1] <= found.losses[0] * 1.001


def test_resnet18_runs_and_lowers_its_loss(short_iterations) -> None:
    update = local_update(model_for(digits(1), "resnet18"), digits(1))
    found = search(update, iterations=1, restarts=1)
    assert found.loss < found.losses[0]


def test_a_layer_without_second_derivative_is_named() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.hardsigmoid(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Fused(), nn.Linear(5, 10))
    message = "model: expected layers that torch can differentiate twice, .*hardsigmoid"
    with pytest.raises(InputError, match=message) as error:
        search(local_update(model, digits(1)))
    assert "\n" not in str(error.value)


# --- the loss that is minimised ---------------------------------------------------


def naive_loss(update: SharedUpdate, images: Tensor, targets: Tensor) -> Tensor:
    """The formula of the documentation, by plain autograd."""
    weights = [p for p in update.model.parameters() if p.requires_grad]
    logits = update.model(images)
    loss = -(targets * torch.log_softmax(logits, 1)).sum(1).mean()
    found = torch.autograd.grad(loss, weights, create_graph=True)
    goal = list(update.gradient().values())
    distance = sum((f - g).square().sum() for f, g in zip(found, goal, strict=True))
    box = (images - images.clamp(0, 1)).square().mean()
    return distance / sum(g.square().sum() for g in goal) + box


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("tv_weight", [0.0, 0.1])
def test_loss_and_gradient_against_the_formula(fitted: bool, tv_weight: float) -> None:
    truth = digits(1, 2)
    model = model_for(truth).double()
    updates = [local_update(model, truth), local_update(model, digits(5, 9))]
    given = None if fitted else [torch.tensor([1, 2]), torch.tensor([3, 4])]
    plan = make_plan(updates, "dlg", labels=given, tv_weight=tv_weight)
    problem = MatchingProblem(updates, plan)
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([problem.start(generator, 0.8) for _ in range(3)])
    clients = torch.tensor([0, 1, 0])
    loss, gradient = problem.evaluate(points, clients)
    for row, client in enumerate(clients.tolist()):
        point = points[row].clone().requires_grad_()
        images = point[:128].view(2, 1, 8, 8)
        if given is None:
            targets = torch.softmax(point[128:].view(2, 10), 1)
        else:
            targets = torch.eye(10, dtype=torch.float64)[given[client]]
        expected = naive_loss(updates[client], images, targets)
        expected = expected + tv_weight * total_variation(images, smoothing=1e-3)
        slope = torch.autograd.grad(expected, point)[0]
        expected = float(expected.detach())
        assert float(loss[row]) == pytest.approx(expected, rel=1e-10)
        assert torch.allclose(gradient[row], slope, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("init_scale", [0.0, 0.05, 0.7])
def test_init_scale_is_the_standard_deviation_of_the_start(init_scale: float) -> None:
    update = update_of(photos(0, 1))
    problem = MatchingProblem([update], make_plan([update], "dlg"))
    point = problem.start(torch.Generator().manual_seed(0), init_scale)
    images = problem.images(point)
    assert images.shape == (2, 3, 16, 16)
    assert float(images.mean()) == pytest.approx(0.5, abs=0.05 * init_scale + 1e-6)
    assert float(images.std()) == pytest.approx(init_scale, rel=0.05, abs=1e-6)
    assert float(point[problem.num_pixels :].std()) == pytest.approx(1, abs=0.4)


def test_first_snapshot_is_the_start() -> None:
    quiet = search(update_of(digits(1)), iterations=1, restarts=1, init_scale=0.0)
    assert torch.equal(quiet.snapshots[0], torch.full((1, 1, 8, 8), 0.5))
    loud = search(update_of(digits(1)), iterations=1, restarts=1, init_scale=0.1)
    assert float(loud.snapshots[0].std()) == pytest.approx(0.1, rel=0.3)


def test_tv_weight_makes_smoother_images() -> None:
    update = update_of(digits(1))
    roughness = [
        float(
            total_variation(
                search(update, tv_weight=w, restarts=1, iterations=30).images
            )
        )
        for w in (0.0, 0.1, 1.0)
    ]
    assert roughness[0] > 1.1 * roughness[1] > 1.2 * roughness[2]


# --- seeds and clients ------------------------------------------------------------


@pytest.mark.parametrize("indices", [(1,), (1, 2)])
def test_same_seed_same_result(indices) -> None:
    update = update_of(digits(*indices))
    settings = {"iterations": 3, "restarts": 2, "seed": 5, "log_every": 1}
    first = search(update, **settings)
    torch.manual_seed(99)
    torch.rand(10)
    same(first, search(update, **settings))
    other = search(update, **settings | {"seed": 6})
    assert not torch.equal(first.snapshots[0], other.snapshots[0])
    assert (first.seed, other.seed) == (5, 6)


def test_restarts_begin_at_different_places_and_the_first_are_the_same() -> None:
    update = update_of(digits(1, 2))
    two = search(update, iterations=1, restarts=2)
    three = search(update, iterations=1, restarts=3)
    assert [trial.seed for trial in three.trials] == [0, 1, 2]
    losses = [trial.loss for trial in three.trials]
    assert len(set(losses)) == 3
    assert losses[:2] == pytest.approx([t.loss for t in two.trials], rel=1e-3)


@pytest.mark.parametrize("width", [24, 4, 2, 1])
def test_client_k_adds_k_to_the_seed(monkeypatch, width: int) -> None:
    """Alone or together, in one batch or in several: the same attack."""
    images = digits(1, 2, 3)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]
    monkeypatch.setattr(module, "_TRIALS_CPU", width)
    steps: list[Step] = []
    settings = {"iterations": 1, "restarts": 2, "attack": "dlg"}
    together = search_clients(updates, seed=4, on_step=steps.append, **settings)
    assert len(together) == 3
    assert {(s.client, s.restart) for s in steps} == set(
        itertools.product(range(3), range(2))
    )
    for k, found in enumerate(together):
        alone = search(updates[k], seed=4 + k, **settings)
        assert found.seed == alone.seed == 4 + k
        assert torch.equal(found.snapshots[0], alone.snapshots[0])
        # Sums in another order differ in the last digits, and so do later steps.
        assert found.losses[0] == pytest.approx(alone.losses[0], rel=1e-5)
        assert torch.allclose(found.images, alone.images, atol=0.05)


def test_clients_are_attacked_on_their_own() -> None:
    images = digits(1, 2, 3)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]
    found = search_clients(updates, restarts=2)
    for one, truth in zip(found, images, strict=True):
        assert one.labels.tolist() == truth.labels.tolist()
        assert min(psnr(one, truth)) > 40
        assert len({trial.seed for trial in one.trials}) == len(one.trials)


# --- labels -----------------------------------------------------------------------


def test_given_labels_are_marked() -> None:
    truth = digits(1, 2)
    update = update_of(truth)
    settings = {"iterations": 2, "restarts": 1}
    found = search(update, labels=truth.labels, **settings)
    assert found.label_source == "given (upper bound)"
    assert found.labels.tolist() == truth.labels.tolist()
    assert "upper bound" in found.label_source
    same(found, search(update, labels=truth.labels.tolist(), **settings))
    swapped = search(update, labels=truth.labels.flip(0), **settings)
    assert swapped.labels.tolist() == truth.labels.flip(0).tolist()
    sources = {"auto": "inferred (last layer taken apart)"}
    for attack in ("auto", "dlg"):
        unmarked = search(update, attack=attack, **settings)
        source = sources.get(attack, "fitted with the images")
        assert unmarked.label_source == source


def test_given_labels_are_one_list_per_client() -> None:
    images = digits(1, 2)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]
    found = search_clients(
        updates, labels=[[7], [8]], iterations=1, restarts=2, attack="dlg"
    )
    assert [one.labels.tolist() for one in found] == [[7], [8]]
    message = "labels: expected one entry for each of 2 updates, got 1"
    with pytest.raises(InputError, match=message):
        search_clients(updates, labels=[[7]])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1], "labels: expected 2 labels, one per sample, got 1"),
        ([1, 2, 3], "labels: expected 2 labels, one per sample, got 3"),
        ([1, 10], "labels: expected labels below the model's 10 classes, got 10"),
        ([-1, 2], "labels: expected class indices of at least 0, got -1"),
        ([1.5, 2.0], "labels: expected integers, got torch.float32"),
        (torch.tensor([math.nan, 1.0]), "labels: expected integers"),
        ([True, False], "labels: expected integers, got torch.bool"),
    ],
)
def test_bad_labels(labels, message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(update_of(digits(1, 2)), labels=labels)


def test_auto_says_what_it_picked_and_why() -> None:
    settings = {"iterations": 1, "restarts": 1}
    one = invert(update_of(digits(1)), **settings)
    assert one.attack == "exact"
    assert one.certificate is not None and one.certificate.exact
    two = invert(update_of(digits(1, 2)), **settings)
    assert two.attack == "gaussian-map"
    assert (
        two.reason
        == "2 images under the prior 'spectrum', annealed L-BFGS and Gauss-Newton"
    )
    settled = invert(update_of(digits(1, 2)), tv_weight=0.0, **settings)
    assert (settled.attack, settled.reason) == ("dlg", "a smooth network")
    kinked = invert(update_of(photos(1), "convnet"), **settings)
    assert kinked.attack == "inverting-gradients"
    assert kinked.reason.startswith("the slope of the network jumps")
    asked = invert(update_of(digits(1)), attack="dlg", **settings)
    assert (asked.attack, asked.reason) == ("dlg", "asked for")
    headless = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    update = local_update(headless, digits(1))
    found = invert(update, **settings)
    assert found.attack == "dlg"
    assert "the label cannot be read off: " in found.reason
    with pytest.raises(InputError, match=r"ends with a trainable torch.nn.Linear"):
        invert(update, attack="idlg")


def test_the_label_is_that_of_the_chosen_trial(monkeypatch) -> None:
    """One public tool returns the labels of another trial than the images."""
    update = update_of(digits(1, 2))
    original = MatchingProblem.evaluate
    seen: dict[tuple, tuple] = {}

    def evaluate(self, points, clients):
        loss, gradient = original(self, points, clients)
        for point in points:
            images = self.images(point).clamp(0, 1).float()
            key = tuple(images.flatten().tolist())
            seen[key] = tuple(self.labels(point, 0).tolist())
        return loss, gradient

    monkeypatch.setattr(MatchingProblem, "evaluate", evaluate)
    found = search(update, iterations=1, restarts=5)
    best = min(range(5), key=lambda i: found.trials[i].loss)
    assert best != 0 or found.trials[0].loss < found.trials[1].loss
    assert found.loss == min(trial.loss for trial in found.trials)
    assert len(set(seen.values())) > 1
    key = tuple(found.images.flatten().tolist())
    assert tuple(found.labels.tolist()) == seen[key]


# --- reports ----------------------------------------------------------------------


def test_losses_snapshots_and_steps_agree() -> None:
    steps: list[Step] = []
    update = update_of(digits(1, 2))
    found = search(update, iterations=7, restarts=2, log_every=3, on_step=steps.append)
    assert found.iterations == tuple(range(len(found.losses)))
    assert len(found.losses) == 8
    assert found.loss == found.losses[-1]
    assert all(b < a for a, b in itertools.pairwise(found.losses))
    assert found.snapshot_iterations == (0, 3, 6, 7)
    assert found.snapshots.shape == (4, 2, 1, 8, 8)
    assert torch.equal(found.snapshots[-1], found.images)
    assert not torch.equal(found.snapshots[0], found.snapshots[1])
    assert 0 <= float(found.snapshots.min()) <= float(found.snapshots.max()) <= 1
    assert len(found.trials) == 2
    for trial in found.trials:
        assert trial.stopped == "all iterations used"
        assert trial.iterations == 7
        assert trial.evaluations >= 140
        assert not trial.replaced
    # Every iteration of every restart was told, the start included.
    told = {(step.restart, step.iteration): step.loss for step in steps}
    assert set(told) == set(itertools.product(range(2), range(8)))
    assert len(steps) == 16
    assert all(step.iterations == 7 and not step.finished for step in steps)
    best = min(range(2), key=lambda r: found.trials[r].loss)
    assert tuple(told[best, i] for i in range(8)) == found.losses


def test_the_reported_loss_is_that_of_the_images() -> None:
    truth = digits(1)
    update = update_of(truth)
    found = search(update, iterations=2, restarts=3)
    targets = torch.eye(10)[found.labels]
    loss = naive_loss(update, found.images, targets)
    # Clamping removes the little that lies outside of the box.
    assert float(loss.detach()) == pytest.approx(found.loss, rel=0.2)


def test_it_stops_when_it_is_done() -> None:
    steps: list[Step] = []
    found = search(update_of(digits(1)), restarts=3, on_step=steps.append)
    assert found.loss < 1e-9
    assert len(found.losses) < 100
    reasons = [trial.stopped for trial in found.trials]
    assert reasons.count("matched") == 1
    assert "another restart has matched the update" in reasons
    assert steps[-1].finished


def test_noise_is_not_fitted() -> None:
    truth = digits(1)
    generator = torch.Generator().manual_seed(0)
    update = defend(
        update_of(truth), GaussianNoise(0.05, relative=True), generator=generator
    )
    found = search(update, restarts=2)
    assert found.stopped == "matched down to the noise"
    assert 1e-4 < found.loss < 0.05**2 * 1.01
    silent = update.replace_tensors(update.tensors, noise_std=0.0)
    longer = search(silent, restarts=2, iterations=30)
    assert longer.loss < found.loss
    assert longer.stopped != "matched down to the noise"


def test_noise_on_a_weight_change_has_the_units_of_a_weight_change() -> None:
    truth = digits(1)
    generator = torch.Generator().manual_seed(0)
    plain = update_of(truth, sends="delta", lr=0.01)
    update = defend(plain, GaussianNoise(0.05, relative=True), generator=generator)
    found = search(update, restarts=2, iterations=40)
    assert "matched down to the noise" in [trial.stopped for trial in found.trials]
    assert 1e-4 < found.loss < 0.05**2 * 1.01


# --- failures are reported and replaced -------------------------------------------


def broken_starts(monkeypatch, bad: set[int], value: float = math.nan) -> None:
    """Make the loss of some starts not finite, wherever they are in the batch."""
    start = MatchingProblem.start
    evaluate = MatchingProblem.evaluate
    count = itertools.count()
    marked: list[Tensor] = []

    def new_start(self, generator, init_scale):
        point = start(self, generator, init_scale)
        if next(count) in bad:
            marked.append(point)
        return point

    def broken(self, points, clients):
        loss, gradient = evaluate(self, points, clients)
        for row, point in enumerate(points):
            if any(torch.equal(point, other) for other in marked):
                loss[row], gradient[row] = value, value
        return loss, gradient

    monkeypatch.setattr(MatchingProblem, "start", new_start)
    monkeypatch.setattr(MatchingProblem, "evaluate", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [{0}, {1}, {0, 2}])
def test_a_start_of_nan_is_replaced_and_reported(monkeypatch, bad, value) -> None:
    broken_starts(monkeypatch, bad, value)
    truth = digits(1)
    found = search(update_of(truth), restarts=3)
    failed = [t for t in found.trials if not math.isfinite(t.loss)]
    assert len(failed) == len(bad)
    for trial in failed:
        assert trial.replaced
        assert "not finite at the start" in trial.stopped
    assert {trial.seed for trial in failed} == bad
    assert len({trial.seed for trial in found.trials}) == len(found.trials)
    # The chosen trial is a good one: defect of a public tool after a NaN.
    assert min(psnr(found, truth)) > 40
    assert found.loss == min(t.loss for t in found.trials if math.isfinite(t.loss))
    assert found.stopped in ("matched", "another restart has matched the update")


def test_every_start_of_nan_is_refused(monkeypatch) -> None:
    broken_starts(monkeypatch, set(range(1000)))
    message = "update: expected a finite matching loss .* none in .* starts; lower"
    with pytest.raises(InputError, match=message):
        search(update_of(digits(1)), restarts=3, iterations=5)


def test_nan_of_one_client_does_not_touch_the_others(monkeypatch) -> None:
    images = digits(1, 2)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]
    broken_starts(monkeypatch, {0})
    found = search_clients(updates, restarts=1)
    for one, truth in zip(found, images, strict=True):
        assert min(psnr(one, truth)) > 40
    assert [len(one.trials) for one in found] == [2, 1]


def test_a_stuck_start_is_replaced_within_the_budget() -> None:
    """No image of this model explains random numbers, so that every start stands."""
    images = digits(1)
    model = model_for(images)
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
    }
    update = SharedUpdate(
        model=model, tensors=noise, num_samples=1, image_shape=(1, 8, 8)
    )
    steps: list[Step] = []
    found = search(
        update, attack="dlg", restarts=2, iterations=24, on_step=steps.append
    )
    assert found.loss > 0.01
    replaced = [trial for trial in found.trials if trial.replaced]
    assert replaced
    for trial in replaced:
        assert trial.stopped in ("stuck", optimise.NO_LOWER_POINT)
    assert found.loss == min(trial.loss for trial in found.trials)
    assert max(step.iteration for step in steps) <= 24
    for restart in range(2):
        mine = [step.iteration for step in steps if step.restart == restart]
        assert mine == sorted(mine)


def coarse_float32(monkeypatch, at_double=lambda count: None) -> None:
    """Round the loss in single precision, so that its searches must fail."""
    original = MatchingProblem.evaluate
    count = itertools.count()

    def evaluate(self, points, clients):
        loss, gradient = original(self, points, clients)
        if points.dtype == torch.float32:
            return (loss * 1e3).round() / 1e3, gradient
        at_double(next(count))
        return loss, gradient

    monkeypatch.setattr(MatchingProblem, "evaluate", evaluate)


def test_rounding_is_overcome_in_double_precision(monkeypatch) -> None:
    """A search that rounding ends is taken up again; its report is one run."""
    coarse_float32(monkeypatch)
    truth = digits(11)
    steps: list[Step] = []
    found = search(update_of(truth), restarts=2, log_every=1, on_step=steps.append)
    assert found.loss < 1e-9
    assert min(psnr(found, truth)) > 40
    assert found.images.dtype == torch.float32
    assert sorted(trial.seed for trial in found.trials) == [0, 1]
    assert found.iterations == tuple(range(len(found.losses)))
    assert found.losses[0] > 1e-3 > 1e-9 > found.losses[-1]
    assert len(found.snapshots) == len(found.losses)
    assert all(trial.evaluations > 20 for trial in found.trials)
    for restart in range(2):
        mine = [step.iteration for step in steps if step.restart == restart]
        assert mine == sorted(mine)


@pytest.mark.parametrize("when", [0, 1, 30])
def test_ctrl_c_in_double_precision_keeps_what_was_found(monkeypatch, when) -> None:
    def stop(count: int) -> None:
        if count == when:
            raise KeyboardInterrupt

    coarse_float32(monkeypatch, stop)
    found = search(update_of(digits(11)), restarts=2)
    assert "interrupted" in [trial.stopped for trial in found.trials]
    assert len(found.trials) == 2
    assert all(math.isfinite(trial.loss) for trial in found.trials)
    assert found.loss == min(trial.loss for trial in found.trials) < 1e-2


# --- interruptions ----------------------------------------------------------------


@pytest.mark.parametrize("when", [1, 3, 6])
def test_ctrl_c_returns_the_best_so_far(when: int) -> None:
    losses: list[float] = []

    def stop(step: Step) -> None:
        losses.append(step.loss)
        if step.restart == 1 and step.iteration == when:
            raise KeyboardInterrupt

    update = update_of(digits(1, 2))
    found = search(update, restarts=3, iterations=50, on_step=stop)
    assert found.stopped == "interrupted"
    assert [trial.stopped for trial in found.trials] == ["interrupted"] * 3
    assert found.loss == min(trial.loss for trial in found.trials)
    assert found.loss <= min(losses)
    assert torch.equal(found.snapshots[-1], found.images)
    assert found.iterations == tuple(range(len(found.losses)))
    # The images are the ones that have the reported loss.
    problem = MatchingProblem([update], make_plan([update], "dlg"))
    assert problem.num_pixels == found.images.numel()


def test_ctrl_c_at_the_very_start() -> None:
    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    images = digits(1, 2)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]
    found = search_clients(updates, restarts=2, on_step=stop)
    assert [one.stopped for one in found] == ["interrupted"] * 2
    assert all(math.isfinite(one.loss) for one in found)


def test_ctrl_c_before_there_is_anything(monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MatchingProblem, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        search(update_of(digits(1)))


@pytest.mark.parametrize("calls", [2, 10, 30, 41, 55])
def test_ctrl_c_in_the_middle_of_an_evaluation(monkeypatch, calls: int) -> None:
    original = MatchingProblem.evaluate
    count = itertools.count()
    points: list[Tensor] = []

    def evaluate(self, x, clients):
        if next(count) == calls:
            raise KeyboardInterrupt
        points.extend(x.clone())
        return original(self, x, clients)

    monkeypatch.setattr(MatchingProblem, "evaluate", evaluate)
    update = update_of(digits(1, 2))
    found = search(update, restarts=2, iterations=5)
    assert found.stopped == "interrupted"
    # The pictures belong to an evaluated point, and that point has the stated loss.
    monkeypatch.undo()
    plan = make_plan([update], "dlg")
    problem = MatchingProblem([update], plan)
    shown = [
        x for x in points if torch.equal(problem.images(x).clamp(0, 1), found.images)
    ]
    assert shown
    loss, _ = problem.evaluate(shown[-1][None], torch.tensor([0]))
    assert found.loss == pytest.approx(float(loss), rel=1e-4)


def test_ctrl_c_between_groups_of_clients(monkeypatch) -> None:
    """Finished groups are kept, the ones that had not begun are missing."""
    monkeypatch.setattr(module, "_TRIALS_CPU", 2)
    monkeypatch.setattr(module, "side_by_side", lambda work, like: 1)
    images = digits(1, 2, 3, 4, 5)
    model = model_for(images)
    updates = [local_update(model, image) for image in images]

    def stop(step: Step) -> None:
        if step.client >= 2:
            raise KeyboardInterrupt

    found = search_clients(updates, restarts=1, iterations=2, on_step=stop)
    assert len(found) == 4
    assert found[0].stopped != "interrupted"
    assert found[2].stopped == found[3].stopped == "interrupted"

    original = MatchingProblem.evaluate

    def evaluate(self, x, clients):
        if torch.equal(self.targets[0][0], updates[2].tensors["0.weight"]):
            raise KeyboardInterrupt
        return original(self, x, clients)

    monkeypatch.setattr(MatchingProblem, "evaluate", evaluate)
    found = search_clients(updates, restarts=1, iterations=2)
    assert len(found) == 2


def test_other_errors_of_the_caller_come_through() -> None:
    def fail(step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(update_of(digits(1)), on_step=fail)


# --- what it refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "idgl"}, "attack: .*auto, dlg, idlg.*, got 'idgl'; did you mean"),
        ({"iterations": 0}, "iterations: expected an integer of at least 1, got 0"),
        ({"restarts": -1}, "restarts: expected an integer of at least 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"seed": 2**32}, "seed: expected an integer of at most"),
        ({"seed": 1.0}, "seed: expected an integer"),
        ({"log_every": 0}, "log_every: expected an integer of at least 1"),
        ({"init_scale": -0.1}, "init_scale: expected a finite number >= 0"),
        ({"init_scale": math.nan}, "init_scale: expected a finite number >= 0"),
        ({"tv_weight": math.inf}, "tv_weight: expected a finite number >= 0"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(update_of(digits(1)), **settings)


def test_idlg_needs_one_sample() -> None:
    with pytest.raises(InputError, match="one sample .* got one of 2 samples"):
        search(update_of(digits(1, 2)), attack="idlg")


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"epochs": 3}, "3 sgd steps"),
        ({"batch_size": 1}, "2 sgd steps"),
        ({"optimiser": "adam"}, "1 adam steps"),
    ],
)
def test_several_local_steps(recipe: dict, what: str) -> None:
    update = update_of(digits(1, 2), sends="delta", **recipe)
    with pytest.raises(
        InputError, match=f"weight change of one SGD step, got the .*{what}"
    ):
        search(update)


def test_an_update_of_zeros() -> None:
    update = update_of(digits(1))
    zeros = {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    with pytest.raises(InputError, match="update: expected a non-zero update"):
        invert(update.replace_tensors(zeros))


def test_an_update_with_nan() -> None:
    update = update_of(digits(1))
    bad = {name: t * math.nan for name, t in update.tensors.items()}
    with pytest.raises(InputError, match="expected finite numbers, got .* NaN"):
        search(update.replace_tensors(bad))


def test_a_shape_that_the_model_does_not_take() -> None:
    update = update_of(digits(1))
    wrong = update.replace_tensors(update.tensors, image_shape=(1, 9, 9))
    with pytest.raises(InputError, match=r"image_shape: .*\(1, 9, 9\)") as error:
        search(wrong, attack="dlg")
    assert "\n" not in str(error.value)


def test_a_model_without_classes() -> None:
    model = nn.Conv2d(1, 2, 3, padding=1)
    update = SharedUpdate(
        model=model,
        tensors={n: torch.ones_like(p) for n, p in model.named_parameters()},
        num_samples=1,
        image_shape=(1, 8, 8),
    )
    with pytest.raises(InputError, match=r"model: expected logits of shape"):
        invert(update)


def test_updates_that_do_not_belong_together() -> None:
    one, other = update_of(digits(1)), update_of(digits(1, 2))
    with pytest.raises(InputError, match="updates: expected equal numbers of samples"):
        invert_clients([one, other])
    stranger = local_update(model_for(digits(1), seed=1), digits(1))
    with pytest.raises(InputError, match="updates: expected updates of one model"):
        invert_clients([one, stranger])
    with pytest.raises(InputError, match="updates: expected at least one update"):
        invert_clients([])


# --- auto under noise ---------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_auto_under_noise_beats_algebra_and_search(declared: bool) -> None:
    truth = photos(2)
    generator = torch.Generator().manual_seed(0)
    noisy = defend(
        update_of(truth), GaussianNoise(1e-3, relative=True), generator=generator
    )
    if not declared:  # the attacker is not told
        noisy = dataclasses.replace(noisy, noise_std=0.0)
    found = {
        name: psnr(invert(noisy, attack=name, iterations=60), truth)[0]
        for name in ("auto", "exact", "idlg", "inverting-gradients")
    }
    assert found["auto"] > max(found["exact"], found["inverting-gradients"]) + 3
    assert found["auto"] > found["idlg"] - 0.5
    assert "the algebra of 'exact' left a residual" in invert(noisy).reason


def test_heavy_noise_still_beats_the_floor() -> None:
    truth = photos(3)
    generator = torch.Generator().manual_seed(1)
    noisy = defend(
        update_of(truth), GaussianNoise(0.1, relative=True), generator=generator
    )
    found = invert(noisy)
    assert psnr(found, truth)[0] > score(found, truth).floors["constant"].psnr[0] + 2


@pytest.mark.parametrize("useful", [True, False])
def test_a_guess_is_a_start_only_where_it_matches_better_than_grey(useful) -> None:
    truth = digits(3)
    update = update_of(truth)
    problem = MatchingProblem([update], make_plan([update], "idlg"))
    noise = torch.rand(truth.pixels.shape, generator=torch.Generator().manual_seed(0))
    guess = truth.pixels + 0.02 * noise if useful else (noise > 0.5).float()
    search = Search(
        problem,
        clients=[0],
        iterations=1,
        restarts=1,
        seed=0,
        init_scale=0.05,
        log_every=1,
        on_step=None,
        guesses={0: guess},
    )
    first = search.run()[0].snapshots[0]
    assert bool(torch.allclose(first, guess.clamp(0, 1))) is useful


@pytest.mark.parametrize("distance", ["squared", "cosine", "absolute", "layerwise"])
@pytest.mark.parametrize("optimiser", ["l-bfgs", "adam", "signed-adam"])
def test_every_distance_with_every_optimiser(distance: str, optimiser: str) -> None:
    truth = digits(4)
    found = invert(
        update_of(truth),
        distance=distance,
        optimiser=optimiser,
        restarts=1,
        iterations=25,
    )
    assert found.attack == "idlg"
    assert found.loss < 0.5 * found.losses[0]
    assert psnr(found, truth)[0] > score(found, truth).floors["constant"].psnr[0] + 1


def test_a_likelihood_in_nats_is_a_distance() -> None:
    """Its unit must not change when the attack says that it has matched."""
    truth = digits(4)
    found = invert(
        update_of(truth), distance=gaussian_likelihood(1e-4), restarts=1, iterations=80
    )
    assert found.losses[0] > 1e3
    assert found.stopped == "matched"
    assert psnr(found, truth)[0] > 40


def test_a_recipe_is_not_mixed_with_algebra() -> None:
    with pytest.raises(InputError, match="attack: expected a search"):
        invert(update_of(digits(1)), attack="exact", distance="cosine")
    with pytest.raises(InputError, match="distance: expected one of"):
        invert(update_of(digits(1)), distance="manhattan")
    with pytest.raises(InputError, match="optimiser: expected one of"):
        invert(update_of(digits(1)), optimiser="sgd")


def test_levenberg_marquardt_finds_all_digits_of_the_gradient() -> None:
    truth = digits(1)
    update = update_of(truth)
    found = invert(update, optimiser="levenberg-marquardt", iterations=20, restarts=1)
    assert found.stopped == "matched"
    assert found.loss < 1e-12
    assert psnr(found, truth)[0] > 80
    assert len(found.losses) < 20
    assert found.losses[-1] < found.losses[-3] ** 1.5  # faster than any fixed factor


def test_levenberg_marquardt_stands_in_a_batch_where_the_gradient_is_silent() -> None:
    """It matches two images behind LeNet exactly, and they are not the true ones."""
    truth = digits(1, 2)
    found = invert(
        local_update(model_for(truth).double(), truth),
        optimiser="levenberg-marquardt",
        labels=truth.labels,
        iterations=40,
        restarts=1,
    )
    assert found.loss < 1e-8
    assert found.label_source == "given (upper bound)"


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"attack": "dlg"}, "labels to be fitted"),
        ({"distance": "cosine"}, "another distance"),
        ({"tv_weight": 0.1}, "total variation of weight 0.1"),
    ],
)
def test_levenberg_marquardt_needs_squares(settings, got: str) -> None:
    message = f"optimiser: expected known labels and the squared error alone .*{got}"
    with pytest.raises(InputError, match=message):
        invert(update_of(digits(1)), optimiser="levenberg-marquardt", **settings)


def test_trials_that_do_not_fit_together_are_taken_in_turns() -> None:
    updates = [update_of(digits(k)) for k in range(3)]
    problem = MatchingProblem(updates, make_plan(updates, "idlg"))
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([problem.start(generator, 0.3) for _ in range(7)])
    clients = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    loss, gradient = problem.evaluate(points, clients)
    problem.together = 3
    again, slopes = problem.evaluate(points, clients)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(slopes, gradient)


@pytest.mark.parametrize("lr", [0.05, None])
def test_auto_replays_the_local_steps_of_a_single_image(lr: float | None) -> None:
    image = digits(3)
    sent = update_of(image, sends="delta", lr=0.05, epochs=3)
    assert not sent.is_gradient
    recipe = dataclasses.replace(sent.training, lr=lr)
    seen = sent.replace_tensors(sent.tensors, training=recipe)
    found = invert(seen, iterations=6, restarts=1)
    assert found.attack == "gaussian-map"
    assert psnr(found, image)[0] > 35
    assert ("inferred" in found.reason) == (lr is None)
