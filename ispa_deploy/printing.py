"""What commands print: lines and progress for people on stderr, results on stdout, reports in files.

Importing this file does not import torch, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ispa_deploy.budget import Setup, predict
from ispa_deploy.media.output import output_path, write_text

if TYPE_CHECKING:
    from ispa_deploy.run import Progress
    from ispa_deploy.specs import ModelSpec

# What `models` predicts bytes for.
SETUPS = {"full": Setup(scheme="none", policy="full"), "ispa-0.5+w8a8": Setup()}


WIDE = 110
"""Columns of a table that goes to a file: no window limits it."""


def say(line: str) -> None:
    """One line for people; stdout stays free for results."""
    print(line, file=sys.stderr)


def to_json(document: Any) -> str:
    """JSON text. NaN and Inf, which JSON does not know, become null; a path becomes its text."""
    return json.dumps(_plain(document), indent=1, default=str, allow_nan=False)


def emit(document: Any, json_only: bool, stats: Path | None, show: Callable[[], None]) -> None:
    """A command's result: the document to `stats`, then to stdout, or `show` in its place."""
    if stats is not None:
        write_text(stats, to_json(document) + "\n")
    if json_only:
        print(to_json(document))
    else:
        show()


def json_path(path: Path | None) -> Path | None:
    """The same path; InputError unless a report can be written there. Asked before the work, not after it."""
    return path if path is None else output_path(path, path.suffix.lower(), "report")


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, err: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    table.columns[0].no_wrap = True  # names are there to be copied: a narrow terminal takes room from the others
    for column in table.columns[1:]:
        column.overflow = "fold"  # `full+w8a8` and `full` would both be "full…"
    for row in rows:
        table.add_row(*row)
    Console(stderr=err).print(table)


def describe_models(specs: Iterable[ModelSpec]) -> list[dict[str, Any]]:
    """Every spec with its predicted bytes, as plain JSON types."""
    return [
        {**spec.to_dict(), "bytes": {name: predict(spec, setup).to_dict() for name, setup in SETUPS.items()}}
        for spec in specs
    ]


def print_models(specs: Iterable[ModelSpec]) -> None:
    """Geometry, window / sink / chunk and predicted bytes as a table; below it sources and licences."""
    head = ("model", "layers", "tokens", "window", "weights", "KV")
    rows, notes = [], []
    for spec in specs:
        full, ours = (predict(spec, setup) for setup in SETUPS.values())
        rows.append(
            (
                spec.name,
                f"{spec.layers}x{spec.dim}",
                str(spec.frame_tokens),
                f"{spec.window_frames}/{spec.sink_frames}/{spec.chunk_frames}",
                f"{_gigabytes(full.weights)}/{_gigabytes(ours.weights)}",
                f"{_gigabytes(full.kv)}/{_gigabytes(ours.kv)}",
            )
        )
        notes.append(f"{spec.name}: {spec.source} ({spec.licence})")
    print_table(head, rows)
    print("layers x width; tokens of a latent frame; latent frames of the window / its sink / a chunk;")
    print("GB in bfloat16 with the full cache / in W8A8 with half of the layers local")
    print("\n".join(notes))


def _gigabytes(count: int) -> str:
    """Three digits are enough to choose a card by; of a small model, megabytes."""
    return f"{count / 1e9:.{1 if count >= 1e10 else 2 if count >= 1e8 else 3}f}"


def print_mapping(document: dict[str, Any]) -> None:
    for key, value in document.items():
        print(f"{key}: {json.dumps(value, default=str) if isinstance(value, (dict, list)) else value}")


def print_run(document: dict[str, Any], *, err: bool = False) -> None:
    """A run's report in a few lines."""
    fps, kv, absorption = document["fps"], document["kv"], document["absorption"]
    lines = [
        f"{document['pixel_frames']} pixel frames in {document['wall_s']:.1f} s: {fps['dit']:.2f} FPS DiT only, "
        f"{fps['with_vae']:.2f} with decoding, {fps['wall']:.2f} wall",
        f"KV cache {kv['persistent_bytes'] / 2**20:.2f} MiB, {kv['percent']:.1f} % of full; "
        f"local layers {absorption['local_layers'] or 'none'}",
        *(f"{name}: {path}" for name, path in document["outputs"].items()),
    ]
    for line in lines:
        print(line, file=sys.stderr if err else sys.stdout)


def print_profile(document: dict[str, Any]) -> None:
    from rich.console import Console

    from ispa_deploy.profile.terminal import terminal

    console = Console()
    wide = Console(width=max(console.width, WIDE)) if not console.is_terminal else console
    for report in document["reports"]:
        wide.print(terminal(report))


def write_reports(document: dict[str, Any], folder: Path | None) -> None:
    """The report as JSON, Markdown, HTML, CSV and trace in a folder, which is made if need be."""
    if folder is None:
        return
    from ispa_deploy.profile.csv import csv
    from ispa_deploy.profile.html import html
    from ispa_deploy.profile.table import markdown
    from ispa_deploy.profile.trace import trace

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"report.html": html, "report.csv": csv, "trace.json": trace}.items():
        write_text(folder / name, text(document))
    write_text(folder / "report.json", to_json(document) + "\n")
    write_text(folder / "report.md", "\n\n".join(markdown(report) for report in document["reports"]) + "\n")


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None] | None]:
    """Chunk number, FPS, ETA, KV bytes and state on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    # The text comes before the bar: on a narrow terminal the bar is what gives way.
    columns = (TextColumn("chunk"), MofNCompleteColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("first chunk", total=None)

        def show(at: Progress) -> None:
            text = f"{at.fps:.1f} FPS  ETA {at.eta:.0f} s  KV {at.kv_bytes / 2**20:.1f} MiB  {at.state}"
            bar.update(task, completed=at.chunk, total=at.chunks, description=text)

        yield show


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
