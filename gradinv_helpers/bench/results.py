"""Result files of the suites: one record per line, and nothing twice.

A list or an object that several records hold, such as the floors of one batch, stands
once in ``shared``; the records refer to it as ``{"$ref": "#/shared/3"}``. No number is
changed: ``read_result`` gives back what was measured.

``python -m gradinv_helpers.bench.results FILE...`` rewrites files of any layout so,
finished or not.

Taught in: notebooks/03_stronger_matching.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradinv_helpers.errors import InputError
from gradinv_helpers.files import write_text

_LEAST = 40  # characters of a value that is worth a reference
_REFERENCE, _WHERE = "$ref", "#/shared/"


def write_result(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write a result of a suite, finished or not, without repetitions.

    Args:
        path: The file.
        result: With a list of ``records``, which are objects.

    Raises:
        InputError: The file cannot be written, or a number is NaN or infinite.
    """
    return write_text(path, result_text(result))


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file of any layout; every record holds all its values again.

    Args:
        path: A file of ``gradinv bench``, finished or ``.partial.json``.

    Raises:
        InputError: It is no such file.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        if isinstance(found, dict) and isinstance(found["records"], list):
            return expanded(found)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    raise InputError("path", "a result file of gradinv bench", str(path))


def result_text(result: Mapping[str, Any]) -> str:
    """JSON of a result, one record per line."""
    try:
        return _text(shared(result)) + "\n"
    except ValueError as error:
        raise InputError("result", "finite numbers for JSON", str(error)) from error


def shared(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same result with references to values that several records hold."""
    records: list[Mapping[str, Any]] = result["records"]
    texts = [_long(value) for record in records for value in record.values()]
    counts = Counter(text for text in texts if text)
    places = {text: i for i, text in enumerate(t for t, n in counts.items() if n > 1)}
    if not places:
        return dict(result)

    def referred(value: Any) -> Any:
        place = places.get(_long(value))
        return value if place is None else {_REFERENCE: f"{_WHERE}{place}"}

    slim = [{k: referred(value) for k, value in record.items()} for record in records]
    rest = {name: value for name, value in result.items() if name != "records"}
    return {**rest, "shared": [json.loads(text) for text in places], "records": slim}


def expanded(result: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``shared``; a result without references comes back as it is."""
    values: Sequence[Any] = result.get("shared", [])

    def resolved(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {_REFERENCE}:
            return values[int(value[_REFERENCE].removeprefix(_WHERE))]
        return value

    records = [
        {name: resolved(value) for name, value in record.items()}
        for record in result["records"]
    ]
    rest = {name: value for name, value in result.items() if name != "shared"}
    return {**rest, "records": records}


def _long(value: Any) -> str:
    """JSON of a list or object that is worth a reference; else nothing."""
    if not isinstance(value, (list, tuple, Mapping)):
        return ""
    text = _plain(value)
    return text if len(text) >= _LEAST else ""


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _text(value: Any, indent: str = "") -> str:
    """Lists of objects get a line per object, what holds them a line per name."""
    inner = indent + "  "
    if isinstance(value, Mapping) and (
        not indent or any(map(_is_table, value.values()))
    ):
        lines = [f"{inner}{_plain(k)}: {_text(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if _is_table(value):
        lines = [inner + _plain(item) for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return _plain(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, Mapping) for item in value
    )


def main(paths: Sequence[str]) -> None:
    """Rewrite files where they lie."""
    for path in paths:
        write_result(path, read_result(path))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        raise SystemExit(f"{error}") from None
