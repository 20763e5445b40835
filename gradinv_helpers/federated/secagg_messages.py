"""What travels in a secure aggregation, and what can go wrong on the way.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
)
from gradinv_helpers.federated.fixed_point import Residues, check_bits
from gradinv_helpers.federated.shamir import SHARE_BYTES

Round = Literal["advertise-keys", "share-keys", "masked-input", "unmasking"]
ROUNDS: tuple[Round, ...] = get_args(Round)

_NUMBER = 4  # bytes of a client's number or of a count


class SecAggError(InputError):
    """A secure aggregation cannot go on.

    Taught in: notebooks/09_secure_aggregation.
    """


class BelowThresholdError(SecAggError):
    """Fewer clients are left than the threshold asks for; the sum stays hidden.

    Taught in: notebooks/09_secure_aggregation.
    """


class TamperedMessageError(SecAggError):
    """A key, a share or a ciphertext is not the one that was sent.

    Taught in: notebooks/09_secure_aggregation.
    """


class RepeatedMessageError(SecAggError):
    """Somebody speaks twice in a round, or out of turn.

    Taught in: notebooks/09_secure_aggregation.
    """


class RefusedRequestError(SecAggError):
    """A client does not answer, because the answer would unmask an update.

    Taught in: notebooks/09_secure_aggregation.
    """


@dataclass(frozen=True)
class SecAggSettings:
    """What all parties agree on before a secure aggregation.

    Args:
        threshold: How many clients must stay to the end, at least 1. No sum of fewer
            is ever unmasked; fewer clients who pool their shares learn nothing. With
            1 every client holds the secrets of all others.
        bits: Width of a number in the sum: 16, 32 or 64.
        bound: Bound on the absolute value of every entry of an update.
        rounding: ``nearest``, or ``stochastic`` (up or down at random, no bias).

    Raises:
        InputError: A value is out of range.

    Taught in: notebooks/09_secure_aggregation.
    """

    threshold: int
    bits: int = 32
    bound: float = 16.0
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        check_count("threshold", self.threshold)
        check_bits(self.bits)
        check_number("bound", self.bound, exclusive=True)
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))


@dataclass(frozen=True)
class AdvertisedKeys:
    """Round 0, to the server and through it to all: two public keys and a count.

    Args:
        client: Number of the sender.
        num_samples: Weight of its update; public, as in FedAvg.
        sealing_key: X25519 public key for what clients tell each other.
        masking_key: X25519 public key for the pairwise masks.

    Taught in: notebooks/09_secure_aggregation.
    """

    client: int
    num_samples: int
    sealing_key: bytes
    masking_key: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return 2 * _NUMBER + len(self.sealing_key) + len(self.masking_key)


Roster: TypeAlias = Mapping[int, AdvertisedKeys]


@dataclass(frozen=True)
class SealedShares:
    """Round 1, to the server: shares of a client's two secrets, one letter per peer.

    Args:
        client: Number of the sender.
        commitment: A digest of the seed of its self-mask; with it the server notices
            wrong shares. (The masking key plays this part for the other secret.)
        letters: Ciphertext for every other client.

    Taught in: notebooks/09_secure_aggregation.
    """

    client: int
    commitment: bytes
    letters: Mapping[int, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return _NUMBER + len(self.commitment) + mail_bytes(self.letters)


@dataclass(frozen=True)
class MaskedInput:
    """Round 2, to the server: an update behind its masks.

    Args:
        client: Number of the sender.
        values: (m,) numbers modulo 2**bits; each is uniform on its own.

    Taught in: notebooks/09_secure_aggregation.
    """

    client: int
    values: Residues

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return _NUMBER + self.values.nbytes


@dataclass(frozen=True)
class UnmaskingRequest:
    """Round 3, from the server: whose input arrived and whose did not.

    Args:
        survivors: Clients whose self-mask is to be removed.
        dropped: Clients whose pairwise masks are to be removed.

    Taught in: notebooks/09_secure_aggregation.
    """

    survivors: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        return _NUMBER * (len(self.survivors) + len(self.dropped))


@dataclass(frozen=True)
class UnmaskingShares:
    """Round 3, to the server: one share of one secret of every client.

    Args:
        client: Number of the sender.
        self_masks: Its shares of the self-mask seeds of the survivors.
        masking_keys: Its shares of the masking-key seeds of those who dropped out.

    Taught in: notebooks/09_secure_aggregation.
    """

    client: int
    self_masks: Mapping[int, int]
    masking_keys: Mapping[int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes that travel."""
        shares = len(self.self_masks) + len(self.masking_keys)
        return _NUMBER + shares * (_NUMBER + SHARE_BYTES)


def mail_bytes(letters: Mapping[int, bytes]) -> int:
    """Bytes of ciphertexts, each with the number of its sender or receiver."""
    return sum(_NUMBER + len(letter) for letter in letters.values())


def roster_bytes(roster: Roster, reader: int) -> int:
    """Bytes of what a client reads in the list of all keys: not its own entry."""
    return sum(keys.num_bytes for k, keys in roster.items() if k != reader)
