"""Ranks agree with a search by hand; copies never count, ties always do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from gradinv_helpers import identifiability
from gradinv_helpers.classifier import Classifier
from gradinv_helpers.data import Images, load_images
from gradinv_helpers.errors import InputError
from gradinv_helpers.identifiability import identify
from gradinv_helpers.models import build_model


def _random(count, seed=0, side=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, side, side, generator=generator)


def _images(pixels):
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("a",))


def _found(pixels):
    return SimpleNamespace(images=pixels, labels=torch.zeros(len(pixels)).long())


def _join(*parts):
    return _images(torch.cat([p.pixels for p in parts]))


def _rank_by_hand(query, index, truth, pool):
    """1 plus the number of other images that are as close or closer."""
    known = {image.tobytes(): image for image in truth}
    own = known.pop(truth[index].tobytes())
    true = {image.tobytes() for image in truth}
    others = [*known.values(), *(x for x in pool if x.tobytes() not in true)]
    limit = np.square(query - own).mean()
    return 1 + sum(np.square(query - other).mean() <= limit for other in others)


def _arrays(pixels):
    return [image.double().numpy() for image in pixels]


class _Colours:
    """A judge that sees three block means of an image."""

    def features(self, images):
        return images.float().unfold(2, 2, 2).mean(dim=(1, 4)).flatten(1)[:, :3]


class _Blind:
    """A judge to whom all images are the same."""

    def features(self, images):
        return torch.ones(len(images), 5)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6, 1.0])
def test_ranks_agree_with_a_search_by_hand(noise):
    truth, pool = _images(_random(5)), _images(_random(40, seed=1))
    images = (1 - noise) * truth.pixels + noise * _random(5, seed=2)
    pool = _join(pool, truth[[1, 3]], pool[[0, 0]])
    found = identify(_found(images), truth, pool)
    order = identifiability.assign(images, truth.pixels)
    arrays, others = _arrays(truth.pixels), _arrays(pool.pixels)
    expected = [
        _rank_by_hand(query, i, arrays, others)
        for i, query in enumerate(_arrays(images[order]))
    ]
    assert found.ranks == tuple(expected)
    assert found.pool_size == 45 + 2  # copies of the truth are gone, others count
    assert found.chance == 1 / 47
    assert found.share == found.ranks.count(1) / 5
    assert (found.share == 1) == (noise < 0.5)


def test_floors_are_ranked_like_reconstructions():
    digits = load_images("digits", split="test")
    truth = digits[[4, 40, 140]]
    found = identify(truth, truth, digits)
    assert found.ranks == (1, 1, 1) and found.pool_size == 360
    arrays, pool = _arrays(truth.pixels), _arrays(digits.pixels)
    for name, guess in {
        "constant": [np.full_like(x, x.mean()) for x in arrays],
        "batch_mean": [np.mean(arrays, axis=0)] * 3,
    }.items():
        expected = [
            _rank_by_hand(query, i, arrays, pool) for i, query in enumerate(guess)
        ]
        assert found.floors[name] == tuple(expected)
        assert found.floor_shares[name] == expected.count(1) / 3
    assert set(identify(truth[:1], truth[:1], digits).floors) == {"constant"}


def test_the_assignment_is_one_to_one_and_the_order_does_not_matter():
    digits = load_images("digits", split="test")
    truth = digits[[4, 40, 140, 141]]
    images = 0.6 * truth.pixels + 0.2
    one = identify(_found(images), truth, digits)
    two = identify(_found(images[[2, 0, 3, 1]]), truth, digits)
    assert one == two and one.ranks == (1, 1, 1, 1)
    # The same picture four times: it can name one true image, not four.
    four = identify(_found(images[[0, 0, 0, 0]]), truth, digits)
    assert four.ranks.count(1) == 1 and four.ranks[0] == 1


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    copies=st.lists(st.integers(0, 3), max_size=6),
    noise=st.floats(0, 1),
)
def test_copies_of_true_images_change_nothing(seed, copies, noise):
    truth, pool = _images(_random(4, seed)), _images(_random(12, seed + 1))
    images = _found((1 - noise) * truth.pixels + noise * _random(4, seed + 2))
    plain = identify(images, truth, pool)
    more = _join(pool, truth[copies]) if copies else pool
    assert identify(images, truth, more) == plain


@settings(derandomize=True, max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.floats(0, 1), extra=st.integers(1, 20))
def test_a_larger_pool_never_makes_it_easier(seed, noise, extra):
    truth, pool = _images(_random(3, seed)), _images(_random(30, seed + 1))
    images = _found((1 - noise) * truth.pixels + noise * _random(3, seed + 2))
    small = identify(images, truth, pool[:-extra])
    large = identify(images, truth, pool)
    assert large.pool_size == small.pool_size + extra
    for a, b in zip(small.ranks, large.ranks, strict=True):
        assert a <= b <= a + extra


def test_equal_true_images_do_not_count_against_each_other():
    pixels = _random(3)
    truth = _images(pixels[[0, 1, 0, 2]])
    pool = _images(torch.cat([_random(10, seed=1), pixels]))
    found = identify(truth, truth, pool)
    assert found.ranks == (1, 1, 1, 1)
    assert found.pool_size == 13


def test_negative_zero_is_a_copy():
    truth = _images(torch.zeros(1, 1, 4, 4))
    pool = _images(torch.stack([-torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]))
    assert identify(truth, truth, pool).pool_size == 2


def test_another_image_as_close_counts_against():
    truth = _images(torch.zeros(1, 1, 4, 4))
    pool = _images(torch.ones(1, 1, 4, 4))
    halfway = _found(torch.full((1, 1, 4, 4), 0.5))
    assert identify(halfway, truth, pool).ranks == (2,)
    nearer = _found(torch.full((1, 1, 4, 4), 0.4999))
    assert identify(nearer, truth, pool).ranks == (1,)


def test_a_judge_that_sees_no_difference_identifies_nobody():
    truth, pool = _images(_random(2)), _images(_random(7, seed=1))
    found = identify(truth, truth, pool, judge=_Blind()).by_features
    assert found.ranks == (9, 9) and found.share == 0
    assert found.floor_shares == {"constant": 0, "batch_mean": 0}


def test_features_are_compared_by_their_cosine():
    truth, pool = _images(_random(4)), _images(_random(50, seed=1))
    images = (truth.pixels + 0.2 * _random(4, seed=2)).clamp(0, 1)
    judge = _Colours()
    found = identify(_found(images), truth, pool, judge=judge)

    def unit(pixels):
        vectors = judge.features(pixels).double().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    expected = tuple(
        _rank_by_hand(query, i, list(unit(truth.pixels)), list(unit(pool.pixels)))
        for i, query in enumerate(unit(images))
    )
    assert found.by_features.ranks == expected
    assert found.by_features.pool_size == found.pool_size == 54
    assert found.by_features.by_features is None
    # Three block means of a bright and of a dark copy have the same direction.
    dark = identify(_found(0.1 * truth.pixels), truth, pool, judge=judge)
    assert dark.by_features.share == 1 and dark.share < 1


def test_a_real_classifier_is_a_judge():
    digits = load_images("digits", split="test")
    model = build_model("convnet", in_channels=1, image_size=8, num_classes=10)
    truth = digits[[4, 40]]
    found = identify(truth, truth, digits, judge=Classifier(model.eval()))
    assert found.by_features.ranks == (1, 1) and found.by_features.pool_size == 360


def test_noise_is_identified_as_often_as_chance_says():
    """A reconstruction that knows nothing is right once in five."""
    found = 0
    for seed in range(400):
        pixels = _random(6, seed=seed)
        truth = _images(pixels[:1])
        result = identify(_found(pixels[5:]), truth, _images(pixels[1:5]))
        assert result.chance == 0.2
        found += result.ranks == (1,)
    assert binomtest(found, 400, 0.2).pvalue > 0.01


def test_the_size_of_the_parts_does_not_matter(monkeypatch):
    truth, pool = _images(_random(3)), _images(_random(20, seed=1))
    pool = _join(pool, truth[[0]])
    images = _found(0.5 * truth.pixels + 0.5 * _random(3, seed=2))
    whole = identify(images, truth, pool)
    monkeypatch.setattr(identifiability, "_CHUNK", 3)
    assert identify(images, truth, pool) == whole


def test_interval_and_text():
    digits = load_images("digits", split="test")
    truth = digits[[4, 40, 140]]
    found = identify(truth, truth, digits, judge=_Blind())
    expected = binomtest(3, 3).proportion_ci(method="wilson")
    assert found.interval() == pytest.approx(tuple(expected))
    text = str(found)
    assert text.startswith("identified 3 of 3 among 360 (chance 0.003, constant 0.000")
    assert "; by features: identified 0 of 3 among 360" in text


def test_bad_input_is_refused():
    truth, pool = _images(_random(2)), _images(_random(4, seed=1))
    with pytest.raises(InputError, match="images: expected 2 images, one for each"):
        identify(_found(_random(1)), truth, pool)
    with pytest.raises(
        InputError, match="pool: expected images of shape \\(1, 4, 4\\)"
    ):
        identify(truth, truth, _images(_random(2, side=5)))
    with pytest.raises(
        InputError, match="reconstruction: expected pixels in \\[0, 1\\]"
    ):
        identify(_found(3 * truth.pixels), truth, pool)


def test_float64_reconstructions_and_the_random_state():
    truth, pool = _images(_random(2)), _images(_random(4, seed=1))
    state = torch.random.get_rng_state()
    found = identify(_found(truth.pixels.double()), truth, pool)
    assert found == identify(truth, truth, pool)
    assert torch.equal(state, torch.random.get_rng_state())
