"""Write files whole or not at all, and say clearly why a folder cannot be used."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from gradinv_helpers.errors import InputError

_HINTS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a file has this name; choose another folder",
    errno.EISDIR: "a folder has this name; choose another file name",
    errno.ENOTEMPTY: "a folder has this name; choose another file name",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "check the disk or choose another folder",
}


def expand_home(path: str | Path) -> Path:
    """Replace a leading ``~`` by the home folder, if that is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def prepare_folder(path: str | Path, argument: str = "output_dir") -> Path:
    """Create a folder if needed and check that files can be written into it.

    Call it before a long computation, so that a bad folder costs no time.

    Args:
        path: The folder; ``~`` is the home folder.
        argument: Name of the argument or option, for the message.

    Returns:
        The folder as a path.

    Raises:
        InputError: The folder cannot be created or written to; the cause is named.
    """
    folder = expand_home(path)
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # A full disk still takes an empty file, so some bytes are needed.
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _folder_error(argument, folder, error) from error
    return folder


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file, then give it its final name in one step.

    Whoever reads ``path`` sees the old file or the new one, never half of it. After
    any failure, Ctrl-C included, the temporary file is gone and the old file is left
    as it was. Missing folders are created.

    Args:
        path: The file to write; ``~`` is the home folder.
        write: Called with the temporary path, which has the suffix of ``path`` and
            lies in the same folder. It must create that file.

    Returns:
        The path of the finished file.

    Raises:
        InputError: The disk is full, the folder cannot be written to, or the like.
    """
    path = expand_home(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise _folder_error(str(path), path.parent, cause) from error
    return path


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write bytes to a file, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: str | Path, content: str) -> Path:
    """Write text as UTF-8 with Unix line ends to a file, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    return write_bytes(path, content.encode())


def write_json(path: str | Path, value: object) -> Path:
    """Write a value as JSON, the same bytes for the same value.

    Keys keep their order, the indent is two spaces, and floats are written with all
    their digits, so that they read back as the same number.

    Raises:
        InputError: The file cannot be written, or a number is NaN or infinite,
            which JSON cannot hold.
    """
    try:
        content = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(str(path), "finite numbers for JSON", str(error)) from error
    return write_text(path, content + "\n")


def _system_error(error: Exception) -> OSError | None:
    """Find the system's reason behind an error, also where a library hid it.

    Writers of tensor files raise their own exception type and keep only the text of
    the system's message.
    """
    if isinstance(error, OSError):
        return error
    for number in _HINTS:
        if os.strerror(number).lower() in str(error).lower():
            return OSError(number, os.strerror(number))
    return None


def _folder_error(argument: str, folder: Path, error: OSError) -> InputError:
    """Name the folder, the cause and what to do."""
    reason = error.strerror or type(error).__name__
    return InputError(
        argument,
        "a folder that can be written to",
        f"{str(folder)!r} ({reason})",
        _HINTS.get(error.errno or 0, "choose another folder"),
    )
