"""Diffusion models load from a hub by name; the hub here is a server of this machine.

It speaks the part of the protocol that a download needs. The client runs in a process
of its own, since the address of the hub is read when its library is imported, and that
process can reach nothing but this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import gradinv_helpers as gi

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CLIENT = """
import json, socket, sys

address = ("127.0.0.1", int(sys.argv[1]))
free = socket.socket.connect

def connect(self, to):
    if tuple(to[:2]) != address:
        raise AssertionError(f"the test reached for {to}")
    return free(self, to)

def look_up(host, *rest, lookup=socket.getaddrinfo, **more):
    if host not in ("127.0.0.1", "localhost"):
        raise AssertionError(f"the test looked for {host}")
    return lookup(host, *rest, **more)

socket.socket.connect, socket.getaddrinfo = connect, look_up

import torch
import gradinv_helpers as gi

def outputs(source):
    try:
        prior = gi.load_prior(source)
    except gi.InputError as error:
        return {"error": str(error)}
    noisy = torch.linspace(-1, 1, prior.size).view(1, *prior.image_shape)
    with torch.no_grad():
        clean, noise = prior.predict(noisy, 500)
    return {"outputs": torch.cat([clean, noise]).flatten().tolist(), "name": prior.name}

for line in sys.stdin:
    print(json.dumps(outputs(line.strip())), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """Repositories are the folders ``owner/model`` under ``root``."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        """The headers of a file."""
        self._answer()

    def do_GET(self) -> None:
        """A file, or what is known of a repository."""
        self._answer()

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            self._about(path.removeprefix("api/models/").split("/"))
        else:
            owner, model, *rest = path.split("/")
            file = self.root.joinpath(owner, model, *rest[2:])
            if rest[:1] != ["resolve"] or rest[1] not in ("main", COMMIT):
                self._missing("RepoNotFound")
            elif not (self.root / owner / model).is_dir():
                self._missing("RepoNotFound")
            elif not file.is_file():
                self._missing("EntryNotFound")
            else:
                self._send(file.read_bytes(), "application/octet-stream")

    def _about(self, parts: list[str]) -> None:
        """Commit and list of files, in the two forms that clients ask for."""
        folder = self.root.joinpath(*parts[:2])
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        names = [f.relative_to(folder).as_posix() for f in files]
        if parts[2:3] == ["tree"]:
            told: object = [
                {
                    "type": "file",
                    "path": name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for name, file in zip(names, files, strict=True)
            ]
        else:
            told = {
                "_id": "1",
                "id": "/".join(parts[:2]),
                "modelId": "/".join(parts[:2]),
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in names],
            }
        self._send(json.dumps(told).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "there is no such thing")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Serve a folder; gives the port and what was asked for."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def client(port: int, home: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose hub is at the port, and whose cache lies in ``home``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    kept = {k: v for k, v in kept.items() if "proxy" not in k.lower()}
    mine = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | mine | more,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], source: str | Path) -> dict:
    """What the client makes of a source."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{source}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return json.loads(line)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A repository in the standard layout, and two in the old flat one."""
    root = tmp_path_factory.mktemp("hub")
    images = gi.load_images("digits", split="train", image_size=8)[:8]
    how = {"steps": 1, "batch_size": 4, "channels": (8,), "class_conditional": False}
    standard = gi.train_diffusion(images, **how).save(root / "lab" / "digits-8")
    (standard / "prior.json").unlink()  # others know nothing of it
    (standard / "README.md").write_text("# A model\n")
    parts = {
        "model_index.json": "model_index.json",
        "unet/config.json": "config.json",
        "scheduler/scheduler_config.json": "scheduler_config.json",
    }
    weights = "diffusion_pytorch_model"
    for name in ("flat", "flat-bin"):
        folder = root / "lab" / name
        folder.mkdir()
        for source, target in parts.items():
            (folder / target).write_bytes((standard / source).read_bytes())
    tensors = (standard / "unet" / f"{weights}.safetensors").read_bytes()
    (root / "lab" / "flat" / f"{weights}.safetensors").write_bytes(tensors)
    state = gi.load_prior(standard).unet.state_dict()
    for name in ("flat", "flat-bin"):
        torch.save(state, root / "lab" / name / f"{weights}.bin")
    return root


def same(found: dict, expected: dict) -> bool:
    """Equal up to rounding, which depends on where in memory the weights lie."""
    assert "outputs" in found, found
    pair = [torch.tensor(one["outputs"]) for one in (found, expected)]
    assert float(pair[1].std()) > 0.1
    return torch.allclose(*pair, atol=1e-5)


def downloads(asked: list[str]) -> list[str]:
    """Files whose content was fetched."""
    return [a.split("/")[-1] for a in asked if a.startswith("GET lab/")]


def check_error(found: dict, name: str) -> None:
    """One line that says what to do."""
    text = found["error"]
    assert text.startswith("prior: expected a shipped prior, a folder")
    assert name in text and "\n" not in text and len(text) < 400
    assert "check name and network" in text
    assert 30 < len(text.split("elsewhere (")[1].split(");")[0]) <= 100  # the reason


def test_a_name_is_as_good_as_the_folder(shared: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as running, contextlib.ExitStack() as up:
        port, asked = up.enter_context(hub(shared))
        process = running.enter_context(client(port, tmp_path))
        folder = ask(process, shared / "lab" / "digits-8")
        assert asked == []  # a folder needs no hub
        named = ask(process, "lab/digits-8")
        assert named["name"] == "digits-8"
        assert same(named, folder)
        fetched = downloads(asked)
        assert len(set(fetched)) == len(fetched) == 4
        assert "README.md" not in fetched
        assert same(ask(process, "lab/digits-8"), folder)
        assert downloads(asked) == fetched
        check_error(ask(process, "lab/nothing"), "lab/nothing")

        for name in ("flat", "flat-bin"):
            before = len(asked)
            assert same(ask(process, f"lab/{name}"), folder)
            weights = [f for f in downloads(asked[before:]) if f.startswith("diffu")]
            end = "bin" if name == "flat-bin" else "safetensors"
            assert weights == [f"diffusion_pytorch_model.{end}"]

        up.close()  # from here on the cache has to do
        for name in ("digits-8", "flat"):
            assert same(ask(process, f"lab/{name}"), folder)
        check_error(ask(process, "lab/unknown"), "lab/unknown")
        out, err = process.communicate(timeout=60)
        assert out == ""
        lines = [line for line in err.splitlines() if "Fetching 4 files" not in line]
        told = "Could not reach the Hub"
        assert all(not line or line.startswith(told) for line in lines), err
