"""Class proportions against true shares, guesses and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradinv_helpers.attacks.class_proportions import infer_class_proportions
from gradinv_helpers.attacks.labels import infer_label_counts
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.defences import GaussianNoise, defend
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, local_update

FEDAVG = LocalTraining(sends="delta", lr=0.1, epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images("digits", split="train", image_size=8)


@pytest.fixture(scope="module")
def public(images) -> Images:
    """Ten images of each class that no client holds: every seventh one."""
    pool = images[torch.arange(0, len(images), 7)]
    return pool[torch.cat([(pool.labels == k).nonzero()[:10, 0] for k in range(10)])]


def client(images: Images, counts: list[int]) -> Images:
    """So many images of each class, none of them public."""
    left = torch.arange(len(images)) % 7 != 0
    chosen = [
        ((images.labels == k) & left).nonzero()[:count, 0]
        for k, count in enumerate(counts)
    ]
    return images[torch.cat(chosen)]


def mlp(seed: int = 0) -> nn.Module:
    return build_model("mlp", in_channels=1, image_size=8, num_classes=10, seed=seed)


@pytest.fixture(scope="module")
def trained(images) -> nn.Module:
    """A model after some epochs on images that are neither public nor the clients'."""
    model = mlp()
    mine = images[(torch.arange(len(images)) % 7 != 0).nonzero()[-500:, 0]]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(mine.pixels), mine.labels).backward()
        optimiser.step()
    return model


def distance(found: Tensor, counts: list[int]) -> float:
    """Total variation to the true shares."""
    shares = torch.tensor(counts).double() / sum(counts)
    return 0.5 * float((found - shares).abs().sum())


def guess(counts: list[int]) -> float:
    return distance(torch.full((10,), 0.1, dtype=torch.float64), counts)


def by_examples(update, public, **options) -> Tensor:
    return infer_class_proportions(
        update, examples=public.pixels, example_labels=public.labels, **options
    )


SKEWED = [40, 20, 0, 0, 0, 0, 5, 0, 0, 0]
SINGLE = [0, 0, 0, 50, 0, 0, 0, 0, 0, 0]
MIXED = [12, 3, 20, 0, 7, 5, 0, 9, 1, 3]


@pytest.mark.parametrize("counts", [SKEWED, SINGLE, MIXED])
def test_one_gradient_gives_the_shares(images, public, trained, counts) -> None:
    for model in (mlp(), trained):
        update = local_update(model, client(images, counts))
        found = by_examples(update, public)
        assert float(found.sum()) == pytest.approx(1)
        assert float(found.min()) >= 0
        assert distance(found, counts) < min(0.15, guess(counts) / 2)


@pytest.mark.parametrize("optimiser", ["sgd", "momentum"])
@pytest.mark.parametrize("counts", [SKEWED, SINGLE, MIXED])
def test_local_epochs_do_not_hide_the_shares(
    images, public, trained, counts, optimiser
) -> None:
    recipe = LocalTraining(
        sends="delta",
        lr=0.1 if optimiser == "sgd" else 0.02,
        epochs=2,
        batch_size=16,
        optimiser=optimiser,
    )
    for model in (mlp(), trained):
        update = local_update(model, client(images, counts), recipe, seed=1)
        assert distance(by_examples(update, public), counts) < 0.6 * guess(counts)


def test_examples_beat_counts_on_a_trained_model(images, public, trained) -> None:
    update = local_update(trained, client(images, MIXED), FEDAVG, seed=1)
    counts = infer_class_proportions(update)
    assert distance(by_examples(update, public), MIXED) < distance(counts, MIXED)


def test_the_mixture_of_the_examples_themselves_is_found(public) -> None:
    """A client that holds exactly the examples of some classes."""
    for model_seed in range(2):
        chosen = public[(public.labels == 2) | (public.labels == 7)]
        update = local_update(mlp(model_seed), chosen)
        found = by_examples(update, public)
        assert float(found[2]) == pytest.approx(0.5, abs=0.05)
        assert float(found[7]) == pytest.approx(0.5, abs=0.05)


def test_an_aggregate_shows_the_shares_of_all_its_images(images, public) -> None:
    groups = [SKEWED, SINGLE]
    updates = [local_update(mlp(), client(images, counts)) for counts in groups]
    together = [sum(pair) for pair in zip(*groups, strict=True)]
    assert distance(by_examples(aggregate(updates), public), together) < 0.1


def test_without_examples_labels_are_counted(images) -> None:
    update = local_update(mlp(), client(images, SKEWED), FEDAVG, seed=1)
    counts = infer_label_counts(update)
    found = infer_class_proportions(update)
    assert torch.allclose(found, counts.double() / counts.sum())


def test_adam_and_normalised_clients_fall_back_on_counts(images, public) -> None:
    adam = LocalTraining(sends="delta", lr=0.001, epochs=2, optimiser="adam")
    data = client(images, SKEWED)
    for update in (
        local_update(mlp(), data, adam),
        normalize(local_update(mlp(), data, FEDAVG)),
    ):
        found = by_examples(update, public)
        assert torch.equal(found, infer_class_proportions(update, method="counts"))
        with pytest.raises(InputError, match="what method 'examples' needs"):
            by_examples(update, public, method="examples")


def test_the_same_call_gives_the_same_shares(images, public) -> None:
    update = local_update(mlp(), client(images, MIXED), FEDAVG, seed=1)
    state = torch.get_rng_state()
    first = by_examples(update, public)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, by_examples(update, public))
    assert not torch.equal(first, by_examples(update, public, seed=1))


def test_noise_drowns_the_shares(images, public) -> None:
    """Noise that the update states leaves nothing but even shares."""
    update = local_update(mlp(), client(images, SINGLE))
    generator = torch.Generator().manual_seed(0)
    noisy = defend(update, GaussianNoise(1e3), generator=generator)
    found = by_examples(noisy, public)
    assert float(found.max()) < 0.2
    assert float(by_examples(update, public).max()) > 0.9


def test_a_model_without_bias_and_one_with_batch_norm(images, public) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with_norm = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)
    )
    for model in (plain, with_norm):
        nn.init.normal_(model[-1].weight, std=0.1, generator=seeded())
        before = {n: b.clone() for n, b in model.named_buffers()}
        update = local_update(model, client(images, SKEWED))
        found = by_examples(update, public)
        assert distance(found, SKEWED) < 0.5 * guess(SKEWED)
        for name, buffer in update.model.named_buffers():
            assert torch.equal(buffer, before[name])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_bad_examples_are_refused_in_one_line(images, public) -> None:
    update = local_update(mlp(), client(images, SKEWED))
    good, labels = public.pixels, public.labels
    for examples, of, message in (
        (good, None, "examples and example_labels together"),
        (good[:, :, :4], labels, r"shape \(M, 1, 8, 8\)"),
        (good, labels[:-1], "100 integers"),
        (good, labels + 5, "classes 0 to 9"),
        (good[:11], labels[:11], "at least two of every class"),
    ):
        with pytest.raises(InputError, match=message):
            infer_class_proportions(update, examples=examples, example_labels=of)
    with pytest.raises(InputError, match="no examples"):
        infer_class_proportions(update, method="examples")
    with pytest.raises(InputError, match="method: expected one of"):
        infer_class_proportions(update, method="guess")
