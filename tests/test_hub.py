"""Checkpoints by their repository's name: what the cache holds is used, what cannot be had is one line.

A server on this machine stands in for the hub; nothing else is reached.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from export.hub import fetch, is_repository, published_files
from ispa_deploy.errors import InputError
from ispa_deploy.specs import SPECS
from tests.test_cli import command
from tests.test_families import FAMILIES, publish, spec_of

hub = pytest.importorskip("huggingface_hub")

LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, repository: str, file: Path, name: str) -> None:
    """A file as an earlier download left it."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    target = home / "snapshots" / COMMIT / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())


class Served(ThreadingHTTPServer):
    """The part of the hub's protocol that a download needs: a revision's files, and each file by `resolve`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, dict[str, bytes]] = {}  # of each repository, by path
        self.sent: list[str] = []  # paths whose bytes went out


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Served

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        for repository, files in self.server.files.items():
            found = [
                name for name in files if path in {f"/{repository}/resolve/{at}/{name}" for at in ("main", COMMIT)}
            ]
            if found:
                if with_body:
                    self.server.sent.append(found[0])
                return self._send(200, files[found[0]], with_body)
            if path.startswith(f"/{repository}/resolve/"):
                return self._send(404, b"", with_body, ("X-Error-Code", "EntryNotFound"))
            if path.startswith(f"/api/models/{repository}/tree/"):
                rows = [{"type": "file", "path": name, "size": len(x), "oid": _tag(x)} for name, x in files.items()]
                return self._send(200, json.dumps(rows).encode(), with_body)
            if path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in files]
                about = {"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
                return self._send(200, json.dumps(about).encode(), with_body)
        return self._send(404, b"", with_body, ("X-Error-Code", "RepoNotFound"))

    def _send(self, code: int, body: bytes, with_body: bool, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        common = (("Content-Length", str(len(body))), ("ETag", f'"{_tag(body)}"'), ("X-Repo-Commit", COMMIT))
        for name, value in common + headers:
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _tag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def served(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The stand-in, as the address that huggingface_hub calls."""
    with Served() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_table_names_repositories_and_their_files() -> None:
    assert published_files(LONGLIVE) == ["models/longlive_base.pt", "models/lora.pt"]
    assert published_files("gdhe17/Self-Forcing") == ["checkpoints/self_forcing_dmd.pt"]
    assert published_files("somebody/else") == []
    named = [spec.source.partition(": ")[0] for spec in SPECS.values() if "/" in spec.source.partition(": ")[0]]
    named = [name for name in named if " " not in name]
    assert len(named) >= 4
    assert all(is_repository(name) for name in named)


@pytest.mark.parametrize(
    "source", ["demo", "random", "none.safetensors", "folder/none.pt", "./a/b", "../a", "/a/b", "here/model", "a/b/c"]
)
def test_paths_are_not_taken_for_repositories(tmp_path: Path, source: str) -> None:
    (tmp_path / "here").mkdir()
    assert not is_repository(source)


def longlive_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A tiny LongLive and its adapter as published, in a table of models of that size."""
    for name in FAMILIES:
        monkeypatch.setitem(SPECS, name, spec_of(name))
    base, (_, lora) = publish("longlive-1.3b", folder)
    return base, Path(str(lora))


def test_a_published_repository_in_the_cache_is_quantised_with_its_adapter(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = longlive_files(tmp_path, monkeypatch)
    put(cache, LONGLIVE, base, "models/longlive_base.pt")
    put(cache, LONGLIVE, lora, "models/lora.pt")
    done = command("quantize", LONGLIVE, "-o", tmp_path / "by-name", "--json")
    assert done.code == 0, done.err
    assert "LoRA" in done.err
    command("quantize", base, "--lora", lora, "-o", tmp_path / "by-path", "--json")
    shards = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("by-name", "by-path")]
    assert shards[0] == shards[1]


def test_a_published_repository_is_downloaded_once_and_quantised(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = longlive_files(tmp_path, monkeypatch)
    wanted = {"models/longlive_base.pt": base.read_bytes(), "models/lora.pt": lora.read_bytes()}
    served.files[LONGLIVE] = {**wanted, "README.md": b"not asked for"}
    for folder in ("first", "again"):
        done = command("quantize", LONGLIVE, "-o", tmp_path / folder, "--json")
        assert done.code == 0, done.err
    assert sorted(served.sent) == sorted(wanted)
    command("quantize", base, "--lora", lora, "-o", tmp_path / "by-path", "--json")
    shards = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("first", "again", "by-path")]
    assert shards[0] == shards[1] == shards[2]


def test_of_other_repositories_the_weights_alone_are_downloaded(served: Served) -> None:
    served.files["some/body"] = {"a.safetensors": b"weights", "config.json": b"{}", "sample.mp4": b"a film"}
    folder = fetch("some/body").path
    assert sorted(x.name for x in folder.iterdir()) == ["a.safetensors", "config.json"]
    assert (folder / "a.safetensors").read_bytes() == b"weights"
    assert sorted(served.sent) == ["a.safetensors", "config.json"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [("some/body:none.pt", "no such file"), ("no/body", "no such repository"), ("no/body:x.pt", "no such repository")],
)
def test_what_the_hub_does_not_have_is_one_line(served: Served, tmp_path: Path, source: str, reason: str) -> None:
    served.files["some/body"] = {"a.safetensors": b"weights"}
    done = command("quantize", source, "-o", tmp_path / "bundle", "--json")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(f"error: '{source}' cannot be downloaded: ")
    assert reason in done.err.splitlines()[-1]
    assert not (tmp_path / "bundle").exists()


def test_one_file_of_any_repository(cache: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pt")
    put(cache, "some/body", tmp_path / "x.pt", "deep/er.pt")
    assert fetch("some/body:deep/er.pt").path.read_bytes() == (tmp_path / "x.pt").read_bytes()


@pytest.mark.parametrize("source", [LONGLIVE, "some/body", "some/body:file.pt"])
def test_offline_is_one_line(tmp_path: Path, source: str) -> None:
    done = command("quantize", source, "-o", tmp_path / "bundle", "--json")
    last = done.err.splitlines()[-1]
    assert (done.code, done.out) == (2, "")
    assert last.startswith(f"error: '{source}' cannot be downloaded: ")
    assert "no network" in last or "HF_HUB_OFFLINE" in last
    assert "path" in last
    assert not (tmp_path / "bundle").exists()


def test_without_huggingface_hub_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"a download needs huggingface_hub .*pip install 'ispa-deploy\[hf\]'"):
        fetch("some/body")
