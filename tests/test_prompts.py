"""Prompts over a stream's life land on chunk borders, wherever they come from, and the report says where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.bundle import stand_in_rows
from ispa_deploy.errors import InputError
from ispa_deploy.prompts import LivePrompts, cues, dropped, plan_prompts, read_prompts
from tests.test_cli import ROOT, RUN, command, refused, tiny_bundle
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream

CHUNKS = [(0, 3), (3, 3), (6, 3), (9, 3), (12, 3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("prompts") / "tiny", "none")


def run(tiny: Path, folder: Path, *arguments: object) -> tuple[dict[str, object], Tensor]:
    done = command(
        "run",
        tiny,
        "--frames",
        15,
        "--json",
        *RUN,
        "--latents",
        folder / "l.safetensors",
        "--prompt",
        "one",
        *arguments,
    )
    return done.document, load_file(folder / "l.safetensors")["latents"]


def test_a_prompt_lands_on_the_next_border() -> None:
    planned = cues("one", [(1, "two"), (3, "three"), (7, "four"), (12, "five")], CHUNKS)
    assert [(cue.prompt, cue.asked, cue.chunk, cue.frame) for cue in planned] == [
        ("one", 0, 0, 0), ("three", 3, 1, 3), ("four", 7, 3, 9), ("five", 12, 4, 12),
    ]  # fmt: skip
    assert planned[2].line(5) == "prompt from frame 9 on (chunk 4 of 5): four"
    with pytest.raises(InputError, match="last chunk begins at frame 12"):
        cues("one", [(13, "two")], CHUNKS)


def test_frame_0_replaces_the_first_prompt() -> None:
    assert plan_prompts("one", [(6, "b"), (0, "a"), (3, "c")]) == ("a", [(3, "c"), (6, "b")])
    assert plan_prompts("one", []) == ("one", [])


def test_a_prompt_that_another_one_displaces_is_told(tiny: Path) -> None:
    switches = [(1, "two"), (3, "three"), (3, "four"), (9, "five")]
    assert dropped(switches, cues("one", switches, CHUNKS)) == [
        f"prompt '{lost}' at frame {frame} is never shown: 'four' takes effect on the same border, frame 3"
        for lost, frame in (("two", 1), ("three", 3))
    ]
    assert not dropped([(4, "a"), (7, "b")], cues("one", [(4, "a"), (7, "b")], CHUNKS))
    done = command("run", tiny, "--frames", 9, "--json", *RUN, "--policy", "full", "--at", "3:two", "--at", "2:three")
    assert done.err.startswith("note: prompt 'three' at frame 2 is never shown: 'two' takes effect"), done.err


def test_a_file_that_an_editor_began_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf0: one\r\n6: two\r\n")
    assert read_prompts(tmp_path / "p.txt", 15) == [(0, "one"), (6, "two")]


def test_a_file_of_prompts_is_the_same_as_flags(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a story\n\n0: one\n  5: two: with a colon \n9:drei\n", encoding="utf-8")
    assert read_prompts(path, 15) == [(0, "one"), (5, "two: with a colon"), (9, "drei")]
    flags = run(tiny, tmp_path, "--at", "5:two: with a colon", "--at", "9:drei")
    file = run(tiny, tmp_path, "--prompts", path)
    assert torch.equal(flags[1], file[1])
    assert file[0]["prompts"] == flags[0]["prompts"]
    assert [(cue["chunk"], cue["frame"]) for cue in file[0]["prompts"]] == [(0, 0), (2, 6), (3, 9)]  # type: ignore
    plain = run(tiny, tmp_path)[1]
    assert torch.equal(file[1][:, :6], plain[:, :6])
    assert not torch.equal(file[1][:, 6:], plain[:, 6:])


def test_where_a_prompt_lands_is_said(tiny: Path) -> None:
    done = command("run", tiny, "--frames", 15, "--json", *RUN, "--policy", "full", "--at", "4:two")
    assert done.err == "prompt from frame 6 on (chunk 3 of 5): two\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("No such file",)),
        ("", ("holds no prompt",)),
        ("# 3: a\n", ("holds no prompt",)),
        ("0: a\nb\n", ("line 2", "FRAME:PROMPT")),
        ("0: a\n99: b\n", ("line 2", "--frames 15")),
        ("14: a\n", ("frame 14", "last chunk begins at frame 12")),
        (b"\xff\xfe", ("UTF-8",)),
    ],
)
def test_a_bad_file_of_prompts_is_one_line(
    tiny: Path, tmp_path: Path, text: str | bytes | None, parts: tuple[str]
) -> None:
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(command("run", tiny, "--frames", 15, "--json", *RUN, "--prompts", path), *parts)


# -- live


class Pipe:
    """The reading end of a pipe as live prompts, and lines into the other."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.read, self.write = os.pipe()
        self.live = LivePrompts(self.read, self.encode, self.said.append)

    def encode(self, prompt: str) -> Tensor:
        if prompt == "nonsense":
            raise InputError("no word of it is known")
        return stand_in_rows(prompt, SPEC)

    def type(self, text: str) -> None:
        os.write(self.write, text.encode())

    def settle(self, lines: int) -> None:
        deadline = time.monotonic() + 10
        while self.live._read.qsize() < lines and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.live._read.qsize() == lines


def test_a_typed_line_holds_from_the_next_border_on() -> None:
    model, pipe = tiny_model(), Pipe()
    stream, found = tiny_stream(model, frames=21), []
    for chunk in stream:
        found.append(chunk.latents)
        if chunk.index == 1:
            pipe.type("red\nnonsense\n\ngre")
            pipe.settle(2)
        if chunk.index == 3:
            pipe.type("en\nblue")  # green is not shown, and that is said
            os.close(pipe.write)  # the end of the input, without a line break
            pipe.settle(2)
        pipe.live.follow(stream, chunk.index + 1)
    assert [(cue.prompt, cue.chunk, cue.frame) for cue in pipe.live.cues] == [("red", 2, 6), ("blue", 4, 12)]
    assert pipe.said == [
        "prompt not taken: no word of it is known",
        "prompt from frame 6 on (chunk 3 of 7): red",
        "prompt 'green' is never shown: 'blue' was typed before the next border",
        "prompt from frame 12 on (chunk 5 of 7): blue",
    ]
    switches = [(6, stand_in_rows("red", SPEC)), (12, stand_in_rows("blue", SPEC))]
    planned = latents_of(tiny_stream(model, frames=21, switches=switches))
    assert torch.equal(torch.cat(found, 1), planned)


def test_a_silent_reader_does_not_hold_the_stream_up() -> None:
    """Nothing is typed and the input does not end: every chunk comes all the same."""
    model, pipe = tiny_model(), Pipe()
    stream = tiny_stream(model, frames=9)
    found = []
    for chunk in stream:
        found.append(chunk.latents)
        pipe.live.follow(stream, chunk.index + 1)
    assert torch.equal(torch.cat(found, 1), latents_of(tiny_stream(model, frames=9)))
    assert not pipe.live.cues
    os.close(pipe.write)


def test_the_command_reads_its_stdin(tiny: Path, tmp_path: Path) -> None:
    """As typed before the first chunk is done; the report says where it landed, and the same by --at gives the same."""
    arguments = [
        "run",
        tiny,
        "--frames",
        "15",
        "--json",
        *RUN,
        "--prompt",
        "one",
        "--policy",
        "full",
        "--latents",
        tmp_path / "a.safetensors",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cli", *map(str, arguments), "--live"], cwd=ROOT, input="two\n", capture_output=True,
        text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first, second = json.loads(done.stdout)["prompts"]
    assert (first["prompt"], second["prompt"], second["asked"]) == ("one", "two", None)
    assert done.stderr == f"prompt from frame {second['frame']} on (chunk {second['chunk'] + 1} of 5): two\n"
    assert torch.equal(
        load_file(tmp_path / "a.safetensors")["latents"],
        run(tiny, tmp_path, "--policy", "full", "--at", f"{second['frame']}:two")[1],
    )
