"""A client gives away one masked vector and never both shares of anybody."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from gradinv_helpers.errors import InputError
from gradinv_helpers.federated.fixed_point import FixedPoint
from gradinv_helpers.federated.masks import add_mask, agree, derive_key
from gradinv_helpers.federated.secagg_client import SecAggClient
from gradinv_helpers.federated.secagg_messages import (
    AdvertisedKeys,
    BelowThresholdError,
    RefusedRequestError,
    RepeatedMessageError,
    SecAggError,
    SecAggSettings,
    TamperedMessageError,
    UnmaskingRequest,
)
from gradinv_helpers.federated.secagg_server import SecAggServer

SETTINGS = SecAggSettings(threshold=2)


def federation(
    values: Mapping[int, np.ndarray], *, seed: int = 0, settings=SETTINGS
) -> dict[int, SecAggClient]:
    return {
        k: SecAggClient(k, vector, 1 + k, settings=settings, seed=seed)
        for k, vector in values.items()
    }


def prepared(
    values: Mapping[int, np.ndarray], *, seed: int = 0, settings=SETTINGS
) -> tuple[dict[int, SecAggClient], dict[int, dict[int, bytes]]]:
    """Clients who have shared their keys, and the letters to each of them."""
    clients = federation(values, seed=seed, settings=settings)
    server = SecAggServer(len(next(iter(values.values()))), settings=settings)
    roster = server.collect_keys([c.advertise_keys() for c in clients.values()])
    mail = server.route_letters([c.share_keys(roster) for c in clients.values()])
    return clients, mail


def zeros(count: int = 3, size: int = 4) -> dict[int, np.ndarray]:
    return {k: np.zeros(size) for k in range(count)}


# --- what a masked update looks like ------------------------------------------------

SIZE = 100_000


def masked(values: np.ndarray, *, seed: int, bits: int = 32) -> np.ndarray:
    settings = SecAggSettings(threshold=2, bits=bits)
    inputs = {0: values, 1: np.zeros(len(values)), 2: np.zeros(len(values))}
    clients, mail = prepared(inputs, seed=seed, settings=settings)
    return clients[0].masked_input(mail[0]).values


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("value", [0.0, 1.5, -16.0])
def test_masked_update_is_uniform(bits: int, value: float) -> None:
    """A constant vector would be a single bar without its masks."""
    found = masked(np.full(SIZE, value), seed=7, bits=bits)
    for shift in (0, bits - 8):  # lowest and highest byte
        counts = np.bincount((found >> shift).astype(np.int64) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3
    share = found.astype(np.float64) / 2.0**bits
    assert stats.kstest(share, "uniform").pvalue > 1e-3
    pairs = 16 * (found[::2] >> (bits - 4)) + (found[1::2] >> (bits - 4))
    counts = np.bincount(pairs.astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_unmasked_update_is_not_uniform() -> None:
    """The tests above can fail."""
    code = FixedPoint(total=6, clients=3)
    plain = code.encode(np.random.default_rng(0).normal(size=SIZE), 1)
    counts = np.bincount((plain >> 24).astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue < 1e-6


def test_two_inputs_give_the_same_distribution() -> None:
    """One entry over many seeds: nothing tells a large input from a small one."""
    low, high = (
        np.concatenate([masked(np.full(4, v), seed=s) for s in range(250)])
        for v in (-16.0, 16.0)
    )
    assert stats.ks_2samp(low, high).pvalue > 1e-3
    assert stats.kstest(low / 2.0**32, "uniform").pvalue > 1e-3
    assert stats.kstest(high / 2.0**32, "uniform").pvalue > 1e-3


def test_masked_update_is_the_formula() -> None:
    """y_u = q_u + PRG(b_u) + sum of signed pairwise masks, rebuilt from the seeds."""
    inputs = {k: np.linspace(-1, 1, 5) * (k + 1) for k in range(3)}
    clients, mail = prepared(inputs)
    u = clients[1]
    expected = FixedPoint(6, 3).encode(inputs[1], 2)
    add_mask(expected, derive_key(u._self_mask_seed, "self-mask"))
    for v, sign in ((0, 1), (2, -1)):
        key = agree(u._masking_seed, u._roster[v].masking_key, "pairwise mask")
        add_mask(expected, key, sign=sign)
    assert np.array_equal(u.masked_input(mail[1]).values, expected)


def test_masks_follow_the_clients_who_are_left() -> None:
    clients, mail = prepared(zeros())
    without = {k: letter for k, letter in mail[0].items() if k != 2}
    all_there = copy.copy(clients[0]).masked_input(mail[0]).values
    one_gone = copy.copy(clients[0]).masked_input(without).values
    assert not np.array_equal(all_there, one_gone)


def test_letters_are_sealed_for_one_reader() -> None:
    clients, mail = prepared(zeros())
    swapped = {1: mail[2][1], 2: mail[0][2]}  # client 1 wrote to 2, not to 0
    with pytest.raises(TamperedMessageError, match="letter from client 1 to client 0"):
        clients[0].masked_input(swapped)


# --- what a client refuses ----------------------------------------------------------


def ready(count: int = 4) -> dict[int, SecAggClient]:
    """Clients who have sent their masked inputs."""
    clients, mail = prepared(zeros(count))
    for k, client in clients.items():
        client.masked_input(mail[k])
    return clients


def test_never_both_shares_of_a_client() -> None:
    client = ready()[0]
    with pytest.raises(RefusedRequestError, match=r"got \[2\] among both; both shares"):
        client.unmask(UnmaskingRequest((0, 1, 2), (2, 3)))
    answer = client.unmask(UnmaskingRequest((0, 1, 2), (3,)))
    assert set(answer.self_masks) == {0, 1, 2}
    assert set(answer.masking_keys) == {3}


def test_not_in_two_answers_either() -> None:
    client = ready()[0]
    client.unmask(UnmaskingRequest((0, 1, 2), (3,)))
    with pytest.raises(RepeatedMessageError, match="one question to client 0"):
        client.unmask(UnmaskingRequest((0, 1, 3), (2,)))


@pytest.mark.parametrize(
    ("survivors", "dropped", "error", "message"),
    [
        ((1, 2), (0, 3), RefusedRequestError, "client 0, who sent its input"),
        ((0, 1, 2), (), RefusedRequestError, r"the clients \[0, 1, 2, 3\] who shared"),
        ((0, 1, 2, 3), (4,), RefusedRequestError, "who shared keys"),
        ((0,), (1, 2, 3), BelowThresholdError, "at least 2 clients, got 1"),
    ],
)
def test_requests_that_would_leak(survivors, dropped, error, message) -> None:
    client = ready()[0]
    with pytest.raises(error, match=message):
        client.unmask(UnmaskingRequest(survivors, dropped))
    # A refusal uses nothing up: the honest request is answered.
    client.unmask(UnmaskingRequest((0, 1, 2, 3), ()))


def test_tampered_letter_gets_no_input() -> None:
    clients, mail = prepared(zeros())
    changed = dict(mail[0])
    changed[1] = changed[1][:-1] + bytes([changed[1][-1] ^ 1])
    with pytest.raises(TamperedMessageError, match="letter from client 1 to client 0"):
        clients[0].masked_input(changed)


def test_letter_of_another_aggregation() -> None:
    clients, mail = prepared(zeros(), seed=1)
    _, old = prepared(zeros(), seed=0)
    with pytest.raises(TamperedMessageError, match="letter from client 1"):
        clients[0].masked_input(mail[0] | {1: old[0][1]})


@pytest.mark.parametrize("letters", [{0: b"own"}, {9: b"stranger"}])
def test_letters_of_strangers(letters: dict[int, bytes]) -> None:
    clients, mail = prepared(zeros())
    with pytest.raises(TamperedMessageError, match="letters of the other clients"):
        clients[0].masked_input(mail[0] | letters)


def test_too_few_letters() -> None:
    clients, _ = prepared(zeros())
    with pytest.raises(BelowThresholdError, match="mail: expected at least 2 clients"):
        clients[0].masked_input({})


def test_roster_is_checked() -> None:
    clients = federation(zeros())
    roster = {k: client.advertise_keys() for k, client in clients.items()}
    client = clients[0]
    with pytest.raises(BelowThresholdError, match="roster"):
        client.share_keys({0: roster[0]})
    with pytest.raises(TamperedMessageError, match="the keys that client 0 sent"):
        client.share_keys(roster | {0: roster[1]})
    with pytest.raises(TamperedMessageError, match="the keys that client 0 sent"):
        client.share_keys({1: roster[1], 2: roster[2]})
    twin = AdvertisedKeys(2, 1, roster[1].sealing_key, roster[1].masking_key)
    with pytest.raises(TamperedMessageError, match="a key that stands there twice"):
        client.share_keys(roster | {2: twin})
    with pytest.raises(TamperedMessageError, match="stands there twice"):
        client.share_keys(roster | {5: roster[2]})
    client.share_keys(roster)


def test_every_round_once_and_in_order() -> None:
    clients, mail = prepared(zeros())
    client = clients[0]
    for repeat in (client.advertise_keys, lambda: client.share_keys({})):
        with pytest.raises(RepeatedMessageError, match="start a new aggregation"):
            repeat()
    with pytest.raises(SecAggError, match="unmasking: expected masked-input before"):
        client.unmask(UnmaskingRequest((0, 1, 2), ()))
    client.masked_input(mail[0])
    with pytest.raises(RepeatedMessageError, match="masked-input: expected one"):
        client.masked_input(mail[0])


def test_overflow_stops_the_client_at_the_start() -> None:
    with pytest.raises(InputError, match="up to bound=16, got 17; raise the bound"):
        SecAggClient(0, np.array([17.0]), 1, settings=SETTINGS)


# --- randomness ---------------------------------------------------------------------


def test_same_seed_same_messages() -> None:
    once, again = (prepared(zeros(), seed=3) for _ in range(2))
    other, _ = prepared(zeros(), seed=4)
    assert once[1] == again[1]
    found = [
        c[0].masked_input(m[0]).values for c, m in (once, again, prepared(zeros()))
    ]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert other[0]._masking_seed != once[0][0]._masking_seed


def test_without_a_seed_nothing_repeats() -> None:
    keys = [
        SecAggClient(0, np.zeros(1), 1, settings=SETTINGS).advertise_keys()
        for _ in range(2)
    ]
    assert keys[0].masking_key != keys[1].masking_key
    assert keys[0].sealing_key != keys[0].masking_key


def test_the_clients_copy_of_the_values_is_its_own() -> None:
    values = {k: np.full(3, 0.5) for k in range(3)}
    clients, mail = prepared(values)
    expected = copy.copy(clients[0]).masked_input(mail[0]).values
    values[0][:] = 1.0
    assert np.array_equal(clients[0].masked_input(mail[0]).values, expected)
