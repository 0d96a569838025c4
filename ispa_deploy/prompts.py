"""Prompts over a stream's life: asked for at a frame, in a file or live; each takes effect on a chunk border."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ispa_deploy.errors import InputError, IspaError
from ispa_deploy.flags import switch_of
from ispa_deploy.stream import Stream

Switch = tuple[int, str]
"""A frame and the prompt that holds from there on."""


@dataclass(frozen=True)
class Cue:
    """A prompt, the frame it was asked for (None: live), and the chunk and frame from which on it holds."""

    prompt: str
    asked: int | None
    chunk: int
    frame: int

    def line(self, chunks: int) -> str:
        """One line for people."""
        return f"prompt from frame {self.frame} on (chunk {self.chunk + 1} of {chunks}): {self.prompt}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(path: Path, frames: int) -> list[Switch]:
    """Switches of a text file: `FRAME: prompt` on each line; empty lines and those that begin with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"--prompts '{path}' cannot be read ({reason}): expected lines of FRAME: prompt") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    wanted = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not wanted:
        raise InputError(f"--prompts '{path}' holds no prompt: expected lines of FRAME: prompt")
    return [switch_of(line, frames, f"--prompts '{path}' line {number}:") for number, line in wanted]


def plan_prompts(first: str, switches: Sequence[Switch]) -> tuple[str, list[Switch]]:
    """The first prompt, which frame 0 of `switches` replaces, and the later ones, ascending."""
    ordered = sorted(switches, key=lambda switch: switch[0])
    opening = [prompt for frame, prompt in ordered if frame == 0]
    return opening[-1] if opening else first, [switch for switch in ordered if switch[0] > 0]


def cues(first: str, switches: Sequence[Switch], chunks: Sequence[tuple[int, int]]) -> list[Cue]:
    """Where each prompt takes effect in a stream of `chunks` (start, count); of two on one border, the later one.

    InputError for a prompt that no chunk would begin with.
    """
    landed = {0: Cue(first, 0, 0, 0)}
    for asked, prompt in switches:
        border = next(((index, start) for index, (start, _) in enumerate(chunks) if start >= asked), None)
        if border is None:
            raise InputError(
                f"prompt '{prompt}' at frame {asked}: the stream's last chunk begins at frame {chunks[-1][0]}; ask for "
                "an earlier frame or give more --frames"
            )
        landed[border[0]] = Cue(prompt, asked, *border)
    return [landed[index] for index in sorted(landed)]


def dropped(switches: Sequence[Switch], planned: Sequence[Cue]) -> list[str]:
    """A line for each prompt that another one pushed off its border."""
    shown = {(cue.asked, cue.prompt) for cue in planned}
    holds = {cue.frame: cue for cue in planned}
    lines = []
    for asked, prompt in switches:
        if (asked, prompt) not in shown:
            frame = min(start for start in holds if start >= asked)
            lines.append(
                f"prompt '{prompt}' at frame {asked} is never shown: '{holds[frame].prompt}' takes effect on the same "
                f"border, frame {frame}"
            )
    return lines


class LivePrompts:
    """Lines from a file descriptor, each a prompt, read and encoded beside the stream, which never waits for them.

    A line that cannot be encoded is told and forgotten; at the end of the input the last prompt holds.
    """

    def __init__(self, descriptor: int, encode: Callable[[str], Tensor], say: Callable[[str], None]) -> None:
        self.cues: list[Cue] = []
        self._say, self._encode = say, encode
        self._read: queue.SimpleQueue[tuple[str, Tensor | IspaError]] = queue.SimpleQueue()
        # A bare read: a thread inside Python's own buffer would hold its lock when the program ends.
        threading.Thread(target=self._listen, args=(descriptor,), daemon=True).start()

    def follow(self, stream: Stream, index: int) -> None:
        """Called on the border before chunk `index`: the newest prompt that is ready takes effect."""
        newest: tuple[str, Tensor] | None = None
        while not self._read.empty():
            prompt, rows = self._read.get()
            if isinstance(rows, IspaError):
                self._say(f"prompt not taken: {rows}")
                continue
            if newest is not None:
                self._say(f"prompt '{newest[0]}' is never shown: '{prompt}' was typed before the next border")
            newest = prompt, rows
        if newest is None:
            return
        if index >= len(stream.chunks):
            self._say(f"prompt '{newest[0]}' is never shown: the stream is at its end")
            return
        cue = Cue(newest[0], None, index, stream.chunks[index][0])
        stream.switch_prompt(newest[1])
        self.cues.append(cue)
        self._say(cue.line(len(stream.chunks)))

    def _listen(self, descriptor: int) -> None:
        rest = b""
        while part := os.read(descriptor, 4096):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._take(line)
        self._take(rest)

    def _take(self, line: bytes) -> None:
        prompt = line.decode(errors="replace").strip()
        if not prompt:
            return
        try:
            self._read.put((prompt, self._encode(prompt)))
        except IspaError as error:
            self._read.put((prompt, error))
