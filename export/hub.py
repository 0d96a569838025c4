"""A published checkpoint by its repository's name: `org/name`, fetched through huggingface_hub into its own cache.

Repositories of the model table give the files that make the model; of others all weights are taken, or one file where
it is named, `org/name:path/in/the/repository`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ispa_deploy.errors import InputError
from ispa_deploy.media.weights import library
from ispa_deploy.specs import SPECS

WEIGHTS = ("*.safetensors", "*.json")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?$")


@dataclass(frozen=True)
class Fetched:
    """What was asked for, on disk: a file or a folder, and the adapter that belongs to it, if any."""

    path: Path
    lora: Path | None = None


def is_repository(source: str) -> bool:
    """Whether a source reads as a repository. What is on this disk is none, nor is a path to a file that is missing."""
    match = _NAME.match(source)
    if match is None or match["repo"].startswith(".") or match["repo"].endswith(_SUFFIXES):
        return False
    return not Path(source.split("/")[0]).exists()


def fetch(source: str) -> Fetched:
    """The files of a repository, downloaded where they are not in huggingface_hub's cache.

    InputError: huggingface_hub is missing, no network, no such repository or file, or access is not granted.
    """
    match = _NAME.match(source)
    assert match is not None, source
    repository, file = match["repo"], match["file"]
    hub = library("huggingface_hub", "a download")
    files = [file] if file else published_files(repository)
    try:
        if not files:
            return Fetched(Path(hub.snapshot_download(repository, allow_patterns=list(WEIGHTS))))
        paths = [Path(hub.hf_hub_download(repository, name)) for name in files]
    except (OSError, ValueError, hub.errors.EntryNotFoundError) as error:
        raise _refusal(source, error, hub) from None
    return Fetched(*paths[:2])


def published_files(repository: str) -> list[str]:
    """Weights and adapter of a repository that the model table names; none of others."""
    for spec in SPECS.values():
        named, _, files = spec.source.partition(": ")
        if named == repository and files:
            return files.split(" + ")
    return []


def _refusal(source: str, error: Exception, hub: Any) -> InputError:
    """The order matters: each kind is a case of the next one."""
    errors = hub.errors
    kinds = (
        (errors.GatedRepoError, "access is not granted; accept its licence on its page, then `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private; check the name"),
        (errors.LocalEntryNotFoundError, "it is not in the cache and there is no network; pass the path of a file"),
        (errors.EntryNotFoundError, "it has no such file; check the name"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or pass the path of a file you have"),
        (errors.HFValidationError, "the name is none; expected org/name"),
    )
    reason = next((text for kind, text in kinds if isinstance(error, kind)), None)
    if reason is None:
        detail = f"{(str(error).splitlines() or [type(error).__name__])[0]:.100}"
        reason = f"{detail}; check the network, or pass the path of a file you have"
    return InputError(f"'{source}' cannot be downloaded: {reason}")
