"""Checkpoints by their repository's name: what the cache holds is used, what cannot be had is one line. No network."""

from __future__ import annotations

import sys
from pathlib import Path

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


def test_a_published_repository_in_the_cache_is_quantised_with_its_adapter(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FAMILIES:
        monkeypatch.setitem(SPECS, name, spec_of(name))
    base, (_, lora) = publish("longlive-1.3b", tmp_path)
    put(cache, LONGLIVE, base, "models/longlive_base.pt")
    put(cache, LONGLIVE, Path(str(lora)), "models/lora.pt")
    done = command("quantize", LONGLIVE, "-o", tmp_path / "by-name", "--json")
    assert done.code == 0, done.err
    assert "LoRA" in done.err
    command("quantize", base, "--lora", lora, "-o", tmp_path / "by-path", "--json")
    shards = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("by-name", "by-path")]
    assert shards[0] == shards[1]


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
