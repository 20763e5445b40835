"""The layer-by-layer attack: exact where it says so, and honest where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradinv_helpers as gi
from gradinv_helpers.attacks import layerwise
from gradinv_helpers.attacks.layerwise import invert_layer_by_layer
from gradinv_helpers.federated.aggregation import normalize


@pytest.fixture(scope="module")
def photos() -> gi.Images:
    return gi.load_images("photos", split="test", image_size=16)


def lenet(seed: int = 0, activation: Callable[[], nn.Module] | None = None):
    model = gi.build_model(
        "lenet", in_channels=3, image_size=16, num_classes=10, seed=seed
    )
    if activation is not None:
        for place, layer in enumerate(model):
            if isinstance(layer, nn.Sigmoid):
                model[place] = activation()
    return model


def error(image: torch.Tensor, truth: gi.Images) -> float:
    return float((image - truth.pixels.to(image)).abs().max())


@pytest.mark.parametrize("index", [0, 1, 5, 6])
@pytest.mark.parametrize("activation", [None, nn.Tanh])
def test_one_image_is_computed(
    photos: gi.Images, index: int, activation: type[nn.Module] | None
) -> None:
    victim = photos[[index]]
    update = gi.local_update(lenet(index, activation), victim)
    image, label, certificate = invert_layer_by_layer(update)
    assert image.shape == (1, 3, 16, 16)
    assert error(image, victim) < 1e-3  # float32 gradients, magnified by conditioning
    assert label.tolist() == victim.labels.tolist()
    assert certificate.exact
    assert certificate.residual < 1e-9
    assert certificate.rank == certificate.unknowns == 3 * 16 * 16
    assert certificate.condition == max(s.condition for s in certificate.layers)


def test_double_precision_gives_double_precision(photos: gi.Images) -> None:
    update = gi.local_update(lenet().double(), photos[[0]])
    image, _, certificate = invert_layer_by_layer(update)
    assert error(image, photos[[0]]) < 1e-8
    assert certificate.residual < 1e-18


@pytest.mark.parametrize("name", ["lenet", "mlp"])
def test_a_first_layer_that_standardises(photos: gi.Images, name: str) -> None:
    model = gi.build_model(
        name,
        in_channels=3,
        image_size=16,
        num_classes=10,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.1),
    )
    update = gi.local_update(model.double(), photos[[4]])
    image, _, certificate = invert_layer_by_layer(update)
    assert error(image, photos[[4]]) < 1e-8
    assert certificate.exact


@pytest.mark.parametrize("index", [0, 60])
def test_relu_where_enough_units_are_on(photos: gi.Images, index: int) -> None:
    """Units that are off are told from units that are hardly on."""
    image, _, certificate = invert_layer_by_layer(
        gi.local_update(lenet(0, nn.ReLU), photos[[index]])
    )
    assert error(image, photos[[index]]) < 1e-3
    assert certificate.exact


def test_relu_where_too_many_units_are_off_is_not_called_exact() -> None:
    photos = gi.load_images("photos", split="test", image_size=24)
    model = gi.build_model("lenet", in_channels=3, image_size=24, num_classes=10)
    for place, layer in enumerate(model):
        if isinstance(layer, nn.Sigmoid):
            model[place] = nn.ReLU()
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, photos[[0]]))
    assert error(image, photos[[0]]) > 0.1
    assert not certificate.exact
    assert not certificate.determined
    assert certificate.rank == 0
    assert certificate.condition == float("inf")
    assert "leaves its input open" in str(certificate)


@pytest.mark.parametrize(("share", "exact"), [(1e-6, True), (3e-2, False)])
def test_noise_shows_in_the_residual(
    photos: gi.Images, share: float, exact: bool
) -> None:
    noisy = gi.defend(
        gi.local_update(lenet(), photos[[0]]),
        gi.GaussianNoise(share, relative=True),
        generator=torch.Generator().manual_seed(0),
    )
    _, _, certificate = invert_layer_by_layer(noisy)
    assert certificate.exact is exact
    assert certificate.determined
    if not exact:
        assert "does not explain the update" in str(certificate)


def test_an_mlp_and_strides_and_dilation(photos: gi.Images) -> None:
    victim = photos[[3]]
    mlp = gi.build_model("mlp", in_channels=3, image_size=16, num_classes=10)
    image, _, certificate = invert_layer_by_layer(gi.local_update(mlp, victim))
    assert error(image, victim) < 1e-4
    assert certificate.exact
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=1, padding=2, dilation=2),
        nn.Tanh(),
        nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 0)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 12, 10),
    )
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, victim))
    assert certificate.determined
    assert error(image, victim) < 1e-2


def test_layers_that_follow_directly_share_what_is_known(photos: gi.Images) -> None:
    """Without an activation between them, the output of a convolution is known too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Identity(),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8 * 8 * 8, 10),
    ).eval()
    update = gi.local_update(model.double(), photos[[0]])
    image, _, certificate = invert_layer_by_layer(update)
    equations = [layer.equations for layer in certificate.layers]
    assert equations == [5120, 512 + 8 * 8 * 9, 2048 + 8 * 3 * 9]
    # 1,088 equations for the 2,048 numbers between the convolutions
    assert [layer.determined for layer in certificate.layers] == [True, False, True]
    assert certificate.rank == 0
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(2048, 10)
    )
    update = gi.local_update(wide.double(), photos[[0]])
    image, _, certificate = invert_layer_by_layer(update)
    assert certificate.exact
    assert error(image, photos[[0]]) < 1e-10


def test_the_normal_matrix_is_that_of_both_kinds_of_equations() -> None:
    """Every column of the equations, taken from the convolution's own derivatives."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    a = torch.rand(2, 5, 6, dtype=torch.float64)
    e = torch.randn(3, 3, 3, dtype=torch.float64)
    slope = torch.rand(3, 3, 3, dtype=torch.float64)
    slope[0, 0, 0] = 0

    def sides(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = conv.weight.detach().requires_grad_()
        z = F.conv2d(x[None], weight, None, stride=2, padding=1)[0]
        (moments,) = torch.autograd.grad((z * e).sum(), weight, create_graph=True)
        return (slope * z).reshape(-1), moments.reshape(-1)

    jacobians = torch.autograd.functional.jacobian(sides, a)
    known, moments = (j.reshape(-1, a.numel()) for j in jacobians)
    known = known / (known.square().sum() / 26).sqrt()  # one of 27 is not known
    moments = moments / (moments.square().sum() / len(moments)).sqrt()
    reference = known.T @ known + moments.T @ moments
    output = F.conv2d(a[None], conv.weight, conv.bias, stride=2, padding=1)[0].detach()
    equations = layerwise._Convolution(
        conv, (2, 5, 6), output, slope, e, sides(a)[1].detach().view(3, 2, 3, 3)
    )
    found = equations._normal_matrix(0.0)
    assert torch.allclose(found, reference, rtol=0, atol=1e-9)
    rank = torch.linalg.matrix_rank(reference, hermitian=True, rtol=1e-12)
    answer, solution = equations.solve("conv")
    assert solution.determined is bool(rank == 60)
    assert solution.equations == 26 + 54
    if solution.determined:
        assert torch.allclose(answer, a, atol=1e-8)


def test_a_weight_change_of_one_step_will_do(photos: gi.Images) -> None:
    recipe = gi.LocalTraining(sends="delta", lr=0.5)
    image, _, certificate = invert_layer_by_layer(
        gi.local_update(lenet(), photos[[0]], recipe)
    )
    assert error(image, photos[[0]]) < 1e-2
    assert certificate.exact


def test_an_activation_used_twice_counts_twice(photos: gi.Images) -> None:
    torch.manual_seed(0)
    tanh = nn.Tanh()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        tanh,
        nn.Conv2d(8, 8, 3, padding=1),
        tanh,
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 10),
    )
    image, _, certificate = invert_layer_by_layer(gi.local_update(model, photos[[0]]))
    assert certificate.exact
    assert error(image, photos[[0]]) < 1e-2


# --- what it refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"), [("convnet", "MaxPool2d"), ("resnet18", "ResNet")]
)
def test_other_models(photos: gi.Images, name: str, message: str) -> None:
    model = gi.build_model(name, in_channels=3, image_size=16, num_classes=10)
    with pytest.raises(gi.InputError, match=message):
        invert_layer_by_layer(gi.local_update(model, photos[[0]]))


def test_several_samples_and_unknown_lengths(photos: gi.Images) -> None:
    with pytest.raises(gi.InputError, match="one of 2 samples"):
        invert_layer_by_layer(gi.local_update(lenet(), photos[[0, 1]]))
    with pytest.raises(gi.InputError, match="a normalised one; the errors of all"):
        invert_layer_by_layer(normalize(gi.local_update(lenet(), photos[[0]])))


def test_layers_without_a_bias(photos: gi.Images) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10, bias=False))
    with pytest.raises(gi.InputError, match="with biases.* got layer 1: Linear"):
        invert_layer_by_layer(gi.local_update(model, photos[[0]]))


def test_chains_that_are_more_than_their_layers(photos: gi.Images) -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    layers = [nn.Flatten(), nn.Linear(768, 20), nn.Sigmoid(), nn.Linear(20, 10)]
    frozen = nn.Sequential(*layers)
    with pytest.raises(gi.InputError, match="Twice"):
        invert_layer_by_layer(gi.local_update(Twice(*layers), photos[[0]]))
    frozen[1].bias.requires_grad_(False)
    with pytest.raises(gi.InputError, match="frozen"):
        invert_layer_by_layer(gi.local_update(frozen, photos[[0]]))


def test_equations_that_do_not_fit_into_memory(
    photos: gi.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_MOST_UNKNOWNS", 500)
    update = gi.local_update(lenet(), photos[[0]])
    with pytest.raises(gi.InputError, match="at most 500 numbers.* got 768 in layer 2"):
        invert_layer_by_layer(update)
