"""Where an output file goes: checked before any work, written as a temporary sibling, renamed when whole."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from ispa_deploy.errors import InputError


def output_path(path: str | Path, suffix: str, what: str) -> Path:
    """`path` if a file of this kind can be written there, else InputError: wrong suffix, no folder, not writable."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise InputError(f"{what} '{path}' has suffix '{path.suffix}': expected '{suffix}', rename the output")
    try:
        if path.is_dir():
            raise InputError(f"{what} '{path}' is a folder: expected a file name inside it")
        if not path.parent.is_dir():
            raise InputError(f"{what} '{path}': its folder does not exist, create '{path.parent}' first")
        with suppress(FileNotFoundError):
            os.lstat(partial_path(path))  # its name is the longer one
    except OSError as error:
        raise InputError(f"{what} '{path}' cannot be written ({error.strerror}): choose another name") from None
    try:
        # A real file, for permission bits say nothing about read-only mounts, nor to root.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{what} '{path}': folder '{path.parent}' is not writable ({error.strerror}), choose another"
        ) from None
    return path


def partial_path(path: Path) -> Path:
    """The hidden sibling that holds `path` until it is whole; on the same disk, so that the rename is atomic."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def local_file(path: str | Path) -> str:
    """`path` as the video library opens it: of a relative one it takes what is before a colon for a protocol."""
    return os.path.abspath(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    return replace_text(output_path(path, Path(path).suffix.lower(), "report"), text)


def replace_text(target: Path, text: str) -> Path:
    """The same where the path is known to be good."""
    partial = partial_path(target)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
