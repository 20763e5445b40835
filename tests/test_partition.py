import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.partition import Client, partition
from gradinv_helpers.updates import LocalTraining


def numbered(labels, num_classes=10):
    """Images whose first pixel is their position."""
    pixels = torch.arange(len(labels)).reshape(-1, 1, 1, 1) / 1000
    names = tuple(map(str, range(num_classes)))
    return Images(pixels, torch.as_tensor(labels), names)


def positions(client):
    return (client.images.pixels.flatten() * 1000).round().int().tolist()


label_lists = st.lists(st.integers(0, 9), min_size=2, max_size=60)


@given(
    labels=label_lists,
    scheme=st.sampled_from(["iid", "dirichlet", "shards"]),
    alpha=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_image_goes_to_exactly_one_client(labels, scheme, alpha, seed, data):
    most = len(labels) // 2 if scheme == "shards" else len(labels)
    clients = data.draw(st.integers(1, most))
    images = numbered(labels)
    options = {
        "clients": clients,
        "scheme": scheme,
        "alpha": alpha if scheme == "dirichlet" else None,
        "seed": seed,
    }
    parts = partition(images, **options)
    assert len(parts) == clients
    assert min(len(part.images) for part in parts) >= 1
    found = [position for part in parts for position in positions(part)]
    assert sorted(found) == list(range(len(labels)))
    for part in parts:
        assert part.images.labels.tolist() == [labels[i] for i in positions(part)]
    again = partition(images, **options)
    assert [positions(part) for part in again] == [positions(part) for part in parts]


@given(labels=label_lists, data=st.data())
@settings(max_examples=50, deadline=None)
def test_iid_sizes_differ_by_at_most_one(labels, data):
    clients = data.draw(st.integers(1, len(labels)))
    sizes = [len(part.images) for part in partition(numbered(labels), clients=clients)]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_give_different_parts():
    images = numbered([0] * 30)
    first, second = (
        positions(partition(images, clients=2, seed=seed)[0]) for seed in (0, 1)
    )
    assert first != second


def classes_per_client(parts):
    counts = [len(part.images.labels.unique()) for part in parts]
    return sum(counts) / len(counts)


def test_small_alpha_separates_the_classes_and_large_alpha_mixes_them():
    images = numbered([i % 10 for i in range(500)])
    options = {"clients": 5, "scheme": "dirichlet", "seed": 3}
    apart = partition(images, alpha=0.01, **options)
    mixed = partition(images, alpha=1e308, **options)
    assert classes_per_client(apart) < 4
    assert classes_per_client(mixed) == 10
    # Equal shares of 50 images per class: every client has 10 of each.
    for part in mixed:
        assert torch.bincount(part.images.labels).tolist() == [10] * 10


def test_shards_give_at_most_two_classes_when_shards_fit_the_classes():
    images = numbered([i % 10 for i in range(500)])
    parts = partition(images, clients=5, scheme="shards", seed=1)
    assert [len(part.images) for part in parts] == [100] * 5
    assert max(len(part.images.labels.unique()) for part in parts) == 2


def test_training_recipe_reaches_every_client():
    recipe = LocalTraining(sends="delta", lr=0.5, epochs=2)
    images = numbered([0, 1, 2])
    parts = partition(images, clients=3, training=recipe)
    assert all(part.training == recipe for part in parts)
    assert partition(images, clients=1)[0].training == LocalTraining()


def test_client_is_frozen():
    client = Client(numbered([0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        client.images = numbered([1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 5}, "clients: expected at most 4 for 4 images .*'iid', got 5"),
        (
            {"clients": 3, "scheme": "shards"},
            "clients: expected at most 2 for 4 images and scheme 'shards', got 3",
        ),
        ({"clients": 0}, "clients: expected an integer of at least 1, got 0"),
        ({"clients": 2, "seed": -1}, "seed: expected an integer of at least 0"),
        ({"clients": 2, "scheme": "shard"}, "scheme: .*did you mean 'shards'"),
        (
            {"clients": 2, "alpha": 0.5},
            "alpha: expected nothing for the scheme 'iid', got 0.5; leave it out",
        ),
        (
            {"clients": 2, "scheme": "dirichlet"},
            "alpha: expected a number > 0 for the scheme 'dirichlet', got None",
        ),
        (
            {"clients": 2, "scheme": "dirichlet", "alpha": 0.0},
            "alpha: expected a finite number > 0, got 0.0",
        ),
        (
            {"clients": 2, "scheme": "dirichlet", "alpha": float("nan")},
            "alpha: expected a finite number > 0, got nan",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        partition(numbered([0, 1, 2, 3]), **options)
