"""Likelihoods of messages against integrals, simulations and differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from gradinv_helpers.attacks.likelihood import (
    Gaussian,
    Likelihood,
    Pruned,
    Quantised,
    Sign,
    likelihoods_of,
)
from gradinv_helpers.encoding import Encoding

LAWS = {
    "gaussian": (Gaussian(), 0.4),
    "pruned, sent": (Pruned(0.3), 0.4),
    "pruned, unsent": (Pruned(0.3), 0.0),
    "pruned, small bound": (Pruned(1e-3), 0.0),
    "sign": (Sign(), -0.4),
    "quantised": (Quantised(0.2), 0.4),
    "quantised, small step": (Quantised(1e-3), 0.4),
}


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def energy(law: Likelihood, value: float, sent: float, std: float) -> float:
    return float(law.energy(one(value), one(sent), std**2)[0])


def smoothed_triangle(value: float, sent: float, step: float, std: float) -> float:
    def density(shift: float) -> float:
        height = max(0.0, 1 - abs(value + shift - sent) / step)
        return float(stats.norm.pdf(shift, scale=std)) * height

    centre = sent - value
    edges = [centre - step, centre, centre + step]
    parts = itertools.pairwise(edges)
    return sum(integrate.quad(density, a, b, epsabs=0)[0] for a, b in parts)


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.1, -2.5])
def test_rounding_at_random_is_an_integral(value: float, std: float) -> None:
    expected = -2 * math.log(smoothed_triangle(value, 0.2, 1.0, std))
    assert energy(Quantised(1.0), value, 0.2, std) == pytest.approx(expected)


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.1, -2.5])
def test_unsent_entries_lie_within_the_bound(value: float, std: float) -> None:
    inside = stats.norm.cdf([-1, 1], abs(value), std)
    expected = -2 * math.log(inside[1] - inside[0])
    assert energy(Pruned(1.0), value, 0.0, std) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("value", [-3.0, -0.2, 0.0, 0.2])
def test_signs_are_probits_with_a_mean_magnitude(value: float) -> None:
    probit = -2 * math.log(stats.norm.cdf(-value / 0.5))
    scale = ((abs(value) - 0.7) / 0.5) ** 2
    found = energy(Sign(), value, -0.7, 0.5)
    assert found == pytest.approx(probit + scale)


def test_the_mean_magnitude_is_one_equation_for_the_tensor() -> None:
    """Entries of the right signs whose mean magnitude is right cost next to nothing."""
    sent = torch.tensor([[0.5, -0.5, 0.5]], dtype=torch.float64)
    right = torch.tensor([[0.9, -0.4, 0.2]], dtype=torch.float64)
    assert float(Sign().energy(right, sent, 1e-4)[0]) < 1e-9
    found = float(Sign().energy(2 * right, sent, 1e-4)[0])
    assert found == pytest.approx(0.5**2 / (1e-4 / 3))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("std", [0.02, 0.5])
def test_slopes_against_differences(name: str, std: float) -> None:
    law, sent = LAWS[name]
    for value in (-0.9, 0.05, 0.31, 0.47):
        slope = float(law.energy(one(value), one(sent), std**2)[1])
        up, down = (energy(law, value + s, sent, std) for s in (1e-6, -1e-6))
        tolerance = 1e-6 * (1 + abs(up) / 1e-6 * 1e-9)
        assert slope == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=tolerance)


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=40, deadline=None)
@given(value=st.floats(-1e4, 1e4), std=st.floats(1e-7, 1e4))
def test_nothing_overflows(name: str, value: float, std: float) -> None:
    law, sent = LAWS[name]
    found, slope = law.energy(one(value), one(sent), std**2)
    assert bool(found.isfinite()) and bool(slope.isfinite().all())


@pytest.mark.parametrize("name", ["pruned, unsent", "quantised"])
def test_laws_are_log_concave(name: str) -> None:
    law, sent = LAWS[name]
    values = torch.linspace(-3, 3, 301, dtype=torch.float64).view(-1, 1)
    found = law.energy(values, torch.full_like(values[:1], sent), 0.05)[0]
    assert float(found.diff().diff().min()) > 0


def test_messages_are_as_frequent_as_their_likelihood_says() -> None:
    generator = torch.Generator().manual_seed(0)
    value, step, std, count = 0.37, 0.5, 0.1, 200_000
    noisy = value + std * torch.randn(count, generator=generator, dtype=torch.float64)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    sent = torch.floor(noisy / step + drawn) * step
    for message in (0.0, 0.5, 1.0):
        share = float((sent == message).double().mean())
        expected = math.exp(-energy(Quantised(step), value, message, std) / 2)
        error = math.sqrt(expected / count)
        assert share == pytest.approx(expected, abs=4 * error + 1e-5)


def test_trials_stand_alone_and_entries_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    computed = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    for law, sent in LAWS.values():
        messages = torch.full((1, 4, 5), sent, dtype=torch.float64)
        together, slopes = law.energy(computed, messages, 0.3)
        assert together.shape == (3,)
        assert slopes.shape == computed.shape
        for k in range(3):
            alone, slope = law.energy(computed[k : k + 1], messages, 0.3)
            assert float(alone) == pytest.approx(float(together[k]))
            torch.testing.assert_close(slope[0], slopes[k])
        if not isinstance(law, Sign):  # its mean magnitude is one for the tensor
            parts = sum(
                law.energy(computed[:, i], messages[:, i], 0.3)[0] for i in range(4)
            )
            torch.testing.assert_close(parts, together)


def test_gaps_are_distances_to_what_would_be_sent_alike() -> None:
    values = torch.tensor([[-0.6, 0.1, 0.7]])
    pairs: list[tuple[Likelihood, float, list[float]]] = [
        (Gaussian(), 0.1, [-0.7, 0.0, 0.6]),
        (Pruned(0.5), 0.0, [-0.1, 0.0, 0.2]),
        (Pruned(0.5), 0.6, [-1.2, -0.5, 0.1]),
        (Pruned(math.inf), 0.0, [0.0, 0.0, 0.0]),
        (Sign(), 1.0, [-0.6, 0.0, 0.0]),
        (Quantised(0.5), 0.0, [-0.1, 0.0, 0.2]),
    ]
    for law, sent, expected in pairs:
        found = law.gap(values, torch.full_like(values, sent))
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_spreads() -> None:
    sent = torch.tensor([0.0, 2.0])
    assert Gaussian().spread(sent, 4.0) == 2
    assert Pruned(0.5).spread(sent, 4.0).tolist() == [math.inf, 2.0]
    # Entries that lie evenly between two levels scatter by a sixth of the square.
    assert Quantised(3.0).spread(sent, 4.0) == pytest.approx(math.sqrt(4 + 9 / 6))


def test_norms() -> None:
    sent = torch.tensor([[0.0, 2.0, 0.0]])
    for law in (Gaussian(), Sign(), Quantised(0.5), Pruned(math.inf)):
        assert law.squared_norm(sent) == 4
    # What lies evenly between the bounds has a third of their square on average.
    assert Pruned(0.6).squared_norm(sent) == pytest.approx(4 + 2 * 0.36 / 3)


def test_every_tensor_has_its_own() -> None:
    assert likelihoods_of(None, ["a", "b"]) == [Gaussian(), Gaussian()]
    pruned = Encoding("pruned", {"b": 0.25})
    assert likelihoods_of(pruned, ["a", "b"]) == [Gaussian(), Pruned(0.25)]
    steps = Encoding("quantised", {"a": 0.5}, bits=4)
    assert likelihoods_of(steps, ["a"]) == [Quantised(0.5)]
    assert likelihoods_of(Encoding("sign", {"a": 1.0}), ["a"]) == [Sign()]
    assert likelihoods_of(Encoding("mixed"), ["a"]) == [Gaussian()]
