"""LPIPS agrees with torchmetrics and never touches the network by itself.

The weights in these tests are random: they stand where torch's hub cache would hold
the real ones.
"""

from __future__ import annotations

import os
import pickle
import shutil
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision import models

from gradinv_helpers import metrics
from gradinv_helpers.data import Images
from gradinv_helpers.errors import InputError
from gradinv_helpers.perceptual import (
    MIN_SIDE,
    perceptual_distance,
    perceptual_weights_available,
)

FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def _random(count=3, channels=3, side=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator)


def _random_weights(build):
    """A state dict whose classifier, unused here, takes no room on the disk."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name.startswith("classifier"):
            state[name] = torch.zeros(1).expand(shape)
        else:
            scale = shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
            state[name] = scale * torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(_random_weights(models.alexnet), folder / FILES["alex"])
    torch.save(_random_weights(models.squeezenet1_1), folder / FILES["squeeze"])
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no way to the network."""

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeeze(hub, stubs):
    shutil.copy(stubs / FILES["squeeze"], hub)
    return hub / FILES["squeeze"]


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_distance_agrees_with_torchmetrics(hub, stubs, net):
    shutil.copy(stubs / FILES[net], hub)
    images, truth = _random(), _random(seed=1)
    truth[2] = images[2]
    found = perceptual_distance(images, truth, net=net)
    assert found.dtype == torch.float64 and found.shape == (3,)
    assert found[2] == 0 and found[:2].min() > 0
    expected = learned_perceptual_image_patch_similarity(
        images[:2], truth[:2], net_type=net, normalize=True, reduction="none"
    )
    assert found[:2].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_distance_is_per_pair_and_symmetric(squeeze):
    images, truth = _random(), _random(seed=1)
    together = perceptual_distance(images, truth, net="squeeze")
    for i in range(3):
        alone = perceptual_distance(images[[i]], truth[[i]], net="squeeze")
        assert alone.shape == (1,)
        assert alone.item() == pytest.approx(together[i].item(), rel=1e-5)
    swapped = perceptual_distance(truth, images, net="squeeze")
    assert swapped.tolist() == pytest.approx(together.tolist(), rel=1e-5)
    assert perceptual_distance(images, truth, net="squeeze").equal(together)


def test_more_pairs_than_one_pass_takes(squeeze):
    images, truth = _random(40, side=17), _random(40, side=17, seed=1)
    found = perceptual_distance(images, truth, net="squeeze")
    last = perceptual_distance(images[39:], truth[39:], net="squeeze")
    assert len(found) == 40
    assert found[39].item() == pytest.approx(last.item(), rel=1e-5)


def test_grey_images_are_shown_in_three_channels(squeeze):
    images, truth = _random(2, 1), _random(2, 1, seed=1)
    grey = perceptual_distance(images, truth, net="squeeze")
    colour = perceptual_distance(
        images.repeat(1, 3, 1, 1), truth.repeat(1, 3, 1, 1), net="squeeze"
    )
    assert grey.equal(colour)


def test_rounding_outside_the_range_is_allowed_and_double_precision_works(squeeze):
    images, truth = _random(2), _random(2, seed=1)
    plain = perceptual_distance(images, truth, net="squeeze")
    images[0, 0, 0, 0] = 1.0
    edge = perceptual_distance(images.double() + 5e-6, truth.double(), net="squeeze")
    assert edge.tolist() == pytest.approx(plain.tolist(), rel=0.05)


def test_the_random_state_is_left_alone(squeeze):
    state = torch.random.get_rng_state()
    perceptual_distance(_random(1), _random(1, seed=1), net="squeeze")
    assert torch.equal(state, torch.random.get_rng_state())


def test_availability_is_a_file_in_the_cache(hub, stubs):
    assert [perceptual_weights_available(net) for net in FILES] == [False] * 3
    assert perceptual_weights_available() is False
    shutil.copy(stubs / FILES["squeeze"], hub)
    assert [perceptual_weights_available(net) for net in FILES] == [False, False, True]
    with pytest.raises(InputError, match="net: expected one of alex, vgg, squeeze"):
        perceptual_weights_available("resnet")


@pytest.mark.parametrize("net", FILES)
def test_missing_weights_are_named_and_never_fetched_silently(hub, net):
    with pytest.raises(InputError) as caught:
        perceptual_distance(_random(1), _random(1), net=net)
    text = str(caught.value)
    assert "net: expected weights in torch's hub cache, got none" in text
    assert "download=True" in text and str(hub / FILES[net]) in text
    assert "\n" not in text


def test_download_on_request(hub, stubs, monkeypatch):
    asked = []

    def deliver(url, path, prefix, progress=True):
        asked.append((url.rsplit("/", 1)[-1], prefix, progress))
        shutil.copy(stubs / FILES["squeeze"], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    for _ in range(2):
        images, truth = _random(1), _random(1, seed=1)
        found = perceptual_distance(images, truth, net="squeeze", download=True)
        assert found.item() > 0
    assert asked == [(FILES["squeeze"], "b8a52dc0", False)]


def test_a_failed_download_is_one_clear_line(hub, monkeypatch):
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = "download: expected a reachable server, got .*no route.*; get https://"
    with pytest.raises(InputError, match=message):
        perceptual_distance(_random(1), _random(1), download=True)


@pytest.mark.parametrize(
    "content", [b"", b"no weights", pickle.dumps(print, protocol=2)]
)
def test_damaged_or_foreign_files_are_refused(hub, content):
    path = hub / FILES["squeeze"]
    path.write_bytes(content)
    with pytest.raises(
        InputError, match="net: expected readable weights, got .*delete"
    ):
        perceptual_distance(_random(1), _random(1), net="squeeze")


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_weights_file_is_not_run(hub, tmp_path):
    trap = tmp_path / "sprung"
    content = pickle.dumps(_Trap(str(trap)), protocol=2)
    (hub / FILES["squeeze"]).write_bytes(content)
    with pytest.raises(InputError, match="net: expected readable weights"):
        perceptual_distance(_random(1), _random(1), net="squeeze")
    assert not trap.exists()
    pickle.loads(content)
    assert trap.exists()  # the trap works


def test_weights_of_another_model_are_refused(hub):
    torch.save({"features.0.weight": torch.zeros(2)}, hub / FILES["squeeze"])
    with pytest.raises(InputError, match="net: expected readable weights, got Error"):
        perceptual_distance(_random(1), _random(1), net="squeeze")


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_smallest_side_is_the_smallest_that_works(hub, stubs, net):
    shutil.copy(stubs / FILES[net], hub)
    side = MIN_SIDE[net]
    images = _random(1, side=side)
    assert perceptual_distance(images, images, net=net).item() == 0
    smaller = _random(1, side=side - 1)
    with pytest.raises(InputError, match=f"sides of at least {side} for '{net}'"):
        perceptual_distance(smaller, smaller, net=net)
    with pytest.raises(RuntimeError):
        learned_perceptual_image_patch_similarity(smaller, smaller, net_type=net)


def test_other_bad_images_are_refused(squeeze):
    for channels in (2, 4):
        wrong = _random(1, channels)
        with pytest.raises(InputError, match="images: expected 1 or 3 channels"):
            perceptual_distance(wrong, wrong, net="squeeze")
    with pytest.raises(InputError, match="truth: expected pixels in \\[0, 1\\]"):
        perceptual_distance(_random(1), 3 * _random(1), net="squeeze")
    with pytest.raises(InputError, match="net: expected one of"):
        perceptual_distance(_random(1), _random(1), net="vgg19")


# --- in a score ---------------------------------------------------------------------


def _images(pixels):
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("a",))


def test_score_measures_it_where_the_weights_are(squeeze):
    truth = _images(_random(2))
    pixels = (truth.pixels + 0.1 * _random(2, seed=1)).clamp(0, 1).flip(0)
    found = SimpleNamespace(images=pixels, labels=truth.labels)
    score = metrics.score(found, truth, perceptual_net="squeeze")
    assert score.assignment == (1, 0)
    expected = perceptual_distance(pixels.flip(0), truth.pixels, net="squeeze")
    assert score.perceptual_distance == pytest.approx(tuple(expected.tolist()))
    assert all(floor.perceptual_distance for floor in score.floors.values())
    summary = score.summary()
    best = min(floor["perceptual_distance"] for floor in summary["floors"].values())
    gain = best - summary["perceptual_distance"]["mean"]
    assert summary["gains"]["perceptual_distance"] == pytest.approx(gain)
    assert gain > 0
    assert "LPIPS" in score.table()


def test_score_goes_without_it_where_they_are_not(hub):
    truth = _images(_random(2))
    score = metrics.score(truth, truth, perceptual_net="alex")
    assert score.perceptual_distance is None
    assert "perceptual_distance" not in score.summary()
    assert "LPIPS" not in score.table()
    assert score == metrics.score(truth, truth)
    with pytest.raises(InputError, match="perceptual_net: expected one of alex"):
        metrics.score(truth, truth, perceptual_net="lpips")


def test_score_goes_without_it_for_images_that_do_not_fit(squeeze):
    small = _images(_random(2, side=16))
    score = metrics.score(small, small, perceptual_net="squeeze")
    assert score.perceptual_distance is None


def test_score_does_not_measure_it_unasked(squeeze):
    truth = _images(_random(2))
    assert metrics.score(truth, truth).perceptual_distance is None
