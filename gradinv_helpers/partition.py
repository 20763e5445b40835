"""Divide images among the clients of a federation.

Taught in: notebooks/01_fl_guarantees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError, check_choice, check_count, check_number
from gradinv_helpers.updates import LocalTraining

Scheme = Literal["iid", "dirichlet", "shards"]

SHARDS_PER_CLIENT = 2
MAX_ALPHA = 1e9


@dataclass(frozen=True, eq=False)
class Client:
    """A participant: private images and the recipe that turns them into an update.

    Args:
        images: The images that never leave the client.
        training: How the client computes what it sends.
    """

    images: Images
    training: LocalTraining = field(default_factory=LocalTraining)


def partition(
    images: Images,
    *,
    clients: int,
    scheme: Scheme = "iid",
    alpha: float | None = None,
    seed: int = 0,
    training: LocalTraining | None = None,
) -> list[Client]:
    """Give every image to exactly one client.

    - ``iid``: shuffle, then cut into equal parts (sizes differ by at most 1).
    - ``dirichlet``: for every class k draw the shares of the clients
      p_k ~ Dirichlet(alpha, ..., alpha) and cut the class accordingly. A small alpha
      gives each client few classes; a large one comes close to equal shares. A
      client that got nothing takes one image from the largest client, so that
      everybody can train.
    - ``shards``: sort by label, cut into 2 parts per client, and deal each client 2
      of them at random. Most clients then see one to four classes.

    Args:
        images: What is to be divided; N images.
        clients: Number of clients, 1 to N (``shards``: to N / 2).
        scheme: ``iid``, ``dirichlet`` or ``shards``.
        alpha: Concentration of ``dirichlet``, > 0; ``None`` for the other schemes.
        seed: Seed of the shuffle and the draws; the same seed gives the same clients.
        training: The recipe of every client; one gradient (FedSGD) if ``None``.

    Returns:
        One ``Client`` for each part, in order.

    Raises:
        InputError: More clients than images, an unknown scheme, or an alpha that is
            missing, not positive or not wanted.

    Source: ``shards`` from McMahan et al. (2017), Section 3; ``dirichlet`` as in
    Yurochkin et al. (2019), Section 4, with the concentration read as the degree of
    heterogeneity, as in Hsu et al. (2019), Section 3.
    Taught in: notebooks/01_fl_guarantees.
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_count("clients", clients)
    check_count("seed", seed, minimum=0)
    _check_clients(clients, scheme, len(images))
    rng = np.random.default_rng(seed)
    labels = images.labels.cpu().numpy()
    if scheme == "dirichlet":
        parts = _dirichlet(labels, clients, _check_alpha(alpha), rng)
    elif alpha is not None:
        raise InputError(
            "alpha",
            f"nothing for the scheme {scheme!r}",
            repr(alpha),
            "leave it out or choose the scheme 'dirichlet'",
        )
    elif scheme == "shards":
        parts = _shards(labels, clients, rng)
    else:
        parts = np.array_split(rng.permutation(len(labels)), clients)
    training = training or LocalTraining()
    return [Client(images[part], training) for part in parts]


def _check_clients(clients: int, scheme: str, count: int) -> None:
    """Refuse more clients than the images can serve."""
    each = SHARDS_PER_CLIENT if scheme == "shards" else 1
    if clients * each > count:
        raise InputError(
            "clients",
            f"at most {count // each} for {count} images and scheme {scheme!r}",
            clients,
            "take fewer clients or more images",
        )


def _check_alpha(alpha: float | None) -> float:
    """Return alpha if it is a positive number that a computer can draw with."""
    if alpha is None:
        raise InputError(
            "alpha", "a number > 0 for the scheme 'dirichlet'", None, "for example 0.5"
        )
    # Beyond MAX_ALPHA the shares are equal anyway and the draw would overflow.
    return min(check_number("alpha", alpha, exclusive=True), MAX_ALPHA)


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut every class by shares drawn from a symmetric Dirichlet distribution."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        ends = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(int)
        for part, piece in zip(parts, np.split(members, ends), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in parts]


def _shards(
    labels: NDArray[np.int64], clients: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Sort by label, cut into shards and deal them out."""
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(ordered, clients * SHARDS_PER_CLIENT)
    hands = rng.permutation(len(shards)).reshape(clients, SHARDS_PER_CLIENT)
    return [np.concatenate([shards[i] for i in hand]) for hand in hands]
