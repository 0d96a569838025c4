"""The quality table as Markdown, as a terminal table, and inside a README."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.variants import twin
from ispa_deploy.media.output import replace_text

if TYPE_CHECKING:
    from rich.table import Table

START, END = "<!-- quality:start -->", "<!-- quality:end -->"

Numbers = dict[str, dict[str, float]]

_ABSENT = "–"


@dataclass(frozen=True)
class _Column:
    """`heading` in Markdown; `short`, in a terminal of 80 columns, where a column without one is left out."""

    heading: str
    metric: str
    show: Callable[[dict[str, float]], str]
    short: str = ""
    show_short: Callable[[dict[str, float]], str] | None = None


def _percent(number: dict[str, float]) -> str:
    return f"{100 * number['value']:.1f}"


def _plain(number: dict[str, float]) -> str:
    return f"{number['value']:.2f}"


def _fine(number: dict[str, float]) -> str:
    return f"{number['value']:.4f}" if number["high"] else "0"


def _fine_range(number: dict[str, float]) -> str:
    return f"{_fine(number)} [{number['low']:.4f}, {number['high']:.4f}]" if number["high"] else "0"


def _percent_range(number: dict[str, float]) -> str:
    value, low, high = (100 * number[key] for key in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


_COLUMNS = (
    _Column("KV %", "kv_share", _percent, "KV %"),
    _Column("error, 1st chunk", "error_first", _fine_range, "error 1", _fine),
    _Column("chunks 2–3", "error_next", _fine_range, "2–3", _fine),
    _Column("later", "error_later", _fine_range),
    _Column("gap recovered, 1st chunk, %", "recovery", _percent_range, "recovered %"),
    _Column("background dB", "background_psnr", _plain, "dB"),
    _Column("flicker", "flicker", _plain),
    _Column("speed, px/frame", "speed", _plain, "speed"),
    _Column("sprite present %", "present", _percent),
    _Column("right shape %", "shape", _percent),
)


def markdown(document: dict[str, Any]) -> str:
    """The table with its legend, without a trailing newline."""
    lines = [("", *(column.heading for column in _COLUMNS)), (":--", *("--:" for _ in _COLUMNS))]
    lines += [(title, *(_cell(c.show, numbers, c.metric) for c in _COLUMNS)) for title, numbers in _lines(document)]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", _legend(document)])


def terminal_table(document: dict[str, Any]) -> Table:
    """The columns that fit into a terminal; intervals only for what was recovered."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"Quality on the demo model, {len(document['pairs'])} pairs", box=box.SIMPLE_HEAD, padding=0)
    columns = [column for column in _COLUMNS if column.short]
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.short, justify="right", no_wrap=True)
    for title, numbers in _lines(document):
        cells = (_cell(c.show_short or c.show, numbers, c.metric) for c in columns)
        table.add_row(title.replace("`", ""), *cells)
    return table


def replace_section(path: Path, text: str, start: str = START, end: str = END) -> None:
    """Put `text` between the markers of a file, which stay; the file is replaced whole or not at all."""
    before, after = split_section(path, start, end)
    replace_text(path, f"{before}{start}\n{text}\n{end}{after}")


def split_section(path: Path, start: str = START, end: str = END) -> tuple[str, str]:
    """What stands before the start marker and after the end marker; InputError unless the file has both, in order."""
    if not path.is_file():
        raise InputError(f"'{path}' does not exist: expected a text with the lines {start} and {end}")
    text = path.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise InputError(f"'{path}' does not hold {start} and {end} once each, in this order: put them where it goes")
    return text.split(start)[0], text.split(end)[1]


def _lines(document: dict[str, Any]) -> Iterator[tuple[str, Numbers]]:
    """Title and numbers of each variant, with `recovery` where it has a twin."""
    recoveries = {
        item["variant"]: item["error_first"]["recovery"]
        for item in document["comparisons"]
        if item["against"] == twin(item["variant"]) and "error_first" in item
    }
    for variant in document["variants"]:
        name = variant["name"]
        recovery = {"recovery": recoveries[name]} if name in recoveries else {}
        yield variant["title"], document["summary"][name] | recovery


def _cell(show: Callable[[dict[str, float]], str], numbers: Numbers, metric: str) -> str:
    return show(numbers[metric]) if metric in numbers else _ABSENT


def _legend(document: dict[str, Any]) -> str:
    frames, warmup, pairs = document["frames"], document["warmup"], len(document["pairs"])
    return (
        f"{pairs} prompt-seed pairs, {frames} frames, transition after frame {warmup} (`paper`) or one denoising pass "
        "later (all others, No-Absorb too); means over pairs, [95 % bootstrap interval over pairs]. KV: persistent "
        "bytes as allocated, against Full. Error: squared latent error over Full's square, same noise. Recovered: "
        "share of the No-Absorb error on the same layers that absorption removes. The last five columns need no "
        "reference: background against the run's own warm-up (dB, and change "
        "from frame to frame on a scale of 255), and the sprite, which must go on moving. Made by "
        f"`{document['command']}`."
    )
