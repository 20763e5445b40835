"""The server's mean is the gradient of all images together."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate, apply_update, normalize
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update


def some_images(count: int) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.rand(count, 1, 6, 6, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcd"))


def lenet(seed: int = 0) -> nn.Module:
    model = build_model("lenet", in_channels=1, image_size=6, num_classes=4, seed=seed)
    return model.double()


MODEL = lenet()


def split(images: Images, sizes) -> list[Images]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        images[list(range(end - size, end))]
        for size, end in zip(sizes, ends, strict=True)
    ]


def norm(update: SharedUpdate) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in update.tensors.values()))


def assert_equal(found: SharedUpdate, expected: SharedUpdate) -> None:
    for name, tensor in expected.tensors.items():
        assert torch.allclose(found.tensors[name], tensor, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (5, 2, 9), (1, 30), (3, 3, 3, 1)])
def test_aggregate_is_the_gradient_of_the_union(sizes) -> None:
    images = some_images(sum(sizes))
    found = aggregate([local_update(MODEL, part) for part in split(images, sizes)])
    expected = local_update(MODEL, images)
    assert_equal(found, expected)
    assert found.num_samples == sum(sizes)
    assert found.group_sizes == sizes


@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_order_of_the_clients_does_not_matter(order) -> None:
    updates = [local_update(MODEL, p) for p in split(some_images(11), (5, 1, 2, 3))]
    assert_equal(aggregate([updates[i] for i in order]), aggregate(updates))


def constant(value: float, num_samples: int, **fields) -> SharedUpdate:
    tensors = {name: torch.full_like(p, value) for name, p in MODEL.named_parameters()}
    return SharedUpdate(
        model=MODEL,
        tensors=tensors,
        num_samples=num_samples,
        image_shape=(1, 6, 6),
        **fields,
    )


def test_every_one_of_a_hundred_clients_counts_the_same() -> None:
    """A moving average, as in one public tool, would weigh the last ones most."""
    clients = 100
    updates = [constant(0.0, 2) for _ in range(clients)]
    for chosen in (0, 50, 99):
        some = list(updates)
        some[chosen] = constant(1.0, 2)
        bias = aggregate(some).tensors["7.bias"]
        assert torch.allclose(bias, torch.full_like(bias, 1 / clients), rtol=1e-12)
    every = aggregate([constant(1.0, 2)] * clients).tensors["7.bias"]
    assert torch.allclose(every, torch.ones_like(every), rtol=1e-12)


def test_weights_are_the_numbers_of_samples() -> None:
    bias = aggregate([constant(1.0, 1), constant(5.0, 3)]).tensors["7.bias"]
    assert torch.allclose(bias, torch.full_like(bias, 4.0))


def test_noise_adds_up_in_variance() -> None:
    updates = [constant(0.0, 1, noise_std=0.4), constant(0.0, 3, noise_std=0.2)]
    expected = math.sqrt((0.25 * 0.4) ** 2 + (0.75 * 0.2) ** 2)
    assert aggregate(updates).noise_std == pytest.approx(expected, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    noisy = [
        update.replace_tensors(
            {
                n: t + update.noise_std * torch.randn(t.shape, generator=generator)
                for n, t in update.tensors.items()
            }
        )
        for update in updates
    ]
    values = torch.cat([t.flatten() for t in aggregate(noisy).tensors.values()])
    assert float(values.std()) == pytest.approx(expected, rel=0.03)


def test_aggregates_can_be_aggregated() -> None:
    parts = [local_update(MODEL, p) for p in split(some_images(10), (2, 3, 5))]
    nested = aggregate([aggregate(parts[:2]), parts[2]])
    assert_equal(nested, aggregate(parts))
    assert nested.group_sizes == (2, 3, 5)


def test_weight_changes_are_averaged_like_gradients() -> None:
    recipe = LocalTraining("delta", lr=0.2)
    parts = split(some_images(7), (3, 4))
    found = aggregate([local_update(MODEL, part, recipe) for part in parts])
    assert_equal(found, local_update(MODEL, some_images(7), recipe))
    assert found.kind == "delta"


def test_running_statistics_are_averaged() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 4)
    ).train()
    parts = [local_update(model, part) for part in split(some_images(8), (2, 6))]
    mean = aggregate(parts).buffers
    assert mean is not None
    first, second = (part.buffers["1.running_mean"] for part in parts)
    expected = 0.25 * first + 0.75 * second
    assert torch.allclose(mean["1.running_mean"], expected)
    assert int(mean["1.num_batches_tracked"]) == 1
    server = copy.deepcopy(model)
    apply_update(server, aggregate(parts), lr=0.5)
    assert torch.allclose(server[1].running_mean, expected)
    silent = parts[1].replace_tensors(parts[1].tensors, buffers=None)
    assert aggregate([parts[0], silent]).buffers is None


def test_inputs_are_left_as_they_were() -> None:
    updates = [constant(1.0, 1), constant(3.0, 1)]
    aggregate(updates)
    normalize(updates[0])
    assert float(updates[0].tensors["7.bias"][0]) == 1.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: local_update(lenet(seed=1), some_images(2)), "another model in nu"),
        (
            lambda: local_update(
                nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), some_images(2)
            ),
            "another model in number 1",
        ),
        (
            lambda: local_update(MODEL, some_images(2), LocalTraining("delta")),
            "the same training in all, got another in number 1",
        ),
        (
            lambda: normalize(local_update(MODEL, some_images(2))),
            "the same normalized in all",
        ),
        (
            lambda: SharedUpdate(
                model=MODEL,
                tensors=dict(MODEL.named_parameters()),
                num_samples=1,
                image_shape=(1, 5, 5),
            ),
            "the same image_shape in all",
        ),
    ],
)
def test_updates_that_do_not_belong_together(other, message: str) -> None:
    with pytest.raises(InputError, match=f"^updates: expected .*{message}"):
        aggregate([local_update(MODEL, some_images(3)), other()])


def test_nothing_to_aggregate() -> None:
    with pytest.raises(InputError, match="updates: expected at least one update"):
        aggregate([])


def test_unknown_rule() -> None:
    with pytest.raises(InputError, match="rule: expected one of mean, got 'median'"):
        aggregate([constant(1.0, 1)], rule="median")  # type: ignore[arg-type]


# --- unit norm --------------------------------------------------------------------


def test_normalised_update_has_unit_norm_over_all_layers() -> None:
    update = local_update(MODEL, some_images(3))
    length = norm(update)
    unit = normalize(update)
    assert norm(unit) == pytest.approx(1, rel=1e-12)
    assert unit.normalized
    for name, tensor in update.tensors.items():
        assert torch.allclose(unit.tensors[name] * length, tensor, rtol=1e-10)


def test_normalised_noise_shrinks_with_the_update() -> None:
    update = constant(0.5, 1, noise_std=0.3)
    assert normalize(update).noise_std == pytest.approx(0.3 / norm(update))


def test_normalised_updates_are_weighted_by_samples() -> None:
    parts = [local_update(MODEL, p) for p in split(some_images(4), (1, 3))]
    found = aggregate([normalize(part) for part in parts])
    for name, tensor in found.tensors.items():
        expected = sum(
            part.num_samples / 4 * part.tensors[name] / norm(part) for part in parts
        )
        assert torch.allclose(tensor, expected)
    assert found.normalized


def test_what_cannot_be_normalised() -> None:
    parts = [local_update(MODEL, p) for p in split(some_images(4), (1, 3))]
    with pytest.raises(InputError, match="the update of one client, got an aggregate"):
        normalize(aggregate(parts))
    with pytest.raises(InputError, match="a non-zero update, got all zeros"):
        normalize(constant(0.0, 1))


# --- the server's step ------------------------------------------------------------


def test_a_gradient_is_applied_with_the_step_size() -> None:
    update = local_update(MODEL, some_images(3))
    server = lenet()
    apply_update(server, update, lr=0.25)
    for name, parameter in server.named_parameters():
        expected = MODEL.state_dict()[name] - 0.25 * update.tensors[name]
        assert torch.allclose(parameter, expected, rtol=1e-12)
        assert parameter.requires_grad and parameter.grad is None


def test_the_step_size_of_the_recipe_is_the_default() -> None:
    recipe = LocalTraining(lr=0.7)
    update = local_update(MODEL, some_images(3), recipe)
    one, two = lenet(), lenet()
    apply_update(one, update)
    apply_update(two, update, lr=0.7)
    assert torch.equal(one[7].weight, two[7].weight)


def test_a_weight_change_is_added() -> None:
    update = local_update(MODEL, some_images(3), LocalTraining("delta", epochs=3))
    server = lenet()
    apply_update(server, update, lr=0.25)
    for name, parameter in server.named_parameters():
        expected = MODEL.state_dict()[name] + update.tensors[name]
        assert torch.allclose(parameter, expected, rtol=1e-12)


def test_federated_sgd_is_central_sgd() -> None:
    """Two rounds of clients move the model like two steps on all images."""
    images = some_images(9)
    server, central = lenet(), lenet()
    optimiser = torch.optim.SGD(central.parameters(), lr=0.3)
    for _ in range(2):
        parts = split(images, (2, 3, 4))
        apply_update(
            server, aggregate([local_update(server, p) for p in parts]), lr=0.3
        )
        optimiser.zero_grad()
        logits = central(images.pixels.double())
        nn.functional.cross_entropy(logits, images.labels).backward()
        optimiser.step()
    for ours, theirs in zip(server.parameters(), central.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
