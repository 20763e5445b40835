"""One error for bad input, so that every message reads the same way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Report a bad argument in one line: which one, what was expected, what came.

    The command line prints the line and exits with code 2; in Python it is an
    ordinary ``ValueError``.

    Args:
        argument: Name of the argument, option, file or configuration key.
        expected: What is accepted, in a few words.
        got: What came, in a few words.
        hint: What to do about it; may be empty.
    """

    def __init__(self, argument: str, expected: str, got: object, hint: str = ""):
        message = f"{argument}: expected {expected}, got {got}"
        super().__init__(f"{message}; {hint}" if hint else message)
        self.argument = argument
        self.expected = expected
        self.got = got
        self.hint = hint

    def __reduce__(self) -> tuple:
        return (type(self), (self.argument, self.expected, self.got, self.hint))


def check_choice(argument: str, value: object, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise name them all.

    Raises:
        InputError: ``value`` is not among ``choices``; the nearest one is suggested.
    """
    known = list(choices)
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    raise InputError(argument, "one of " + ", ".join(known), repr(value), hint)


def check_count(
    argument: str, value: object, *, minimum: int = 1, maximum: int | None = None
) -> int:
    """Return ``value`` if it is an integer from ``minimum`` to ``maximum``.

    Raises:
        InputError: ``value`` is not an integer, or is too small or too large.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(argument, f"an integer of at least {minimum}", repr(value))
    if maximum is not None and value > maximum:
        raise InputError(argument, f"an integer of at most {maximum}", repr(value))
    return value


def check_seed(argument: str, value: object) -> int:
    """Return ``value`` if every random generator takes it as a seed.

    Raises:
        InputError: ``value`` is not an integer from 0 to 2**32 - 1.
    """
    return check_count(argument, value, minimum=0, maximum=2**32 - 1)


def check_number(
    argument: str,
    value: object,
    *,
    minimum: float = 0.0,
    exclusive: bool = False,
) -> float:
    """Return ``value`` as a float if it is finite and large enough.

    Raises:
        InputError: ``value`` is no finite number, or is below ``minimum`` (or equal
            to it where ``exclusive``).
    """
    sign = ">" if exclusive else ">="
    if isinstance(value, int | float) and not isinstance(value, bool):
        large_enough = value > minimum if exclusive else value >= minimum
        if large_enough and value < float("inf"):
            return float(value)
    raise InputError(argument, f"a finite number {sign} {minimum:g}", repr(value))
