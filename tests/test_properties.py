"""What must hold for every batch, model, objective and seed.

Examples are drawn by hypothesis, the same ones in every run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gradinv_helpers.attacks.gradients import gradient_map
from gradinv_helpers.attacks.invert import Reconstruction, invert, invert_clients
from gradinv_helpers.attacks.labels import infer_labels
from gradinv_helpers.attacks.matching import (
    absolute_error,
    cosine_distance,
    gaussian_likelihood,
    laplace_likelihood,
    layerwise_squared_error,
    only_layers,
    squared_error,
    top_k,
    weighted,
)
from gradinv_helpers.data import Images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.metrics import score
from gradinv_helpers.models import build_model
from gradinv_helpers.partition import partition
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SIDE, CLASSES = 8, 5
CLASS_NAMES = tuple("abcde")
Gradients = list[Tensor]
Distance = Callable[[Gradients, Gradients], tuple[Tensor, Gradients]]


def examples(count: int) -> settings:
    """So many examples, the same in every run and on every machine."""
    return settings(derandomize=True, deadline=None, max_examples=count)


class Wrapped(nn.Module):
    """No plain chain of layers, so that the engine differentiates by autograd."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def built(name: str) -> nn.Module:
    if name == "wrapped":
        return Wrapped(built("lenet")).eval()
    return build_model(name, in_channels=1, image_size=SIDE, num_classes=CLASSES)


NAMES = ("lenet", "mlp", "convnet", "wrapped")
SINGLE = {name: built(name) for name in NAMES}
DOUBLE = {name: copy.deepcopy(model).double() for name, model in SINGLE.items()}

names = st.sampled_from(NAMES)
seeds = st.integers(0, 10_000)
scales = st.floats(1e-4, 1e4)

# How the value changes when dummy and shared gradient are both multiplied by c.
RELATIVE: dict[str, Distance] = {
    "squared": squared_error,
    "absolute": absolute_error,
    "layerwise": layerwise_squared_error,
    "weighted": weighted(squared_error, [1.0, 0.0, 3.0]),
    "top-k": top_k(squared_error, 0.4),
}
ANGULAR: dict[str, Distance] = {
    "cosine": cosine_distance,
    "cosine of some layers": only_layers(cosine_distance, [0, 2]),
    "cosine of the top": top_k(cosine_distance, 0.4),
    "weighted cosine": weighted(cosine_distance, [0.2, 1.0, 3.0]),
}
ABSOLUTE: dict[str, Distance] = {
    "gaussian": gaussian_likelihood(0.3),
    "gaussian per layer": gaussian_likelihood([0.3, 2.0, 0.1]),
    "laplace": laplace_likelihood(0.3),
}
DISTANCES = RELATIVE | ANGULAR | ABSOLUTE
# Those that take a model with any number of parameters.
GENERAL = {
    name: DISTANCES[name]
    for name in ("squared", "absolute", "layerwise", "top-k", "cosine", "gaussian")
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int, seed: int) -> Images:
    generator = seeded(seed)
    pixels = torch.rand(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Images(pixels, labels, CLASS_NAMES)


def some_gradients(trials: int, seed: int) -> Gradients:
    generator = seeded(seed)
    shapes = [(trials, 4, 3), (trials, 4), (trials, 2, 3, 2)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def dummies(trials: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Dummy images and soft labels in float64."""
    generator = seeded(seed)
    x = torch.rand(trials, count, 1, SIDE, SIDE, generator=generator)
    y = torch.randn(trials, count, CLASSES, generator=generator)
    return x.double(), torch.softmax(y.double(), -1)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def sent(update: SharedUpdate) -> Tensor:
    return flat(update.tensors.values())


def stacked(update: SharedUpdate, trials: int) -> Gradients:
    return [t.expand(trials, *t.shape) for t in update.tensors.values()]


def gap(one: Tensor, other: Tensor) -> float:
    """Relative difference."""
    return float((one - other).norm() / other.norm().clamp_min(1e-300))


def matching(
    model: nn.Module, target: Gradients, x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss of every trial and its gradient at the images, for every objective."""
    mapped, found = gradient_map(model), {}
    for name, distance in GENERAL.items():
        gradients, pullback = mapped(x, y)
        loss, derivatives = distance(gradients, target)
        found[name] = (loss, pullback(derivatives)[0])
    return found


# --- batches ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@examples(4)
@given(order=st.permutations(range(4)), seed=seeds)
def test_order_of_a_batch_does_not_change_its_update(name, order, seed) -> None:
    images = some_images(4, seed)
    update = local_update(DOUBLE[name], images)
    assert gap(sent(local_update(DOUBLE[name], images[order])), sent(update)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@examples(4)
@given(order=st.permutations(range(3)), seed=seeds)
def test_order_of_a_batch_permutes_the_image_gradient(name, order, seed) -> None:
    model = DOUBLE[name]
    target = stacked(local_update(model, some_images(3, seed)), 2)
    x, y = dummies(2, 3, seed + 1)
    found = matching(model, target, x, y)
    permuted = matching(model, target, x[:, order], y[:, order])
    for objective, (loss, slope) in found.items():
        assert gap(permuted[objective][0], loss) < 1e-10, objective
        assert gap(permuted[objective][1], slope[:, order]) < 1e-8, objective
        assert float(slope.abs().max()) > 0, objective


@pytest.mark.parametrize("name", NAMES)
@examples(4)
@given(count=st.integers(1, 5), seed=seeds)
def test_a_batch_is_the_mean_of_its_images(name, count, seed) -> None:
    model, images = DOUBLE[name], some_images(count, seed)
    rows = torch.stack([sent(local_update(model, image)) for image in images])
    assert gap(rows.mean(0), sent(local_update(model, images))) < 1e-12


@examples(8)
@given(name=names, sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3))
def test_one_step_of_a_batch_is_the_weighted_mean_of_its_parts(name, sizes) -> None:
    model, recipe = DOUBLE[name], LocalTraining(sends="delta", lr=0.3)
    images = some_images(sum(sizes), 3)
    parts = torch.arange(sum(sizes)).split(sizes)
    rows = [sent(local_update(model, images[part], recipe)) for part in parts]
    mean = sum(size / sum(sizes) * row for size, row in zip(sizes, rows, strict=True))
    assert gap(mean, sent(local_update(model, images, recipe))) < 1e-10


@examples(8)
@given(name=names, count=st.integers(1, 3), seed=seeds)
def test_a_batch_taken_twice_sends_the_same(name, count, seed) -> None:
    model, images = DOUBLE[name], some_images(count, seed)
    twice = images[[*range(count), *range(count)]]
    assert gap(sent(local_update(model, twice)), sent(local_update(model, images))) < (
        1e-12
    )


# --- aggregates -------------------------------------------------------------------


def nested(updates: Sequence[SharedUpdate], rng: random.Random) -> SharedUpdate:
    """The updates, in order, aggregated along a random tree."""
    if len(updates) == 1:
        return updates[0]
    cut = rng.randrange(1, len(updates))
    return aggregate([nested(updates[:cut], rng), nested(updates[cut:], rng)])


@examples(15)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    tree=st.integers(0, 10_000),
    noise=st.sampled_from([0.0, 0.2]),
)
def test_aggregates_of_aggregates_are_one_aggregate(sizes, tree, noise) -> None:
    model, images = DOUBLE["mlp"], some_images(sum(sizes), tree)
    parts = [images[part] for part in torch.arange(sum(sizes)).split(sizes)]
    updates = [
        defend(local_update(model, part), GaussianNoise(noise), generator=seeded(k))
        for k, part in enumerate(parts)
    ]
    once, again = aggregate(updates), nested(updates, random.Random(tree))
    assert gap(sent(again), sent(once)) < 1e-12
    assert again.group_sizes == once.group_sizes == tuple(sizes)
    assert again.num_samples == sum(sizes)
    shares = [size / sum(sizes) * noise for size in sizes]
    for update in (once, again):  # variances add up
        assert update.noise_std == pytest.approx(math.hypot(*shares), rel=1e-12)
    if noise == 0:
        assert gap(sent(once), sent(local_update(model, images))) < 1e-12


# --- objectives -------------------------------------------------------------------


@pytest.mark.parametrize("objective", ANGULAR)
@examples(6)
@given(scale=scales, other=scales, seed=seeds)
def test_cosine_ignores_the_scale_of_either_side(objective, scale, other, seed) -> None:
    dummy, target = some_gradients(2, seed), some_gradients(2, seed + 1)
    loss, slopes = ANGULAR[objective](dummy, target)
    again, scaled = ANGULAR[objective](
        [other * g for g in dummy], [scale * g for g in target]
    )
    assert torch.allclose(again, loss, rtol=1e-10, atol=1e-12)
    assert gap(other * flat(scaled), flat(slopes)) < 1e-9
    assert 0 <= float(loss.min()) <= float(loss.max()) <= 2


@pytest.mark.parametrize("objective", RELATIVE)
@examples(6)
@given(scale=scales, seed=seeds)
def test_relative_errors_have_no_unit(objective, scale, seed) -> None:
    dummy, target = some_gradients(2, seed), some_gradients(2, seed + 1)
    loss, slopes = RELATIVE[objective](dummy, target)
    again, scaled = RELATIVE[objective](
        [scale * g for g in dummy], [scale * g for g in target]
    )
    assert torch.allclose(again, loss, rtol=1e-10)
    assert gap(scale * flat(scaled), flat(slopes)) < 1e-9
    zeros = [torch.zeros_like(g) for g in dummy]
    one, _ = RELATIVE[objective](zeros, target)
    assert torch.allclose(one, torch.ones_like(one), rtol=1e-10)


@examples(6)
@given(scale=scales, seed=seeds)
def test_likelihoods_have_the_unit_of_their_noise(scale, seed) -> None:
    dummy, target = some_gradients(2, seed), some_gradients(2, seed + 1)
    for family in (gaussian_likelihood, laplace_likelihood):
        loss, _ = family(0.3)(dummy, target)
        again, _ = family(0.3 * scale)(
            [scale * g for g in dummy], [scale * g for g in target]
        )
        assert torch.allclose(again, loss, rtol=1e-10)


@pytest.mark.parametrize("objective", DISTANCES)
@examples(6)
@given(seed=seeds)
def test_derivative_of_every_objective_by_differences(objective, seed) -> None:
    distance = DISTANCES[objective]
    dummy, target, along = (some_gradients(2, seed + k) for k in range(3))
    loss, slopes = distance(dummy, target)
    products = [(s * a).flatten(1).sum(1) for s, a in zip(slopes, along, strict=True)]
    step = 1e-6

    def moved(size: float) -> Tensor:
        values = [d + size * a for d, a in zip(dummy, along, strict=True)]
        return distance(values, target)[0]

    differences = (moved(step) - moved(-step)) / (2 * step)
    unit = flat(slopes).norm()
    assert float((differences - sum(products)).abs().max()) < 1e-5 * float(unit)
    at_truth, _ = distance(target, target)
    assert float(at_truth.abs().max()) < 1e-12 < float(loss.min())


@pytest.mark.parametrize("name", NAMES)
@examples(3)
@given(count=st.integers(1, 2), seed=seeds)
def test_image_gradient_of_every_objective_by_differences(name, count, seed) -> None:
    """All the way: from a step of the images to the change of the loss."""
    model = DOUBLE[name]
    target = stacked(local_update(model, some_images(count, seed)), 1)
    x, y = dummies(1, count, seed + 1)
    along = torch.randn(x.shape, generator=seeded(seed + 2), dtype=x.dtype)
    along, step = along / along.norm(), 1e-6
    found = matching(model, target, x, y)
    after = matching(model, target, x + step * along, y)
    before = matching(model, target, x - step * along, y)
    for objective, (_, slope) in found.items():
        difference = float(after[objective][0] - before[objective][0]) / (2 * step)
        expected, size = float((slope * along).sum()), float(slope.norm())
        assert abs(difference - expected) < 1e-3 * abs(expected) + 1e-4 * size, (
            objective
        )


@examples(8)
@given(name=names, count=st.integers(1, 3), seed=seeds)
def test_the_truth_matches_under_every_objective(name, count, seed) -> None:
    model, images = DOUBLE[name], some_images(count, seed)
    target = stacked(local_update(model, images), 1)
    y = F.one_hot(images.labels, CLASSES).double()[None]
    for loss, _ in matching(model, target, images.pixels.double()[None], y).values():
        assert abs(float(loss)) < 1e-11


@pytest.mark.parametrize("name", NAMES)
@examples(3)
@given(seed=seeds)
def test_single_and_double_precision_agree(name, seed) -> None:
    images = some_images(2, seed)
    x, y = dummies(2, 2, seed + 1)
    results = []
    for model, dtype in ((SINGLE[name], torch.float32), (DOUBLE[name], torch.float64)):
        update = local_update(model, images)
        assert all(t.dtype == dtype for t in update.tensors.values())
        found = matching(model, stacked(update, 2), x.to(dtype), y.to(dtype))
        pairs = [part for pair in found.values() for part in pair]
        assert all(part.dtype == dtype for part in pairs)
        results.append([sent(update), *(part.double() for part in pairs)])
    for single, double in zip(*results, strict=True):
        assert gap(single, double) < 1e-4


# --- models -----------------------------------------------------------------------


def last_linear(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


@examples(10)
@given(name=names, constant=st.floats(-20, 20), seed=seeds)
def test_a_constant_on_all_logits_changes_nothing(name, constant, seed) -> None:
    shifted = copy.deepcopy(DOUBLE[name])
    with torch.no_grad():
        last_linear(shifted).bias += constant
    images = some_images(2, seed)
    x, y = dummies(1, 2, seed + 1)
    found = []
    for model in (DOUBLE[name], shifted):
        update = local_update(model, images)
        losses = matching(model, stacked(update, 1), x, y).values()
        found.append([sent(update), *(part for pair in losses for part in pair)])
    for one, other in zip(*found, strict=True):
        assert gap(one, other) < 1e-8
    label = infer_labels(local_update(shifted, images[[0]]))
    assert label.tolist() == images[[0]].labels.tolist()


@examples(8)
@given(name=names, order=st.permutations(range(CLASSES)), seed=seeds)
def test_classes_can_be_renamed(name, order, seed) -> None:
    """Class k becomes class order[k], in the last layer and in the labels."""
    renamed, order = copy.deepcopy(DOUBLE[name]), torch.tensor(order)
    images = some_images(2, seed)
    with torch.no_grad():
        layer, old = last_linear(renamed), last_linear(DOUBLE[name])
        layer.weight[order], layer.bias[order] = old.weight, old.bias
    relabelled = Images(images.pixels, order[images.labels], CLASS_NAMES)
    before = list(local_update(DOUBLE[name], images).tensors.values())
    after = list(local_update(renamed, relabelled).tensors.values())
    assert gap(flat(after[:-2]), flat(before[:-2])) < 1e-9
    for one, other in zip(after[-2:], before[-2:], strict=True):
        assert gap(one[order], other) < 1e-9
    label = infer_labels(local_update(renamed, relabelled[[0]]))
    assert label.tolist() == relabelled[[0]].labels.tolist()


# --- the attack as a whole --------------------------------------------------------

ATTACKS = ("dlg", "idlg", "inverting-gradients")


def same(one: Reconstruction, other: Reconstruction) -> None:
    """Bit for bit equal, but for the time and the word for the seed."""
    for field in dataclasses.fields(one):
        if field.name in ("seconds", "seed"):
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def global_states() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        pickle.dumps(np.random.get_state()),
        pickle.dumps(random.getstate()),
    ]


@pytest.mark.parametrize("attack", ATTACKS)
@examples(3)
@given(name=names, seed=st.integers(0, 1000), outside=seeds)
def test_an_attack_depends_on_its_seed_alone(attack, name, seed, outside) -> None:
    update = local_update(SINGLE[name], some_images(1, seed))
    options = {"attack": attack, "iterations": 1, "restarts": 2, "seed": seed}
    first = invert(update, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(outside)
        before = global_states()
        again = invert(update, **options)
        assert global_states() == before
    same(first, again)
    other = invert(update, **options | {"seed": seed + 1})
    assert not torch.equal(other.snapshots[0], first.snapshots[0])


@pytest.mark.parametrize("attack", ATTACKS)
@examples(6)
@given(
    name=st.sampled_from(["lenet", "wrapped"]),  # ReLU would amplify rounding
    clients=st.integers(2, 4),
    seed=st.integers(0, 1000),
    last=st.booleans(),
)
def test_a_client_is_attacked_as_if_it_were_alone(
    attack, name, clients, seed, last
) -> None:
    """Client k starts from seed + k; only sums in another order tell the difference."""
    model = DOUBLE[name]
    updates = [local_update(model, some_images(1, seed + k)) for k in range(clients)]
    options = {"attack": attack, "iterations": 1, "restarts": 2}
    together = invert_clients(updates, seed=seed, **options)
    assert len(together) == clients
    k = clients - 1 if last else 0
    alone = invert(updates[k], seed=seed + k, **options)
    assert torch.equal(together[k].snapshots[0], alone.snapshots[0])
    assert together[k].losses[0] == pytest.approx(alone.losses[0], rel=1e-9)
    assert together[k].labels.tolist() == alone.labels.tolist()
    assert together[k].loss == pytest.approx(alone.loss, rel=1e-4, abs=1e-12)
    assert float((together[k].images - alone.images).abs().max()) < 1e-3


@examples(5)
@given(name=names, power=st.integers(-12, 12), seed=st.integers(0, 1000))
def test_the_cosine_attack_ignores_the_scale_of_the_update(name, power, seed) -> None:
    """A power of two changes no digit on the way, so that results are equal."""
    update = local_update(SINGLE[name], some_images(1, seed))
    scaled = update.replace_tensors(
        {n: t * 2.0**power for n, t in update.tensors.items()}
    )
    options = {"attack": "inverting-gradients", "iterations": 1, "restarts": 2}
    same(invert(update, **options), invert(scaled, **options))


@examples(4)
@given(name=names, seed=st.integers(0, 1000))
def test_inference_of_labels_ignores_the_scale_of_the_update(name, seed) -> None:
    images = some_images(1, seed)
    update = local_update(SINGLE[name], images)
    for scaled in (update, normalize(update)):
        assert infer_labels(scaled).tolist() == images.labels.tolist()


@examples(5)
@given(outside=seeds, seed=st.integers(0, 1000))
def test_every_step_leaves_the_global_random_state_alone(outside, seed) -> None:
    def pipeline() -> list[Tensor]:
        images = some_images(6, seed)
        model = build_model(
            "mlp", in_channels=1, image_size=SIDE, num_classes=CLASSES, seed=seed
        )
        clients = partition(images, clients=2, seed=seed)
        recipe = LocalTraining(sends="delta", epochs=2, batch_size=2)
        trained = [local_update(model, c.images, recipe, seed=seed) for c in clients]
        noisy = [defend(u, GaussianNoise(0.1), generator=seeded(seed)) for u in trained]
        found = score(images, images, seed=seed)
        return [sent(aggregate(noisy)), torch.tensor(found.floors["random_image"].mse)]

    first = pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(outside)
        before = global_states()
        again = pipeline()
        assert global_states() == before
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_gpu_gives_what_the_cpu_gives(attack: str) -> None:
    images = some_images(1, 0)
    cuda = torch.device("cuda")
    for name in NAMES:
        model = copy.deepcopy(DOUBLE[name]).to(cuda)
        update, reference = (local_update(m, images) for m in (model, DOUBLE[name]))
        assert all(t.is_cuda for t in update.tensors.values())
        assert gap(sent(update).cpu(), sent(reference)) < 1e-10
        options = {"attack": attack, "iterations": 1, "restarts": 2}
        found, expected = invert(update, **options), invert(reference, **options)
        assert found.images.device.type == found.labels.device.type == "cpu"
        assert torch.equal(found.snapshots[0], expected.snapshots[0])
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.loss == pytest.approx(expected.loss, rel=1e-3, abs=1e-10)
