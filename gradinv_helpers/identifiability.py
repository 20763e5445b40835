"""Ask whether a reconstruction tells its true image from all others of a data set.

A blurred image of 20 dB may point at one person among thousands, and a sharp one at
nobody in particular. The question is posed for guesses too: without them and without
the chance level, a share of identified images means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradinv_helpers.errors import InputError
from gradinv_helpers.image_metrics import (
    ImagesLike,
    assign,
    check_images,
    check_reconstruction,
    check_same_shape,
    check_unit_range,
)
from gradinv_helpers.intervals import share_interval

if TYPE_CHECKING:
    from gradinv_helpers.attacks.invert import Reconstruction
    from gradinv_helpers.classifier import Classifier
    from gradinv_helpers.data import Images

SAME = 1e-13  # mean squared errors closer than this count as equal

_CHUNK = 1024  # images of the pool held in float64 at a time


@dataclass(frozen=True)
class Identification:
    """Where the true images stand among all images of a pool.

    Attributes:
        ranks: For each true image, 1 plus the number of other images that are as close
            to its reconstruction or closer; 1 means identified.
        floors: The same ranks for images that no attack produced, by name:
            ``constant`` and, for more than one image, ``batch_mean``.
        pool_size: Number of images in the pool, each true image counted once.
        by_features: The same by the distance between a judge's features; None without
            a judge.

    Taught in: notebooks/03_stronger_matching
    """

    ranks: tuple[int, ...]
    floors: Mapping[str, tuple[int, ...]]
    pool_size: int
    by_features: Identification | None = None

    @property
    def share(self) -> float:
        """Share of the true images that are identified."""
        return _share(self.ranks)

    @property
    def chance(self) -> float:
        """Share that picking images of the pool at random would identify."""
        return 1 / self.pool_size

    @property
    def floor_shares(self) -> dict[str, float]:
        """Share that each floor identifies."""
        return {name: _share(ranks) for name, ranks in self.floors.items()}

    def interval(self, *, level: float = 0.95) -> tuple[float, float]:
        """Return the Wilson interval of the share."""
        return share_interval(self.ranks.count(1), len(self.ranks), level=level)

    def __str__(self) -> str:
        found, size = self.ranks.count(1), self.pool_size
        floors = [f"{name} {share:.3f}" for name, share in self.floor_shares.items()]
        guesses = ", ".join([f"chance {self.chance:.3f}", *floors])
        line = f"identified {found} of {len(self.ranks)} among {size} ({guesses})"
        return (
            line
            if self.by_features is None
            else f"{line}; by features: " + str(self.by_features)
        )


def identify(
    reconstruction: Reconstruction | ImagesLike | Images,
    truth: Images,
    pool: Images,
    *,
    judge: Classifier | None = None,
) -> Identification:
    """Rank every true image among a pool by its distance to its reconstruction.

    One one-to-one assignment decides which reconstruction belongs to which true
    image. The distance is the mean squared error; with a judge, the cosine distance
    between the judge's features is used as well. An image exactly as close as the
    truth counts as closer, so features that do not tell images apart identify nothing.

    Args:
        reconstruction: What an attack returned: ``images`` (N, C, H, W) in [0, 1] in
            any order. ``Images`` work too.
        truth: The N true images.
        pool: Images of the same data set, as many as possible. The true images belong
            to the pool whether or not it contains them; copies of a true image never
            count against it.
        judge: An independent classifier; never the attacked model.

    Returns:
        The ranks, with the chance level and the ranks of the floors.

    Raises:
        InputError: Counts or shapes differ, or a value is not finite or not in [0, 1].

    Source: Yin et al. (2021), See through gradients, for the share of images whose
    reconstruction has them as nearest neighbour.
    Taught in: notebooks/03_stronger_matching
    """
    images = check_reconstruction(reconstruction)
    target = check_unit_range(check_images(truth.pixels, "truth"), "truth")
    check_same_shape(images, target)
    gallery = build_gallery(target, pool, argument="pool")
    return identification(images[assign(images, target)], gallery, judge=judge)


@dataclass(frozen=True, eq=False)
class Gallery:
    """The distinct images among which the true images have to be found.

    Attributes:
        truth: True images (N, C, H, W).
        pool: Images of the data set (M, C, H, W), copies of true images included.
        owner: For each true image the first one that it equals, (N,).
        kept: Indices of the pool images that equal no true image, in order.
    """

    truth: Tensor
    pool: Tensor
    owner: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.owner.unique()) + len(self.kept)


def build_gallery(truth: Tensor, pool: Images, *, argument: str) -> Gallery:
    """Put true images and pool together, without copies of true images."""
    pixels = check_unit_range(check_images(pool.pixels, argument), argument)
    if pixels.shape[1:] != truth.shape[1:]:
        expected = f"images of shape {tuple(truth.shape[1:])}"
        raise InputError(argument, expected, tuple(pixels.shape[1:]))
    flat = truth.flatten(1).double()
    owner = _equal(flat, flat).int().argmax(dim=1)  # the first that equals it
    copies = [_equal(flat, part).any(dim=0) for part in _parts(pixels.flatten(1))]
    return Gallery(truth, pixels, owner, (~torch.cat(copies)).nonzero().flatten())


def identification(
    images: Tensor, gallery: Gallery, *, judge: Classifier | None = None
) -> Identification:
    """Rank the true images for reconstructions and floors in the truth's order."""
    truth = gallery.truth
    shown = {
        "": images,
        "constant": truth.mean(dim=(-2, -1), keepdim=True).expand_as(truth),
    }
    if len(truth) > 1:
        shown["batch_mean"] = truth.mean(dim=0, keepdim=True).expand_as(truth)
    found = _ranked(shown, gallery, lambda pixels: pixels.flatten(1))
    if judge is None:
        return found

    def features(pixels: Tensor) -> Tensor:
        return normalize(judge.features(pixels).double(), dim=1)

    return replace(found, by_features=_ranked(shown, gallery, features))


def _ranked(
    shown: Mapping[str, Tensor], gallery: Gallery, embed: Callable[[Tensor], Tensor]
) -> Identification:
    """Rank by the Euclidean distance between the vectors of images."""
    queries, truth, pool = map(
        embed, (torch.cat(list(shown.values())), gallery.truth, gallery.pool)
    )
    parts = _ranks(queries, truth, pool, gallery).reshape(len(shown), -1).tolist()
    ranks = dict(zip(shown, map(tuple, parts), strict=True))
    return Identification(ranks.pop(""), ranks, len(gallery))


def _ranks(queries: Tensor, truth: Tensor, pool: Tensor, gallery: Gallery) -> Tensor:
    """Return the rank of the true image for each query, (Q,).

    The vectors are (Q, D), (N, D) and (M, D), and query i asks for true image
    ``i mod N``. Distances are compared without their common part, the squared length
    of the query.
    """
    asked = torch.arange(len(queries)) % len(truth)
    queries, own = queries.double(), truth.double()[asked]
    limit = (own * (own - 2 * queries)).sum(dim=1) + SAME * truth.shape[1]
    distinct = gallery.owner.unique()
    others = distinct != gallery.owner[asked][:, None]
    near = _offsets(queries, truth[distinct].double()) <= limit[:, None]
    ranks = 1 + (near & others).sum(dim=1)
    for part in _parts(pool, gallery.kept):
        ranks += (_offsets(queries, part) <= limit[:, None]).sum(dim=1)
    return ranks


def _offsets(queries: Tensor, candidates: Tensor) -> Tensor:
    """Squared distances (Q, K) less the squared length of the query."""
    return candidates.square().sum(dim=1) - 2 * queries @ candidates.T


def _equal(images: Tensor, candidates: Tensor) -> Tensor:
    """Tell which candidates equal which image, (N, K), for flat images in float64."""
    distance = _offsets(images, candidates) + images.square().sum(dim=1, keepdim=True)
    return distance <= SAME * images.shape[1]


def _parts(vectors: Tensor, indices: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the vectors, or those at the indices, in float64 and a few at a time."""
    chosen = torch.arange(len(vectors)) if indices is None else indices
    for part in chosen.split(_CHUNK):
        yield vectors[part].double()


def _share(ranks: tuple[int, ...]) -> float:
    return ranks.count(1) / len(ranks)
