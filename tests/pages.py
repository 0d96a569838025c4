"""The page that documents JSON fields, `docs/report-schema.md`, held against documents that commands really write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "report-schema.md"


def paths_of(value: Any, path: str = "") -> Iterator[str]:
    """Every key below `value` as the page writes it."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from paths_of(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value or [None]:
            yield from paths_of(item, f"{path}[]")
    else:
        yield path


def documented(part: str) -> dict[str, bool]:
    """Field -> whether the page calls it optional, under the heading `part`."""
    found = f"\n{PAGE.read_text(encoding='utf-8')}".partition(f"\n# {part}\n")[2].partition("\n# ")[0]
    assert found, f"the page has no heading '{part}'"
    rows = [line for line in found.splitlines() if line.startswith("| `")]
    return {name: "optional" in row for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def undocumented(document: Any, part: str) -> set[str]:
    """Fields of `document` that the page does not have; `x.*` is all below x, and an object or a list may be null or
    empty where the page says what is inside of it."""
    page = set(documented(part))
    known = tuple(name.removesuffix("*") for name in page if name.endswith(".*"))
    return {
        path
        for path in paths_of(document)
        if path not in page and not path.startswith(known) and not _inside(page, path.removesuffix("[]"))
    }


def unreal(document: Any, part: str) -> set[str]:
    """Fields that the page has, not as optional, and `document` does not."""
    needed = {name for name, optional in documented(part).items() if not optional}
    real = set(paths_of(document))
    bare = {name: name.removesuffix(".*") for name in needed - real}
    empty = {name for name, stem in bare.items() if stem not in real and not _inside(real, stem)}
    return {name for name in empty if not _inside(needed, name)}


def _inside(names: set[str], name: str) -> set[str]:
    return {other for other in names if other.startswith((f"{name}.", f"{name}["))}
