"""Which algebraic method is picked, and that each one delivers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradinv_helpers as gi
from gradinv_helpers.attacks import exact
from gradinv_helpers.attacks.exact import ExactSolution, invert_exactly
from gradinv_helpers.federated.aggregation import normalize


@pytest.fixture(scope="module")
def photos() -> gi.Images:
    return gi.load_images("photos", split="test", image_size=16)


def build(name: str, **options: object) -> nn.Module:
    return gi.build_model(name, in_channels=3, image_size=16, num_classes=10, **options)


def error(found: ExactSolution, truth: gi.Images) -> float:
    return float((found.images - truth.pixels.to(found.images)).abs().max())


@pytest.mark.parametrize(
    ("name", "indices", "method", "source"),
    [
        ("mlp", [3], "closed form", "inferred (iDLG)"),
        ("lenet", [3], "layer by layer", "inferred (last bias)"),
        ("mlp", [10, 23, 36], "low rank", "inferred (error of the first layer)"),
    ],
)
def test_method_by_model_and_batch(
    photos: gi.Images, name: str, indices: list[int], method: str, source: str
) -> None:
    victims = photos[indices]
    found = invert_exactly(gi.local_update(build(name).double(), victims))
    assert found.certificate.method == method
    assert found.certificate.exact
    assert found.certificate.unknowns == victims.pixels.numel()
    assert found.label_source == source
    assert found.reason.startswith(
        "one sample" if len(indices) == 1 else "several samples"
    )
    assert found.labels.tolist() == victims.labels.tolist()  # they are sorted
    assert error(found, victims) < 1e-6


def test_labels_of_one_sample_without_a_last_linear_layer(photos: gi.Images) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(768, 64),
        nn.Sigmoid(),
        nn.Unflatten(1, (4, 4, 4)),
        nn.Conv2d(4, 5, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()
    for index in (0, 17, 60):
        truth = photos[[index]]
        truth = gi.Images(truth.pixels, truth.labels % 5, truth.class_names[:5])
        found = invert_exactly(gi.local_update(model, truth))
        assert found.label_source == "inferred (error of the first layer)"
        assert found.labels.tolist() == truth.labels.tolist()
        assert found.certificate.exact
        assert error(found, truth) < 1e-10


class Minus(nn.Module):
    """Turns the signs of the last layer around, which misleads iDLG."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@pytest.mark.parametrize("classes", [2, 10])
def test_labels_where_the_last_layer_misleads(photos: gi.Images, classes: int) -> None:
    model = gi.build_model("mlp", in_channels=3, image_size=16, num_classes=classes)
    model = nn.Sequential(*model, Minus()).double()
    for index in range(4):
        truth = photos[[index]]
        truth = gi.Images(truth.pixels, truth.labels % classes, photos.class_names)
        found = invert_exactly(gi.local_update(model, truth))
        assert found.labels.tolist() == truth.labels.tolist()
        assert found.label_source == "inferred (error of the first layer)"
        assert found.certificate.exact


def test_labels_where_one_unit_cannot_tell_classes(photos: gi.Images) -> None:
    """All errors of the first layer are parallel then; the whole gradient decides."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(768, 1), nn.Sigmoid(), nn.Linear(1, 10), Minus()
    ).double()
    for index in range(6):
        found = invert_exactly(gi.local_update(model, photos[[index]]))
        assert found.labels.tolist() == [index]
        assert found.certificate.exact


@pytest.mark.parametrize(("name", "count"), [("mlp", 1), ("lenet", 1), ("mlp", 3)])
def test_given_labels_are_named(photos: gi.Images, name: str, count: int) -> None:
    victims = photos[[36, 10, 23][:count]]
    update = gi.local_update(build(name), victims)
    found = invert_exactly(update, labels=victims.labels)
    assert found.label_source == "given (upper bound)"
    assert found.labels.tolist() == victims.labels.tolist()
    assert error(found, victims) < 1e-2
    assert found.certificate.exact


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_a_wrong_label_shows_in_the_residual(photos: gi.Images, name: str) -> None:
    victim = photos[[3]]
    wrong = (victim.labels + 1) % 10
    update = gi.local_update(build(name), victim)
    found = invert_exactly(update, labels=wrong)
    assert error(found, victim) < 1e-2  # the image needs no label
    assert not found.certificate.exact


def test_a_normalised_gradient_of_one_sample(photos: gi.Images) -> None:
    update = normalize(gi.local_update(build("mlp").double(), photos[[8]]))
    found = invert_exactly(update)
    assert found.certificate.exact
    assert error(found, photos[[8]]) < 1e-10
    for name, indices in (("lenet", [8]), ("mlp", [8, 9])):
        update = normalize(gi.local_update(build(name), photos[indices]))
        with pytest.raises(gi.InputError, match="got a normalised one"):
            invert_exactly(update)


def test_a_first_layer_that_standardises(photos: gi.Images) -> None:
    model = build("mlp", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)).double()
    for indices in ([5], [5, 26]):
        found = invert_exactly(gi.local_update(model, photos[indices]))
        assert found.certificate.exact
        assert error(found, photos[indices]) < 1e-8


def test_invert_carries_the_solution(photos: gi.Images) -> None:
    victims = photos[[2, 40]]
    found = gi.invert(gi.local_update(build("mlp"), victims), attack="exact")
    assert found.attack == "exact"
    assert found.certificate is not None
    assert found.certificate.exact
    assert found.loss == found.certificate.residual
    assert "low rank" in found.reason
    assert min(gi.score(found, victims).psnr) > 80


def test_old_names_are_still_there() -> None:
    from gradinv_helpers.attacks import certificate, layerwise

    assert exact.Certificate is certificate.Certificate
    assert exact.invert_layer_by_layer is layerwise.invert_layer_by_layer


# --- what it refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "indices", "message"),
    [
        ("convnet", [0], r"got 1 sample of .*layer by layer: layer \S+: MaxPool2d"),
        ("resnet18", [0], "got 1 sample of .*closed form: ResNet; layer by layer"),
        ("lenet", [0, 1], r"got 2 samples of .*\(low rank: layer 0: Conv2d"),
    ],
)
def test_other_models(
    photos: gi.Images, name: str, indices: list[int], message: str
) -> None:
    update = gi.local_update(build(name), photos[indices])
    with pytest.raises(gi.InputError, match=message) as caught:
        invert_exactly(update)
    assert "use attack='auto'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_linear_layers_without_a_bias(photos: gi.Images) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10, bias=False))
    with pytest.raises(gi.InputError, match="closed form: layer 1 without a bias"):
        invert_exactly(gi.local_update(model, photos[[0]]))


def test_a_first_layer_in_which_nothing_is_active(photos: gi.Images) -> None:
    model = build("mlp")
    with torch.no_grad():
        model[1].bias.fill_(-100.0)
    with pytest.raises(gi.InputError, match="non-zero bias gradient in layer '1'"):
        invert_exactly(gi.local_update(model, photos[[0]]))


def test_bad_labels_and_seeds(photos: gi.Images) -> None:
    update = gi.local_update(build("mlp"), photos[[0]])
    with pytest.raises(gi.InputError, match="1 labels, one per sample, got 2"):
        invert_exactly(update, labels=torch.tensor([1, 2]))
    with pytest.raises(gi.InputError, match="seed: expected an integer"):
        invert_exactly(update, seed=-1)


def test_levenberg_marquardt_where_no_algebra_applies() -> None:
    """Two images behind LeNet at 8x8: the rank is full, so the pair is the pair."""
    victims = gi.load_images("digits", split="test")[[1, 2]]
    model = gi.build_model("lenet", in_channels=1, image_size=8, num_classes=10)
    found = gi.invert(gi.local_update(model, victims), attack="exact")
    assert found.certificate is not None
    assert found.certificate.method == "levenberg-marquardt"
    assert found.certificate.exact
    assert found.label_source == "inferred (counts)"
    assert min(gi.score(found, victims).psnr) > 60
    with pytest.raises(gi.InputError, match="attack 'exact'"):
        invert_exactly(gi.local_update(model, victims))
    many = gi.load_images("digits", split="test")[list(range(130))]
    with pytest.raises(
        gi.InputError, match="or at most 8,192 pixels behind a smooth model"
    ):
        gi.invert(gi.local_update(model, many), attack="exact")
