"""Total variation against known values and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradinv_helpers.priors.smoothness import total_variation


def naive(images: np.ndarray, smoothing: float = 0.0) -> float:
    """Mean over vertical plus mean over horizontal neighbours, one by one."""

    def size(d: float) -> float:
        return float(np.sqrt(d * d + smoothing**2) - smoothing)

    down, right = [], []
    for image in images.reshape(-1, *images.shape[-2:]):
        height, width = image.shape
        down += [
            size(image[i + 1, j] - image[i, j])
            for i in range(height - 1)
            for j in range(width)
        ]
        right += [
            size(image[i, j + 1] - image[i, j])
            for i in range(height)
            for j in range(width - 1)
        ]
    return sum(down) / len(down) + sum(right) / len(right)


def random_images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_constant_images_have_none() -> None:
    assert float(total_variation(torch.full((2, 3, 5, 4), 0.7))) == 0


def test_a_ramp() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 6, 8) / 10
    assert float(total_variation(ramp)) == pytest.approx(0.1)
    assert float(total_variation(ramp.mT)) == pytest.approx(0.1)


def test_a_chess_board_has_the_most() -> None:
    board = (torch.arange(6)[:, None] + torch.arange(7)) % 2
    assert float(total_variation(board[None, None].float())) == 2


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.2])
def test_against_a_plain_loop(smoothing: float) -> None:
    images = random_images(2, 3, 5, 4)
    found = total_variation(images, smoothing=smoothing)
    assert float(found) == pytest.approx(naive(images.numpy(), smoothing), rel=1e-12)


def test_leading_axes_are_kept() -> None:
    images = random_images(2, 5, 3, 1, 4, 4)
    found = total_variation(images)
    assert found.shape == (2, 5)
    assert float(found[1, 2]) == pytest.approx(naive(images[1, 2].numpy()), rel=1e-12)


def test_does_not_depend_on_the_number_of_images() -> None:
    images = random_images(3, 1, 6, 6)
    twice = torch.cat([images, images])
    assert float(total_variation(twice)) == pytest.approx(
        float(total_variation(images))
    )


def test_smoothing_is_differentiable_at_zero_and_vanishes() -> None:
    flat = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    total_variation(flat, smoothing=1e-3).backward()
    assert float(flat.grad.abs().max()) == 0
    images = random_images(1, 1, 6, 6)
    smooth = total_variation(images, smoothing=1e-9)
    assert float(smooth) == pytest.approx(float(total_variation(images)), rel=1e-7)
    assert float(total_variation(images, smoothing=0.1)) < float(smooth)


def test_derivative() -> None:
    images = random_images(2, 1, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: total_variation(x, smoothing=0.1), (images,)
    )
