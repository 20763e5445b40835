"""A client of a secure aggregation, one method per round.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gradinv_helpers.errors import check_count
from gradinv_helpers.federated.fixed_point import FixedPoint
from gradinv_helpers.federated.masks import (
    SEED_BYTES,
    add_mask,
    agree,
    derive_key,
    open_seal,
    public_key,
    random_bytes,
    seal,
)
from gradinv_helpers.federated.secagg_messages import (
    ROUNDS,
    AdvertisedKeys,
    BelowThresholdError,
    MaskedInput,
    RefusedRequestError,
    RepeatedMessageError,
    Roster,
    SealedShares,
    SecAggError,
    SecAggSettings,
    TamperedMessageError,
    UnmaskingRequest,
    UnmaskingShares,
)
from gradinv_helpers.federated.shamir import SHARE_BYTES, split_secret

PAIRWISE = "pairwise mask"
SELF_MASK = "self-mask"
COMMITMENT = "commitment to the self-mask"


class SecAggClient:
    """A client that sends its update only behind masks.

    It has three secrets: the seeds of two private keys and of its self-mask. The
    masking-key seed and the self-mask seed are shared with all clients, so that the
    server can undo the masks later: of a client that dropped out the pairwise ones,
    of any other the self-mask, **never both**. A client answers each round once and
    stops with an error where an answer would break this.

    Args:
        index: Number of the client, at least 0.
        values: (m,) entries of its update, of absolute value up to
            ``settings.bound``.
        num_samples: Weight of its update, public.
        settings: What all parties agreed on.
        seed: For lessons and tests; ``None`` takes the operating system's
            randomness, as a real client must.

    Raises:
        InputError: An argument is out of range.

    Source: Bonawitz et al. (2017), the variant against honest-but-curious parties.
    Taught in: notebooks/09_secure_aggregation.
    """

    def __init__(
        self,
        index: int,
        values: NDArray[np.float64],
        num_samples: int,
        *,
        settings: SecAggSettings,
        seed: int | None = None,
    ) -> None:
        self.index = check_count("index", index, minimum=0)
        self.settings = settings
        self._weight = check_count("num_samples", num_samples)
        self._values = np.array(values, np.float64).reshape(-1)
        # An entry beyond the bound is an error before anything is sent.
        FixedPoint(num_samples, 1, settings.bits, settings.bound).encode(
            self._values, num_samples
        )
        self._draw = random_bytes(seed, index)
        self._sealing_seed = self._draw(SEED_BYTES)
        self._masking_seed = self._draw(SEED_BYTES)
        self._self_mask_seed = self._draw(SEED_BYTES)
        self._done = 0  # rounds answered
        self._roster: dict[int, AdvertisedKeys] = {}
        self._self_mask_shares: dict[int, int] = {}
        self._masking_key_shares: dict[int, int] = {}

    def advertise_keys(self) -> AdvertisedKeys:
        """Round 0: make two key pairs and publish their public halves."""
        self._begin(0)
        self._done = 1
        return self._advertised()

    def share_keys(self, roster: Roster) -> SealedShares:
        """Round 1: give every client a share of the two seeds.

        Args:
            roster: What the server says that all clients advertised.

        Returns:
            A sealed letter for every other client: its share of the masking-key seed
            and of the self-mask seed.

        Raises:
            BelowThresholdError: Fewer clients than the threshold.
            TamperedMessageError: The own entry was changed, or a key stands there
                twice.
        """
        self._begin(1)
        self._check_roster(roster)
        holders = {k: k + 1 for k in roster}  # zero would be the secret itself

        def split(seed: bytes) -> dict[int, int]:
            return split_secret(
                int.from_bytes(seed),
                list(holders.values()),
                threshold=self.settings.threshold,
                draw=self._draw,
            )

        of_key, of_mask = split(self._masking_seed), split(self._self_mask_seed)
        letters = {}
        for peer, keys in roster.items():
            if peer != self.index:
                address = _address(self.index, peer)
                text = b"".join(
                    shares[holders[peer]].to_bytes(SHARE_BYTES)
                    for shares in (of_key, of_mask)
                )
                key = agree(self._sealing_seed, keys.sealing_key, address)
                letters[peer] = seal(key, text, address)
        own = holders[self.index]
        self._masking_key_shares = {self.index: of_key[own]}
        self._self_mask_shares = {self.index: of_mask[own]}
        self._roster = dict(roster)
        self._done = 2
        commitment = derive_key(self._self_mask_seed, COMMITMENT)
        return SealedShares(self.index, commitment, letters)

    def masked_input(self, mail: Mapping[int, bytes]) -> MaskedInput:
        r"""Round 2: send the update behind its masks.

        .. math:: y_u = q_u + \mathrm{PRG}(b_u) + \sum_{v < u} \mathrm{PRG}(k_{uv})
            - \sum_{v > u} \mathrm{PRG}(k_{uv}) \bmod 2^b

        The letters are opened here, not in the last round as in the paper: whoever
        changed one then gets no input at all.

        Args:
            mail: The letters of the clients who are still there, by sender.

        Raises:
            BelowThresholdError: Fewer clients than the threshold.
            TamperedMessageError: A letter was changed.
        """
        self._begin(2)
        strangers = set(mail) - set(self._roster)
        if strangers or self.index in mail:
            raise TamperedMessageError(
                "mail", "letters of the other clients", sorted(mail)
            )
        self._check_enough("mail", len(mail) + 1)
        of_key, of_mask = dict(self._masking_key_shares), dict(self._self_mask_shares)
        for sender, letter in mail.items():
            address = _address(sender, self.index)
            key = agree(self._sealing_seed, self._roster[sender].sealing_key, address)
            text = open_seal(key, letter, address)
            of_key[sender] = int.from_bytes(text[:SHARE_BYTES])
            of_mask[sender] = int.from_bytes(text[SHARE_BYTES:])
        counts = [keys.num_samples for keys in self._roster.values()]
        code = FixedPoint(
            sum(counts), len(counts), self.settings.bits, self.settings.bound
        )
        rng = None
        if self.settings.rounding == "stochastic":
            rng = np.random.default_rng(int.from_bytes(self._draw(SEED_BYTES)))
        masked = code.encode(self._values, self._weight, rng=rng)
        add_mask(masked, derive_key(self._self_mask_seed, SELF_MASK))
        for peer in mail:
            peer_key = self._roster[peer].masking_key
            key = agree(self._masking_seed, peer_key, PAIRWISE)
            add_mask(masked, key, sign=mask_sign(self.index, peer))
        self._masking_key_shares, self._self_mask_shares = of_key, of_mask
        self._done = 3
        return MaskedInput(self.index, masked)

    def unmask(self, request: UnmaskingRequest) -> UnmaskingShares:
        """Round 3: help to remove what does not cancel in the sum.

        Args:
            request: Whose input arrived and whose did not.

        Returns:
            One share for each of them, of the self-mask or of the masking key.

        Raises:
            RefusedRequestError: The server wants both shares of a client, leaves one
                out, or does not count this client among the survivors.
            BelowThresholdError: Fewer survivors than the threshold.
        """
        self._begin(3)
        survivors, dropped = set(request.survivors), set(request.dropped)
        if survivors & dropped:
            raise RefusedRequestError(
                "request",
                "a client among the survivors or the dropped ones",
                f"{sorted(survivors & dropped)} among both",
                "both shares together would unmask an update",
            )
        if survivors | dropped != set(self._self_mask_shares):
            raise RefusedRequestError(
                "request",
                f"the clients {sorted(self._self_mask_shares)} who shared keys",
                sorted(survivors | dropped),
            )
        if self.index not in survivors:
            raise RefusedRequestError(
                "request",
                f"client {self.index}, who sent its input, among the survivors",
                sorted(survivors),
            )
        self._check_enough("request", len(survivors))
        self._done = 4
        return UnmaskingShares(
            self.index,
            {k: self._self_mask_shares[k] for k in sorted(survivors)},
            {k: self._masking_key_shares[k] for k in sorted(dropped)},
        )

    def _advertised(self) -> AdvertisedKeys:
        return AdvertisedKeys(
            self.index,
            self._weight,
            sealing_key=public_key(self._sealing_seed),
            masking_key=public_key(self._masking_seed),
        )

    def _begin(self, number: int) -> None:
        """Answer every round once, and in order."""
        if self._done > number:
            raise RepeatedMessageError(
                ROUNDS[number],
                f"one question to client {self.index} in this round",
                "another one",
                "start a new aggregation with new keys",
            )
        if self._done < number:
            raise SecAggError(
                ROUNDS[number], f"{ROUNDS[self._done]} before it", "nothing"
            )

    def _check_enough(self, argument: str, count: int) -> None:
        if count < self.settings.threshold:
            raise BelowThresholdError(
                argument, f"at least {self.settings.threshold} clients", count
            )

    def _check_roster(self, roster: Roster) -> None:
        self._check_enough("roster", len(roster))
        if roster.get(self.index) != self._advertised():
            raise TamperedMessageError(
                "roster", f"the keys that client {self.index} sent", "others"
            )
        public = [k for e in roster.values() for k in (e.sealing_key, e.masking_key)]
        if len(set(public)) < len(public) or any(
            entry.client != k for k, entry in roster.items()
        ):
            raise TamperedMessageError(
                "roster", "other keys for every client", "a key that stands there twice"
            )


def mask_sign(adder: int, peer: int) -> int:
    """The sign with which one of two clients adds their mask; the other has -1."""
    return 1 if adder > peer else -1


def _address(sender: int, receiver: int) -> str:
    return f"from client {sender} to client {receiver}"
