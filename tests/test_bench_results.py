"""Result files of the suites: small, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradinv_helpers.bench import results
from gradinv_helpers.bench.results import read_result, write_result
from gradinv_helpers.errors import InputError
from gradinv_helpers.files import write_json

NUMBERS = st.lists(st.floats(-1e9, 1e9), max_size=9)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.text(max_size=60),
    NUMBERS,
    st.dictionaries(st.text("abc", max_size=3), NUMBERS, max_size=4),
)
POOL = st.lists(VALUES, min_size=1, max_size=4)


@st.composite
def any_result(draw: st.DrawFn) -> dict:
    """Records that have few different values, so that many are held twice."""
    pool = draw(POOL)
    fields = st.dictionaries(
        st.sampled_from(["psnr", "floors", "what"]), st.sampled_from(pool)
    )
    records = draw(st.lists(fields, max_size=6))
    for number, record in enumerate(records):
        record["key"] = f"{number}"
    return {"suite": "any", "summary": {"cases": records[:2]}, "records": records}


@given(any_result())
def test_nothing_is_lost(result: dict) -> None:
    assert results.expanded(results.shared(result)) == result
    read = json.loads(results.result_text(result))
    assert results.expanded(read) == result
    assert list(results.expanded(read)) == list(result)


def batches(count: int = 50) -> dict:
    """As many methods on the same batch: all have the same floors."""
    floors = {"constant": [11.2898, 10.0001, 8.94598], "batch_mean": [14.5, 14.2, 13.4]}
    records = [
        {"key": f"{k}", "floors": floors, "psnr": [k / 7, k / 11, k / 13], "few": [1.5]}
        for k in range(count)
    ]
    return {"suite": "any", "complete": True, "records": records}


def test_what_all_records_hold_stands_once(tmp_path: Path) -> None:
    result = batches()
    path = write_result(tmp_path / "slim.json", result)
    plain = write_json(tmp_path / "plain.json", result)
    assert path.read_text().count("batch_mean") == 1
    assert path.stat().st_size < plain.stat().st_size / 2.5
    raw = json.loads(path.read_text())
    assert raw["shared"] == [result["records"][0]["floors"]]
    assert {r["floors"]["$ref"] for r in raw["records"]} == {"#/shared/0"}
    assert raw["records"][0]["few"] == [1.5]  # shorter than a reference
    assert read_result(path) == read_result(plain) == result


def test_a_line_per_record(tmp_path: Path) -> None:
    lines = write_result(tmp_path / "a.json", batches(7)).read_text().splitlines()
    of_records = [line for line in lines if line.startswith('    {"key"')]
    assert [json.loads(line.rstrip(","))["key"] for line in of_records] == list(
        "0123456"
    )


def test_files_are_rewritten_where_they_lie(tmp_path: Path) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.partial.json"]
    for path in paths:
        write_json(path, batches(9))
    results.main([str(path) for path in paths])
    assert all(read_result(path) == batches(9) for path in paths)
    assert all("#/shared/0" in path.read_text() for path in paths)
    before = [path.read_bytes() for path in paths]
    results.main([str(path) for path in paths])
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"a": 1}',
        '{"records": 3}',
        '{"records": [3]}',
        '{"records": [{"a": {"$ref": "#/shared/0"}}]}',
        '{"records": [{"a": {"$ref": 5}}], "shared": [1]}',
    ],
)
def test_no_result_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="path: expected a result file of gradinv ben"):
        read_result(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == text


def test_missing_file_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path: expected a result file"):
        results.main([str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()
    for bad in (float("nan"), [float("inf")] * 9):
        result = {"records": [{"key": "a", "value": bad}]}
        with pytest.raises(InputError, match="finite numbers for JSON"):
            write_result(tmp_path / "a.json", result)
    assert not (tmp_path / "a.json").exists()
