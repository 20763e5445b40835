import errno
import json
import os
import re

import pytest

from gradinv_helpers import files
from gradinv_helpers.errors import InputError
from gradinv_helpers.files import (
    prepare_folder,
    write_atomically,
    write_bytes,
    write_json,
    write_text,
)


def fail_with(number):
    def write(path, *_, **__):
        path.touch()
        raise OSError(number, os.strerror(number))

    return write


def test_writes_and_replaces_in_missing_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert write_text(path, "ä\n") == path
    assert path.read_bytes() == "ä\n".encode()
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.txt"]


def test_temporary_name_is_hidden_and_keeps_the_suffix(tmp_path):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("x")

    write_atomically(tmp_path / "loss.png", write)
    assert seen[0].suffix == ".png"
    assert seen[0].name.startswith(".")
    assert seen[0].parent == tmp_path


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise stop

    with pytest.raises(stop):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder that you may write to"),
        (errno.EMFILE, "choose another folder"),
    ],
)
def test_system_errors_name_folder_cause_and_remedy(tmp_path, number, hint):
    message = f"{re.escape(str(tmp_path))}.*{os.strerror(number)}.*; {hint}"
    with pytest.raises(InputError, match=message):
        write_atomically(tmp_path / "a.txt", fail_with(number))
    assert os.listdir(tmp_path) == []


def test_system_error_inside_another_exception_is_understood(tmp_path):
    def write(temporary):
        temporary.touch()
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(InputError, match="No space left on device.*free some space"):
        write_atomically(tmp_path / "a.safetensors", write)
    assert os.listdir(tmp_path) == []


def test_write_below_a_file_and_onto_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*; a part of the path is a file"):
        write_text(tmp_path / "file" / "deep" / "a.txt", "")
    with pytest.raises(InputError, match="a folder has this name"):
        (tmp_path / "folder").mkdir()
        write_text(tmp_path / "folder", "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_json_is_stable_and_reads_back_exactly(tmp_path):
    value = {"b": [0.1 + 0.2, 1e-17, 3], "a": {"name": "é", "none": None}}
    path = write_json(tmp_path / "a.json", value)
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "b": [\n    0.30000000000000004,')
    assert text.endswith("}\n")
    assert "é" in text
    assert json.loads(text) == value


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_json_lacks(tmp_path, number):
    with pytest.raises(InputError, match=r"a\.json: expected finite numbers"):
        write_json(tmp_path / "a.json", {"psnr": number})
    assert os.listdir(tmp_path) == []


def test_prepare_folder_creates_and_leaves_it_empty(tmp_path):
    folder = prepare_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert os.listdir(folder) == []
    assert prepare_folder(folder) == folder


def test_prepare_folder_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert prepare_folder("~/out") == tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert str(prepare_folder("~no-such-user-here/out")).startswith("~")


def test_prepare_folder_refuses_files_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output-dir: .*a file has this name"):
        prepare_folder(tmp_path / "file", "--output-dir")
    with pytest.raises(InputError, match="output_dir: .*a part of the path is a file"):
        prepare_folder(tmp_path / "file" / "below")


def test_prepare_folder_notices_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "write_bytes", fail_with(errno.ENOSPC))
    with pytest.raises(InputError, match="No space left on device.*free some space"):
        prepare_folder(tmp_path / "out")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "out") == []
