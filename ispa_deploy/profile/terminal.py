"""A report on a terminal of any width: no number is ever cut off.

Columns that do not fit stand in a further table below, under the same first column, which may wrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ispa_deploy.profile.table import grid, more, sentences, title
from ispa_deploy.regions import FAMILIES

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

Lines = Sequence[Sequence[str]]

LABEL = 30
"""Columns of the first column at most, where there is little room; what is longer wraps."""
_GAP = 2  # columns between two columns of a table, one of them the box's
_BOLD = (*FAMILIES, "chunk, median", "speed-up")


def terminal(report: dict[str, Any]) -> RenderableType:
    """For `rich.console.Console.print`."""
    from rich.console import Group

    tables = [Fitted(title(report), grid(report)), *(Fitted(*entry) for entry in more(report))]
    return Group(*tables, "", *sentences(report))


@dataclass(frozen=True)
class Fitted:
    """`lines`, the heading first. `numbers`: cells must not wrap, and columns move into tables below instead."""

    heading: str
    lines: Lines
    numbers: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        parts = fitted(self.lines, options.max_width) if self.numbers else [self.lines]
        yield f"\n{self.heading}"
        for part in parts:
            yield _table(part, self.numbers)


def fitted(lines: Lines, width: int) -> list[Lines]:
    """`lines` cut between columns into parts that are at most `width` columns wide; the first column is in all of them.

    A part holds at least one column beside the first, however narrow the terminal is.
    """
    widths = [max(len(cell) for cell in column) + _GAP for column in zip(*lines, strict=True)]
    room = width - min(widths[0], LABEL)
    parts: list[list[int]] = [[]]
    left = room
    for column in range(1, len(widths)):
        if widths[column] > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= widths[column]
    return [[[line[0], *(line[column] for column in part)] for line in lines] for part in parts]


def _table(lines: Lines, numbers: bool) -> RenderableType:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, _GAP - 1, 0, 0), pad_edge=False)
    for index, name in enumerate(lines[0]):
        first = not index
        made.add_column(name, justify="left" if first or not numbers else "right", no_wrap=numbers and not first)
    for line in lines[1:]:
        made.add_row(*line, style="bold" if line[0] in _BOLD else None)
    return made
