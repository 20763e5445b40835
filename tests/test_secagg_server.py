"""The server gets the sum, or an error, and keeps nothing of a single client."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradinv_helpers.federated.masks import add_mask, agree, derive_key
from gradinv_helpers.federated.secagg_client import SecAggClient
from gradinv_helpers.federated.secagg_messages import (
    AdvertisedKeys,
    BelowThresholdError,
    MaskedInput,
    RepeatedMessageError,
    SealedShares,
    SecAggError,
    SecAggSettings,
    TamperedMessageError,
    UnmaskingShares,
)
from gradinv_helpers.federated.secagg_server import SecAggServer
from gradinv_helpers.federated.shamir import PRIME

SETTINGS = SecAggSettings(threshold=3)
COUNT, SIZE, DROPPED = 5, 6, 4
VALUES = np.random.default_rng(0).normal(size=(COUNT, SIZE))


class Session:
    """One aggregation of five clients up to a given round."""

    def __init__(self, rounds: int) -> None:
        self.server = SecAggServer(SIZE, settings=SETTINGS)
        self.clients = [
            SecAggClient(k, VALUES[k], k + 1, settings=SETTINGS, seed=0)
            for k in range(COUNT)
        ]
        self.keys = [c.advertise_keys() for c in self.clients]
        if rounds > 0:
            self.roster = self.server.collect_keys(self.keys)
            self.shares = [c.share_keys(self.roster) for c in self.clients]
        if rounds > 1:
            self.mail = self.server.route_letters(self.shares)
            self.inputs = [c.masked_input(self.mail[c.index]) for c in self.clients[:4]]
        if rounds > 2:
            self.request = self.server.collect_inputs(self.inputs)
            self.answers = [c.unmask(self.request) for c in self.clients[:4]]

    def assert_the_sum_is_still_there(self) -> None:
        """An error used nothing up and told nothing: the round can be repeated."""
        found = self.server.code.decode(self.server.unmask(self.answers))
        expected = sum((k + 1) * VALUES[k] for k in range(4))
        assert found == pytest.approx(expected, abs=4 * self.server.code.step)


def test_whole_session() -> None:
    session = Session(3)
    assert session.request.survivors == (0, 1, 2, 3)
    assert session.request.dropped == (DROPPED,)
    session.assert_the_sum_is_still_there()


@pytest.mark.parametrize("answers", [(0, 1, 2), (1, 2, 3), (0, 2, 3), (3, 1, 0)])
def test_any_three_answers_do(answers: tuple[int, ...]) -> None:
    session = Session(3)
    session.answers = [session.answers[k] for k in answers]
    session.assert_the_sum_is_still_there()


# --- twice, too few, unknown --------------------------------------------------------

METHODS = ("collect_keys", "route_letters", "collect_inputs", "unmask")
FIELDS = ("keys", "shares", "inputs", "answers")


@pytest.mark.parametrize("number", range(4))
def test_a_client_twice(number: int) -> None:
    session = Session(number)
    messages = getattr(session, FIELDS[number])
    with pytest.raises(RepeatedMessageError, match="got two from client 0"):
        getattr(session.server, METHODS[number])([*messages, messages[0]])
    getattr(session.server, METHODS[number])(messages)


@pytest.mark.parametrize("number", range(4))
def test_below_the_threshold(number: int) -> None:
    session = Session(number)
    messages = getattr(session, FIELDS[number])
    with pytest.raises(BelowThresholdError, match="at least 3 clients, got 2; the upd"):
        getattr(session.server, METHODS[number])(messages[:2])
    getattr(session.server, METHODS[number])(messages[:3])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stranger(number: int) -> None:
    session = Session(number)
    messages = getattr(session, FIELDS[number])
    stranger = replace(messages[0], client=9)
    with pytest.raises(SecAggError, match=r"messages of the clients .*, got client 9"):
        getattr(session.server, METHODS[number])([*messages, stranger])


def test_who_sent_no_input_cannot_answer() -> None:
    session = Session(3)
    late = replace(session.answers[0], client=DROPPED)
    with pytest.raises(SecAggError, match="got client 4"):
        session.server.unmask([*session.answers, late])
    session.assert_the_sum_is_still_there()


@pytest.mark.parametrize("number", range(4))
def test_every_round_once_and_in_order(number: int) -> None:
    session = Session(3)
    session.server.unmask(session.answers)
    with pytest.raises(RepeatedMessageError, match="each round once, .* got is over"):
        getattr(session.server, METHODS[number])(getattr(session, FIELDS[number]))
    if number > 0:
        fresh = SecAggServer(SIZE, settings=SETTINGS)
        with pytest.raises(RepeatedMessageError, match="got has not begun"):
            getattr(fresh, METHODS[number])(getattr(session, FIELDS[number]))


def test_a_key_twice() -> None:
    session = Session(0)
    first = session.keys[0]
    twin = AdvertisedKeys(7, 1, first.masking_key, bytes(range(32)))
    with pytest.raises(RepeatedMessageError, match="got a key twice"):
        session.server.collect_keys([*session.keys, twin])


# --- tampered -----------------------------------------------------------------------


@pytest.mark.parametrize("client", range(3))
@pytest.mark.parametrize("kind", ["self_masks", "masking_keys"])
def test_a_tampered_share(client: int, kind: str) -> None:
    """By one unit, by the lowest bit of the seed's place, and by something large."""
    for change in (1, 2**247, PRIME - 5):
        session = Session(3)
        answer = session.answers[client]
        for owner in getattr(answer, kind):
            shares = dict(getattr(answer, kind))
            shares[owner] = (shares[owner] + change) % PRIME
            answers = list(session.answers)
            answers[client] = replace(answer, **{kind: shares})
            with pytest.raises(TamperedMessageError, match=f"of client {owner}: exp"):
                session.server.unmask(answers)
        session.assert_the_sum_is_still_there()


def test_without_the_tampered_answer_the_others_suffice() -> None:
    session = Session(3)
    wrong = dict.fromkeys(session.answers[0].self_masks, 12345)
    bad = replace(session.answers[0], self_masks=wrong)
    with pytest.raises(TamperedMessageError):
        session.server.unmask([bad, *session.answers[1:]])
    session.answers = session.answers[1:]
    session.assert_the_sum_is_still_there()


def test_missing_shares() -> None:
    session = Session(3)
    answer = session.answers[0]
    few = UnmaskingShares(0, {0: answer.self_masks[0]}, answer.masking_keys)
    with pytest.raises(TamperedMessageError, match="one share for each request"):
        session.server.unmask([few, *session.answers[1:]])


@pytest.mark.parametrize("wrong", ["letter", "commitment"])
def test_incomplete_shares(wrong: str) -> None:
    session = Session(1)
    first = session.shares[0]
    letters = {k: v for k, v in first.letters.items() if k != 1}
    bad = SealedShares(0, first.commitment, letters)
    if wrong == "commitment":
        bad = SealedShares(0, b"", first.letters)
    with pytest.raises(TamperedMessageError, match="shares of client 0: expected a"):
        session.server.route_letters([bad, *session.shares[1:]])


@pytest.mark.parametrize("values", [np.zeros(SIZE + 1, "<u4"), np.zeros(SIZE, "<u8")])
def test_input_of_another_form(values: np.ndarray) -> None:
    session = Session(2)
    with pytest.raises(TamperedMessageError, match="input of client 0: expected 6 num"):
        session.server.collect_inputs([MaskedInput(0, values), *session.inputs[1:]])


# --- what the server holds ----------------------------------------------------------


def test_the_server_keeps_no_single_input_letter_or_share() -> None:
    session = Session(3)
    session.server.unmask(session.answers)
    held = repr(sorted(vars(session.server)))
    assert held == repr(
        sorted(
            [
                *("size", "settings", "roster", "survivors", "dropped"),
                *("_commitments", "_sum", "_done"),
            ]
        )
    )
    secrets = {
        secret
        for client in session.clients
        for secret in (
            client._sealing_seed,
            client._masking_seed,
            client._self_mask_seed,
        )
    }
    letters = {text for share in session.shares for text in share.letters.values()}

    def walk(value: object) -> list[object]:
        if isinstance(value, dict):
            return [x for v in value.values() for x in walk(v)]
        if isinstance(value, AdvertisedKeys):
            return [value.sealing_key, value.masking_key]
        return [value]

    everything = [x for v in vars(session.server).values() for x in walk(v)]
    assert not secrets & {x for x in everything if isinstance(x, bytes)}
    assert not letters & {x for x in everything if isinstance(x, bytes)}
    arrays = [x for x in everything if isinstance(x, np.ndarray)]
    assert len(arrays) == 1
    assert all(not np.array_equal(arrays[0], m.values) for m in session.inputs)


def test_masks_of_a_dropped_client_do_not_unmask_it() -> None:
    """Its pairwise masks are known in the end; the self-mask still hides it."""
    session = Session(3)
    session.server.unmask(session.answers)
    late = session.clients[DROPPED].masked_input(session.mail[DROPPED]).values
    shares = [answer.self_masks for answer in session.answers]
    assert all(DROPPED not in share for share in shares)
    code = session.server.code
    seed = session.clients[DROPPED]._masking_seed  # what the server can recover
    for peer in range(COUNT - 1):
        key = agree(seed, session.roster[peer].masking_key, "pairwise mask")
        add_mask(late, key, sign=-1)  # it is the largest number: all signs are +
    plain = code.encode(VALUES[DROPPED], DROPPED + 1)
    assert not np.array_equal(late, plain)
    own = session.clients[DROPPED]._self_mask_seed
    add_mask(late, derive_key(own, "self-mask"), sign=-1)
    assert np.array_equal(late, plain)
