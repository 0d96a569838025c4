"""Report files: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ispa_deploy.media.output import replace_text


def write_text(path: Path, text: str) -> None:
    """Write a temporary sibling, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Indented JSON; NaN and Inf, which other readers refuse, are a slip of ours."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
