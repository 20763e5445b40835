"""Whoever drops out and when: the exact sum of the rest, or the documented error."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.federated import secagg_client, secagg_server
from gradinv_helpers.federated.aggregation import aggregate
from gradinv_helpers.federated.fixed_point import FixedPoint
from gradinv_helpers.federated.masks import agree
from gradinv_helpers.federated.secagg_messages import (
    ROUNDS,
    BelowThresholdError,
    SecAggSettings,
)
from gradinv_helpers.federated.secure_aggregation import (
    paper_bytes,
    secure_aggregate,
    secure_sum,
)
from gradinv_helpers.models import build_model
from gradinv_helpers.updates import LocalTraining, SharedUpdate, local_update

SIZE = 3


def subsets(items: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    sizes = range(len(items) + 1)
    return chain.from_iterable(combinations(items, size) for size in sizes)


def plain_sum(vectors, counts, survivors, roster) -> np.ndarray:
    """The sum of what the survivors encode, with nothing hidden."""
    code = FixedPoint(sum(counts[k] for k in roster), len(roster))
    total = np.zeros(SIZE, code.dtype)
    for k in survivors:
        total += code.encode(vectors[k], counts[k])
    return total


# --- exhaustive ---------------------------------------------------------------------


@pytest.fixture
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember key agreements: they are pure, and the tests repeat them."""
    remembered = functools.cache(agree)
    for module in (secagg_client, secagg_server):
        monkeypatch.setattr(module, "agree", remembered)


@pytest.mark.parametrize("count", range(1, 7))
def test_every_way_to_drop_out(count: int, quick_keys: None) -> None:
    """Every threshold, every subset of clients in every round: 5**n ways in all.

    Runs that begin alike share their beginning: a copy of the parties goes on. The
    documented error of a round ends all ways that begin so.
    """
    everybody = tuple(range(count))
    counts = [k + 1 for k in everybody]
    vectors = np.random.default_rng(count).normal(size=(count, SIZE))
    ways = 0
    for threshold in range(1, count + 1):
        chosen = SecAggSettings(threshold)
        fresh = {
            k: secagg_client.SecAggClient(
                k, vectors[k], counts[k], settings=chosen, seed=count
            )
            for k in everybody
        }
        keys = {k: client.advertise_keys() for k, client in fresh.items()}
        for first in subsets(everybody):
            server = secagg_server.SecAggServer(SIZE, settings=chosen)
            if len(first) < threshold:
                with pytest.raises(BelowThresholdError, match="advertise-keys"):
                    server.collect_keys([keys[k] for k in first])
                ways += 4 ** len(first)
                continue
            roster = server.collect_keys([keys[k] for k in first])
            sharers = {k: copy.copy(fresh[k]) for k in first}
            shares = {k: client.share_keys(roster) for k, client in sharers.items()}
            for second in subsets(first):
                if len(second) < threshold:
                    with pytest.raises(BelowThresholdError, match="share-keys"):
                        copy.copy(server).route_letters([shares[k] for k in second])
                    ways += 3 ** len(second)
                    continue
                ways += finish(server, sharers, shares, second, vectors, counts)
    assert ways == count * 5**count


def finish(server, sharers, shares, second, vectors, counts) -> int:
    """All ways to go on after the keys were shared; returns how many."""
    threshold = server.settings.threshold
    server = copy.copy(server)
    mail = server.route_letters([shares[k] for k in second])
    senders = {k: copy.copy(sharers[k]) for k in second}
    inputs = {k: client.masked_input(mail[k]) for k, client in senders.items()}
    ways = 0
    for third in subsets(second):
        collector = copy.copy(server)
        if len(third) < threshold:
            with pytest.raises(BelowThresholdError, match="masked-input"):
                collector.collect_inputs([inputs[k] for k in third])
            ways += 2 ** len(third)
            continue
        request = collector.collect_inputs([inputs[k] for k in third])
        answers = {k: copy.copy(senders[k]).unmask(request) for k in third}
        expected = plain_sum(vectors, counts, third, server.roster)
        for fourth in subsets(third):
            ways += 1
            last = copy.copy(collector)
            if len(fourth) < threshold:
                with pytest.raises(BelowThresholdError, match="unmasking"):
                    last.unmask([answers[k] for k in fourth])
            else:
                found = last.unmask([answers[k] for k in fourth])
                assert np.array_equal(found, expected), (threshold, third, fourth)
    return ways


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_call_agrees_with_the_rounds(data: st.DataObject) -> None:
    """Sampled ways to drop out, through the one call that users make."""
    count = data.draw(st.integers(1, 7))
    threshold = data.draw(st.integers(1, count))
    stages = data.draw(
        st.lists(st.sampled_from([*ROUNDS, None]), min_size=count, max_size=count)
    )
    counts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    vectors = np.random.default_rng(count).uniform(-16, 16, (count, SIZE))
    dropouts = {k: stage for k, stage in enumerate(stages) if stage is not None}
    left = [
        [k for k in range(count) if stages[k] not in ROUNDS[: number + 1]]
        for number in range(4)
    ]

    def run():
        return secure_sum(vectors, counts, threshold=threshold, dropouts=dropouts)

    too_few = [name for name, s in zip(ROUNDS, left, strict=True) if len(s) < threshold]
    if too_few:
        with pytest.raises(BelowThresholdError, match=f"^{too_few[0]}: expected"):
            run()
        return
    found = run()
    assert found.survivors == tuple(left[2])
    expected = plain_sum(vectors, counts, left[2], left[0])
    assert np.array_equal(found.residues, expected)
    exact = sum(counts[k] * vectors[k] for k in left[2])
    assert found.values == pytest.approx(exact, abs=count * found.step)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_widths_and_rounding(bits: int, rounding) -> None:
    vectors = np.random.default_rng(0).uniform(-2, 2, (5, 4_000))
    found = secure_sum(
        vectors,
        [1, 2, 3, 4, 5],
        threshold=3,
        dropouts=[0],
        bits=bits,
        bound=2.0,
        rounding=rounding,
    )
    exact = sum((k + 1) * vectors[k] for k in range(1, 5))
    error = found.values - exact
    if bits < 64:  # below the resolution of float64
        assert float(error.std()) == pytest.approx(found.rounding_std, rel=0.05)
    assert float(np.abs(error).max()) <= 4 * found.step + 1e-14


# --- updates ------------------------------------------------------------------------


def some_images(count: int) -> Images:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.rand(count, 1, 6, 6, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return Images(pixels, labels, tuple("abcd"))


def lenet() -> nn.Module:
    return build_model("lenet", in_channels=1, image_size=6, num_classes=4)


def client_updates(model: nn.Module, sizes, training=None) -> list[SharedUpdate]:
    images, start, updates = some_images(sum(sizes)), 0, []
    for size in sizes:
        part = images[list(range(start, start + size))]
        updates.append(local_update(model, part, training))
        start += size
    return updates


def largest_difference(one: SharedUpdate, other: SharedUpdate) -> float:
    return max(
        float((one.tensors[n] - t).abs().max()) for n, t in other.tensors.items()
    )


@pytest.mark.parametrize(
    "training",
    [LocalTraining(), LocalTraining(sends="delta", epochs=2, batch_size=2)],
    ids=["gradient", "delta"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_aggregate_of_the_survivors(training, dtype) -> None:
    sizes = (3, 1, 4, 2)
    updates = client_updates(lenet().to(dtype), sizes, training)
    found = secure_aggregate(updates, threshold=2, dropouts=[1])
    expected = aggregate([updates[0], updates[2], updates[3]])
    assert found.num_samples == 9
    assert found.group_sizes == (3, 4, 2)
    assert found.training == training
    assert next(iter(found.tensors.values())).dtype == dtype
    assert 0 < found.noise_std < 1e-7
    assert largest_difference(found, expected) < 6 * found.noise_std + 1e-7
    finer = secure_aggregate(updates, threshold=2, dropouts=[1], bits=64)
    exact = largest_difference(finer, expected)
    assert exact < (1e-7 if dtype == torch.float32 else 1e-15)


def test_stated_noise_is_the_rounding_error() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [  # evenly spread, so that few entries lie below one step
        update.replace_tensors(
            {
                name: 2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1
                for name, t in update.tensors.items()
            }
        )
        for update in client_updates(lenet().double(), (3, 1, 4, 2))
    ]
    found = secure_aggregate(updates, threshold=2, bits=16, bound=2.0)
    expected = aggregate(updates)
    error = torch.cat(
        [(found.tensors[n] - t).flatten() for n, t in expected.tensors.items()]
    )
    assert float(error.std()) == pytest.approx(found.noise_std, rel=0.1)


def test_noise_of_the_clients_is_kept() -> None:
    updates = [
        update.replace_tensors(update.tensors, noise_std=0.5)
        for update in client_updates(lenet(), (1, 1, 2))
    ]
    found = secure_aggregate(updates, threshold=1, dropouts=[0])
    assert found.noise_std == pytest.approx(aggregate(updates[1:]).noise_std)


def test_statistics_of_batch_norm_are_hidden_with_the_rest() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)
    )
    model.train()
    updates = client_updates(model, (2, 3, 4))
    found = secure_aggregate(updates, threshold=2, dropouts=[0])
    expected = aggregate(updates[1:])
    assert found.buffers is not None and expected.buffers is not None
    for name, value in expected.buffers.items():
        assert found.buffers[name].dtype == value.dtype
        assert torch.allclose(found.buffers[name], value, atol=1e-6), name
    silent = [
        updates[0].replace_tensors(updates[0].tensors, buffers=None),
        *updates[1:],
    ]
    assert secure_aggregate(silent, threshold=2, dropouts=[0]).buffers is None


def test_seed_changes_the_masks_and_not_the_sum() -> None:
    updates = client_updates(lenet(), (1, 2, 1))
    found = [secure_aggregate(updates, threshold=2, seed=s) for s in (0, 0, 1, None)]
    for other in found[1:]:
        assert largest_difference(found[0], other) == 0


def test_global_random_states_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = (torch.rand(1), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    secure_sum([np.zeros(2)] * 3, [1, 1, 1], threshold=2, rounding="stochastic")
    assert (torch.rand(1), np.random.rand()) == expected


# --- bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bytes_of_every_round(count: int, bits: int) -> None:
    """Keys 32, shares 32, tags 16, digest 32, counts and numbers of clients 4 bytes."""
    entries, others = 50, count - 1
    found = secure_sum(
        [np.zeros(entries)] * count, [1] * count, threshold=count, bits=bits
    )
    keys = 4 + 4 + 2 * 32
    letters = others * (4 + 2 * 32 + 16)
    sent = [keys, 4 + 32 + letters, 4 + entries * bits // 8, 4 + count * (4 + 32)]
    assert found.sent.tolist() == [sent] * count
    received = [others * keys, letters, 4 * count, 0]
    assert found.received.tolist() == [received] * count
    # Beside the paper's count there are only headers, tags and one digest.
    extra = 4 + 4 + 8 * others + (4 + 32) + others * 2 * 20 + 4 + (4 + 4 * count)
    measured = int((found.sent + found.received)[0].sum())
    assert measured == paper_bytes(count, entries, bits=bits) + extra + 4 * count


def test_bytes_of_those_who_drop_out() -> None:
    found = secure_sum(
        [np.zeros(5)] * 6,
        [1] * 6,
        threshold=2,
        dropouts=[(0, "advertise-keys"), (1, "share-keys"), 2, (3, "unmasking")],
    )
    silent = found.sent == 0
    assert silent.sum(axis=1).tolist() == [4, 3, 2, 1, 0, 0]
    assert found.survivors == (3, 4, 5)


@pytest.mark.parametrize(
    ("clients", "entries", "factor"), [(2**10, 2**20, 1.73), (2**14, 2**24, 1.98)]
)
def test_paper_formula_gives_the_published_expansion(clients, entries, factor) -> None:
    """Abstract of Bonawitz et al. (2017): inputs of 16 bits, sums of n of them."""
    bits = (clients * (2**16 - 1)).bit_length()
    found = paper_bytes(clients, entries, bits=bits) / (2 * entries)
    assert round(found, 2) == factor


# --- bad input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0}, "threshold: expected an integer of at least 1"),
        ({"threshold": 4}, "threshold: expected an integer of at most 3"),
        ({"dropouts": [3]}, "dropouts: expected an integer of at most 2"),
        ({"dropouts": [(1, "later")]}, "dropouts: expected one of advertise-keys"),
        ({"dropouts": [1, (1, "unmasking")]}, "every client once, got 1 twice"),
        ({"bits": 8}, "bits: expected 16, 32 or 64"),
        ({"bound": 1e-9}, "values: expected entries of absolute value up to bound"),
        ({"rounding": "up"}, "rounding: expected one of nearest, stochastic"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    updates = client_updates(lenet(), (1, 1, 1))
    arguments = {"threshold": 2} | changes
    with pytest.raises(InputError, match=message):
        secure_aggregate(updates, **arguments)


def test_updates_that_do_not_belong_together() -> None:
    updates = client_updates(lenet(), (1, 1))
    other = client_updates(lenet(), (1,), LocalTraining(lr=0.5))
    with pytest.raises(InputError, match="the same training in all"):
        secure_aggregate([*updates, *other], threshold=2)
    with pytest.raises(InputError, match="updates: expected at least one update"):
        secure_aggregate([], threshold=1)


@pytest.mark.parametrize(
    ("vectors", "counts", "message"),
    [
        ([], [], "at least one vector"),
        ([np.zeros(2)], [1, 1], "a weight for each, got 1 and 2"),
        ([np.zeros(2), np.zeros(3)], [1, 1], r"of one size, got \[2, 3\]"),
        ([np.zeros(2)], [0], "num_samples: expected an integer of at least 1"),
    ],
)
def test_bad_vectors(vectors, counts, message: str) -> None:
    with pytest.raises(InputError, match=message):
        secure_sum(vectors, counts, threshold=1)
