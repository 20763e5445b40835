"""The server of a secure aggregation, one method per round.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

import numpy as np

from gradinv_helpers.errors import check_count
from gradinv_helpers.federated.fixed_point import FixedPoint, Residues
from gradinv_helpers.federated.masks import (
    KEY_BYTES,
    SEED_BYTES,
    add_mask,
    agree,
    derive_key,
    public_key,
)
from gradinv_helpers.federated.secagg_client import (
    COMMITMENT,
    PAIRWISE,
    SELF_MASK,
    mask_sign,
)
from gradinv_helpers.federated.secagg_messages import (
    ROUNDS,
    AdvertisedKeys,
    BelowThresholdError,
    MaskedInput,
    RepeatedMessageError,
    Roster,
    SealedShares,
    SecAggError,
    SecAggSettings,
    TamperedMessageError,
    UnmaskingRequest,
    UnmaskingShares,
)
from gradinv_helpers.federated.shamir import PRIME, lagrange_weights


class _Message(Protocol):
    @property
    def client(self) -> int: ...


_M = TypeVar("_M", bound=_Message)


class SecAggServer:
    """A server that learns the sum of the survivors' updates and nothing else.

    It keeps the public keys, the commitments and one running sum of masked inputs:
    no input of a single client, no letter, no share. A method that raises an error
    changes nothing, so that the server may wait for a better answer.

    Args:
        size: Entries m of an update.
        settings: What all parties agreed on.

    Source: Bonawitz et al. (2017), the variant against honest-but-curious parties.
    Taught in: notebooks/09_secure_aggregation.
    """

    def __init__(self, size: int, *, settings: SecAggSettings) -> None:
        self.size = check_count("size", size)
        self.settings = settings
        self.roster: dict[int, AdvertisedKeys] = {}
        self.survivors: tuple[int, ...] = ()
        self.dropped: tuple[int, ...] = ()
        self._commitments: dict[int, bytes] = {}
        self._sum: Residues = np.zeros(0, self.dtype)
        self._done = 0

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Type of a number in a masked input."""
        return np.dtype(f"<u{self.settings.bits // 8}")

    @property
    def code(self) -> FixedPoint:
        """How the clients of the roster write their values as whole numbers."""
        counts = [keys.num_samples for keys in self.roster.values()]
        return FixedPoint(
            sum(counts), len(counts), self.settings.bits, self.settings.bound
        )

    def collect_keys(self, messages: Sequence[AdvertisedKeys]) -> Roster:
        """Round 0: collect the public keys.

        Returns:
            The list of all keys, for every client.

        Raises:
            BelowThresholdError: Fewer clients than the threshold.
            RepeatedMessageError: A client, or a key, comes twice.
        """
        roster = self._by_client(0, messages, None)
        public = [
            k for entry in messages for k in (entry.sealing_key, entry.masking_key)
        ]
        if len(set(public)) < len(public):
            raise RepeatedMessageError(
                ROUNDS[0], "new keys of everybody", "a key twice"
            )
        self.roster = roster
        self._done = 1
        return dict(roster)

    def route_letters(
        self, messages: Sequence[SealedShares]
    ) -> dict[int, dict[int, bytes]]:
        """Round 1: pass on the sealed letters.

        Returns:
            For every client the letters to it, by sender.

        Raises:
            BelowThresholdError: Fewer clients than the threshold.
            RepeatedMessageError: A client comes twice.
            TamperedMessageError: A client has not written to everybody.
        """
        found = self._by_client(1, messages, self.roster)
        for k, message in found.items():
            wanted = set(self.roster) - {k}
            if set(message.letters) != wanted or len(message.commitment) != KEY_BYTES:
                raise TamperedMessageError(
                    f"shares of client {k}",
                    f"a commitment and letters to the clients {sorted(wanted)}",
                    sorted(message.letters),
                )
        self._commitments = {k: message.commitment for k, message in found.items()}
        self._done = 2
        return {
            k: {s: message.letters[k] for s, message in found.items() if s != k}
            for k in found
        }

    def collect_inputs(self, messages: Sequence[MaskedInput]) -> UnmaskingRequest:
        """Round 2: add up the masked inputs.

        Returns:
            Whose input arrived and whose did not, for the survivors.

        Raises:
            BelowThresholdError: Fewer clients than the threshold.
            RepeatedMessageError: A client comes twice.
            TamperedMessageError: An input has another size or type.
        """
        found = self._by_client(2, messages, self._commitments)
        total = np.zeros(self.size, self.dtype)
        for k, message in found.items():
            values = message.values
            if values.shape != total.shape or values.dtype != total.dtype:
                raise TamperedMessageError(
                    f"input of client {k}",
                    f"{self.size} numbers of type {total.dtype}",
                    f"shape {values.shape} of type {values.dtype}",
                )
            total += values
        self._sum = total
        self.survivors = tuple(sorted(found))
        self.dropped = tuple(sorted(set(self._commitments) - set(found)))
        self._done = 3
        return UnmaskingRequest(self.survivors, self.dropped)

    def unmask(self, messages: Sequence[UnmaskingShares]) -> Residues:
        """Round 3: remove the masks that did not cancel.

        Returns:
            (m,) the sum of the survivors' numbers modulo 2**bits; ``code.decode``
            gives its value.

        Raises:
            BelowThresholdError: Fewer answers than the threshold.
            RepeatedMessageError: A client answers twice.
            TamperedMessageError: Shares are missing, or do not give the secret that
                the client committed itself to.
        """
        found = self._by_client(3, messages, self.survivors)
        for k, message in found.items():
            named = (tuple(message.self_masks), tuple(message.masking_keys))
            if named != (self.survivors, self.dropped):
                raise TamperedMessageError(
                    f"answer of client {k}", "one share for each request", named
                )
        first = [found[k] for k in sorted(found)[: self.settings.threshold]]
        weights = lagrange_weights([message.client + 1 for message in first]).values()

        def secret(shares: Sequence[int]) -> bytes:
            return _as_seed(sum(w * f for w, f in zip(weights, shares, strict=True)))

        total = self._sum.copy()
        for k in self.survivors:
            seed = secret([message.self_masks[k] for message in first])
            if derive_key(seed, COMMITMENT) != self._commitments[k]:
                raise _wrong_shares("self-mask", k)
            add_mask(total, derive_key(seed, SELF_MASK), sign=-1)
        for k in self.dropped:
            seed = secret([message.masking_keys[k] for message in first])
            if public_key(seed) != self.roster[k].masking_key:
                raise _wrong_shares("masking key", k)
            for peer in self.survivors:
                key = agree(seed, self.roster[peer].masking_key, PAIRWISE)
                add_mask(total, key, sign=-mask_sign(peer, k))
        self._done = 4
        return total

    def _by_client(
        self, number: int, messages: Sequence[_M], allowed: Collection[int] | None
    ) -> dict[int, _M]:
        """Messages by sender: each once, all expected, enough of them."""
        name = ROUNDS[number]
        if self._done != number:
            after = "is over" if self._done > number else "has not begun"
            raise RepeatedMessageError(name, "each round once, in order", after)
        found: dict[int, _M] = {}
        for message in messages:
            k = message.client
            if k in found:
                raise RepeatedMessageError(
                    name, "one message from every client", f"two from client {k}"
                )
            if allowed is not None and k not in allowed:
                raise SecAggError(
                    name, f"messages of the clients {sorted(allowed)}", f"client {k}"
                )
            found[k] = message
        if len(found) < self.settings.threshold:
            raise BelowThresholdError(
                name,
                f"at least {self.settings.threshold} clients",
                len(found),
                "the updates stay hidden; start again with more clients",
            )
        return found


def _as_seed(number: int) -> bytes:
    """The seed that a recovered number stands for: its lowest 31 bytes."""
    return (number % PRIME).to_bytes(KEY_BYTES)[KEY_BYTES - SEED_BYTES :]


def _wrong_shares(secret: str, client: int) -> TamperedMessageError:
    return TamperedMessageError(
        f"shares of the {secret} of client {client}",
        "shares that give the secret it committed itself to",
        "another secret",
        "a client changed its share; the sum stays hidden",
    )
