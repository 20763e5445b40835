"""A whole secure aggregation in one call, with clients who drop out.

Taught in: notebooks/09_secure_aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradinv_helpers.errors import InputError, check_choice, check_count, check_seed
from gradinv_helpers.federated.aggregation import aggregate, check_same_round
from gradinv_helpers.federated.fixed_point import Residues
from gradinv_helpers.federated.secagg_client import SecAggClient
from gradinv_helpers.federated.secagg_messages import (
    ROUNDS,
    Round,
    SecAggSettings,
    mail_bytes,
    roster_bytes,
)
from gradinv_helpers.federated.secagg_server import SecAggServer
from gradinv_helpers.updates import SharedUpdate

Dropouts = Mapping[int, Round] | Sequence[int | tuple[int, Round]]

_KEY_BITS = 256  # of a public key and of a share alike


@dataclass(frozen=True, eq=False)
class SecureSum:
    """What the server has at the end of a secure aggregation.

    Args:
        values: (m,) the sum of n_k g_k over the survivors, float64.
        residues: (m,) the same as whole numbers modulo 2**bits: bit by bit the sum of
            what the survivors encoded.
        survivors: Numbers of the clients in the sum.
        step: Value of one unit of ``residues``.
        rounding_std: Standard deviation of the rounding error of ``values``.
        sent: (K, 4) bytes that each client sent in each round.
        received: (K, 4) bytes that each client received in answer to each round.

    Taught in: notebooks/09_secure_aggregation.
    """

    values: NDArray[np.float64]
    residues: Residues
    survivors: tuple[int, ...]
    step: float
    rounding_std: float
    sent: NDArray[np.int64]
    received: NDArray[np.int64]


def secure_aggregate(
    updates: Sequence[SharedUpdate],
    *,
    threshold: int,
    dropouts: Dropouts = (),
    seed: int | None = 0,
    bits: int = 32,
    bound: float = 16.0,
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> SharedUpdate:
    r"""Combine updates so that the server sees only their sum.

    Every client sends :math:`n_k g_k` as whole numbers behind masks that cancel in
    the sum of all; the server divides the sum by the survivors'
    :math:`N = \sum_k n_k`. But for the rounding this is ``aggregate``.

    Args:
        updates: Updates of the same model with the same recipe, one per client.
        threshold: How many clients must stay to the end; 1 to the number of updates.
        dropouts: Clients who drop out, by number; alone before they send their masked
            input, or with the round whose message they no longer send: ``[(0,
            "share-keys"), (3, "unmasking")]`` or a mapping. Who drops out at
            ``unmasking`` is still in the sum.
        seed: Seed of all keys and masks, for lessons and tests. ``None`` takes the
            operating system's randomness, as real clients must.
        bits: Width of a number in the sum: 16, 32 or 64.
        bound: Public bound on the absolute value of every entry.
        rounding: ``nearest``, or ``stochastic`` (no bias, twice the variance).

    Returns:
        The mean over the survivors' samples; ``group_sizes`` keeps their counts, and
        the error of rounding to whole numbers is part of ``noise_std``.

    Raises:
        BelowThresholdError: Too few clients are left in some round.
        InputError: The updates do not belong together, an entry exceeds the bound,
            or another argument is out of range.

    Source: Bonawitz et al. (2017), the variant of four rounds against
    honest-but-curious parties. The consistency check, a fifth round, belongs to the
    variant against active ones and is not built.
    Taught in: notebooks/09_secure_aggregation.
    """
    check_same_round(updates)
    with_buffers = all(update.buffers is not None for update in updates)
    vectors = [_flat(update, with_buffers) for update in updates]
    found = secure_sum(
        vectors,
        [update.num_samples for update in updates],
        threshold=threshold,
        dropouts=dropouts,
        seed=seed,
        bits=bits,
        bound=bound,
        rounding=rounding,
    )
    # The counts, the recipe and stated noise are public; the numbers come from the sum.
    plain = aggregate([updates[k] for k in found.survivors])
    mean = torch.from_numpy(found.values / plain.num_samples)
    tensors, rest = _unflat(mean, plain.tensors)
    buffers = None
    if with_buffers and plain.buffers is not None:
        buffers, _ = _unflat(rest, plain.buffers)
    noise = math.hypot(plain.noise_std, found.rounding_std / plain.num_samples)
    return plain.replace_tensors(tensors, buffers=buffers, noise_std=noise)


def secure_sum(
    vectors: Sequence[NDArray[np.float64]],
    num_samples: Sequence[int],
    *,
    threshold: int,
    dropouts: Dropouts = (),
    seed: int | None = 0,
    bits: int = 32,
    bound: float = 16.0,
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> SecureSum:
    """Run the four rounds between one server and as many clients as vectors.

    Args:
        vectors: (m,) values of every client.
        num_samples: Weight n_k of every client.
        threshold: As in ``secure_aggregate``, like all further arguments.
        dropouts: Clients who drop out, and before which message.
        seed: Seed of all keys and masks; ``None`` for real randomness.
        bits: Width of a number in the sum.
        bound: Bound on the absolute value of every entry.
        rounding: ``nearest`` or ``stochastic``.

    Returns:
        The sum, who is in it, and the bytes that travelled.

    Raises:
        BelowThresholdError: Too few clients are left in some round.
        InputError: An argument is out of range.

    Source: Bonawitz et al. (2017), the variant against honest-but-curious parties.
    Taught in: notebooks/09_secure_aggregation.
    """
    count = len(vectors)
    if count == 0 or len(num_samples) != count:
        got = f"{count} and {len(num_samples)}"
        raise InputError("vectors", "at least one vector, a weight for each", got)
    sizes = {len(vector) for vector in vectors}
    if len(sizes) > 1:
        raise InputError("vectors", "vectors of one size", sorted(sizes))
    check_count("threshold", threshold, maximum=count)
    if seed is not None:
        check_seed("seed", seed)
    last = _last_rounds(dropouts, count)
    settings = SecAggSettings(threshold, bits, bound, rounding)
    clients = [
        SecAggClient(k, vector, n, settings=settings, seed=seed)
        for k, (vector, n) in enumerate(zip(vectors, num_samples, strict=True))
    ]
    server = SecAggServer(sizes.pop(), settings=settings)
    sent = np.zeros((count, len(ROUNDS)), np.int64)
    received = np.zeros_like(sent)

    def alive(number: int, among: Sequence[int]) -> list[SecAggClient]:
        return [clients[k] for k in among if last[k] > number]

    keys = [client.advertise_keys() for client in alive(0, range(count))]
    roster = server.collect_keys(keys)
    for entry in keys:
        sent[entry.client, 0] = entry.num_bytes
        received[entry.client, 0] = roster_bytes(roster, entry.client)

    shares = [client.share_keys(roster) for client in alive(1, list(roster))]
    mail = server.route_letters(shares)
    for share in shares:
        sent[share.client, 1] = share.num_bytes
        received[share.client, 1] = mail_bytes(mail[share.client])

    inputs = [client.masked_input(mail[client.index]) for client in alive(2, [*mail])]
    request = server.collect_inputs(inputs)
    for masked in inputs:
        sent[masked.client, 2] = masked.num_bytes
        received[masked.client, 2] = request.num_bytes

    answers = [client.unmask(request) for client in alive(3, request.survivors)]
    residues = server.unmask(answers)
    for answer in answers:
        sent[answer.client, 3] = answer.num_bytes
    code = server.code
    return SecureSum(
        values=code.decode(residues),
        residues=residues,
        survivors=server.survivors,
        step=code.step,
        rounding_std=code.rounding_std(
            len(server.survivors), stochastic=rounding == "stochastic"
        ),
        sent=sent,
        received=received,
    )


def paper_bytes(clients: int, entries: int, *, bits: int = 32) -> float:
    r"""Bytes that the paper counts for one client, sent and received, no dropouts.

    :math:`2 n a_K + (5 n - 4) a_S + m b` bits for n clients: two keys of every
    client; two shares to and two from every other one; n shares to unmask; and the
    masked vector. Keys and shares have 256 bits each. The numbers of the clients and
    the tags of the letters are not counted here; ``SecureSum`` counts them, too.

    Args:
        clients: Number n of clients.
        entries: Entries m of an update.
        bits: Width b of an entry.

    Returns:
        Bytes of one client.

    Source: Bonawitz et al. (2017), performance analysis of the client.
    Taught in: notebooks/09_secure_aggregation.
    """
    check_count("clients", clients)
    check_count("entries", entries)
    check_count("bits", bits)
    keys, shares = 2 * clients, 5 * clients - 4
    return (_KEY_BITS * (keys + shares) + entries * bits) / 8


def _last_rounds(dropouts: Dropouts, count: int) -> list[int]:
    """For every client how many messages it sends."""
    last = [len(ROUNDS)] * count
    pairs = dropouts.items() if isinstance(dropouts, Mapping) else dropouts
    for entry in pairs:
        client, name = entry if isinstance(entry, tuple) else (entry, "masked-input")
        check_count("dropouts", client, minimum=0, maximum=count - 1)
        check_choice("dropouts", name, ROUNDS)
        if last[client] < len(ROUNDS):
            raise InputError("dropouts", "every client once", f"{client} twice")
        last[client] = [*ROUNDS].index(name)
    return last


def _flat(update: SharedUpdate, with_buffers: bool) -> NDArray[np.float64]:
    """All real numbers of an update in one vector; counters are not among them."""
    parts = list(update.tensors.values())
    if with_buffers:
        parts += (update.buffers or {}).values()
    flat = [p.detach().double().cpu().flatten() for p in parts if p.is_floating_point()]
    return torch.cat(flat).numpy()


def _unflat(
    vector: Tensor, like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Cut tensors off the front of a vector; also returns what is left of it."""
    tensors = {}
    for name, model in like.items():
        tensors[name] = model
        if model.is_floating_point():
            tensors[name] = vector[: model.numel()].reshape(model.shape).to(model)
            vector = vector[model.numel() :]
    return tensors, vector
