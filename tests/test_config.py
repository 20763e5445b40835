import json
import re
from pathlib import Path

import jsonschema
import pydantic
import pytest

from gradinv_helpers import config
from gradinv_helpers.config import Settings, load_config
from gradinv_helpers.errors import InputError

ROOT = Path(__file__).parents[1]


def load_text(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_shipped_file_holds_every_default():
    assert load_config(ROOT / "config.json") == Settings()
    assert (ROOT / "config.json").read_text() == config.defaults_text()


def test_schema_file_is_up_to_date_and_accepts_the_shipped_file():
    schema = json.loads(config.SCHEMA_FILE.read_text())
    assert schema == json.loads(config.schema_text())
    shipped = json.loads((ROOT / "config.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(shipped, schema)
    shipped["invert"]["iteratons"] = 3
    with pytest.raises(jsonschema.ValidationError, match="iteratons"):
        jsonschema.validate(shipped, schema)


def test_settings_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Settings().seed = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Settings().invert.iterations = 1


def test_keys_may_be_left_out_in_every_group(tmp_path):
    settings = load_text(
        tmp_path, '{"profile": "full", "book": {"full": {"restarts": 7}}}'
    )
    assert settings.book_settings.restarts == 7
    assert settings.book_settings.num_seeds == Settings().book.full.num_seeds
    assert settings.book.fast == Settings().book_settings
    assert settings.invert == Settings().invert


def test_whole_numbers_are_fine_for_floats_and_a_byte_order_mark_is_dropped(tmp_path):
    text = '\ufeff{"invert":{"tv_weight":1,\t"agg_lr":5e-2}}'
    settings = load_text(tmp_path, text)
    assert settings.invert.tv_weight == 1.0
    assert settings.invert.agg_lr == 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "invert": {\n    "iteratons": 3\n  }\n}',
            "config.json line 3, invert.iteratons: expected a known key, "
            "got an unknown key; did you mean 'iterations'?",
        ),
        (
            '{\n"zzz": {"$schema": 1}}',
            "config.json line 2, zzz: .*; known: $schema, profile, dataset",
        ),
        (
            '{"book": {\n\t"fast": {\n\t\t"num_sed": 1}}}',
            "config.json line 3, book.fast.num_sed: .*did you mean 'num_seeds'?",
        ),
        (
            '{\n\n"invert": {"restarts": 0}}',
            "config.json line 3, invert.restarts: "
            "expected a number greater than or equal to 1, got 0",
        ),
        (
            '{"invert": {"restarts": "3"}}',
            'config.json line 1, invert.restarts: expected an integer, got "3"',
        ),
        (
            '{"invert": {"restarts": true}}',
            "config.json line 1, invert.restarts: expected an integer, got true",
        ),
        (
            '{"invert": {"tv_weight": true}}',
            "config.json line 1, invert.tv_weight: expected a number, got true",
        ),
        (
            '{"invert": {"agg_lr": 0}}',
            "invert.agg_lr: expected a number greater than 0, got 0",
        ),
        (
            '{"invert": {"tv_weight": NaN}}',
            "line 1, invert.tv_weight: expected a finite number, got NaN",
        ),
        (
            '{"invert": {"tv_weight": 1e999}}',
            "line 1, invert.tv_weight: expected a finite number, got Infinity",
        ),
        (
            '{"seed":\n -1}',
            "line 1, seed: expected a number greater than or equal to 0, got -1",
        ),
        (
            '{"device": "tpu"}',
            "line 1, device: expected 'auto', 'cpu', 'cuda' or 'mps', got \"tpu\"",
        ),
        (
            '{"dataset": "cifar1000"}',
            "line 1, dataset: expected 'auto', 'photos', .*, got \"cifar1000\"",
        ),
        (
            '{\n"invert": 3}',
            "line 2, invert: expected a group of settings { ... }, got 3",
        ),
        (
            '{\n"train_global": {"lr": "x"},\n"invert": {"restarts": -1}}',
            "line 2, train_global.lr: expected a number",
        ),
        (
            '{"seed": 1\n  "device": "cpu"}',
            "config.json line 2, column 3: expected JSON, got a syntax error",
        ),
        ("", "config.json line 1, column 1: expected JSON, got a syntax error"),
        ("[1]", "config.json: expected a JSON object { ... }, got a list"),
        (
            '{"seed": 1,\n"invert": {"seed": 2},\n"seed": 3}',
            "config.json line 3, seed: expected each key once, "
            "got a second one (the first is in line 1); remove one",
        ),
        (
            '{"invert": {\n"restarts": 1,\n"re\\u0073tarts": 3}}',
            "config.json line 3, invert.restarts: expected each key once",
        ),
        (
            '{"invert": {"apply_agg_step": 1, "output_dir": "x"}}',
            "invert.apply_agg_step: expected true or false, got 1",
        ),
        ('{"data_root": 5}', 'data_root: expected text in "quotes", got 5'),
    ],
)
def test_every_message_names_the_place(tmp_path, text, message):
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(InputError, match=pattern) as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"seed": ' + "9" * 5000 + "}", "[" * 200_000], ids=["long", "deep"]
)
def test_json_beyond_the_limits_of_the_reader(tmp_path, text):
    with pytest.raises(InputError, match="config.json: expected JSON, got "):
        load_text(tmp_path, text)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="config: .*no file .*none.json.*leave it out"):
        load_config(tmp_path / "none.json")
    with pytest.raises(InputError, match="config: expected a JSON file.*directory"):
        load_config(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"data_root": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_config(tmp_path / "latin.json")


def test_looks_in_the_parents_for_our_file_only(tmp_path, monkeypatch):
    deep = tmp_path / "1" / "2" / "3" / "4"
    deep.mkdir(parents=True)
    (tmp_path / "config.json").write_text(
        '{"$schema": "gradinv_helpers/config.schema.json", "seed": 5}'
    )
    (deep / "config.json").write_text('{"architectures": ["other program"]}')
    monkeypatch.chdir(deep)
    assert load_config().seed == 5
    (deep / "5").mkdir()
    monkeypatch.chdir(deep / "5")
    assert load_config() == Settings()


def test_broken_file_of_ours_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        '{"$schema": "https://example.org/config.schema.json",\n "seed": }'
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="config.json line 2, column 10"):
        load_config()


def test_command_writes_schema_and_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SCHEMA_FILE", tmp_path / "schema.json")
    target = tmp_path / "new.json"
    config.main(["--write-schema", "--write-defaults", str(target)])
    assert load_config(target) == Settings()
    assert (tmp_path / "schema.json").read_text() == config.schema_text()
