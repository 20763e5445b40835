"""Two means that differ in one client are as good as its update."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradinv_helpers.attacks.differencing import difference_updates
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.federated.secure_aggregation import secure_aggregate
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SIZES = (3, 1, 4, 2, 1)


def client_updates(model: nn.Module, training=None) -> list[SharedUpdate]:
    generator = torch.Generator().manual_seed(0)
    updates = []
    for size in SIZES:
        pixels = torch.rand(size, 1, 6, 6, generator=generator)
        labels = torch.randint(4, (size,), generator=generator)
        updates.append(
            local_update(model, Images(pixels, labels, tuple("abcd")), training)
        )
    return updates


def lenet(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = build_model("lenet", in_channels=1, image_size=6, num_classes=4)
    return model.to(dtype)


def errors(found: SharedUpdate, expected: SharedUpdate) -> torch.Tensor:
    return torch.cat(
        [(found.tensors[n] - t).flatten() for n, t in expected.tensors.items()]
    )


@pytest.mark.parametrize("left_out", range(len(SIZES)))
@pytest.mark.parametrize(
    "training",
    [LocalTraining(), LocalTraining(sends="delta", epochs=3)],
    ids=["gradient", "delta"],
)
def test_the_one_client_is_recovered(left_out: int, training) -> None:
    updates = client_updates(lenet(), training)
    rest = [u for k, u in enumerate(updates) if k != left_out]
    found = difference_updates(aggregate(updates), aggregate(rest))
    assert float(errors(found, updates[left_out]).abs().max()) < 1e-13
    assert found.num_samples == SIZES[left_out]
    assert found.group_sizes == (SIZES[left_out],)
    assert found.training == training


def test_several_clients_stay_a_sum() -> None:
    updates = client_updates(lenet())
    found = difference_updates(aggregate(updates), aggregate(updates[:3]))
    expected = aggregate(updates[3:])
    assert float(errors(found, expected).abs().max()) < 1e-13
    assert sorted(found.group_sizes or ()) == [1, 2]


@pytest.mark.parametrize("bits", [16, 32])
def test_stated_noise_covers_the_rounding_of_secure_sums(bits: int) -> None:
    """Two sums of fresh roundings: the noise of the difference is counted."""
    updates = client_updates(lenet())

    def total(chosen: list[SharedUpdate], seed: int) -> SharedUpdate:
        return secure_aggregate(
            chosen,
            threshold=2,
            seed=seed,
            bits=bits,
            bound=4.0,
            rounding="stochastic",
        )

    found = difference_updates(total(updates, 0), total(updates[:4], 1))
    error = float(errors(found, updates[4]).std())
    # Rounding at random errs by s**2 / 6 where values lie evenly within a step, and by
    # less where they lie below one.
    assert 0.3 * found.noise_std < error < 1.1 * found.noise_std


@pytest.mark.parametrize("bits", [16, 32])
def test_rounding_in_the_same_steps_cancels(bits: int) -> None:
    """The same clients, of whom one drops out of the second sum."""
    generator = torch.Generator().manual_seed(1)
    updates = [
        update.replace_tensors(
            {
                name: torch.rand(t.shape, generator=generator, dtype=t.dtype)
                for name, t in update.tensors.items()
            }
        )
        for update in client_updates(lenet())
    ]
    how = {"threshold": 2, "bits": bits, "bound": 4.0}
    whole = secure_aggregate(updates, **how)
    rest = secure_aggregate(updates, dropouts=[0], seed=1, **how)
    found = difference_updates(whole, rest, same_noise=True)
    error = float(errors(found, updates[0]).std())
    assert error == pytest.approx(found.noise_std, rel=0.1)
    # One client's rounding, 1 / 12 of a squared step, on 3 samples.
    alone = found.noise_std * found.num_samples
    assert alone == pytest.approx(whole.noise_std * 11 / math.sqrt(5), rel=1e-6)
    assert difference_updates(whole, rest).noise_std > 2 * found.noise_std


def test_noise_grows_by_the_weights() -> None:
    updates = client_updates(lenet())
    larger = aggregate(updates).replace_tensors(
        aggregate(updates).tensors, noise_std=0.3
    )
    smaller = aggregate(updates[:4]).replace_tensors(
        aggregate(updates[:4]).tensors, noise_std=0.1
    )
    found = difference_updates(larger, smaller)
    assert found.noise_std == pytest.approx(math.hypot(11 * 0.3, 10 * 0.1), rel=1e-9)


def test_rounding_of_float32_is_counted() -> None:
    updates = client_updates(lenet(torch.float32))
    found = difference_updates(aggregate(updates), aggregate(updates[:4]))
    error = errors(found, updates[4]).double()
    assert 0.2 * found.noise_std < float(error.std()) < 2 * found.noise_std
    assert next(iter(found.tensors.values())).dtype == torch.float32


def test_statistics_of_batch_norm_are_told_apart_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    updates = client_updates(model.train())
    found = difference_updates(aggregate(updates), aggregate(updates[1:]))
    assert found.buffers is not None and updates[0].buffers is not None
    for name, value in updates[0].buffers.items():
        assert torch.allclose(found.buffers[name], value, atol=1e-12), name
    silent = aggregate(updates[1:]).replace_tensors(updates[1].tensors, buffers=None)
    assert difference_updates(aggregate(updates), silent).buffers is None


def test_cohorts_that_do_not_contain_each_other() -> None:
    updates = client_updates(lenet())
    whole = aggregate(updates)
    for smaller in (
        whole,
        aggregate([*updates, updates[0]]),
        aggregate([updates[0]] * 2),
    ):
        with pytest.raises(InputError, match="smaller: expected some, not all, of the"):
            difference_updates(whole, smaller)
    other = build_model("lenet", in_channels=1, image_size=6, num_classes=4, seed=1)
    with pytest.raises(InputError, match="updates of one model"):
        difference_updates(whole, aggregate(client_updates(other.double())[:2]))
