"""Every message names the argument, what was expected and what came."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

from gradinv_helpers.errors import (
    InputError,
    check_choice,
    check_count,
    check_number,
    check_seed,
)


def test_line_without_hint() -> None:
    error = InputError("lr", "a number > 0", -1)
    assert str(error) == "lr: expected a number > 0, got -1"
    assert isinstance(error, ValueError)


def test_line_with_hint() -> None:
    error = InputError("lr", "a number > 0", -1, "use 0.1")
    assert str(error) == "lr: expected a number > 0, got -1; use 0.1"
    assert (error.argument, error.expected, error.got, error.hint) == (
        "lr",
        "a number > 0",
        -1,
        "use 0.1",
    )


@pytest.mark.parametrize("again", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_keep_everything(again) -> None:
    error = InputError("model", "one of a, b", "'c'", "did you mean 'a'?")
    other = again(error)
    assert type(other) is InputError
    assert str(other) == str(error)
    assert other.hint == error.hint


def test_choice_is_returned() -> None:
    assert check_choice("model", "mlp", ("lenet", "mlp")) == "mlp"


def test_choices_may_come_from_an_iterator() -> None:
    with pytest.raises(InputError, match="one of a, b, got 'z'"):
        check_choice("x", "z", iter(("a", "b")))


def test_nearest_choice_is_suggested() -> None:
    with pytest.raises(InputError, match=r"^model: .* 'lent'; did you mean 'lenet'\?$"):
        check_choice("model", "lent", ("lenet", "mlp"))


def test_no_suggestion_far_away() -> None:
    with pytest.raises(InputError, match="got 'xyz'$"):
        check_choice("model", "xyz", ("lenet", "mlp"))


@pytest.mark.parametrize("value", [None, 3, ["mlp"], b"mlp"])
def test_a_choice_is_text(value) -> None:
    with pytest.raises(InputError, match="^model: expected one of lenet, mlp, got "):
        check_choice("model", value, ("lenet", "mlp"))


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (7, 1), (0, 0), (10**30, 1)])
def test_count_is_returned(value: int, minimum: int) -> None:
    assert check_count("n", value, minimum=minimum) == value


@pytest.mark.parametrize("value", [0, -3, True, 1.0, "1", None, math.nan])
def test_bad_counts(value) -> None:
    with pytest.raises(InputError, match="^n: expected an integer of at least 1, got "):
        check_count("n", value)


def test_count_too_large() -> None:
    assert check_count("seed", 4, minimum=0, maximum=4) == 4
    with pytest.raises(
        InputError, match="^seed: expected an integer of at most 4, got 5"
    ):
        check_count("seed", 5, minimum=0, maximum=4)


@pytest.mark.parametrize("value", [0, 0.0, 2, 1e300, np.float64(0.5)])
def test_number_is_returned_as_float(value) -> None:
    got = check_number("lr", value)
    assert type(got) is float
    assert got == value


@pytest.mark.parametrize(
    "value", [-1e-12, math.nan, math.inf, -math.inf, True, "0.1", None, 1j]
)
def test_bad_numbers(value) -> None:
    with pytest.raises(InputError, match="^lr: expected a finite number >= 0, got "):
        check_number("lr", value)


def test_exclusive_minimum() -> None:
    assert check_number("lr", 1e-30, exclusive=True) == 1e-30
    with pytest.raises(InputError, match="a finite number > 0, got 0"):
        check_number("lr", 0, exclusive=True)
    with pytest.raises(InputError, match="a finite number > 2.5, got 2.5"):
        check_number("lr", 2.5, minimum=2.5, exclusive=True)


def test_seeds() -> None:
    assert check_seed("seed", 0) == 0
    assert check_seed("seed", 2**32 - 1) == 2**32 - 1
    for bad in (-1, 2**32, 1.0, None):
        with pytest.raises(InputError, match="^seed: expected an integer of at "):
            check_seed("seed", bad)
